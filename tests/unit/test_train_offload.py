from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megarl.train.offload import Offload, pinned_sizes


def test_tensors_leave_after_the_first_use_and_come_back_with_their_values_and_their_views() -> None:
    buffer = torch.arange(6.0)
    view, other = buffer[2:4], torch.tensor([7], dtype=torch.int64)
    offload = Offload(lambda: [buffer, view, other], enabled=True)
    assert not offload.is_away
    with offload.resident():
        pass
    assert offload.is_away
    assert buffer.untyped_storage().size() == other.untyped_storage().size() == 0
    with offload.resident():
        view.add_(10)
        assert buffer.tolist() == [0, 1, 12, 13, 4, 5]
    with offload.resident():
        assert buffer.tolist() == [0, 1, 12, 13, 4, 5]
        assert view.tolist() == [12, 13]
        assert other.tolist() == [7]


def test_the_last_of_several_uses_sends_them_away() -> None:
    tensor = torch.ones(3)
    offload = Offload(lambda: [tensor], enabled=True)
    with offload.resident():
        with offload.resident():
            pass
        assert tensor.tolist() == [1, 1, 1]
    assert offload.is_away


def test_tensors_that_appear_during_a_use_leave_too_and_replaced_ones_are_forgotten() -> None:
    tensors = [torch.ones(3)]
    offload = Offload(lambda: tensors, enabled=True)
    with offload.resident():
        pass
    with offload.resident():
        old, new = tensors[0], torch.full((4,), 2.0)
        tensors[:] = [new]
    assert new.untyped_storage().size() == 0
    assert old.tolist() == [1, 1, 1]


def test_values_that_are_not_kept_leave_room_of_the_same_size() -> None:
    tensor = torch.ones(3)
    offload = Offload(lambda: [tensor], enabled=True, keep_values=False)
    with offload.resident():
        pass
    assert tensor.untyped_storage().size() == 0
    with offload.resident():
        assert tensor.zero_().tolist() == [0, 0, 0]


def test_an_error_leaves_everything_where_it_is() -> None:
    tensor = torch.ones(3)
    offload = Offload(lambda: [tensor], enabled=True)
    with pytest.raises(ZeroDivisionError), offload.resident():
        raise ZeroDivisionError
    assert tensor.tolist() == [1, 1, 1]
    with offload.resident():
        pass
    assert offload.is_away


def test_what_is_not_offloaded_never_leaves() -> None:
    tensor = torch.ones(3)
    offload = Offload(lambda: [tensor], enabled=False)
    with offload.resident():
        pass
    assert tensor.tolist() == [1, 1, 1]
    assert not offload.is_away


@given(st.integers(0, 1 << 40))
def test_pinned_pieces_are_powers_of_two_but_the_last_and_waste_at_most_an_eighth(num_bytes: int) -> None:
    sizes = pinned_sizes(num_bytes)
    assert sum(sizes) == num_bytes
    assert all(size & (size - 1) == 0 for size in sizes[:-1])
    pinned = sum(1 << (size - 1).bit_length() for size in sizes)
    assert pinned - num_bytes <= num_bytes // 8
