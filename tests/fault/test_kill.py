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
    """Where a process is killed, as kills/sitecustomize.py reads it. rank: ``-``, Ray's controller, is none.

    victim: the name of the process that is killed instead.
    """

    rank: str
    function: str
    call: int
    when: str = "before"
    victim: str = ""

    @property
    def environ(self) -> dict[str, str]:
        """The variable that says so."""
        victim = [self.victim] if self.victim else []
        return {"MEGARL_TEST_KILL": ":".join([self.rank, self.function, str(self.call), self.when, *victim])}


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


@dataclass(frozen=True)
class SavePoint:
    """Where a process is killed in a save. call: of the function, from the save's first. each: its calls a save.

    is_named: whether the checkpoint has its name by then.
    """

    rank: str
    function: str
    call: int = 1
    when: str = "before"
    each: int = 1
    is_named: bool = False

    def after(self, num_saves: int) -> Point:
        """Return the Point in the save after so many others of the same start."""
        return Point(self.rank, self.function, self.each * num_saves + self.call, self.when)


FOLDER, WRITE = "megarl.checkpoint.folder:CheckpointFolder", "megarl.checkpoint.tensor_file:write_tensors"
INDEX = "megarl.weights.hf_export:_write_index"
STATE = "megarl.checkpoint.trainer_state:write_trainer_state"
MANIFEST = "megarl.checkpoint.manifest:write_manifest"
# A rank writes actor, critic and random states each time, the controller's the indices of two models.
IN_A_SAVE = {
    "before the folder is made": SavePoint("0", f"{FOLDER}.begin"),
    "once the folder is made": SavePoint("0", f"{FOLDER}.begin", when="after"),
    "a rank before the models are exported": SavePoint("1", "megarl.ranks.worker:Worker.save"),
    "between the models": SavePoint("0", INDEX, 1, "after", each=2),
    "a rank before its first state": SavePoint("1", WRITE, 1, each=3),
    "a rank after its first state": SavePoint("1", WRITE, 1, "after", each=3),
    "a rank after its last state": SavePoint("1", WRITE, 3, "after", each=3),
    "before the controller's state": SavePoint("0", STATE),
    "before the manifest": SavePoint("0", MANIFEST),
    "after the manifest, before the name": SavePoint("0", MANIFEST, when="after"),
    "after the name, before the link": SavePoint("0", f"{FOLDER}._link", is_named=True),
    "before what doesn't stay is removed": SavePoint("0", f"{FOLDER}.prune", is_named=True),
    "after what doesn't stay is removed": SavePoint("0", f"{FOLDER}.prune", when="after", is_named=True),
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

    def killed(self, command: list[str], name: str, point: Point) -> Path:
        """Return the folder of a run that was killed, all of whose checkpoints are whole, and nothing else left."""
        folder = self.folder / "runs" / name
        struck, before = self.folder / f"struck.{name}", shared_memory()
        struck.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir="/tmp") as temp:  # short, for Ray's sockets
            environ = point.environ | {"MEGARL_TEST_STRUCK": str(struck), "TMPDIR": temp}
            killed = self.go(command, name, environ)
        assert struck.is_file() and killed.code != 0, killed.output
        assert killed.processes == () and shared_memory() == before
        for step in (checkpoints := CheckpointFolder(folder / "checkpoints")).steps():
            verified_state(checkpoints.of(step))
        return folder

    def resumed(self, command: list[str], name: str) -> Path:
        """Return the folder of a run that was killed, and went on to its end."""
        resumed = self.go(command, name)
        assert resumed.code == 0, resumed.output
        assert "going on after step" in resumed.stdout
        return self.folder / "runs" / name

    def assert_equal(self, command: list[str], name: str, point: Point) -> None:
        """Compare a run that was killed and went on with one that never was, to the bit."""
        self.killed(command, name, point)
        self.assert_ends_like_clean(command, name)

    def assert_ends_like_clean(self, command: list[str], name: str) -> None:
        """Have a run that was killed go on, and compare it with one that never was, to the bit."""
        whole, folder = self.clean(command), self.resumed(command, name)
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
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_a_run_whose_save_is_killed_at_one_point_after_the_other_has_whole_checkpoints_alone(
    runs: Runs, seed: int
) -> None:
    command, name = torchrun(NUM_RANKS, *PPO, f"trainer.seed={seed}"), f"saves_{seed}"
    saved = 1  # step, by the first start, which is killed while it saves the next one
    for number, (where, point) in enumerate(list(IN_A_SAVE.items())[seed::NUM_SEEDS]):
        folder = runs.killed(command, name, point.after(saved if number == 0 else 0))
        saved += point.is_named
        assert CheckpointFolder(folder / "checkpoints").steps()[-1] == saved, where
    runs.assert_ends_like_clean(command, name)


@pytest.mark.long
def test_a_run_that_is_killed_while_it_saves_in_the_background_goes_on_to_the_bit(runs: Runs) -> None:
    command = torchrun(NUM_RANKS, *SFT, "trainer.save_freq=1", "trainer.async_save=true")
    # A rank writes its actor and random states: this is the first file of the third save.
    runs.assert_equal(command, "background", Point("1", WRITE, 5, "after"))


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
    runs.killed(command, "stream", point)
    folder = runs.resumed(command, "stream")
    lines = lines_of(folder)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert all(0 <= float.fromhex(line["rollout/staleness_max"]) <= 2 for line in lines)


IN_AN_UPDATE = "megarl.ranks.worker:Worker.update"
ON_RAY = {
    "a rank": Point("1", IN_AN_UPDATE, NUM_STEPS),
    "the controller": Point("-", "megarl.controller.role_on_ranks:RoleOnRanks.update", NUM_STEPS),
    "Ray's own process on the node": Point("1", IN_AN_UPDATE, NUM_STEPS, victim="raylet"),
}


@pytest.mark.long
@pytest.mark.parametrize("which", ON_RAY)
def test_on_ray_a_process_that_is_killed_costs_as_little(runs: Runs, which: str) -> None:
    runs.assert_equal(python(*SFT), name_of(which), ON_RAY[which])
