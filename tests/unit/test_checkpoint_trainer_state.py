"""trainer_state.json gives back what was written, to the bit, and a controller that goes on as if never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.algorithm.kl_control import AdaptiveKL, FixedKL, KLController, KLControlSettings, from_state, kl_controllers
from megarl.checkpoint.trainer_state import FILE_NAME, TrainerState, read_trainer_state, write_trainer_state
from megarl.errors import CheckpointError
from megarl.train.held_state import UpdateCounts

CONTROLLER = AdaptiveKL(0.1, 0.05, 100)
STATE = TrainerState(
    step=3,
    policy_version=4,
    kl_controller=CONTROLLER,
    updates={"actor": UpdateCounts(scheduled=9, adam=8)},
    config={"data": {"train_files": ["a.parquet"]}},
    metrics={"val/reward_mean": 1 / 3},
    before=0.1,
    skipped_in_a_row=2,
    data="24 rows",
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


def through_a_file(state: TrainerState) -> TrainerState:
    with TemporaryDirectory() as folder:
        write_trainer_state(Path(folder), state)
        return read_trainer_state(Path(folder))


def coefs(controller: KLController, kls: list[float]) -> list[str]:
    """Return the coefficients of the steps that follow, to the bit."""
    found = []
    for kl in kls:
        controller = controller.after(kl, num_rollouts=64)
        found.append(controller.coef.hex())
    return found


@given(coef=FLOATS, target=FLOATS, step=st.integers(0, 10**9), is_fixed=st.booleans())
def test_what_is_read_back_is_equal_to_the_bit(coef: float, target: float, step: int, is_fixed: bool) -> None:
    controller: KLController = FixedKL(coef) if is_fixed else AdaptiveKL(coef, target, 10_000)
    read = through_a_file(TrainerState(step, step + 1, controller))
    assert (read.step, read.policy_version) == (step, step + 1)
    assert type(read.kl_controller) is type(controller)
    numbers, expected = (
        [v.hex() for v in vars(c).values() if isinstance(v, float)] for c in (read.kl_controller, controller)
    )
    assert numbers == expected


@given(kls=st.lists(st.floats(-1, 10), min_size=1, max_size=30), stop=st.integers(0, 30))
def test_a_controller_that_was_stopped_gives_the_coefficients_of_one_that_never_was(
    kls: list[float], stop: int
) -> None:
    start = kl_controllers.get("adaptive")(KLControlSettings(coef=1 / 3, target=0.07, horizon=700))
    controller = start
    for kl in kls[:stop]:
        controller = controller.after(kl, num_rollouts=64)
    resumed = through_a_file(TrainerState(stop, stop, controller)).kl_controller
    assert resumed is not None
    assert coefs(start, kls[:stop]) + coefs(resumed, kls[stop:]) == coefs(start, kls)


@pytest.mark.parametrize("name", kl_controllers.names())
def test_every_controller_that_a_config_can_name_has_a_state(name: str) -> None:
    controller = kl_controllers.get(name)(KLControlSettings(coef=0.3, target=0.2, horizon=11))
    assert controller.state()["type"] == name
    assert from_state(controller.state()) == controller


def test_a_state_replaces_the_one_before_and_leaves_no_other_file(tmp_path: Path) -> None:
    write_trainer_state(tmp_path, STATE)
    later = TrainerState(5, 6, FixedKL(0.0))
    write_trainer_state(tmp_path, later)
    assert read_trainer_state(tmp_path) == later
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_all_of_a_state_is_read_back(tmp_path: Path) -> None:
    write_trainer_state(tmp_path, STATE)
    assert read_trainer_state(tmp_path) == STATE
    without = TrainerState(1, 0, None, metrics={"loss": float("nan"), "lr": 0.5})
    write_trainer_state(tmp_path, without)
    assert read_trainer_state(tmp_path) == TrainerState(1, 0, None, metrics={"lr": 0.5})  # JSON has no word for NaN


def test_a_missing_file_is_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no trainer_state\.json; give the folder of a checkpoint"):
        read_trainer_state(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_named(tmp_path: Path, share: float) -> None:
    write_trainer_state(tmp_path, STATE)
    path = tmp_path / FILE_NAME
    path.write_text(path.read_text()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is truncated or not JSON"):
        read_trainer_state(tmp_path)


ADAPTIVE = CONTROLLER.state()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"format": 1}, "has format 1, this version reads 3"),
        ({"updates": None}, "updates = None must be an object of objects"),
        ({"updates": {"actor": 3}}, "must be an object of objects"),
        ({"updates": {"actor": {"scheduled": 3}}}, "adam = None must be an integer"),
        ({"step": -1}, "step = -1 must be an integer of at least 0"),
        ({"step": 1.5}, r"step = 1\.5 must be an integer"),
        ({"policy_version": None}, "policy_version = None must be"),
        ({"skipped_in_a_row": -2}, "skipped_in_a_row = -2 must be"),
        ({"kl_controller": 7}, "kl_controller = 7 must be an object"),
        ({"kl_controller": {"type": "adaptve"}}, "has type 'adaptve', must be one of fixed, adaptive"),
        ({"kl_controller": {"type": ["fixed"]}}, "must be one of fixed, adaptive"),
        ({"kl_controller": {"type": "fixed"}}, r"type fixed has numbers \['coef'\]"),
        ({"kl_controller": {**ADAPTIVE, "gain": 0.1}}, "not .*'gain'"),
        ({"kl_controller": {**ADAPTIVE, "coef": "0.1"}}, "type adaptive has numbers"),
        ({"kl_controller": {**ADAPTIVE, "coef": True}}, "type adaptive has numbers"),
        ({"kl_controller": {**ADAPTIVE, "coef": float("nan")}}, "type adaptive has numbers"),
    ],
)
def test_a_file_that_says_something_else_is_an_error_with_the_field(
    tmp_path: Path, fields: dict[str, object], said: str
) -> None:
    write_trainer_state(tmp_path, STATE)
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(CheckpointError, match=rf"trainer_state\.json.*{said}"):
        read_trainer_state(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"3", b"null"])
def test_json_that_is_no_object_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match="has format None"):
        read_trainer_state(tmp_path)
