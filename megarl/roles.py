"""The models of a run as values: made once from the config, and handed to checks, plan, ranks and workers.

One more role is a section of the config, a function here, and a line in ``roles_of``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

from megarl.algorithm.needs import needs_critic, needs_reference, needs_reward_model
from megarl.batching.balance import TokenBudget, pass_cost, spread_rows
from megarl.batching.plan import BatchPlan, MiniBatch, Rows, cut, plan_batch, plan_update, split_rows
from megarl.batching.size import Batching, rollouts_a_pass, tokens_a_pass
from megarl.config.schema import (
    FSDP_STRATEGIES,
    SERVER,
    SGLANG,
    BackendConfig,
    CriticModelConfig,
    FsdpConfig,
    LRSchedulerConfig,
    MegatronConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    SFTConfig,
    TrainedFsdpConfig,
    TrainedMegatronConfig,
)
from megarl.errors import Absent, ConfigError, Problem
from megarl.parallel.layout import EngineLayout, Layout, layout_of, without_experts
from megarl.weights.adapters import Lora
from megarl.weights.model_shape import ModelShape

ACTOR, REF, CRITIC, REWARD_MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.ref", "critic", "reward.model"
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}

# Keys with their values, the first that isn't null decides.
_Keys = tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class ModelFacts:
    """A model that roles start from.

    key: section of the config that names it. init: ``pretrained`` or ``random``. known_shape: None where nothing is
    known of the model. folder: None where this machine has the facts of its architecture at most.
    """

    key: str
    path: str | None
    init: str = "pretrained"
    known_shape: ModelShape | None = None
    folder: str | None = None

    @property
    def shape(self) -> ModelShape:
        """The shape of a model that was found."""
        assert self.known_shape is not None, f"{self.key} was not found, which the checks report"
        return self.known_shape

    def here(self) -> str:
        """Return the folder of a model that a run is about to load."""
        assert self.folder is not None, "a run is checked with its files"
        return self.folder

    def with_value_head(self) -> ModelFacts:
        """Return the facts of the same model with a value head in place of its output layer."""
        return replace(self, known_shape=self.known_shape and self.known_shape.with_value_head())


FindModel = Callable[[ModelFacts], ModelFacts]
"""Completes the facts of which the config has the key, the path and the initialisation."""


@dataclass(frozen=True)
class Training:
    """AdamW with decoupled weight decay (none on norms and biases), clipping, a schedule, and mini-batches.

    clip_grad: largest global L2 norm of the gradient. skip_grad_norm: above which, before clipping, no step is taken.
    schedule: ``cosine``, ``constant`` or ``linear``, after a linear warm-up, down to ``min_lr`` at ``total_steps``,
    which are optimizer steps; 0 until the data is read. warmup_steps, warmup_ratio: as asked for, in optimizer steps or
    as a share of them. mini_batch_size: rollouts of an optimizer step.
    """

    lr: float
    min_lr: float
    weight_decay: float
    betas: tuple[float, ...]
    eps: float
    clip_grad: float
    schedule: str
    warmup_steps: int
    total_steps: int = 0
    mini_batch_size: int = 1
    epochs: int = 1
    shuffle: bool = False
    warmup_ratio: float | None = None
    skip_grad_norm: float | None = None

    def takes(self, grad_norm: float) -> bool:
        """Whether an optimizer step is taken for a gradient of this norm."""
        return math.isfinite(grad_norm) and (self.skip_grad_norm is None or grad_norm <= self.skip_grad_norm)

    @property
    def warm_up(self) -> int:
        """Optimizer steps of warm-up. In a run of known length the last one always has the peak at least."""
        asked = self.warmup_steps if self.warmup_ratio is None else int(self.warmup_ratio * self.total_steps)
        return min(asked, self.total_steps - 1) if self.total_steps else asked


@dataclass(frozen=True)
class Residency:
    """Where the tensors of a role wait between uses.

    The parts of a role that are offloaded wait in host memory; gradients are freed. optimizer_on_host: optimizer state
    never leaves the host.
    """

    param_offload: bool = False
    grad_offload: bool = False
    optimizer_offload: bool = False
    optimizer_on_host: bool = False


@dataclass(frozen=True)
class Role:
    """One model of a run.

    name: ``actor``, ``ref``, ``critic`` or ``reward_model``. key: section of the config, empty where the keys stand at
    the top. backend: section of the backend. packed: no padding is computed. fused_head: logits are computed together
    with their log-probs. update, training: None where nothing is trained. lora: adapters that alone are trained.
    """

    name: str
    key: str
    model: ModelFacts
    backend: BackendConfig
    layout: Layout
    dtype: str
    scoring: Batching
    update: Batching | None = None
    training: Training | None = None
    residency: Residency = field(default_factory=Residency)
    packed: bool = True
    fused_head: bool = False
    lora: Lora | None = None

    @property
    def shape(self) -> ModelShape:
        """The model's shape."""
        return self.model.shape

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one parameter in the model's dtype."""
        return DTYPE_BYTES[self.dtype]

    @property
    def is_trained(self) -> bool:
        """Whether the run changes the model."""
        return self.training is not None

    @property
    def backend_key(self) -> str:
        """The key of the backend's section."""
        return self.at("fsdp_config" if self.layout.is_fsdp else "megatron")

    def at(self, name: str) -> str:
        """Return the whole key of ``name`` in this role's section."""
        return f"{self.key}.{name}" if self.key else name

    def batch_plan(self, num_prompts: int, n: int) -> BatchPlan:
        """Return the batch arithmetic of a step. Raises ConfigError where it doesn't come out even."""
        assert self.update is not None and self.training is not None
        return plan_batch(
            num_prompts=num_prompts,
            n=n,
            mini_batch_size=self.training.mini_batch_size,
            micro_batch_size=self.update.micro_batch_size,
            dp_size=max(1, self.layout.dp),  # axes that don't divide the ranks are for another rule to report
            epochs=self.training.epochs,
            role=self.key,
            max_tokens=self.update.max_tokens,
        )

    def budget(self, batching: Batching) -> TokenBudget | None:
        """Return the budget of tokens that fills micro-batches, None where rollouts are counted."""
        if batching.max_tokens is None:
            return None
        shape, multiple = self.shape, self.layout.pp if self.layout.vpp > 1 else 1
        cost = pass_cost(shape.active_parameters, shape.num_layers * shape.num_heads * shape.head_dim)
        return TokenBudget(batching.max_tokens, cost, multiple, batching.sequence_multiple)

    def scoring_parts(self, lengths: Sequence[int]) -> tuple[tuple[Rows, ...], ...]:
        """Return the micro-batches of every data-parallel rank in a pass without training, as many on each.

        lengths: in tokens, of every row.
        """
        if budget := self.budget(self.scoring):
            return spread_rows(tuple(range(len(lengths))), lengths, self.layout.dp, budget)
        size, shares = self.scoring.micro_batch_size, split_rows(len(lengths), self.layout.dp)
        most = max(-(-len(rows) // size) for rows in shares)
        return tuple(cut(rows, size, most) for rows in shares)

    def optimizer_steps(self, lengths: Sequence[int], seed: int | None) -> tuple[MiniBatch, ...]:
        """Return the optimizer steps over rows of these ``lengths`` in tokens, in an order that follows from ``seed``.

        None keeps the order of the rows.
        """
        assert self.update is not None and self.training is not None
        budget = self.budget(self.update)
        return plan_update(
            len(lengths),
            self.training.mini_batch_size,
            self.update.micro_batch_size,
            self.layout.dp,
            self.training.epochs,
            seed,
            budget.over(lengths) if budget else None,
        )


def roles_of(c: PPOConfig | SFTConfig, find: FindModel) -> tuple[Role, ...]:
    """Return the roles of a run as a tuple, the actor first.

    Raises ConfigError where a role has no section of a backend.
    """
    if isinstance(c, SFTConfig):
        return (_demonstrated(c, find),)
    roles = [_actor(c, find)]
    if needs_reference(c):
        roles.append(_reference(c, find))
    if needs_critic(c):
        roles.append(_critic(c, find))
    if needs_reward_model(c):
        roles.append(_reward_model(c, find))
    return tuple(roles)


def pass_keys(c: PPOConfig) -> frozenset[str]:
    """Return the keys that decide the size of some pass, also of a reference or reward model that is switched off."""
    roles = [make(c, lambda facts: facts) for make in (_actor, _reference, _reward_model)]
    passes = [batching for role in roles for batching in (role.scoring, role.update)]
    return frozenset(batching.key for batching in passes if batching is not None)


def role_named(roles: Sequence[Role], name: str) -> Role | None:
    """Return the role of that name, None where the run has none."""
    return next((role for role in roles if role.name == name), None)


def batch_plan(c: PPOConfig | SFTConfig, role: Role) -> BatchPlan:
    """Return the batch arithmetic of a trained role. Raises ConfigError where it doesn't come out even."""
    n = c.actor_rollout_ref.rollout.n if isinstance(c, PPOConfig) else 1
    return role.batch_plan(c.data.train_batch_size, n)


def with_total_steps(c: PPOConfig | SFTConfig, roles: Sequence[Role], num_steps: int) -> tuple[Role, ...]:
    """Return the roles of a run of so many steps, whose schedules know how many optimizer steps they have."""
    idle = c.critic.warmup_steps if isinstance(c, PPOConfig) and role_named(roles, "critic") else 0

    def with_total(role: Role) -> Role:
        if role.training is None:
            return role
        steps = num_steps - idle if role.name == "actor" else num_steps
        total = steps * batch_plan(c, role).num_optimizer_steps
        return replace(role, training=replace(role.training, total_steps=total))

    return tuple(with_total(role) for role in roles)


def num_ranks(c: PPOConfig | SFTConfig) -> int:
    """Return the number of ranks of a run."""
    return c.trainer.nnodes * c.trainer.n_gpus_per_node


def is_served(c: PPOConfig) -> bool:
    """Return whether engines are in processes of their own, as SGLang always is."""
    rollout = c.actor_rollout_ref.rollout
    return rollout.placement == SERVER or rollout.name == SGLANG


def in_the_trainers_ranks(c: PPOConfig) -> str:
    """Return the overrides that put engines in processes of their own into the trainer's ranks."""
    rollout = c.actor_rollout_ref.rollout
    of_engine = ["actor_rollout_ref.rollout.name=vllm"] if rollout.name == SGLANG else []
    of_place = ["actor_rollout_ref.rollout.placement=colocated"] if rollout.placement == SERVER else []
    return " and ".join([*of_engine, *of_place])


def num_engine_ranks(c: PPOConfig) -> int:
    """Return the number of ranks that engines have, in the trainer's ranks or beside them."""
    rollout = c.actor_rollout_ref.rollout
    return rollout.nnodes * engine_ranks_per_node(c) if is_served(c) else num_ranks(c)


def engines_share_devices(c: PPOConfig) -> bool:
    """Whether engines are on the trainer's devices: in its ranks, or beside them in processes of their own."""
    return not is_served(c) or c.actor_rollout_ref.rollout.n_gpus_per_node == 0


def engine_ranks_per_node(c: PPOConfig) -> int:
    """Return the number of ranks on each node of engines in processes of their own."""
    rollout = c.actor_rollout_ref.rollout
    if rollout.n_gpus_per_node == 0:
        return c.trainer.n_gpus_per_node
    return rollout.n_gpus_per_node or rollout.tensor_model_parallel_size


def engine_layout(c: PPOConfig) -> EngineLayout:
    """Return the EngineLayout by which engines split the actor's model."""
    rollout = c.actor_rollout_ref.rollout
    return EngineLayout(rollout.tensor_model_parallel_size, rollout.expert_parallel_size)


def num_engines(c: PPOConfig) -> int:
    """Return the number of engines of a checked run."""
    return num_engine_ranks(c) // c.actor_rollout_ref.rollout.tensor_model_parallel_size


def _layout(c: PPOConfig | SFTConfig, backend: BackendConfig, model: ModelFacts) -> Layout:
    """Return the layout of a role; of a model that is known to have no experts nothing is split by their axes."""
    layout, shape = layout_of(backend, num_ranks(c)), model.known_shape
    return without_experts(layout) if shape is not None and not shape.num_experts else layout


def _actor(c: PPOConfig, find: FindModel) -> Role:
    actor, sizes, tokens = c.actor_rollout_ref.actor, _actor_sizes(c), _actor_tokens(c)
    backend, model = _actors_backend(c), _policy(c, find)
    layout, sequence = _layout(c, backend, model), _longest(c)
    return Role(
        "actor",
        ACTOR,
        model,
        backend,
        layout,
        c.actor_rollout_ref.model.dtype,
        _batching(sequence, layout, _actor_scores_by_tokens(c), sizes, tokens),
        _batching(sequence, layout, actor.use_dynamic_bsz, sizes[-1:], tokens[-1:]),
        training_of(
            actor.optim, actor.lr_scheduler, actor.ppo_mini_batch_size, epochs=actor.ppo_epochs, shuffle=actor.shuffle
        ),
        residency_of(backend),
        _packed(c.actor_rollout_ref.model, model),
        c.actor_rollout_ref.model.use_fused_kernels,
        _lora(c.actor_rollout_ref.model),
    )


def _reference(c: PPOConfig, find: FindModel) -> Role:
    ref = c.actor_rollout_ref.ref
    return replace(
        _frozen(
            c,
            "ref",
            REF,
            _policy(c, find),
            _backend_of(REF, ref.megatron, ref.fsdp_config),
            ref.log_prob_use_dynamic_bsz,
            (f"{REF}.log_prob_micro_batch_size_per_gpu", ref.log_prob_micro_batch_size_per_gpu),
            (f"{REF}.log_prob_max_token_len_per_gpu", ref.log_prob_max_token_len_per_gpu),
        ),
        fused_head=c.actor_rollout_ref.model.use_fused_kernels,
    )


def _critic(c: PPOConfig, find: FindModel) -> Role:
    critic, sequence = c.critic, _longest(c)
    backend = _backend_of(CRITIC, critic.megatron, critic.fsdp_config)
    model = find(_named("critic.model", critic.model)).with_value_head()
    layout = _layout(c, backend, model)
    sizes = (
        (f"{CRITIC}.forward_micro_batch_size_per_gpu", critic.forward_micro_batch_size_per_gpu),
        (f"{CRITIC}.ppo_micro_batch_size_per_gpu", critic.ppo_micro_batch_size_per_gpu),
    )
    tokens = (
        (f"{CRITIC}.forward_max_token_len_per_gpu", critic.forward_max_token_len_per_gpu),
        (f"{CRITIC}.ppo_max_token_len_per_gpu", critic.ppo_max_token_len_per_gpu),
    )
    return Role(
        "critic",
        CRITIC,
        model,
        backend,
        layout,
        c.actor_rollout_ref.model.dtype,
        _batching(sequence, layout, critic.use_dynamic_bsz, sizes, tokens),
        _batching(sequence, layout, critic.use_dynamic_bsz, sizes[-1:], tokens[-1:]),
        training_of(
            critic.optim,
            critic.lr_scheduler,
            critic.ppo_mini_batch_size,
            epochs=critic.ppo_epochs,
            shuffle=critic.shuffle,
        ),
        residency_of(backend),
        _packed(c.actor_rollout_ref.model, model),
    )


def _reward_model(c: PPOConfig, find: FindModel) -> Role:
    model = c.reward.model
    facts = find(ModelFacts(REWARD_MODEL, model.path))
    return _frozen(
        c,
        "reward_model",
        REWARD_MODEL,
        # Of a model that isn't here only the facts of the language model that it was made from are known.
        facts if facts.folder is not None else facts.with_value_head(),
        model.megatron or model.fsdp_config or _frozen_section(_actors_backend(c)),
        model.use_dynamic_bsz,
        (f"{REWARD_MODEL}.micro_batch_size_per_gpu", model.micro_batch_size_per_gpu),
        (f"{REWARD_MODEL}.forward_max_token_len_per_gpu", model.forward_max_token_len_per_gpu),
    )


def _frozen(
    c: PPOConfig,
    name: str,
    key: str,
    model: ModelFacts,
    backend: BackendConfig,
    by_tokens: bool | None,
    size: tuple[str, int | None],
    tokens: tuple[str, int | None],
) -> Role:
    """Return a role that only scores. by_tokens, size, tokens: its own; null ones are as the actor's log-prob pass."""
    layout, model_config = _layout(c, backend, model), c.actor_rollout_ref.model
    counts_tokens = _actor_scores_by_tokens(c) if by_tokens is None else by_tokens
    sizes, budgets = (size, *_actor_sizes(c)), (tokens, *_actor_tokens(c))
    scoring = _batching(_longest(c), layout, counts_tokens, sizes, budgets)
    residency, packed = residency_of(backend), _packed(model_config, model)
    return Role(name, key, model, backend, layout, model_config.dtype, scoring, residency=residency, packed=packed)


def _demonstrated(c: SFTConfig, find: FindModel) -> Role:
    """Return the actor of supervised fine-tuning: one optimizer step is a step."""
    backend: BackendConfig = c.fsdp_config if c.strategy in FSDP_STRATEGIES else c.megatron
    model = find(_named("model", c.model))
    layout = _layout(c, backend, model)
    size = rollouts_a_pass("data.micro_batch_size_per_gpu", c.data.micro_batch_size_per_gpu, c.data.max_length, layout)
    return Role(
        "actor",
        "",
        model,
        backend,
        layout,
        c.model.dtype,
        size,
        size,
        training_of(c.optim, c.lr_scheduler, c.data.train_batch_size),
        residency_of(backend),
        _packed(c.model, model),
        c.model.use_fused_kernels,
        _lora(c.model),
    )


def training_of(
    optim: OptimConfig,
    scheduler: LRSchedulerConfig,
    mini_batch_size: int,
    *,
    epochs: int = 1,
    shuffle: bool = False,
) -> Training:
    """Return the training that sections of the config describe."""
    return Training(
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        betas=optim.beta,
        eps=optim.eps,
        clip_grad=optim.clip_grad,
        skip_grad_norm=optim.skip_grad_norm,
        schedule=scheduler.type,
        warmup_steps=scheduler.warmup_steps or 0,
        mini_batch_size=mini_batch_size,
        epochs=epochs,
        shuffle=shuffle,
        warmup_ratio=scheduler.lr_warmup_steps_ratio,
    )


def _policy(c: PPOConfig, find: FindModel) -> ModelFacts:
    return find(_named("actor_rollout_ref.model", c.actor_rollout_ref.model))


def _named(key: str, model: ModelConfig | CriticModelConfig) -> ModelFacts:
    return ModelFacts(key, model.path, model.init)


def _packed(asked: ModelConfig, model: ModelFacts) -> bool:
    """Return whether sequences are packed: as asked, where the model's attention can be told which belong together."""
    return asked.use_remove_padding and not (model.known_shape and model.known_shape.own_attention)


def _lora(model: ModelConfig) -> Lora | None:
    return Lora(model.lora_rank, model.lora_alpha, model.target_modules) if model.lora_rank else None


def _actors_backend(c: PPOConfig) -> BackendConfig:
    return _backend_of(ACTOR, c.actor_rollout_ref.actor.megatron, c.actor_rollout_ref.actor.fsdp_config)


def _backend_of(key: str, *sections: BackendConfig | None) -> BackendConfig:
    """Return the section of a backend that a role has."""
    given = next((section for section in sections if section is not None), None)
    if given is None:
        fix = "--config-name=ppo_megatron_trainer, whose files have it; or fsdp_config, which those of ppo_trainer have"
        raise ConfigError([Problem(f"{key}.megatron", Absent(), "is missing", fix)])
    return given


def _frozen_section(backend: BackendConfig) -> BackendConfig:
    """Return the part of a section that concerns a model which isn't trained."""
    kind = MegatronConfig if isinstance(backend, MegatronConfig) else FsdpConfig
    return kind(**{field.name: getattr(backend, field.name) for field in fields(kind)})


def residency_of(backend: BackendConfig) -> Residency:
    """Return where the tensors of a role with this section of a backend wait between uses."""
    match backend:
        case TrainedMegatronConfig():
            return Residency(
                backend.param_offload, backend.grad_offload, backend.optimizer_offload, backend.optimizer_on_host
            )
        case TrainedFsdpConfig():
            # FSDP makes gradients anew in every optimizer step.
            return Residency(backend.param_offload, grad_offload=True, optimizer_offload=backend.optimizer_offload)
        case _:
            return Residency(backend.param_offload)


def _longest(c: PPOConfig) -> int:
    return c.data.max_prompt_length + c.data.max_response_length


def _actor_scores_by_tokens(c: PPOConfig) -> bool:
    actor = c.actor_rollout_ref.actor
    own = actor.log_prob_use_dynamic_bsz
    return actor.use_dynamic_bsz if own is None else own


def _actor_sizes(c: PPOConfig) -> _Keys:
    actor = c.actor_rollout_ref.actor
    return (
        (f"{ACTOR}.log_prob_micro_batch_size_per_gpu", actor.log_prob_micro_batch_size_per_gpu),
        (f"{ACTOR}.ppo_micro_batch_size_per_gpu", actor.ppo_micro_batch_size_per_gpu),
    )


def _actor_tokens(c: PPOConfig) -> _Keys:
    actor = c.actor_rollout_ref.actor
    return (
        (f"{ACTOR}.log_prob_max_token_len_per_gpu", actor.log_prob_max_token_len_per_gpu),
        (f"{ACTOR}.ppo_max_token_len_per_gpu", actor.ppo_max_token_len_per_gpu),
    )


def _batching(sequence: int, layout: Layout, by_tokens: bool, sizes: _Keys, tokens: _Keys) -> Batching:
    """Return the batching that the first key decides whose value isn't null."""
    key, value = next((key, value) for key, value in (tokens if by_tokens else sizes) if value is not None)
    return (tokens_a_pass if by_tokens else rollouts_a_pass)(key, value, sequence, layout)
