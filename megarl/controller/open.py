"""From a run's inputs to a Run: start ranks and sinks, put everything together, and end it all afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from megarl.algorithm.loss_specs import DemonstrationLossSpec, LossSpec
from megarl.algorithm.needs import needs_reward_function, reward_components
from megarl.algorithm.recipe import Recipe
from megarl.algorithm.samples import Samples
from megarl.checkpoint.folder import CheckpointFolder, Kept
from megarl.checkpoint.rollouts_ahead import RolloutsAhead, read_rollouts_ahead
from megarl.checkpoint.trainer_state import TrainerState
from megarl.config.schema import ASYNC, SYNC, PPOConfig, SFTConfig, SFTTrainerConfig
from megarl.controller.ahead_sampler import AheadSampler
from megarl.controller.demonstrations import (
    DemonstrationLoss,
    DemonstrationRecipe,
    Demonstrations,
    DemonstrationSampler,
)
from megarl.controller.early_scores import EarlyScores, early_scores
from megarl.controller.engine_on_ranks import EngineOnRanks
from megarl.controller.engine_servers import EngineServers
from megarl.controller.engine_spec import engine_spec, train_sampling, val_sampling
from megarl.controller.engines import Engines
from megarl.controller.inputs import PPOInputs, SFTInputs
from megarl.controller.memory import devices_of
from megarl.controller.non_finite import NonFinite
from megarl.controller.observer import Observer
from megarl.controller.publication import Publication
from megarl.controller.report import Evaluation
from megarl.controller.resume import Resumption
from megarl.controller.reward_log import RewardLog
from megarl.controller.role_on_ranks import RoleOnRanks
from megarl.controller.run import Run, Sampler, Schedule
from megarl.controller.sampler import RolloutSampler
from megarl.controller.saving import Saver, SaveSettings
from megarl.controller.scoring import Scorer
from megarl.controller.served_engines import ServedEngines
from megarl.controller.stream_sampler import StreamSampler
from megarl.controller.validation import Validation
from megarl.launchers.group import WorkerGroup
from megarl.launchers.start import EngineStarter, engine_starter, preemption_of, worker_group
from megarl.monitor.preemption import Preemption
from megarl.monitor.sinks import Tracker, open_tracker
from megarl.monitor.timing import Stopwatch
from megarl.ranks.spec import EngineStart, RankSpec
from megarl.reward.pool import RewardPool
from megarl.reward.registry import DEFAULT_FUNCTION, RewardSpec
from megarl.reward.trial import try_reward
from megarl.roles import engines_share_devices, is_served, num_engines, num_ranks
from megarl.types import RewardRequest


def open_rewards(config: PPOConfig) -> AbstractContextManager[RewardPool | None]:
    """Start the reward processes, if a function scores. Raises RewardError if it can't be loaded."""
    if not needs_reward_function(config):
        return nullcontext()
    reward = config.reward
    function, kwargs = (reward.function, reward.kwargs) if reward.path else (DEFAULT_FUNCTION, {})
    spec = RewardSpec(reward.name, reward.path, function, kwargs, reward_components(config))
    return RewardPool(reward.num_workers, reward.timeout_s, spec, reward.score_on_failure, reward.batch_timeout_s)


def try_rewards(pool: RewardPool | None, config: PPOConfig, inputs: PPOInputs) -> None:
    """Score the ground truth of a row of each data_source. Raises RewardError where the function fails on one."""
    if pool is None or not config.reward.try_first:
        return
    first = {p.data_source: p for p in reversed((*inputs.train_prompts, *inputs.val_prompts))}
    try_reward(
        pool,
        {
            p.origin: RewardRequest(
                p.data_source, p.text, p.ground_truth, p.ground_truth, {**p.extra_info, "finish_reason": "stop"}
            )
            for p in first.values()
        },
    )


@contextmanager
def open_run(
    config: PPOConfig,
    inputs: PPOInputs,
    algorithm_file: str | None,
    rewards: RewardPool | None,
    run_dir: Path,
    values: Mapping[str, Any],
    resumption: Resumption | None,
    observer: Observer,
) -> Iterator[Run[Samples]]:
    """Open an RL run: sinks first, so that one that can't be opened costs no start of ranks. values: as shown."""
    engine = engine_spec(config, inputs.roles[0])
    spec = RankSpec(
        inputs.roles,
        config.trainer.seed,
        config.trainer.hang_timeout_s,
        engine,
        is_served(config),
        algorithm_file,
        resumption.on_ranks if resumption else None,
        config.trainer.numa_binding,
    )
    with _tracker(config.trainer, run_dir, values, inputs.num_steps) as sinks:
        sinks.stage(3, 3, f"starting {num_ranks(config)} ranks and {num_engines(config)} engines, loading weights")
        preemption = preemption_of(config.trainer, sinks.warn)
        start = EngineStart(engine, inputs.roles[0], engines_share_devices(config))
        starter = engine_starter(config, start, sinks.warn) if is_served(config) else None
        with (
            _servers(config, starter, sinks) as servers,
            worker_group(spec, config.trainer, preemption) as group,
            closing(servers) if servers else nullcontext(),  # before the group, whose end may be that of Ray
            early_scores(rewards if is_served(config) else None, config.reward.num_workers) as early,
        ):
            observer.opened(group)
            engines = _engines(config, group, servers, starter, observer)
            run = rollout_run(
                config, inputs, group, engines, rewards, sinks, run_dir, values, resumption, observer, preemption, early
            )
            group.watchdog.place = run.place
            yield run
        run.raise_if_preempted()


@contextmanager
def _servers(config: PPOConfig, starter: EngineStarter | None, tracker: Tracker) -> Iterator[ServedEngines | None]:
    """Start the engines that are in processes of their own, if they are; they load while the ranks do.

    Those that share the ranks' devices measure what they may take of these, and rest, before there are ranks.
    """
    if starter is None:
        yield None
        return
    number, timeout_s, shared = num_engines(config), config.trainer.hang_timeout_s, engines_share_devices(config)
    engines = ServedEngines(starter.start, number, timeout_s, tracker.warn, tracker.engine, shares_devices=shared)
    with closing(engines):
        if shared:
            engines.wait_until_ready()
        yield engines


def _engines(
    config: PPOConfig,
    group: WorkerGroup,
    servers: ServedEngines | None,
    starter: EngineStarter | None,
    observer: Observer,
) -> Engines:
    if servers is None or starter is None:
        return EngineOnRanks(group, config.actor_rollout_ref.rollout.tensor_model_parallel_size, observer)
    return EngineServers(group, servers, starter.receiving, observer)


@contextmanager
def open_sft_run(
    config: SFTConfig, inputs: SFTInputs, run_dir: Path, values: Mapping[str, Any], resumption: Resumption | None
) -> Iterator[Run[Demonstrations]]:
    """Open an SFT run. values: of the config, as they are shown."""
    trainer, recipe = config.trainer, DemonstrationRecipe()
    resumed = resumption.on_ranks if resumption else None
    spec = RankSpec(
        inputs.roles, trainer.seed, trainer.hang_timeout_s, resumed=resumed, numa_binding=trainer.numa_binding
    )
    with _tracker(trainer, run_dir, values, inputs.num_steps) as sinks, ExitStack() as ranks:
        sinks.stage(2, 2, f"starting {num_ranks(config)} ranks, loading weights")
        preemption = preemption_of(trainer, sinks.warn)
        group = ranks.enter_context(worker_group(spec, trainer, preemption))
        stopwatch = Stopwatch(told=sinks.wait_for, ended=sinks.phase)
        devices = devices_of(config, inputs.roles, group)
        actor = RoleOnRanks(
            inputs.roles[0],
            group,
            trainer.seed,
            stopwatch,
            DemonstrationLossSpec(),
            flops_per_s=devices.flops_per_s,
        )
        saver = _saver(trainer, group, run_dir, sinks)
        run = Run(
            sampler=DemonstrationSampler(inputs.examples, inputs.order),
            recipe=recipe,
            actor=actor,
            ref=None,
            critic=None,
            publication=None,
            evaluate=DemonstrationLoss(inputs.val_examples, actor, recipe),
            state=lambda step: TrainerState(step, 0, None, config=values, data=inputs.data),
            saver=saver,
            non_finite=_non_finite(trainer, saver, lambda state: None, resumption),
            schedule=Schedule(inputs.num_steps, _first_step(resumption), save_freq=trainer.save_freq),
            tracker=sinks,
            run_dir=run_dir,
            stopwatch=stopwatch,
            preemption=preemption,
            memory=devices.memory,
            evaluations=_before_training(resumption),
        )
        group.watchdog.place = run.place
        yield run
        ranks.close()
        run.raise_if_preempted()


def rollout_run(
    config: PPOConfig,
    inputs: PPOInputs,
    group: WorkerGroup,
    engine: Engines,
    rewards: RewardPool | None,
    tracker: Tracker,
    run_dir: Path,
    values: Mapping[str, Any],
    resumption: Resumption | None,
    observer: Observer,
    preemption: Preemption,
    early: EarlyScores | None = None,
) -> Run[Samples]:
    """Return an RL run on ranks that have started. early: scores what has ended before its batch."""
    trainer, data = config.trainer, config.data
    stopwatch, recipe = Stopwatch(told=tracker.wait_for, ended=tracker.phase), Recipe(config)
    losses: dict[str, LossSpec] = {"actor": recipe.policy_loss, "critic": recipe.value_loss}
    devices = devices_of(config, inputs.roles, group)
    roles = {
        role.name: RoleOnRanks(
            role,
            group,
            trainer.seed,
            stopwatch,
            losses.get(role.name),
            recipe.policy_loss.temperature,
            devices.flops_per_s,
        )
        for role in inputs.roles
    }
    scorer = Scorer(
        config.reward,
        inputs.tokenizer,
        data.max_response_length,
        rewards,
        roles.get("reward_model"),
        observer,
        RewardLog(run_dir, tracker.warn),
        reward_components(config),
        early,
    )
    publication = Publication(
        engine, inputs.train_prompts, data.max_response_length, config.actor_rollout_ref.rollout.verify_publish
    )

    def restore_kl(state: TrainerState) -> None:
        assert state.kl_controller is not None
        recipe.kl_controller = state.kl_controller

    if resumption is not None:
        restore_kl(resumption.state)
        publication.policy_version = resumption.state.policy_version - 1  # these weights are published once more
    groups, saver = config.algorithm.filter_groups, _saver(trainer, group, run_dir, tracker)
    each = RolloutSampler(
        inputs.train_prompts,
        inputs.order,
        engine,
        scorer,
        train_sampling(config, inputs.stop_token_ids),
        trainer.seed,
        groups.max_num_gen_batches if groups.enable else 1,
        trainer.num_sampled_rollouts,
        stopwatch,
    )
    sampler, ahead = _sampler(config, each, inputs.num_steps, resumption)
    return Run(
        sampler=sampler,
        recipe=recipe,
        actor=roles["actor"],
        ref=roles.get("ref"),
        critic=roles.get("critic"),
        publication=publication,
        evaluate=Validation(
            inputs.val_prompts,
            data.val_batch_size,
            engine,
            scorer,
            val_sampling(config, inputs.stop_token_ids),
            trainer.seed,
            trainer.num_sampled_rollouts,
        ),
        state=lambda step: TrainerState(
            step, publication.policy_version, recipe.kl_controller, config=values, ahead=ahead(), data=inputs.data
        ),
        saver=saver,
        non_finite=_non_finite(trainer, saver, restore_kl, resumption),
        schedule=Schedule(
            inputs.num_steps,
            _first_step(resumption),
            trainer.test_freq,
            trainer.save_freq,
            trainer.show_rollouts_freq,
            trainer.val_before_train,
        ),
        tracker=tracker,
        run_dir=run_dir,
        stopwatch=stopwatch,
        preemption=preemption,
        memory=devices.memory,
        evaluations=_before_training(resumption),
    )


def _sampler(
    config: PPOConfig, each: RolloutSampler, last_step: int, resumption: Resumption | None
) -> tuple[Sampler[Samples], Callable[[], RolloutsAhead | None]]:
    """Return the sampler of a run's mode, and what returns the rollouts that it has ahead. each: samples one step."""
    if config.trainer.mode == SYNC:
        return each, lambda: None
    assert isinstance(each.engine, EngineServers), "which the checks see to"
    ahead = None if resumption is None else read_rollouts_ahead(resumption.folder)
    if config.trainer.mode == ASYNC:
        stream = StreamSampler(each, each.engine, last_step, config.trainer.max_staleness, ahead)
        return stream, stream.state
    sampler = AheadSampler(each, each.engine, last_step, ahead)
    return sampler, sampler.finished_ahead


def _saver(trainer: SFTTrainerConfig, group: WorkerGroup, run_dir: Path, tracker: Tracker) -> Saver:
    settings = SaveSettings(
        models="model" in trainer.save_contents,
        state="state" in trainer.save_contents,
        in_background=trainer.async_save,
        must_succeed=trainer.on_save_failure == "stop",
        kept=Kept(trainer.keep_checkpoints, trainer.keep_best_by),
        every_min=trainer.save_every_min,
    )
    return Saver(group, CheckpointFolder(run_dir / "checkpoints"), settings, tracker.warn)


def _non_finite(
    trainer: SFTTrainerConfig, saver: Saver, restore: Callable[[TrainerState], None], resumption: Resumption | None
) -> NonFinite:
    return NonFinite(
        trainer.on_non_finite,
        trainer.max_non_finite_steps,
        saver.group,
        saver.folder,
        restore,
        saver.warn,
        saver.finish,
        0 if resumption is None else resumption.state.skipped_in_a_row,
    )


def _first_step(resumption: Resumption | None) -> int:
    return 1 if resumption is None else resumption.state.step + 1


def _before_training(resumption: Resumption | None) -> list[Evaluation]:
    """Return the validation before training of a run that goes on, for its report."""
    before = None if resumption is None else resumption.state.before
    return [] if before is None else [Evaluation(0, before, "", {})]


def _tracker(trainer: SFTTrainerConfig, run_dir: Path, values: Mapping[str, Any], num_steps: int) -> Tracker:
    sinks = tuple(dict.fromkeys((*trainer.logger, "jsonl")))
    return open_tracker(sinks, run_dir, trainer.project_name, trainer.experiment_name, values, num_steps)
