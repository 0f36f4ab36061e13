"""A disk that is full while a run saves or logs: the path and the bytes are named, and what was saved stays whole."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megarl.checkpoint.folder import CheckpointFolder, verified_state
from megarl.checkpoint.rank_save import SavedPart
from megarl.errors import ResourceError
from megarl.monitor.console import RolloutRow
from megarl.parallel.environment import apply_environment
from megarl.parallel.layout import Layout
from megarl.parallel.platform import install_platform
from tests.launch import run, torchrun
from tests.tiny_task import NUM_RANKS, write_weights

apply_environment()
install_platform()

from megarl.ranks.spec import RankSpec  # noqa: E402
from megarl.ranks.work import SaveWork  # noqa: E402
from megarl.ranks.worker import Worker  # noqa: E402
from megarl.roles import Role  # noqa: E402
from megarl.verify.pool import RankPool  # noqa: E402
from megarl.verify.roles import TRAINING, role_on  # noqa: E402
from tests.dist.ranks import cpu_pool  # noqa: E402
from tests.unit.composed_configs import ppo_config  # noqa: E402
from tests.unit.stand_ins import PlainRanks, run_on  # noqa: E402

SFT = ("-m", "megarl.main_sft", "--config-dir=.", "--config-name=sft", "trainer.logger=[jsonl]")
TOO_SMALL = 100_000  # bytes: less than the weights, and than the state of a rank


def save(role: Role, folder: Path, models: bool, refused: tuple[int, ...], blind: tuple[int, ...] = ()) -> SavedPart:
    """Save on ranks of which some may not write files as large as what they have to. Collective.

    blind: ranks of nodes that have another disk where the others see the folder.
    """
    folder = folder / "elsewhere" if dist.get_rank() in blind else folder
    worker = Worker(RankSpec((role,), seed=0, hang_timeout_s=60.0), torch.device("cpu"))
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() in refused:
        resource.setrlimit(resource.RLIMIT_FSIZE, (TOO_SMALL, most))
    try:
        worker.save(SaveWork(str(folder), models=models, state=True, in_background=False))
        part = worker.saved(True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert part is not None
    return part


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Yield a pool of two ranks."""
    pool = cpu_pool(tmp_path_factory.mktemp("ranks"), size=2)
    yield pool
    pool.stop()


@pytest.mark.parametrize("refused", [(0,), (1,), (0, 1)], ids=str)
def test_every_rank_comes_to_the_end_of_a_save_that_the_disk_refuses_some(
    tiny_task: Path, tmp_path: Path, pool: RankPool, refused: tuple[int, ...]
) -> None:
    write_weights(tiny_task / "model")
    role = role_on(Layout(2, tp=2), tiny_task / "model", training=TRAINING)
    (tmp_path / "state").mkdir()
    parts = pool.run(save, role, tmp_path / "state", False, refused, world_size=2)
    assert [part.failure is not None for part in parts] == [rank in refused for rank in range(2)]
    for part in filter(lambda part: part.failure, parts):
        assert str(tmp_path / "state") in str(part.failure)
        assert "File too large" in str(part.failure) and "bytes free" in str(part.failure)

    (tmp_path / "model").mkdir()
    parts = pool.run(save, role, tmp_path / "model", True, refused, world_size=2)
    if 0 in refused:  # which writes the only file of the weights
        (said,) = {part.failure for part in parts}
        assert said is not None and "model.safetensors can't be written" in said and "bytes free" in said
    else:
        assert parts[0].failure is None and parts[1].failure is not None


def test_a_rank_that_does_not_see_the_folder_makes_no_other_one(
    tiny_task: Path, tmp_path: Path, pool: RankPool
) -> None:
    write_weights(tiny_task / "model")
    role = role_on(Layout(2, tp=2), tiny_task / "model", training=TRAINING)
    there, blind = pool.run(save, role, tmp_path, False, (), (1,), world_size=2)
    assert there.failure is None
    assert blind.failure is not None and "this node doesn't see it" in blind.failure
    assert not (tmp_path / "elsewhere").exists()


def test_rollouts_that_the_disk_refuses_are_named_with_path_and_bytes(tmp_path: Path) -> None:
    opened = run_on(PlainRanks(2), ppo_config(), tmp_path)
    rows = (RolloutRow("prompt", "response", "truth", 1.0),)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(ResourceError) as error:
            opened._write_rows("step_1", 1, rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"{tmp_path / 'rollouts' / 'step_1.jsonl'} can't be written: File too large" in str(error.value)
    assert "bytes free" in str(error.value)


@pytest.mark.long
@pytest.mark.parametrize("on_save_failure", ["stop", "continue"])
def test_a_save_that_the_disk_has_no_room_for_leaves_the_one_before_whole(
    tiny_task: Path, small_disk: Callable[[str], Path], on_save_failure: str
) -> None:
    folder = small_disk("3m") / "run"  # a checkpoint is 1.8 MB
    overrides = (f"trainer.run_dir={folder}", "trainer.save_freq=1", "trainer.total_training_steps=3")
    finished = run(torchrun(NUM_RANKS, *SFT, *overrides, f"trainer.on_save_failure={on_save_failure}"), tiny_task)
    checkpoints = CheckpointFolder(folder / "checkpoints")
    assert checkpoints.steps() == [1]
    verified_state(checkpoints.of(1))
    assert sorted(path.name for path in checkpoints.path.iterdir()) == ["latest", "step_1"]
    assert str(checkpoints.path) in finished.stderr and "bytes free" in finished.stderr, finished.output
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if on_save_failure == "stop":
        assert finished.code == 1 and "ResourceError: " in finished.stderr and steps == [1, 2]
    else:
        assert finished.code == 0 and "step 2 is not saved: " in finished.stderr and steps == [1, 2, 3]


@pytest.mark.long
def test_metrics_that_the_disk_has_no_room_for_end_the_run_with_whole_lines(
    tiny_task: Path, small_disk: Callable[[str], Path]
) -> None:
    folder = small_disk("32k") / "run"  # 30 steps are some 18 KB, beside what a run writes at its start
    finished = run(torchrun(NUM_RANKS, *SFT, f"trainer.run_dir={folder}"), tiny_task)
    assert finished.code == 1
    assert f"ResourceError: {folder / 'metrics.jsonl'} can't be written: No space left on device" in finished.stderr
    ours, _, _ = finished.stderr.partition("torch/distributed/elastic")  # which has tracebacks of its own
    assert "0 bytes free" in ours and "Traceback" not in ours
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1)) and 1 < len(lines) < 30
