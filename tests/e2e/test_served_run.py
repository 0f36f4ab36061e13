"""Runs whose engines are in processes of their own: they compute what those in the trainer's ranks do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import python, run, shared_memory, torchrun
from tests.run_folder import close_to, hashes, lines_of
from tests.sglang_environment import SGLANG, needs_sglang
from tests.tiny_task import NUM_RANKS

KILLS = Path(__file__).parents[1] / "fault" / "kills"
COMMAND = (
    *("-m", "megarl.main_ppo", "--config-dir=.", "trainer.val_before_train=false"),
    # Far above the rounding errors of gradients, which Adam would blow up where a gradient is next to zero.
    "actor_rollout_ref.actor.optim.eps=1e-5",
)
SERVED = "actor_rollout_ref.rollout.placement=server"
TP1, TWO = "actor_rollout_ref.rollout.tensor_model_parallel_size=1", "actor_rollout_ref.rollout.n_gpus_per_node=2"
STREAM = "megarl.rollout.vllm_stream:VllmStream"

pytestmark = pytest.mark.long


class Runs:
    """Runs of the tiny task, each once."""

    def __init__(self, task: Path) -> None:
        self.task = task

    def go(self, name: str, *overrides: str, config: str = "rl", launcher: str = "torchrun", kill: str = "") -> Path:
        """Return the folder of a run, which left nothing behind. kill: see tests/fault/kills."""
        folder = self.task / "runs" / name
        if folder.exists():
            return folder
        before, struck = shared_memory(), self.task / f"struck.{name}"
        arguments = (*COMMAND, f"--config-name={config}", f"trainer.run_dir=runs/{name}", *overrides)
        command = torchrun(NUM_RANKS, *arguments) if launcher == "torchrun" else python(*arguments)
        environ = {"MEGARL_TEST_KILL": kill, "MEGARL_TEST_STRUCK": str(struck)} if kill else None
        finished = run(command, self.task, python_path=KILLS if kill else None, environ=environ)
        assert finished.code == 0, finished.output
        assert (finished.processes, shared_memory() - before) == ((), set())
        assert struck.is_file() == bool(kill)
        return folder

    def colocated(self) -> Path:
        """Return the folder of the run whose engine is in the trainer's ranks."""
        return self.go("colocated")


@pytest.fixture(scope="module")
def runs(tiny_task: Path) -> Runs:
    """Return the runs of this module."""
    return Runs(tiny_task)


def test_an_engine_of_two_ranks_gives_to_the_bit_what_it_gives_in_the_trainers_ranks(runs: Runs) -> None:
    served, colocated = runs.go("tp2", SERVED), runs.colocated()
    assert lines_of(served) == lines_of(colocated)
    first, second = (hashes(folder / "checkpoints" / "final") for folder in (served, colocated))
    assert first == second and first


@pytest.mark.parametrize(
    ("name", "overrides", "launcher"),
    [
        ("tp1_on_ray", (TP1,), "ray"),
        ("tp2_on_ray", (), "ray"),
        ("two_engines", (TP1, TWO), "torchrun"),
        ("on_the_trainers_devices", (TP1, "actor_rollout_ref.rollout.n_gpus_per_node=0"), "ray"),
    ],
)
def test_engines_of_any_number_and_size_give_the_same(
    runs: Runs, name: str, overrides: tuple[str, ...], launcher: str
) -> None:
    close_to(runs.go(name, SERVED, *overrides, launcher=launcher), runs.colocated())


def test_shards_of_fsdp_reach_an_engine_in_processes_of_its_own(runs: Runs) -> None:
    close_to(runs.go("fsdp", SERVED, config="rl_fsdp"), runs.colocated())


@pytest.mark.parametrize(
    ("name", "kill", "overrides"),
    [
        ("in_take", f"1:{STREAM}.take:2:before", ()),
        ("after_take", f"0:{STREAM}.take:2:after", ()),
        ("one_of_two", f"0:{STREAM}.step:12:before", (TP1, TWO)),
        ("at_start", "1:megarl.rollout.vllm:VllmEngine.parameters:1:before", ()),
    ],
)
def test_a_rank_of_an_engine_that_is_killed_costs_time_alone(
    runs: Runs, name: str, kill: str, overrides: tuple[str, ...]
) -> None:
    close_to(runs.go(name, SERVED, *overrides, kill=kill), runs.colocated())


AHEAD = (SERVED, TP1, "trainer.mode=one_step_off", "algorithm.rollout_correction.preset=token_tis")


def test_rollouts_are_sampled_one_step_ahead_and_a_killed_engine_changes_none(runs: Runs) -> None:
    whole = runs.go("ahead", *AHEAD, "trainer.total_training_steps=4")
    lines = lines_of(whole)
    assert [float.fromhex(line["rollout/policy_version"]) for line in lines] == [0, 0, 1, 2]
    assert [float.fromhex(line["rollout/staleness_max"]) for line in lines] == [0, 1, 1, 1]
    killed = runs.go("ahead_killed", *AHEAD, "trainer.total_training_steps=4", kill=f"0:{STREAM}.step:16:before")
    close_to(killed, whole)


STREAM_OF = (SERVED, TP1, "trainer.mode=async", "algorithm.rollout_correction.preset=token_tis")


@pytest.mark.parametrize("kill", ["", f"0:{STREAM}.step:16:before"], ids=["whole", "killed"])
def test_rollouts_that_are_sampled_all_the_time_are_each_trained_on_once_and_new_enough(runs: Runs, kill: str) -> None:
    name, limit = ("stream_killed" if kill else "stream"), "trainer.max_staleness=2"
    folder = runs.go(name, *STREAM_OF, limit, "trainer.total_training_steps=6", kill=kill)
    lines = [{k: float.fromhex(v) if isinstance(v, str) else v for k, v in line.items()} for line in lines_of(folder)]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert all(0 <= line["rollout/staleness_max"] <= 2 for line in lines)
    assert all(line["response/total_tokens"] >= 8 * 4 for line in lines)  # all of a step's rollouts


ON_SGLANG = ("actor_rollout_ref.rollout.name=sglang", f"actor_rollout_ref.rollout.sglang.python={SGLANG}", TP1)
CORRECTED = "algorithm.rollout_correction.preset=token_tis"


@needs_sglang
@pytest.mark.parametrize(
    ("name", "mode", "ages", "where"),
    [
        ("sync", "sync", {0.0}, ()),
        ("one_step_off", "one_step_off", {0.0, 1.0}, ()),
        ("async", "async", {0.0, 1.0, 2.0}, ()),
        ("on_the_trainers_devices", "sync", {0.0}, ("actor_rollout_ref.rollout.n_gpus_per_node=0",)),
    ],
)
def test_sglang_samples_what_is_trained_on_in_every_mode(
    runs: Runs, name: str, mode: str, ages: set[float], where: tuple[str, ...]
) -> None:
    """Where the weights are those that are trained, its log-probs are the trainer's."""
    when = (f"trainer.mode={mode}", "trainer.total_training_steps=4", "trainer.max_staleness=2", CORRECTED)
    lines = lines_of(runs.go(f"sglang_{name}", *ON_SGLANG, *when, *where))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    old = [float.fromhex(line.get("rollout/staleness_max", "0x0p0")) for line in lines]  # sync has no such metric
    assert set(old) <= ages
    for line, age in zip(lines, old, strict=True):
        if age == 0:
            assert float.fromhex(line["rollout_train/logprob_diff_max"]) < 1e-4
