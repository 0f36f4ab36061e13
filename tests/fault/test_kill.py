"""A process of a run is killed where it hurts most; the same command goes on, and equals a run that never was."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from megarl.checkpoint.folder import CheckpointFolder, verified_state
from tests.launch import Finished, python, run, shared_memory, torchrun
from tests.run_folder import hashes, lines_of
from tests.tiny_task import NUM_RANKS

KILLS = Path(__file__).parent / "kills"
NUM_STEPS, SAVED = 4, 2
SFT = (
    *("-m", "megarl.main_sft", "--config-dir=.", "--config-name=sft"),
    *(f"trainer.total_training_steps={NUM_STEPS}", f"trainer.save_freq={SAVED}"),
)
# With a critic, and a KL coefficient that moves: all that a run can carry from step to step.
PPO = (
    *("-m", "megarl.main_ppo", "--config-dir=.", "--config-name=rl", f"trainer.total_training_steps={NUM_STEPS}"),
    *("algorithm.adv_estimator=gae", "critic.enable=true", "critic.model.path=model", "critic.model.init=random"),
    *("algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.type=adaptive", "algorithm.kl_ctrl.horizon=100"),
    *("actor_rollout_ref.actor.use_kl_loss=false", "actor_rollout_ref.rollout.n=2"),
    *("trainer.save_freq=1", "trainer.val_before_train=false", "trainer.keep_checkpoints=1"),
)


@dataclass(frozen=True)
class Point:
    """Where a process is killed, as kills/sitecustomize.py reads it. rank: ``-``, Ray's controller, is none."""

    rank: str
    function: str
    call: int
    when: str = "before"

    @property
    def environ(self) -> dict[str, str]:
        """The variable that says so."""
        return {"MEGARL_TEST_KILL": f"{self.rank}:{self.function}:{self.call}:{self.when}"}


MEGATRON, ADAM = "megarl.train.megatron.optimizer:Optimizer", "torch.optim.adam:adam"
VLLM = "megarl.rollout.vllm:VllmEngine"
# The critic and the actor take an optimizer step each, Adam one call a group of parameters.
IN_A_STEP = {
    "a rank between backward and step": Point("1", f"{MEGATRON}._set_learning_rate", 6),
    "the controller's rank between backward and step": Point("0", f"{MEGATRON}._set_learning_rate", 6),
    "a rank in the step, some of its parameters changed": Point("1", ADAM, 7, "after"),
    "a rank in publish, the weights moved": Point("1", f"{VLLM}.publish_done", 4),
    "a rank in generation": Point("1", f"{VLLM}.generate", 3),
    "the controller's rank after generation": Point("0", f"{VLLM}.generate", 3, "after"),
}
FOLDER, WRITE = "megarl.checkpoint.folder:CheckpointFolder", "megarl.checkpoint.tensor_file:write_tensors"
# Of the third save, where a rank writes actor, critic and random states each time.
IN_A_SAVE = {
    "before the folder is made": Point("0", f"{FOLDER}.begin", 3),
    "once the folder is made": Point("0", f"{FOLDER}.begin", 3, "after"),
    "a rank before the models are exported": Point("1", "megarl.ranks.worker:Worker.save", 3),
    "between the models": Point("0", "megarl.weights.hf_export:_write_index", 5),
    "a rank before its first state": Point("1", WRITE, 7),
    "a rank after its first state": Point("1", WRITE, 7, "after"),
    "a rank after its last state": Point("1", WRITE, 9, "after"),
    "before the controller's state": Point("0", "megarl.checkpoint.trainer_state:write_trainer_state", 3),
    "before the manifest": Point("0", "megarl.checkpoint.manifest:write_manifest", 3),
    "after the manifest, before the name": Point("0", "megarl.checkpoint.manifest:write_manifest", 3, "after"),
    "after the name, before the link": Point("0", f"{FOLDER}._link", 3),
    "before what doesn't stay is removed": Point("0", f"{FOLDER}.prune", 3),
    "after what doesn't stay is removed": Point("0", f"{FOLDER}.prune", 3, "after"),
}
NUM_SEEDS = 3


class Runs:
    """Whole and broken-off runs of one command. Those that were never killed are run once a seed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._clean: dict[tuple[str, ...], Path] = {}

    def go(self, command: list[str], name: str, environ: dict[str, str] | None = None) -> Finished:
        """Start or go on in a folder of this name."""
        python_path = KILLS if environ else None
        overrides = f"trainer.run_dir=runs/{name}"
        return run([*command, overrides], self.folder, python_path=python_path, environ=environ, timeout_s=300)

    def clean(self, command: list[str]) -> Path:
        """Return the folder of a run that never was killed."""
        key = tuple(command)
        if key not in self._clean:
            name = f"clean{len(self._clean)}"
            finished = self.go(command, name)
            assert finished.code == 0, finished.output
            self._clean[key] = self.folder / "runs" / name
        return self._clean[key]

    def killed_and_resumed(self, command: list[str], name: str, point: Point) -> Path:
        """Return the folder of a run that was killed, and went on to its end."""
        struck = self.folder / f"struck.{name}"
        before = shared_memory()
        with tempfile.TemporaryDirectory(dir="/tmp") as temp:  # short, for Ray's sockets
            environ = point.environ | {"MEGARL_TEST_STRUCK": str(struck), "TMPDIR": temp}
            killed = self.go(command, name, environ)
        assert struck.is_file() and killed.code != 0, killed.output
        assert killed.processes == () and shared_memory() == before
        folder = self.folder / "runs" / name
        for step in (checkpoints := CheckpointFolder(folder / "checkpoints")).steps():
            verified_state(checkpoints.of(step))  # whole, or not there
        resumed = self.go(command, name)
        assert resumed.code == 0, resumed.output
        assert "going on after step" in resumed.stdout
        return folder

    def assert_equal(self, command: list[str], name: str, point: Point) -> None:
        """Compare a run that was killed and went on with one that never was, to the bit."""
        whole, folder = self.clean(command), self.killed_and_resumed(command, name, point)
        assert [line["step"] for line in lines_of(folder)] == list(range(1, NUM_STEPS + 1))
        assert lines_of(folder) == lines_of(whole)
        left, expected = ({path.name for path in (f / "checkpoints").iterdir()} for f in (folder, whole))
        assert left == expected
        first, second = (hashes(f / "checkpoints" / f"step_{NUM_STEPS}") for f in (whole, folder))
        assert first == second and len(first) > 2


@pytest.fixture(scope="module")
def runs(tiny_task: Path) -> Runs:
    """Return the runs of this module."""
    return Runs(tiny_task)


@pytest.mark.long
def test_a_run_whose_rank_is_killed_between_backward_and_step_goes_on_to_the_bit(runs: Runs) -> None:
    runs.assert_equal(torchrun(NUM_RANKS, *SFT), "quick", Point("1", f"{MEGATRON}._set_learning_rate", NUM_STEPS))


def name_of(where: str) -> str:
    """Return the name of a run's folder."""
    return "".join(letter if letter.isalnum() else "_" for letter in where)


@pytest.mark.long
@pytest.mark.parametrize("where", IN_A_STEP)
def test_a_process_killed_in_a_step_costs_the_steps_since_the_last_save_alone(runs: Runs, where: str) -> None:
    runs.assert_equal(torchrun(NUM_RANKS, *PPO, "trainer.seed=0"), name_of(where), IN_A_STEP[where])


@pytest.mark.long
@pytest.mark.parametrize(("number", "where"), list(enumerate(IN_A_SAVE)), ids=IN_A_SAVE)
def test_a_process_killed_in_a_save_leaves_whole_checkpoints_alone(runs: Runs, number: int, where: str) -> None:
    seed = f"trainer.seed={number % NUM_SEEDS}"
    runs.assert_equal(torchrun(NUM_RANKS, *PPO, seed), name_of(where), IN_A_SAVE[where])


SERVED = (*PPO, "actor_rollout_ref.rollout.placement=server")
AHEAD = (*SERVED, "trainer.mode=one_step_off", "algorithm.rollout_correction.preset=token_tis")


@pytest.mark.long
@pytest.mark.parametrize(("name", "command"), [("served", SERVED), ("ahead", AHEAD)])
def test_a_run_with_engines_of_its_own_goes_on_to_the_bit_with_what_was_sampled_ahead(
    runs: Runs, name: str, command: tuple[str, ...]
) -> None:
    point = Point("0", "megarl.controller.served_engines:ServedEngines.take", 4, "after")
    runs.assert_equal(torchrun(NUM_RANKS, *command), name, point)


@pytest.mark.long
def test_a_run_that_samples_all_the_time_goes_on_with_what_it_had_under_way(runs: Runs) -> None:
    command = torchrun(NUM_RANKS, *AHEAD, "trainer.mode=async", "trainer.max_staleness=2")
    point = Point("0", "megarl.controller.served_engines:ServedEngines.take", 4, "after")
    folder = runs.killed_and_resumed(command, "stream", point)
    lines = lines_of(folder)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert all(0 <= float.fromhex(line["rollout/staleness_max"]) <= 2 for line in lines)


@pytest.mark.long
@pytest.mark.parametrize("rank", ["1", "-"], ids=["a rank", "the controller"])
def test_on_ray_a_process_that_is_killed_costs_as_little(runs: Runs, rank: str) -> None:
    function = (
        "megarl.ranks.worker:Worker.update" if rank == "1" else "megarl.controller.role_on_ranks:RoleOnRanks.update"
    )
    runs.assert_equal(python(*SFT), f"ray_{rank}", Point(rank, function, NUM_STEPS))
