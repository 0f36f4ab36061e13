"""Rules of a run, each named after the sentence that it enforces; all are evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from megarl.catalog import SINKS
from megarl.checks.adapters import adapted_modules_exist, adapters_are_on_fsdp, adapters_have_modules
from megarl.checks.algorithm import ALGORITHM_RULES
from megarl.checks.axes import (
    RANKS,
    a_precision_aware_optimizer_has_its_place,
    a_tensor_split_fits,
    an_optimizer_on_the_host_is_split_and_stays,
    axes_divide_the_ranks,
    late_parameters_are_those_of_buckets,
    overridden_fields_exist_and_are_free,
    recomputation_is_complete,
    the_model_fits_its_axes,
)
from megarl.checks.backends import (
    a_model_outside_the_map_is_served,
    shards_and_sequences_divide_the_ranks,
    ulysses_splits_the_heads,
)
from megarl.checks.modes import (
    engines_on_the_trainers_devices_rest,
    groups_of_several_versions_are_comparable,
    rollouts_ahead_are_sampled_beside_training,
    rollouts_of_older_weights_are_corrected,
)
from megarl.checks.vllm_facts import VLLM_HEAD_SIZES, vllm_serves
from megarl.config.defaults import default_of
from megarl.config.schema import SGLANG, FsdpConfig, MegatronConfig, PPOConfig, SFTConfig, TrainedMegatronConfig
from megarl.errors import ConfigError, Problem, nearest
from megarl.parallel.environment import PlatformName
from megarl.parallel.layout import EngineLayout
from megarl.roles import Role, engine_layout, engine_ranks_per_node, is_served, num_ranks
from megarl.weights.model_shape import ModelShape
from megarl.weights.split import VLLM_VOCAB_MULTIPLE

Problems = Iterator[Problem]


def a_model_is_named(role: Role) -> Problems:
    """``model.path`` is set."""
    if not role.model.path:
        key = f"{role.model.key}.path"
        yield Problem(key, role.model.path, "must name a Hugging Face folder", f"{key}=/path/to/model")


def the_model_has_the_right_head(role: Role) -> Problems:
    """A model that gives log-probs is neither a critic nor a reward model; a reward model has a value head."""
    key, path, has_value_head = f"{role.model.key}.path", role.model.path, role.shape.value_head
    if role.name in ("actor", "ref") and has_value_head:
        allowed = "has a value head in place of the output layer, as a critic or reward model; must be a language model"
        yield Problem(key, path, allowed, f"critic.model.path={path} or reward.model.path={path}, if meant")
    if role.name == "reward_model" and not has_value_head:
        allowed = "is a language model, which scores nothing; must be a *ForSequenceClassification model with one label"
        yield Problem(key, path, allowed, "give a folder whose config.json and weights have a value head")


def the_actors_tokens_are_known(role: Role, vocab_size: int) -> Problems:
    """A model that reads rollouts has every token of the actor's ``vocab_size``."""
    if role.shape.vocab_size < vocab_size:
        allowed = f"its vocabulary of {role.shape.vocab_size} doesn't hold the actor's {vocab_size} tokens"
        yield Problem(f"{role.model.key}.path", role.model.path, allowed, "take a model of the same family")


def the_longest_rollout_fits_the_reward_model(role: Role) -> Problems:
    """The reward model has positions for the longest rollout."""
    tokens, positions = role.scoring.sequence_tokens, role.shape.max_positions
    if role.name == "reward_model" and tokens > positions:
        allowed = f"its max_position_embeddings = {positions} don't hold the longest rollout, {tokens} tokens"
        fix = "shorten data.max_prompt_length or data.max_response_length"
        yield Problem(f"{role.model.key}.path", role.model.path, allowed, fix)


def stop_tokens_are_in_the_vocabulary(token_ids: tuple[int, ...], shape: ModelShape) -> Problems:
    """A token that ends a response can be generated."""
    for token in token_ids:
        if not 0 <= token < shape.vocab_size:
            key = "actor_rollout_ref.rollout.stop_token_ids"
            yield Problem(key, token, f"must be of the model's {shape.vocab_size} tokens, counted from 0")


def betas_are_two_fractions(role: Role) -> Problems:
    """AdamW has two decay rates, each at least 0 and below 1."""
    training = role.training
    if training and (len(training.betas) != 2 or not all(0 <= b < 1 for b in training.betas)):
        yield Problem(
            role.at("optim.beta"), list(training.betas), "must be two numbers, each at least 0 and less than 1"
        )


def the_last_learning_rate_is_reached(role: Role) -> Problems:
    """The last learning rate isn't above the first."""
    training, key = role.training, role.at("optim.min_lr")
    if training and training.min_lr > training.lr:
        yield Problem(key, training.min_lr, f"must be at most {role.at('optim.lr')} = {training.lr:g}")


def a_warm_up_is_said_in_one_way(role: Role) -> Problems:
    """A warm-up is so many optimizer steps or a share of them."""
    training, steps = role.training, role.at("lr_scheduler.warmup_steps")
    default = default_of("actor_rollout_ref.actor.lr_scheduler.warmup_steps")
    if training and training.warmup_ratio is not None and training.warmup_steps not in (0, default):
        allowed = f"contradicts {steps} = {training.warmup_steps}: a warm-up is a share of the run or so many steps"
        yield Problem(role.at("lr_scheduler.lr_warmup_steps_ratio"), training.warmup_ratio, allowed, f"{steps}=null")


def sinks_are_known(sinks: tuple[str, ...]) -> Problems:
    """Every logger exists."""
    for sink in sinks:
        if sink not in SINKS:
            yield Problem("trainer.logger", sink, f"must be among {', '.join(SINKS)}", nearest(sink, SINKS))


def an_engine_replica_divides_the_ranks(c: PPOConfig) -> Problems:
    """The engine's TP divides the ranks; of engines in processes of their own those of a node."""
    tp = c.actor_rollout_ref.rollout.tensor_model_parallel_size
    ranks = engine_ranks_per_node(c) if is_served(c) else num_ranks(c)
    if ranks % tp:
        key = "actor_rollout_ref.rollout.tensor_model_parallel_size"
        whose = "devices of the engines (actor_rollout_ref.rollout.n_gpus_per_node)" if is_served(c) else RANKS
        yield Problem(key, tp, f"must divide the {ranks} {whose}")


def experts_are_spread_by_vllm(c: PPOConfig) -> Problems:
    """Of the engines, vLLM spreads experts over its ranks."""
    rollout = c.actor_rollout_ref.rollout
    if rollout.name == SGLANG and rollout.expert_parallel_size > 1:
        key = "actor_rollout_ref.rollout.expert_parallel_size"
        yield Problem(key, rollout.expert_parallel_size, "must be 1 where rollout.name is sglang", f"{key}=1")


def sglang_tells_what_it_sampled_from(c: PPOConfig) -> Problems:
    """Training samples from the whole distribution on SGLang, whose log-probs are of that."""
    rollout = c.actor_rollout_ref.rollout
    whole = {"top_p": (rollout.top_p, 1.0), "top_k": (rollout.top_k, None)}
    for name, (value, neutral) in whole.items() if rollout.name == SGLANG else ():
        if value != neutral:
            key, why = f"actor_rollout_ref.rollout.{name}", "SGLang doesn't renormalise the log-probs of what it keeps"
            shown = "null" if neutral is None else neutral
            yield Problem(key, value, f"must be {shown} on sglang: {why}", f"{key}={shown}, or rollout.name=vllm")


def an_engine_step_holds_its_sequences(c: PPOConfig) -> Problems:
    """An engine step has a token for each sequence that is generated at once: vLLM demands it."""
    tokens, sequences = c.actor_rollout_ref.rollout.max_num_batched_tokens, c.actor_rollout_ref.rollout.max_num_seqs
    if tokens is not None and tokens < sequences:
        key = "actor_rollout_ref.rollout.max_num_batched_tokens"
        allowed = f"must be at least actor_rollout_ref.rollout.max_num_seqs = {sequences}"
        yield Problem(key, tokens, allowed, f"{key}=null")


def a_prompt_fits_an_engine_step(c: PPOConfig, platform: PlatformName | None, longest_tokens: int) -> Problems:
    """On CPU an engine step holds the longest prompt and response: prompts aren't cut there, as seeds don't bear it."""
    tokens = c.actor_rollout_ref.rollout.max_num_batched_tokens
    if platform == "cpu" and tokens is not None and tokens < longest_tokens:
        key = "actor_rollout_ref.rollout.max_num_batched_tokens"
        sizes = f"data.max_prompt_length + data.max_response_length = {longest_tokens}"
        yield Problem(key, tokens, f"must be at least {sizes} on CPU, where no prompt is cut", f"{key}=null")


def the_placement_of_engines_is_said_once(c: PPOConfig) -> Problems:
    """hybrid_engine is on: it is verl's, and rollout.placement says the same and more."""
    if not c.actor_rollout_ref.hybrid_engine:
        key, fix = "actor_rollout_ref.hybrid_engine", "actor_rollout_ref.rollout.placement=server"
        yield Problem(key, False, "where engines are is said by rollout.placement", f"{fix} and {key}=true")


def every_training_file_has_a_weight(c: PPOConfig) -> Problems:
    """Weights of files are as many as the files, and positive."""
    weights, files = c.data.train_file_weights, c.data.train_files
    if weights is not None and (len(weights) != len(files) or not all(0 < w < math.inf for w in weights)):
        allowed = f"must be a positive number for each of the {len(files)} data.train_files"
        yield Problem("data.train_file_weights", list(weights), allowed, "data.train_file_weights=null")


def a_token_budget_holds_every_rollout(roles: Sequence[Role]) -> Problems:
    """The longest kind of rollout fits a micro-batch by itself, in every pass that counts tokens."""
    passes = [size for role in roles for size in (role.update, role.scoring) if size is not None]
    too_small = [p for p in passes if p.max_tokens is not None and p.max_tokens < p.longest_tokens]
    for size in {p.key: p for p in too_small}.values():
        longest = f"data.max_prompt_length + data.max_response_length = {size.sequence_tokens}"
        allowed = f"must hold the longest rollout by itself: {longest} needs at least {size.least_value}"
        yield Problem(size.key, size.value, allowed, f"{size.key}={size.least_value}")


def a_token_budget_counts_no_padding(roles: Sequence[Role]) -> Problems:
    """Sequences are packed where micro-batches are filled up to a number of tokens."""
    passes = [size for role in roles if not role.packed for size in (role.update, role.scoring) if size is not None]
    if any(size.max_tokens is not None for size in passes):
        key = "actor_rollout_ref.model.use_remove_padding"
        allowed = "must be true where use_dynamic_bsz is: padding would be computed beyond the budget"
        fix = f"{key}=true; of a model that attends in a way of its own, use_dynamic_bsz=false"
        attends_alone = any(role.model.known_shape and role.model.known_shape.own_attention for role in roles)
        yield Problem(key, False, allowed, fix if attends_alone else f"{key}=true")


def one_reward_is_chosen(c: PPOConfig) -> Problems:
    """reward.name and reward.path aren't both set."""
    if c.reward.name and c.reward.path:
        yield Problem("reward.name", c.reward.name, f"contradicts reward.path = {c.reward.path!r}", "reward.name=null")


_PPO_RULES: tuple[Callable[[PPOConfig], Problems], ...] = (
    sglang_tells_what_it_sampled_from,
    experts_are_spread_by_vllm,
    an_engine_replica_divides_the_ranks,
    an_engine_step_holds_its_sequences,
    the_placement_of_engines_is_said_once,
    engines_on_the_trainers_devices_rest,
    rollouts_ahead_are_sampled_beside_training,
    rollouts_of_older_weights_are_corrected,
    groups_of_several_versions_are_comparable,
    every_training_file_has_a_weight,
    one_reward_is_chosen,
    *ALGORITHM_RULES,
)


def axes_make_sense(role: Role) -> Problems:
    """The axes of a role agree with each other and with the ranks."""
    key, backend = role.backend_key, role.backend
    if isinstance(backend, MegatronConfig):
        yield from axes_divide_the_ranks(key, backend, role.layout.world_size)
        yield from overridden_fields_exist_and_are_free(key, backend)
    if isinstance(backend, FsdpConfig):
        yield from shards_and_sequences_divide_the_ranks(key, backend, role.layout.world_size)
    if isinstance(backend, TrainedMegatronConfig):
        yield from recomputation_is_complete(key, backend.recompute)
        yield from an_optimizer_on_the_host_is_split_and_stays(key, backend)
        yield from a_precision_aware_optimizer_has_its_place(key, backend, role.dtype)
        yield from late_parameters_are_those_of_buckets(key, backend)


def run_problems(
    c: PPOConfig | SFTConfig, roles: Sequence[Role], platform: PlatformName | None = None
) -> list[Problem]:
    """Return the problems of a run that need no file. platform: None leaves out what one platform alone demands."""
    problems = [p for rule in _PPO_RULES for p in rule(c)] if isinstance(c, PPOConfig) else []
    if isinstance(c, PPOConfig):
        problems += a_prompt_fits_an_engine_step(c, platform, roles[0].scoring.sequence_tokens)
    problems += a_token_budget_holds_every_rollout(roles)
    problems += a_token_budget_counts_no_padding(roles)
    for models in {role.model.key: role for role in reversed(roles)}.values():
        problems += a_model_is_named(models)
    for role in roles:
        problems += betas_are_two_fractions(role)
        problems += the_last_learning_rate_is_reached(role)
        problems += a_warm_up_is_said_in_one_way(role)
        problems += axes_make_sense(role)
        problems += adapters_are_on_fsdp(role)
    model = c.actor_rollout_ref.model if isinstance(c, PPOConfig) else c.model
    problems += adapters_have_modules(roles[0].model.key, model)
    problems += sinks_are_known(c.trainer.logger)
    return without_followers(problems, roles)


def model_problems(
    c: PPOConfig | SFTConfig, roles: Sequence[Role], platform: PlatformName | None = None
) -> list[Problem]:
    """Return the problems between a config and the config.json of its models, of those that are known.

    platform: as in ``run_problems``.
    """
    problems: list[Problem] = []
    actor, known = roles[0], [role for role in roles if role.model.known_shape is not None]
    for role in known:
        if isinstance(role.backend, MegatronConfig):
            problems += the_model_fits_its_axes(role.backend_key, role.shape, role.backend)
        else:
            problems += ulysses_splits_the_heads(role.backend_key, role.shape, role.backend)
        problems += adapted_modules_exist(role)
        problems += the_longest_rollout_fits_the_reward_model(role)
        if actor in known:
            problems += the_actors_tokens_are_known(role, actor.shape.vocab_size)
    outside = [p for role in known if not role.shape.is_mapped for p in a_model_outside_the_map_is_served(role)]
    problems += {problem.key: problem for problem in reversed(outside)}.values()
    for role in {role.model.key: role for role in reversed(known)}.values():
        problems += the_model_has_the_right_head(role)
    if actor in known:
        problems += _engine_problems(c, actor, platform) if isinstance(c, PPOConfig) else []
        problems += the_longest_sequence_fits_the_model(c, actor.shape)
    return without_followers(problems, roles)


def _engine_problems(c: PPOConfig, actor: Role, platform: PlatformName | None) -> Problems:
    """Yield the problems between the engine and the model that it runs."""
    shape, rollout = actor.shape, c.actor_rollout_ref.rollout
    yield from stop_tokens_are_in_the_vocabulary(rollout.stop_token_ids, shape)
    yield from the_engine_splits_the_model("actor_rollout_ref.rollout", shape, engine_layout(c))
    yield from the_engine_serves_the_heads(actor, platform)


def the_engine_splits_the_model(section: str, shape: ModelShape, engine: EngineLayout) -> Problems:
    """All that vLLM splits divides by the ranks of a replica. section: of the rollout."""
    key, tp = f"{section}.tensor_model_parallel_size", engine.tp
    yield from a_tensor_split_fits(key, shape, tp)
    spread = f"{section}.expert_parallel_size"
    if engine.ep not in (1, tp):
        yield Problem(spread, engine.ep, f"must be 1 or {key}, {tp}: vLLM spreads experts over all ranks or over none")
    elif shape.num_experts % engine.ep:
        yield Problem(spread, engine.ep, f"must divide the model's {shape.num_experts} experts", f"{spread}=1")
    elif shape.num_experts and shape.expert_ffn_size % engine.expert_tp:
        allowed = f"must divide the {shape.expert_ffn_size} of an expert's feed-forward size"
        whole = "" if shape.num_experts % tp else f"{spread}={tp}, which keeps experts whole"
        yield Problem(key, tp, allowed, whole)
    if shape.shared_expert_ffn_size % tp:
        size = shape.shared_expert_ffn_size
        yield Problem(key, tp, f"must divide the shared expert's feed-forward size of {size}")
    padded = -(-shape.vocab_size // VLLM_VOCAB_MULTIPLE) * VLLM_VOCAB_MULTIPLE
    if padded % tp:
        allowed = (
            f"must divide the model's vocabulary of {shape.vocab_size} padded to a multiple of {VLLM_VOCAB_MULTIPLE}, "
            f"{padded}: vLLM demands it"
        )
        yield Problem(key, tp, allowed)


def the_engine_serves_the_heads(actor: Role, platform: PlatformName | None) -> Problems:
    """vLLM has attention for heads of the model's size, and takes that size from the same field."""
    shape, key, path = actor.shape, f"{actor.model.key}.path", actor.model.path
    if platform and not vllm_serves(shape.head_dim, platform):
        served = VLLM_HEAD_SIZES[platform]
        allowed = f"its head_dim = {shape.head_dim} is none that vLLM serves on {platform}: {served}"
        yield Problem(key, path, allowed, "take a model with heads of such a size")
    if shape.family.startswith("Qwen2") and shape.head_dim * shape.num_heads != shape.hidden_size:
        allowed = (
            f"its head_dim = {shape.head_dim} x {shape.num_heads} heads isn't its hidden_size = {shape.hidden_size}, "
            f"which is all that vLLM serves of {shape.family}"
        )
        yield Problem(key, path, allowed, "take a model whose heads are its hidden size together")


def the_longest_sequence_fits_the_model(c: PPOConfig | SFTConfig, shape: ModelShape) -> Problems:
    """The model has positions for the longest prompt and response, or chat."""
    if isinstance(c, PPOConfig):
        key, tokens = (
            "data.max_prompt_length + data.max_response_length",
            c.data.max_prompt_length + c.data.max_response_length,
        )
    else:
        key, tokens = "data.max_length", c.data.max_length
    if tokens > shape.max_positions:
        yield Problem(key, tokens, f"must be at most the model's max_position_embeddings = {shape.max_positions}")


def without_followers(problems: Iterable[Problem], roles: Sequence[Role]) -> list[Problem]:
    """Return the problems without those of other roles' axes that are said of the actor's: they follow its values."""
    kept, actors = list(problems), f"{roles[0].backend_key}."
    said = {(p.key, str(p.value), p.allowed) for p in kept}

    def is_repeated(problem: Problem) -> bool:
        key, allowed = problem.key, problem.allowed
        for follower in (f"{role.backend_key}." for role in roles[1:]):
            key, allowed = key.replace(follower, actors), allowed.replace(follower, actors)
        return key != problem.key and (key, str(problem.value), allowed) in said

    return [problem for problem in kept if not is_repeated(problem)]


def require(problems: Iterable[Problem]) -> None:
    """Raise ConfigError if there are problems."""
    found = list(problems)
    if found:
        raise ConfigError(found)
