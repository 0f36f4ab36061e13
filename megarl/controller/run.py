"""A run: everything the loop needs, and the small steps that are not the algorithm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarl.algorithm.covariance import select_tokens
from megarl.algorithm.filters import in_group_with_spread, overlong_penalty
from megarl.algorithm.kl import kl_estimators
from megarl.algorithm.kl_control import KLController
from megarl.algorithm.metrics import logprob_difference, masked_mean
from megarl.algorithm.rollout_correction import correct_rollouts
from megarl.algorithm.token_rewards import penalize_rewards
from megarl.batching.pack import rollouts_to_batch
from megarl.batching.plan import BatchPlan, Spread
from megarl.checkpoint.trainer_state import TrainerState
from megarl.checks.algorithm import needs_reward_function, needs_reward_model
from megarl.config.schema import PPOConfig
from megarl.controller.inputs import PPOInputs
from megarl.controller.ranks import Ranks
from megarl.controller.report import Evaluation, Rewards, rollout_rows
from megarl.controller.settings import (
    correction_settings,
    kl_controller,
    policy_loss,
    role_layouts,
    train_sampling,
    val_sampling,
)
from megarl.errors import PublishError
from megarl.launchers.start import worker_group
from megarl.monitor.console import RolloutRow, rollouts_table
from megarl.monitor.sinks import Tracker, open_tracker
from megarl.monitor.timing import Stopwatch
from megarl.ranks.spec import RunSpec
from megarl.reward.pool import RewardPool
from megarl.reward.registry import RewardSpec
from megarl.train.work import Metrics
from megarl.types import Batch, GenerationRequest, Prompt, RewardRequest, RewardResult, Rollout, Sampling

Group = tuple[Rollout, ...]

# Largest difference between the engine's and the trainer's log-prob of one token after a publish: the two compute the
# same function in another order. Wrong weights differ by several nats.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}
_NUM_CHECKED_PROMPTS, _NUM_CHECKED_TOKENS = 8, 16


@dataclass
class Run:
    """An RL run after start-up. rewards: None where only a reward model scores."""

    config: PPOConfig
    ranks: Ranks
    inputs: PPOInputs
    rewards: RewardPool | None
    tracker: Tracker
    run_dir: Path
    kl_controller: KLController
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.inputs.num_steps

    @property
    def actor_sizes(self) -> tuple[int, int, int, int, int]:
        """The actor's rollouts, mini-batch, micro-batch, data-parallel ranks and epochs, for ``plan_update``."""
        return _sizes(self.inputs.batch_plan)

    @property
    def critic_sizes(self) -> tuple[int, int, int, int, int]:
        """The critic's, likewise."""
        assert self.inputs.critic_plan is not None
        return _sizes(self.inputs.critic_plan)

    def seed(self, *parts: object) -> int:
        """Return a seed that follows from the run's and ``parts`` alone."""
        digest = hashlib.sha256(":".join(map(str, (self.config.trainer.seed, *parts))).encode()).digest()
        return int.from_bytes(digest[:6], "little")

    def shuffle_seed(self, shuffle: bool, role: str, step: int) -> int | None:
        """Return the seed of the order of mini-batches; None keeps the order of the rollouts."""
        return self.seed(role, step) if shuffle else None

    def spread(self, role: str, batch: Batch) -> Spread | None:
        """Return what spreads a role's rollouts over ranks and micro-batches by tokens; None where they are counted."""
        budget = self.ranks.roles[role].update_budget
        return budget.over(batch.lengths_B.tolist()) if budget else None

    def is_due(self, every: int | None, step: int) -> bool:
        """Whether something done every so many steps is due; the last step has its own."""
        return every is not None and step % every == 0 and step < self.num_steps

    def prompts(self, step: int) -> list[Prompt]:
        """Return the prompts of a step, counted from 1."""
        return [self.inputs.train_prompts[i] for i in self.inputs.order.batch(step - 1)]

    def generate(self, prompts: Sequence[Prompt], step: object) -> tuple[list[Group], list[Group]]:
        """Return the rollouts of each prompt for training, and of each a greedy one if the estimator wants it."""
        sampling = train_sampling(self.config, self._stop_token_ids())
        requests = [GenerationRequest(p.token_ids, self.seed("train", step, p.uid)) for p in prompts]
        groups = self.ranks.generate(requests, sampling)
        self.ranks.end_generation()
        greedy = [g[sampling.n :] for g in groups] if sampling.with_greedy else []
        return [g[: sampling.n] for g in groups], greedy

    def score(self, prompts: Sequence[Prompt], groups: Sequence[Group]) -> Rewards:
        """Return the rewards of all rollouts, in order, with the penalty of overlong ones where configured."""
        config, penalties_B = self.config.reward, torch.zeros(sum(map(len, groups)))
        if config.overlong_buffer.enable:
            lengths_B = torch.tensor([len(r.token_ids) for group in groups for r in group])
            limit, buffer = self.config.data.max_response_length, config.overlong_buffer
            penalties_B = overlong_penalty(lengths_B, limit, buffer.len, buffer.penalty_factor)
        results = self._function_results(prompts, groups) if self.rewards is not None else ()
        model_B = self._model_scores(prompts, groups) if needs_reward_model(self.config) else None
        return Rewards(results, penalties_B, model_B, config.model.coef)

    def _function_results(self, prompts: Sequence[Prompt], groups: Sequence[Group]) -> tuple[RewardResult, ...]:
        """Return what the reward function says of all rollouts."""
        assert self.rewards is not None
        texts = iter(self.texts(groups))
        requests = [
            RewardRequest(
                p.data_source, p.text, next(texts), p.ground_truth, {**p.extra_info, "finish_reason": r.finish_reason}
            )
            for p, group in zip(prompts, groups, strict=True)
            for r in group
        ]
        return tuple(self.rewards.score(requests))

    def _model_scores(self, prompts: Sequence[Prompt], groups: Sequence[Group]) -> Tensor:
        """Return the reward model's scores [B] of all rollouts."""
        with self.stopwatch.timed("reward_model"):
            return self.ranks.reward_scores(rollouts_to_batch([p.token_ids for p in prompts], groups))

    def score_baseline(self, prompts: Sequence[Prompt], greedy: Sequence[Group]) -> Tensor | None:
        """Return for every rollout [B] the reward of its prompt's greedy one; None where there are none."""
        if not greedy:
            return None
        return self.score(prompts, greedy).scores_B.repeat_interleave(self.config.actor_rollout_ref.rollout.n)

    def replace_groups_without_spread(
        self, step: int, prompts: Sequence[Prompt], groups: Sequence[Group], rewards: Rewards
    ) -> tuple[list[Prompt], list[Group], Rewards]:
        """Put fresh prompts in the place of groups whose rewards are all equal, as often as configured (DAPO).

        The replacements follow from the step alone, so a resumed run draws the same. What has no spread then stays.
        """
        prompts, groups, n = list(prompts), list(groups), self.config.actor_rollout_ref.rollout.n
        for attempt in range(1, self.config.algorithm.filter_groups.max_num_gen_batches):
            group_B = torch.arange(len(groups)).repeat_interleave(n)
            dull = (~in_group_with_spread(rewards.scores_B, group_B))[::n].nonzero()[:, 0].tolist()
            if not dull:
                break
            order = replace(self.inputs.order, shuffle=True, seed=self.seed("resample", attempt))
            fresh = [self.inputs.train_prompts[i] for i in order.batch(step - 1)[: len(dull)]]
            fresh_groups, _ = self.generate(fresh, f"{step}.{attempt}")
            fresh_rewards = self.score(fresh, fresh_groups)
            for place, prompt, group in zip(dull, fresh, fresh_groups, strict=True):
                prompts[place], groups[place] = prompt, group
            rewards = rewards.with_groups(dull, fresh_rewards, n)
        return prompts, groups, rewards

    def old_logprobs(self, batch: Batch) -> Tensor:
        """Return log-probs [B, S] by the actor before its update; the engine's where rollout correction is bypassed."""
        if self.config.algorithm.rollout_correction.bypass:
            assert batch.rollout_logprobs_BS is not None
            return batch.rollout_logprobs_BS
        return self.ranks.logprobs("actor", batch, self.config.actor_rollout_ref.rollout.temperature)

    def correct(self, batch: Batch) -> tuple[Batch, Metrics]:
        """Weigh and mask the policy loss by how far the engine's log-probs are from the trainer's, as configured.

        Metrics tell of the difference, and of what was corrected.
        """
        assert batch.old_logprobs_BS is not None and batch.rollout_logprobs_BS is not None
        settings = correction_settings(self.config)
        correction = correct_rollouts(batch.old_logprobs_BS, batch.rollout_logprobs_BS, batch.mask_BS, settings)
        metrics = {f"rollout_train/{name}": value for name, value in correction.metrics.items()}
        return replace(batch, mask_BS=correction.mask_BS, policy_weights_BS=correction.weights_BS), metrics

    def select_tokens(self, batch: Batch, step: int) -> Batch:
        """Mark the tokens that the policy loss treats apart, if it has such."""
        assert batch.old_logprobs_BS is not None and batch.advantages_BS is not None
        loss = policy_loss(self.config)
        chosen = select_tokens(
            loss.name,
            batch.old_logprobs_BS,
            batch.advantages_BS,
            batch.mask_BS,
            loss.settings,
            self.seed("select", step),
        )
        return replace(batch, selected_BS=chosen)

    def penalize(self, batch: Batch) -> tuple[Tensor | None, Metrics]:
        """Return rewards [B, S] of tokens with KL to the reference subtracted, and steer its coefficient by that KL.

        None, and no metrics, where the reward has no KL.
        """
        if not self.config.algorithm.use_kl_in_reward:
            return None, {}
        assert batch.rewards_B is not None and batch.old_logprobs_BS is not None and batch.ref_logprobs_BS is not None
        estimator = kl_estimators.get(self.config.algorithm.kl_penalty, key="algorithm.kl_penalty")
        kl_BS, coef = estimator(batch.old_logprobs_BS, batch.ref_logprobs_BS), self.kl_controller.coef
        kl = masked_mean(kl_BS, batch.mask_BS)
        self.kl_controller = self.kl_controller.after(kl, len(batch))
        token_rewards_BS = penalize_rewards(batch.rewards_B, kl_BS, batch.mask_BS, coef)
        return token_rewards_BS, {"reward/kl": kl, "reward/kl_coef": coef}

    def texts(self, groups: Sequence[Group]) -> list[str]:
        """Return all responses as text, in order."""
        ids = [list(rollout.token_ids) for group in groups for rollout in group]
        texts: list[str] = self.inputs.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts

    def validate(self, step: int) -> Evaluation:
        """Sample the validation prompts as ``rollout.val_kwargs`` says and score them."""
        size, sampling = self.config.data.val_batch_size, val_sampling(self.config, self._stop_token_ids())
        requests = [GenerationRequest(p.token_ids, self.seed("val", p.uid)) for p in self.inputs.val_prompts]
        groups: list[Group] = []
        for start in range(0, len(requests), size):
            groups += self.ranks.generate(requests[start : start + size], sampling)
        self.ranks.end_generation()
        rewards = self.score(self.inputs.val_prompts, groups)
        rows = self._sampled_rows(self.inputs.val_prompts, groups, rewards)
        lengths = [len(r.token_ids) for group in groups for r in group]
        mean = sum(rewards.unpenalized) / len(rewards.unpenalized)
        return Evaluation(step, mean, sum(lengths) / len(lengths), len(lengths), rows)

    def check_publish(self) -> None:
        """Raise PublishError where the engine's greedy tokens have other log-probs than the trainer gives them."""
        prompts = list(self.inputs.train_prompts[:_NUM_CHECKED_PROMPTS])
        max_tokens = min(_NUM_CHECKED_TOKENS, self.config.data.max_response_length)
        requests = [GenerationRequest(p.token_ids, 0) for p in prompts]
        groups = self.ranks.generate(requests, Sampling(temperature=0.0, max_tokens=max_tokens))
        self.ranks.end_generation()
        batch = rollouts_to_batch([p.token_ids for p in prompts], groups)
        assert batch.rollout_logprobs_BS is not None
        trainer_BS = self.ranks.logprobs("actor", batch, temperature=1.0)
        difference = logprob_difference(trainer_BS, batch.rollout_logprobs_BS, batch.mask_BS)
        allowed = _TOLERANCE[self.config.actor_rollout_ref.model.dtype]
        if not difference.max_abs <= allowed:
            raise PublishError(
                f"after publishing, the engine's greedy log-probs differ from the trainer's by up to "
                f"{difference.max_abs:.3g} (allowed {allowed:g}): the engine doesn't run the trainer's weights"
            )

    def save(self, name: str, step: int) -> None:
        """Write checkpoints/``name`` after ``step``: the actor, and in critic/ the critic, as Hugging Face folders.

        trainer_state.json has what else decides the steps that follow, but the optimizers'.
        """
        state = TrainerState(step, self.ranks.policy_version, self.kl_controller)
        self.ranks.export(self.run_dir / "checkpoints" / name, state)

    def log(
        self, step: int, metrics: Metrics, prompts: Sequence[Prompt], groups: Sequence[Group], rewards: Rewards
    ) -> None:
        """Give a step's metrics to the sinks, and its sampled rollouts to rollouts/."""
        times = {f"time_s/{name}": seconds for name, seconds in self.stopwatch.drain().items()}
        self.tracker.log(step, {**metrics, **times})
        rows = self._sampled_rows(prompts, groups, rewards)
        folder = self.run_dir / "rollouts"
        folder.mkdir(exist_ok=True)
        lines = [json.dumps({"step": step, **vars(row)}) + "\n" for row in rows]
        (folder / f"step_{step}.jsonl").write_text("".join(lines))
        if rows and step % self.config.trainer.show_rollouts_freq == 1 % self.config.trainer.show_rollouts_freq:
            self.tracker.show(rollouts_table(rows))

    def _sampled_rows(
        self, prompts: Sequence[Prompt], groups: Sequence[Group], rewards: Rewards
    ) -> tuple[RolloutRow, ...]:
        """Return the table rows of the first prompts, decoding no more than those."""
        count = self.config.trainer.num_sampled_rollouts
        return rollout_rows(prompts, groups, rewards, self.texts(groups[:count]), count)

    def _stop_token_ids(self) -> tuple[int, ...]:
        """Return what ends a response: the user's tokens, and the tokenizer's end of sequence unless ignored."""
        rollout = self.config.actor_rollout_ref.rollout
        end = self.inputs.tokenizer.eos_token_id
        own = () if end is None or rollout.ignore_eos else (int(end),)
        return (*rollout.stop_token_ids, *own)


def open_rewards(config: PPOConfig) -> AbstractContextManager[RewardPool | None]:
    """Start the reward processes, if a function scores. Raises RewardError if it can't be loaded."""
    if not needs_reward_function(config):
        return nullcontext()
    reward = config.reward
    spec = RewardSpec(reward.name, reward.path, reward.function)
    return RewardPool(reward.num_workers, reward.timeout_s, spec, reward.score_on_failure)


@contextmanager
def open_run(
    config: PPOConfig,
    inputs: PPOInputs,
    ranks: RunSpec,
    rewards: RewardPool | None,
    run_dir: Path,
    values: Mapping[str, Any],
) -> Iterator[Run]:
    """Start ranks and sinks, and end them all afterwards. values: of the config, for the sinks."""
    trainer = config.trainer
    sinks = tuple(dict.fromkeys((*trainer.logger, "jsonl")))
    with (
        worker_group(ranks) as group,
        open_tracker(
            sinks, run_dir, trainer.project_name, trainer.experiment_name, values, inputs.num_steps
        ) as tracker,
    ):
        yield Run(
            config,
            Ranks(
                group,
                role_layouts(config, inputs.shape, inputs.critic_shape, inputs.reward_shape),
                config.actor_rollout_ref.rollout.tensor_model_parallel_size,
            ),
            inputs,
            rewards,
            tracker,
            run_dir,
            kl_controller(config),
        )


def _sizes(plan: BatchPlan) -> tuple[int, int, int, int, int]:
    return plan.num_rollouts, plan.mini_batch_size, plan.micro_batch_size, plan.dp_size, plan.epochs
