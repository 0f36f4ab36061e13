"""What must hold between keys. Each rule is a function named as the sentence it enforces; all are evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from megarl.catalog import SINKS
from megarl.checks.algorithm import ALGORITHM_RULES, needs_critic, needs_reference, needs_reward_model
from megarl.checks.axes import (
    RANKS,
    a_precision_aware_optimizer_has_its_place,
    a_tensor_split_fits,
    an_optimizer_on_the_host_is_split_and_stays,
    axes_divide_the_ranks,
    chunks_take_turns_on_a_pipeline,
    overridden_fields_exist_and_are_free,
    recomputation_is_complete,
    the_model_fits_its_axes,
)
from megarl.checks.effects import settings_have_an_effect
from megarl.checks.passes import passes_of
from megarl.config.schema import (
    CriticModelConfig,
    LRSchedulerConfig,
    MegatronConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    SFTConfig,
    TrainedMegatronConfig,
)
from megarl.errors import ConfigError, Problem, nearest
from megarl.weights.model_shape import ModelShape

Problems = Iterator[Problem]

_ACTOR_AXES = "actor_rollout_ref.actor.megatron."


def a_model_is_named(key: str, model: ModelConfig | CriticModelConfig) -> Problems:
    """``model.path`` is set."""
    if not model.path:
        yield Problem(f"{key}.path", model.path, "must name a Hugging Face folder", f"{key}.path=/path/to/model")


def a_policy_has_an_output_layer(key: str, path: str | None, shape: ModelShape) -> Problems:
    """The model that gives log-probs is neither a critic nor a reward model."""
    if shape.value_head:
        allowed = "has a value head in place of the output layer, as a critic or reward model; must be a language model"
        yield Problem(f"{key}.path", path, allowed, f"critic.model.path={path} or reward.model.path={path}, if meant")


def the_actors_tokens_are_known(key: str, path: str | None, shape: ModelShape, vocab_size: int) -> Problems:
    """A model that reads rollouts has every token of the actor's ``vocab_size``."""
    if shape.vocab_size < vocab_size:
        allowed = f"its vocabulary of {shape.vocab_size} doesn't hold the actor's {vocab_size} tokens"
        yield Problem(key, path, allowed, "take a model of the same family")


def stop_tokens_are_in_the_vocabulary(token_ids: tuple[int, ...], shape: ModelShape) -> Problems:
    """A token that ends a response can be generated."""
    for token in token_ids:
        if not 0 <= token < shape.vocab_size:
            key = "actor_rollout_ref.rollout.stop_token_ids"
            yield Problem(key, token, f"must be of the model's {shape.vocab_size} tokens, counted from 0")


def betas_are_two_fractions(key: str, optim: OptimConfig) -> Problems:
    """AdamW has two decay rates, each at least 0 and below 1; the last learning rate isn't above the first."""
    if len(optim.beta) != 2 or not all(0 <= b < 1 for b in optim.beta):
        yield Problem(f"{key}.beta", list(optim.beta), "must be two numbers, each at least 0 and less than 1")
    if optim.min_lr > optim.lr:
        yield Problem(f"{key}.min_lr", optim.min_lr, f"must be at most {key}.lr = {optim.lr:g}")


def the_last_learning_rate_is_reached(key: str, optim: OptimConfig, scheduler: LRSchedulerConfig) -> Problems:
    """min_lr is set only where the schedule ends there. key: of the section with both."""
    if scheduler.type == "constant" and optim.min_lr > 0:
        allowed = f"has no effect where {key}lr_scheduler.type is constant"
        yield Problem(f"{key}optim.min_lr", optim.min_lr, allowed, f"{key}lr_scheduler.type=cosine")


def sinks_are_known(sinks: tuple[str, ...]) -> Problems:
    """Every logger exists."""
    for sink in sinks:
        if sink not in SINKS:
            yield Problem("trainer.logger", sink, f"must be among {', '.join(SINKS)}", nearest(sink, SINKS))


def an_engine_replica_divides_the_ranks(c: PPOConfig) -> Problems:
    """The engine's TP divides the ranks."""
    tp, ranks = c.actor_rollout_ref.rollout.tensor_model_parallel_size, num_ranks(c)
    if ranks % tp:
        key = "actor_rollout_ref.rollout.tensor_model_parallel_size"
        yield Problem(key, tp, f"must divide the {ranks} {RANKS}")


def the_engine_is_built(c: PPOConfig) -> Problems:
    """The engine's name has code behind it."""
    if c.actor_rollout_ref.rollout.name != "vllm":
        key = "actor_rollout_ref.rollout.name"
        yield Problem(key, c.actor_rollout_ref.rollout.name, "isn't built yet", f"{key}=vllm")


def an_engine_step_holds_its_sequences(c: PPOConfig) -> Problems:
    """An engine step has a token for each sequence that is generated at once: vLLM demands it."""
    tokens, sequences = c.actor_rollout_ref.rollout.max_num_batched_tokens, c.actor_rollout_ref.rollout.max_num_seqs
    if tokens is not None and tokens < sequences:
        key = "actor_rollout_ref.rollout.max_num_batched_tokens"
        allowed = f"must be at least actor_rollout_ref.rollout.max_num_seqs = {sequences}"
        yield Problem(key, tokens, allowed, f"{key}=null")


def training_and_rollout_share_devices(c: PPOConfig) -> Problems:
    """hybrid_engine is on."""
    if not c.actor_rollout_ref.hybrid_engine:
        key = "actor_rollout_ref.hybrid_engine"
        yield Problem(key, False, "this version generates on the training ranks only", f"{key}=true")


def every_training_file_has_a_weight(c: PPOConfig) -> Problems:
    """Weights of files are as many as the files, and positive."""
    weights, files = c.data.train_file_weights, c.data.train_files
    if weights is not None and (len(weights) != len(files) or not all(0 < w < math.inf for w in weights)):
        allowed = f"must be a positive number for each of the {len(files)} data.train_files"
        yield Problem("data.train_file_weights", list(weights), allowed, "data.train_file_weights=null")


def a_token_budget_holds_every_rollout(c: PPOConfig) -> Problems:
    """The longest kind of rollout fits a micro-batch by itself, in every pass that counts tokens."""
    too_small = [p for p in passes_of(c) if p.max_tokens is not None and p.max_tokens < p.longest_tokens]
    for size in {p.key: p for p in too_small}.values():
        longest = f"data.max_prompt_length + data.max_response_length = {size.sequence_tokens}"
        allowed = f"must hold the longest rollout by itself: {longest} needs at least {size.least_value}"
        yield Problem(size.key, size.value, allowed, f"{size.key}={size.least_value}")


def a_token_budget_counts_no_padding(c: PPOConfig) -> Problems:
    """Sequences are packed where micro-batches are filled up to a number of tokens."""
    if not c.actor_rollout_ref.model.use_remove_padding and any(p.max_tokens is not None for p in passes_of(c)):
        key = "actor_rollout_ref.model.use_remove_padding"
        allowed = "must be true where use_dynamic_bsz is: padding would be computed beyond the budget"
        yield Problem(key, False, allowed, f"{key}=true")


def one_reward_is_chosen(c: PPOConfig) -> Problems:
    """reward.name and reward.path aren't both set."""
    if c.reward.name and c.reward.path:
        yield Problem("reward.name", c.reward.name, f"contradicts reward.path = {c.reward.path!r}", "reward.name=null")


_PPO_RULES: tuple[Callable[[PPOConfig], Problems], ...] = (
    the_engine_is_built,
    an_engine_replica_divides_the_ranks,
    an_engine_step_holds_its_sequences,
    training_and_rollout_share_devices,
    every_training_file_has_a_weight,
    one_reward_is_chosen,
    a_token_budget_holds_every_rollout,
    a_token_budget_counts_no_padding,
    settings_have_an_effect,
)


def num_ranks(config: PPOConfig | SFTConfig) -> int:
    """Return the number of ranks of the run."""
    return config.trainer.nnodes * config.trainer.n_gpus_per_node


def axes_make_sense(key: str, megatron: MegatronConfig, ranks: int, dtype: str) -> Problems:
    """Every rule of one model's axes that needs no model but its ``dtype``."""
    yield from axes_divide_the_ranks(key, megatron, ranks)
    yield from chunks_take_turns_on_a_pipeline(key, megatron)
    yield from overridden_fields_exist_and_are_free(key, megatron)
    if isinstance(megatron, TrainedMegatronConfig):
        yield from recomputation_is_complete(key, megatron.recompute)
        yield from an_optimizer_on_the_host_is_split_and_stays(key, megatron)
        yield from a_precision_aware_optimizer_has_its_place(key, megatron, dtype)


def ppo_problems(c: PPOConfig) -> list[Problem]:
    """Evaluate every rule of an RL run that needs no file."""
    models, ranks = c.actor_rollout_ref, num_ranks(c)
    problems = [p for rule in (*_PPO_RULES, *ALGORITHM_RULES) for p in rule(c)]
    problems += a_model_is_named("actor_rollout_ref.model", models.model)
    problems += betas_are_two_fractions("actor_rollout_ref.actor.optim", models.actor.optim)
    problems += the_last_learning_rate_is_reached(
        "actor_rollout_ref.actor.", models.actor.optim, models.actor.lr_scheduler
    )
    problems += axes_make_sense("actor_rollout_ref.actor.megatron", models.actor.megatron, ranks, models.model.dtype)
    if needs_reference(c):
        problems += axes_make_sense("actor_rollout_ref.ref.megatron", models.ref.megatron, ranks, models.model.dtype)
    if needs_critic(c):
        problems += a_model_is_named("critic.model", c.critic.model)
        problems += betas_are_two_fractions("critic.optim", c.critic.optim)
        problems += the_last_learning_rate_is_reached("critic.", c.critic.optim, c.critic.lr_scheduler)
        problems += axes_make_sense("critic.megatron", c.critic.megatron, ranks, models.model.dtype)
    if needs_reward_model(c):
        problems += axes_make_sense("reward.model.megatron", c.reward.model.megatron, ranks, models.model.dtype)
    problems += sinks_are_known(c.trainer.logger)
    return problems


def schedule_problems(key: str, scheduler: LRSchedulerConfig, total_steps: int) -> Problems:
    """Warm-up ends before the run does. total_steps: optimizer steps of the run."""
    if scheduler.warmup_steps >= total_steps:
        allowed = f"must be less than the run's {total_steps} optimizer steps"
        yield Problem(f"{key}.warmup_steps", scheduler.warmup_steps, allowed, "lower it, or train longer")


def ppo_model_problems(c: PPOConfig, shape: ModelShape) -> list[Problem]:
    """Evaluate the rules between the config and the model's config.json."""
    models = c.actor_rollout_ref
    problems = [*the_model_fits_its_axes("actor_rollout_ref.actor.megatron", shape, models.actor.megatron)]
    problems += a_policy_has_an_output_layer("actor_rollout_ref.model", models.model.path, shape)
    problems += stop_tokens_are_in_the_vocabulary(models.rollout.stop_token_ids, shape)
    key = "actor_rollout_ref.rollout.tensor_model_parallel_size"
    problems += a_tensor_split_fits(key, shape, models.rollout.tensor_model_parallel_size)
    engine_tp = models.rollout.tensor_model_parallel_size
    if shape.num_experts and shape.expert_ffn_size % engine_tp:
        allowed = f"must divide the {shape.expert_ffn_size} of an expert's feed-forward size"
        problems.append(Problem(key, engine_tp, allowed))
    if needs_reference(c):
        problems += the_model_fits_its_axes("actor_rollout_ref.ref.megatron", shape, models.ref.megatron)
    tokens, longest = c.data.max_prompt_length + c.data.max_response_length, shape.max_positions
    if tokens > longest:
        key = "data.max_prompt_length + data.max_response_length"
        problems.append(Problem(key, tokens, f"must be at most the model's max_position_embeddings = {longest}"))
    return problems


def critic_model_problems(c: PPOConfig, shape: ModelShape, vocab_size: int) -> list[Problem]:
    """Evaluate the rules between the config and the critic's config.json. vocab_size: of the actor's model."""
    problems = [*the_model_fits_its_axes("critic.megatron", shape, c.critic.megatron)]
    problems += the_actors_tokens_are_known("critic.model.path", c.critic.model.path, shape, vocab_size)
    return problems


def reward_model_problems(c: PPOConfig, shape: ModelShape, vocab_size: int) -> list[Problem]:
    """Evaluate the rules between the config and the reward model's config.json. vocab_size: of the actor's model."""
    key, path = "reward.model.path", c.reward.model.path
    problems = [*the_model_fits_its_axes("reward.model.megatron", shape, c.reward.model.megatron)]
    if not shape.value_head:
        allowed = "is a language model, which scores nothing; must be a *ForSequenceClassification model with one label"
        problems.append(Problem(key, path, allowed, "give a folder whose config.json and weights have a value head"))
    problems += the_actors_tokens_are_known(key, path, shape, vocab_size)
    tokens = c.data.max_prompt_length + c.data.max_response_length
    if tokens > shape.max_positions:
        allowed = f"its max_position_embeddings = {shape.max_positions} don't hold the longest rollout, {tokens} tokens"
        problems.append(Problem(key, path, allowed, "shorten data.max_prompt_length or data.max_response_length"))
    return problems


def sft_problems(c: SFTConfig) -> list[Problem]:
    """Evaluate every rule of an SFT run that needs no file."""
    return [
        *a_model_is_named("model", c.model),
        *betas_are_two_fractions("optim", c.optim),
        *the_last_learning_rate_is_reached("", c.optim, c.lr_scheduler),
        *axes_make_sense("megatron", c.megatron, num_ranks(c), c.model.dtype),
        *sinks_are_known(c.trainer.logger),
    ]


def sft_model_problems(c: SFTConfig, shape: ModelShape) -> list[Problem]:
    """Evaluate the rules between the config and the model's config.json."""
    problems = [*the_model_fits_its_axes("megatron", shape, c.megatron)]
    problems += a_policy_has_an_output_layer("model", c.model.path, shape)
    if c.data.max_length > shape.max_positions:
        allowed = f"must be at most the model's max_position_embeddings = {shape.max_positions}"
        problems.append(Problem("data.max_length", c.data.max_length, allowed))
    return problems


def without_followers(problems: Iterable[Problem]) -> list[Problem]:
    """Leave out what is said of other roles' axes where the same is said of the actor's: they follow."""
    kept = list(problems)
    said = {(p.key, str(p.value), p.allowed) for p in kept}

    def is_repeated(problem: Problem) -> bool:
        key, allowed = problem.key, problem.allowed
        for follower in ("actor_rollout_ref.ref.megatron.", "critic.megatron.", "reward.model.megatron."):
            key = key.replace(follower, _ACTOR_AXES)
            allowed = allowed.replace(follower, _ACTOR_AXES)
        return key != problem.key and (key, str(problem.value), allowed) in said

    return [problem for problem in kept if not is_repeated(problem)]


def require(problems: Iterable[Problem]) -> None:
    """Raise ConfigError if there are problems."""
    found = list(problems)
    if found:
        raise ConfigError(found)
