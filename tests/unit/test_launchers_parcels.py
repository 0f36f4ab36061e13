from __future__ import annotations

import math
import pickle

import pytest

from megarl.launchers.parcels import Parcels, packed, parcels_of, relay_of


def test_the_same_object_is_one_parcel_and_equal_ones_are_two() -> None:
    first, second = ["a"], ["a"]
    parcels = parcels_of([first, second, first, second, first])
    assert [id(content) for content in parcels.contents] == [id(first), id(second)]
    assert parcels.takers == ((0, 2, 4), (1, 3))
    assert parcels.of_rank() == {0: 0, 1: 1, 2: 0, 3: 1, 4: 0}


def test_an_argument_for_all_is_packed_once() -> None:
    argument = {"rows": 3}
    [content] = packed(parcels_of([argument] * 64))
    assert pickle.loads(content) == argument
    assert parcels_of([]) == Parcels((), ())


@pytest.mark.parametrize("num_takers", range(1, 71))
def test_every_taker_gets_a_parcel_once_from_one_that_has_it_in_as_few_rounds_as_doubling_takes(
    num_takers: int,
) -> None:
    takers = [7 + 3 * place for place in range(num_takers)]
    relays = {rank: relay_of(takers, rank) for rank in takers}
    has_it = {takers[0]: 0}  # after which round
    assert relays[takers[0]][0] is None
    pending = [takers[0]]
    while pending:
        sender = pending.pop(0)
        for sent, receiver in enumerate(relays[sender][1], start=1):
            assert receiver not in has_it and relays[receiver][0] == sender
            has_it[receiver] = has_it[sender] + sent  # one at a time
            pending.append(receiver)
    assert sorted(has_it) == takers
    assert max(has_it.values()) <= math.ceil(math.log2(num_takers))
