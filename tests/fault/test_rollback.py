"""The losses of a step are NaN: a run goes back to its last checkpoint, and on with the next prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch import run, torchrun
from tests.run_folder import hashes, lines_of
from tests.tiny_task import NUM_RANKS

NUM_STEPS, SAVED, BROKEN = 5, 2, 4
PPO = (
    *("-m", "megarl.main_ppo", "--config-dir=.", f"trainer.total_training_steps={NUM_STEPS}"),
    *("algorithm.path=breaking.py", "actor_rollout_ref.actor.policy_loss=breaking"),
    *(f"trainer.save_freq={SAVED}", "trainer.val_before_train=false", "trainer.max_non_finite_steps=1"),
    "actor_rollout_ref.rollout.verify_publish=always",
)
# A rank is asked for the loss of so many micro-batches in a step.
CALLS = {"rl": 4, "rl_fsdp": 2}
LOSS = """
import itertools
from megarl.algorithm.policy_loss import TokenLoss, policy_losses

calls = itertools.count()

@policy_losses.register("breaking")
def breaking(inputs, settings):
    loss_N = -(inputs.logprobs_N - inputs.old_logprobs_N).exp() * inputs.advantages_N
    step = 1 + next(calls) // {calls}
    return TokenLoss(loss_N * float("nan") if step == {broken} else loss_N, loss_N.detach() * 0)
"""


@pytest.mark.long
@pytest.mark.parametrize("name", CALLS)
def test_a_run_with_a_step_that_is_not_finite_goes_back_to_its_last_checkpoint_and_on(
    tiny_task: Path, name: str
) -> None:
    (tiny_task / "breaking.py").write_text(LOSS.format(calls=CALLS[name], broken=BROKEN))
    folder = tiny_task / "runs" / name
    overrides = (f"--config-name={name}", f"trainer.run_dir={folder}", "trainer.on_non_finite=rollback")
    finished = run(torchrun(NUM_RANKS, *PPO, *overrides), tiny_task)
    assert finished.code == 0, finished.output
    assert f"going on from the weights and the optimizer of step {SAVED}" in finished.output
    lines = lines_of(folder)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    skipped = {line["step"]: float.fromhex(line["actor/num_skipped"]) for line in lines}
    assert {step: number for step, number in skipped.items() if number} == {BROKEN: 2}
    before, after, last = (hashes(folder / "checkpoints" / f"step_{step}") for step in (SAVED, BROKEN, NUM_STEPS))
    assert before == after and len(before) > 2
    assert last != after
    rows = (folder / "rollouts" / f"non_finite_step_{BROKEN}.jsonl").read_text().splitlines()
    assert len(rows) == 32 and {json.loads(row)["step"] for row in rows} == {BROKEN}
