from __future__ import annotations

from pathlib import Path

import pytest

from megarl.checkpoint.rollouts_ahead import FILE_NAME, RolloutsAhead, read_rollouts_ahead, write_rollouts_ahead
from megarl.errors import CheckpointError
from megarl.types import GenerationRequest, Rollout, Sampling

AHEAD = RolloutsAhead(
    7,
    (GenerationRequest((1, 2), 2**62), GenerationRequest((9,), 5)),
    Sampling(n=2, temperature=0.7, top_k=None, max_tokens=3, stop_token_ids=(4, 5), with_greedy=True),
    (
        (Rollout((3, 4), (-0.1, -1e-30), "stop", 2), Rollout((5,), (-2 / 3,), "length", 3)),
        (Rollout((6, 7, 8), (-0.0, -1.5, -3.0), "stop", 2, ((1, 3), (2, 5))),),
    ),
    (3, 9),
)


def test_rollouts_are_read_back_to_the_bit(tmp_path: Path) -> None:
    write_rollouts_ahead(tmp_path, AHEAD)
    assert read_rollouts_ahead(tmp_path) == AHEAD


def test_a_checkpoint_without_rollouts_has_none(tmp_path: Path) -> None:
    assert read_rollouts_ahead(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"step": 1}', '{"step": 1, "groups": [[[[1], [0.5], "stop"]]]}', '{"step": 1, "groups": 3}',
     '{"step": "x", "groups": []}', '{"step": 1, "groups": [[[["a"], [0.5], "stop", 1]]]}', "[" * 100_000],
)  # fmt: skip
def test_a_file_that_is_not_as_it_was_saved_is_a_named_error(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"rollouts_ahead\.json isn't as it was saved"):
        read_rollouts_ahead(tmp_path)
