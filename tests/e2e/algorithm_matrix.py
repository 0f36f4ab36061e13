"""Run main_ppo's loop for many algorithms in ranks that start once. Started on every rank in the folder of a tiny task.

    python -m tests.e2e.algorithm_matrix OUT.json RECIPE CASE...

The ranks hold actor, reference, critic and engine, and each algorithm uses those that it needs. OUT.json gets the
metrics of every step by the name of the case.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from megarl.catalog import ESTIMATORS, POLICY_LOSSES
from megarl.checks.run import CheckedRun, check_ppo
from megarl.config.schema import PPOConfig
from megarl.controller.engine_on_ranks import EngineOnRanks
from megarl.controller.engine_spec import engine_spec
from megarl.controller.inputs import read_ppo_inputs
from megarl.controller.loop import train
from megarl.controller.observer import Observer
from megarl.controller.open import rollout_run
from megarl.launchers.start import preemption_of, serve_if_not_controller, worker_group
from megarl.monitor.sinks import open_tracker
from megarl.ranks.spec import RankSpec
from megarl.reward.pool import RewardPool
from megarl.reward.registry import RewardSpec
from megarl.roles import with_total_steps

NO_KL = "actor_rollout_ref.actor.use_kl_loss=false"
KL = {
    "none": (NO_KL, "algorithm.kl_free=true"),
    "in_loss": ("actor_rollout_ref.actor.use_kl_loss=true", "actor_rollout_ref.actor.kl_loss_type=low_var_kl+"),
    "in_reward": (NO_KL, "algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.type=adaptive"),
}
DAPO = (
    *KL["none"],
    "algorithm.adv_estimator=grpo",
    "algorithm.filter_groups.enable=true",
    "reward.overlong_buffer.enable=true",
    "reward.overlong_buffer.len=3",
    "actor_rollout_ref.actor.clip_ratio_high=0.28",
)
DR_GRPO = (
    *KL["none"],
    "algorithm.adv_estimator=grpo",
    "algorithm.norm_adv_by_std_in_grpo=false",
    "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm",
)
CORRECTION = "algorithm.rollout_correction"
# What an estimator can't do without.
OWN_KEYS = {"gdpo": ("algorithm.gdpo_reward_keys=[digits,length]", "algorithm.gdpo_reward_weights=[1,0.5]")}
IMPOSSIBLE = {("gdpo", "in_reward")}


def algorithms() -> dict[str, tuple[str, ...]]:
    """Return the overrides of every case by its name."""
    cases = {
        f"{name}, kl {where}": (f"algorithm.adv_estimator={name}", *OWN_KEYS.get(name, ()), *overrides)
        for name in ESTIMATORS
        for where, overrides in KL.items()
        if (name, where) not in IMPOSSIBLE
    }
    grpo = ("algorithm.adv_estimator=grpo", *KL["none"])
    for loss in tuple(POLICY_LOSSES)[1:]:
        cases[f"loss {loss}"] = (*grpo, f"actor_rollout_ref.actor.policy_loss={loss}")
    cases["dapo"], cases["dr_grpo"] = DAPO, DR_GRPO
    cases["entropy bonus"] = (*grpo, "actor_rollout_ref.actor.entropy_coeff=0.01")
    cases["correction icepop"] = (*grpo, f"{CORRECTION}.preset=icepop")
    rejection = f"{CORRECTION}.rejections=[{{criterion:geometric,low:0.5,high:2.0}}]"
    cases["correction by keys"] = (*grpo, f"{CORRECTION}.level=sequence", f"{CORRECTION}.cap=2", rejection)
    cases["correction bypass"] = (*grpo, f"{CORRECTION}.bypass=true")
    cases["correction bypass, rejecting"] = (*cases["correction bypass"], rejection)
    weighted = (f"{CORRECTION}.level=token", "actor_rollout_ref.actor.policy_loss=gpg")
    cases["correction bypass, weighted"] = (*cases["correction bypass"], *weighted)
    cases["off-policy mask"] = (*grpo, f"{CORRECTION}.off_policy_mask_delta=0")
    cases["overlong filtering"] = (*grpo, "algorithm.overlong_filtering=true")
    # The critic's sizes are the actor's. 16 rollouts of up to 22 tokens need several micro-batches.
    tokens = ("actor_rollout_ref.actor.use_dynamic_bsz=true", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=64")
    default = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16"
    cases["dynamic batches"] = ("algorithm.adv_estimator=gae", *KL["in_loss"], *tokens, default)
    cases["critic warm-up"] = ("algorithm.adv_estimator=gae", *KL["none"], "critic.warmup_steps=1")
    return cases


def compose_config(recipe: str, overrides: tuple[str, ...]) -> tuple[CheckedRun[PPOConfig], dict[str, Any]]:
    """Return the checked run of the tiny recipe with ``overrides``, and its plain values."""
    own = [
        "hydra.searchpath=[pkg://megarl.conf]",
        "trainer.run_dir=matrix",
        "trainer.val_before_train=false",
        *overrides,
    ]
    values = cast(dict[str, Any], OmegaConf.to_container(compose(recipe, own), resolve=True))
    return check_ppo(values), values


def main(out: Path, recipe: str, names: Sequence[str]) -> None:
    """Run cases of the tiny ``recipe`` and write the metrics.

    The cases share an actor; its steps are small, so that it stays random.
    """
    with initialize_config_dir(str(Path.cwd()), version_base="1.3"):
        everything, _ = compose_config(
            recipe, ("algorithm.adv_estimator=gae", *KL["in_loss"], "actor_rollout_ref.actor.optim.lr=1e-6")
        )
        cases = {name: compose_config(recipe, algorithms()[name]) for name in names}
        trainer = everything.config.trainer
        roles = with_total_steps(everything.config, everything.roles, 1000)
        spec = RankSpec(roles, trainer.seed, trainer.hang_timeout_s, engine_spec(everything.config, everything.actor))
        reward, results = RewardSpec(path="reward.py", components=("digits", "length")), {}
        preemption = preemption_of(trainer, print)
        with RewardPool(1, 10.0, reward, 0.0) as pool, worker_group(spec, trainer, preemption) as group:
            for name, (checked, values) in cases.items():
                config = checked.config
                folder = Path("matrix") / recipe / name
                folder.mkdir(parents=True)
                inputs = read_ppo_inputs(checked)
                with open_tracker(("jsonl",), folder, "tests", name, values) as tracker:
                    observer = Observer()
                    engine = EngineOnRanks(group, config.actor_rollout_ref.rollout.tensor_model_parallel_size, observer)
                    run = rollout_run(
                        config, inputs, group, engine, pool, tracker, folder, {}, None, observer, preemption
                    )
                    train(run)
                lines = (folder / "metrics.jsonl").read_text().splitlines()
                results[name] = [step for line in lines if (step := json.loads(line))["step"] > 0]
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    if not serve_if_not_controller():
        main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
