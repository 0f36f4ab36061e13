"""What must hold between keys. Each rule is a function named as the sentence it enforces; all are evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megarl.config.algorithm_rules import ALGORITHM_RULES, needs_critic, needs_reference
from megarl.config.model_shape import ModelShape
from megarl.config.schema import (
    CriticModelConfig,
    LRSchedulerConfig,
    MegatronConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    SFTConfig,
)
from megarl.errors import ConfigError, Problem, nearest

KNOWN_SINKS = ("console", "tensorboard", "jsonl", "wandb")

Problems = Iterator[Problem]


def a_model_is_named(key: str, model: ModelConfig | CriticModelConfig) -> Problems:
    """``model.path`` is set."""
    if not model.path:
        yield Problem(f"{key}.path", model.path, "must name a Hugging Face folder", f"{key}.path=/path/to/model")


def betas_are_two_fractions(key: str, optim: OptimConfig) -> Problems:
    """AdamW has two decay rates, each at least 0 and below 1; the last learning rate isn't above the first."""
    if len(optim.beta) != 2 or not all(0 <= b < 1 for b in optim.beta):
        yield Problem(f"{key}.beta", list(optim.beta), "must be two numbers, each at least 0 and less than 1")
    if optim.min_lr > optim.lr:
        yield Problem(f"{key}.min_lr", optim.min_lr, f"must be at most {key}.lr = {optim.lr:g}")


def axes_divide_the_ranks(key: str, megatron: MegatronConfig, ranks: int) -> Problems:
    """TP x PP divides the ranks."""
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    if ranks % (tp * pp):
        sizes = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        yield Problem(
            f"{key}.tensor_model_parallel_size x {key}.pipeline_model_parallel_size",
            f"{tp} x {pp} = {tp * pp}",
            f"must divide the {ranks} ranks (trainer.nnodes x trainer.n_gpus_per_node); products that do: {sizes}",
            f"trainer.n_gpus_per_node={tp * pp}, or other axis sizes",
        )


def sinks_are_known(sinks: tuple[str, ...]) -> Problems:
    """Every logger exists."""
    for sink in sinks:
        if sink not in KNOWN_SINKS:
            yield Problem("trainer.logger", sink, f"must be among {', '.join(KNOWN_SINKS)}", nearest(sink, KNOWN_SINKS))


def an_engine_replica_divides_the_ranks(c: PPOConfig) -> Problems:
    """The engine's TP divides the ranks."""
    tp, ranks = c.actor_rollout_ref.rollout.tensor_model_parallel_size, num_ranks(c)
    if ranks % tp:
        key = "actor_rollout_ref.rollout.tensor_model_parallel_size"
        yield Problem(key, tp, f"must divide the {ranks} ranks (trainer.nnodes x trainer.n_gpus_per_node)")


def training_and_rollout_share_devices(c: PPOConfig) -> Problems:
    """hybrid_engine is on."""
    if not c.actor_rollout_ref.hybrid_engine:
        key = "actor_rollout_ref.hybrid_engine"
        yield Problem(key, False, "this version generates on the training ranks only", f"{key}=true")


def one_reward_is_chosen(c: PPOConfig) -> Problems:
    """reward.name and reward.path aren't both set."""
    if c.reward.name and c.reward.path:
        yield Problem("reward.name", c.reward.name, f"contradicts reward.path = {c.reward.path!r}", "reward.name=null")


def the_model_fits_its_axes(key: str, shape: ModelShape, tp: int, pp: int) -> Problems:
    """Heads, key-value heads, feed-forward size and layers can be split as asked."""
    for what, size in (("attention heads", shape.num_heads), ("feed-forward size", shape.ffn_size)):
        if size % tp:
            yield Problem(f"{key}.tensor_model_parallel_size", tp, f"must divide the model's {size} {what}")
    if shape.num_kv_heads % tp and tp % shape.num_kv_heads:
        allowed = f"must divide the model's {shape.num_kv_heads} key-value heads, or be a multiple of them"
        yield Problem(f"{key}.tensor_model_parallel_size", tp, allowed)
    if shape.num_layers < pp:
        yield Problem(
            f"{key}.pipeline_model_parallel_size", pp, f"must be at most the model's {shape.num_layers} layers"
        )


_PPO_RULES: tuple[Callable[[PPOConfig], Problems], ...] = (
    an_engine_replica_divides_the_ranks,
    training_and_rollout_share_devices,
    one_reward_is_chosen,
)


def num_ranks(config: PPOConfig | SFTConfig) -> int:
    """Return the number of ranks of the run."""
    return config.trainer.nnodes * config.trainer.n_gpus_per_node


def check_ppo(c: PPOConfig) -> None:
    """Evaluate every rule of an RL run. Raises ConfigError with all problems."""
    models, ranks = c.actor_rollout_ref, num_ranks(c)
    problems = [p for rule in (*_PPO_RULES, *ALGORITHM_RULES) for p in rule(c)]
    problems += a_model_is_named("actor_rollout_ref.model", models.model)
    problems += betas_are_two_fractions("actor_rollout_ref.actor.optim", models.actor.optim)
    problems += axes_divide_the_ranks("actor_rollout_ref.actor.megatron", models.actor.megatron, ranks)
    problems += axes_divide_the_ranks("actor_rollout_ref.ref.megatron", models.ref.megatron, ranks)
    if needs_critic(c):
        problems += a_model_is_named("critic.model", c.critic.model)
        problems += betas_are_two_fractions("critic.optim", c.critic.optim)
        problems += axes_divide_the_ranks("critic.megatron", c.critic.megatron, ranks)
    problems += sinks_are_known(c.trainer.logger)
    if problems:
        raise ConfigError(problems)


def check_schedule(key: str, scheduler: LRSchedulerConfig, total_steps: int) -> None:
    """Raise ConfigError unless warm-up ends before the run does. total_steps: optimizer steps of the run."""
    if scheduler.warmup_steps >= total_steps:
        allowed = f"must be less than the run's {total_steps} optimizer steps"
        raise ConfigError(
            [Problem(f"{key}.warmup_steps", scheduler.warmup_steps, allowed, "lower it, or train longer")]
        )


def check_ppo_model(c: PPOConfig, shape: ModelShape) -> None:
    """Evaluate the rules between the config and the model's config.json. Raises ConfigError with all problems."""
    models = c.actor_rollout_ref
    actor, ref = models.actor.megatron, models.ref.megatron
    problems = [
        *the_model_fits_its_axes(
            "actor_rollout_ref.actor.megatron",
            shape,
            actor.tensor_model_parallel_size,
            actor.pipeline_model_parallel_size,
        ),
        *the_model_fits_its_axes("actor_rollout_ref.rollout", shape, models.rollout.tensor_model_parallel_size, 1),
    ]
    if needs_reference(c):
        tp, pp = ref.tensor_model_parallel_size, ref.pipeline_model_parallel_size
        problems += the_model_fits_its_axes("actor_rollout_ref.ref.megatron", shape, tp, pp)
    tokens, longest = c.data.max_prompt_length + c.data.max_response_length, shape.max_positions
    if tokens > longest:
        key = "data.max_prompt_length + data.max_response_length"
        problems.append(Problem(key, tokens, f"must be at most the model's max_position_embeddings = {longest}"))
    if problems:
        raise ConfigError(problems)


def check_critic_model(c: PPOConfig, shape: ModelShape, vocab_size: int) -> None:
    """Evaluate the rules between the config and the critic's config.json. vocab_size: of the actor's model."""
    tp, pp = c.critic.megatron.tensor_model_parallel_size, c.critic.megatron.pipeline_model_parallel_size
    problems = [*the_model_fits_its_axes("critic.megatron", shape, tp, pp)]
    if shape.vocab_size < vocab_size:
        allowed = f"its vocabulary of {shape.vocab_size} doesn't hold the actor's {vocab_size} tokens"
        problems.append(Problem("critic.model.path", c.critic.model.path, allowed, "take a model of the same family"))
    if problems:
        raise ConfigError(problems)


def check_sft_model(c: SFTConfig, shape: ModelShape) -> None:
    """Evaluate the rules between the config and the model's config.json. Raises ConfigError with all problems."""
    tp, pp = c.megatron.tensor_model_parallel_size, c.megatron.pipeline_model_parallel_size
    problems = [*the_model_fits_its_axes("megatron", shape, tp, pp)]
    if c.data.max_length > shape.max_positions:
        allowed = f"must be at most the model's max_position_embeddings = {shape.max_positions}"
        problems.append(Problem("data.max_length", c.data.max_length, allowed))
    if problems:
        raise ConfigError(problems)


def check_sft(c: SFTConfig) -> None:
    """Evaluate every rule of an SFT run. Raises ConfigError with all problems."""
    problems = [
        *a_model_is_named("model", c.model),
        *betas_are_two_fractions("optim", c.optim),
        *axes_divide_the_ranks("megatron", c.megatron, num_ranks(c)),
        *sinks_are_known(c.trainer.logger),
    ]
    if problems:
        raise ConfigError(problems)
