"""Every key a user can set, with its type, range, unit and meaning. YAML holds values alone; this is the one source.

``key(...)`` attaches what a value must satisfy; ``megarl.config.build`` checks it and names every mistake.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megarl.catalog import (
    AGGREGATIONS,
    CORRECTION_PRESETS,
    CRITERIA,
    KL_CONTROLLERS,
    KL_ESTIMATORS,
    KL_LOSSES,
    POLICY_LOSSES,
)


def key(doc: str, *, choices: tuple[str, ...] = (), low: float | None = None, above: float | None = None,
        high: float | None = None) -> Any:  # fmt: skip
    """Describe a key: ``low`` <= value <= ``high``, value > ``above``, or one of ``choices``."""
    return field(metadata={"doc": doc, "choices": choices, "low": low, "above": above, "high": high})


FSDP_STRATEGIES = ("fsdp", "fsdp2")
ALL_RANKS = -1  # in fsdp_size, as verl has it
COLOCATED, SERVER = PLACEMENTS = ("colocated", "server")
FIRST, ALWAYS, NEVER = VERIFIED = ("first", "always", "never")
VLLM, SGLANG = ENGINES = ("vllm", "sglang")
SYNC, ONE_STEP_OFF, ASYNC = MODES = ("sync", "one_step_off", "async")
OVERLONG = ("filter", "error", "left", "right", "middle")
MOMENT_DTYPES = ("float32", "bfloat16")
ON_ALL_FAILED = ("stop", "continue")
LARGEST_REWARD = 3.4e38  # rewards are float32
# Far above any run's, and small enough to tell a slip of the finger: 1e6 for 1e-6, 300 for 3e-4.
MOST_TOKENS, MOST_ROWS, MOST_NODES, MOST_PROCESSES = 2**24, 2**20, 2**14, 2**10
LONGEST_S = 604_800.0


@dataclass(frozen=True)
class DataConfig:
    """Prompts."""

    train_files: tuple[str, ...] = key("parquet files of prompts to train on; several are merged")
    train_file_weights: tuple[float, ...] | None = key(
        "shares of every step, a number a file; null: every row once in an epoch"
    )
    val_files: tuple[str, ...] = key("parquet files of prompts to validate on")
    train_batch_size: int = key("prompts in a step, over all ranks; rollouts = this x rollout.n", low=1, high=MOST_ROWS)
    val_batch_size: int = key("prompts of one validation pass through the engine", low=1, high=MOST_ROWS)
    max_val_prompts: int | None = key("validate on the first so many prompts; null: on all", low=1)
    max_prompt_length: int = key("tokens of the longest prompt", low=1, high=MOST_TOKENS)
    max_response_length: int = key("tokens of the longest response", low=1, high=MOST_TOKENS)
    train_shuffle: bool = key("whether each epoch has an order of its own")
    val_shuffle: bool = key("whether validation prompts are shuffled")
    prompt_key: str = key("column with the prompt: chat messages or a string")
    overlong_prompts: str = key("longer prompts: leave out, refuse, or cut at one end or within", choices=OVERLONG)
    apply_chat_template_kwargs: Mapping[str, Any] = key("arguments of the chat template, as enable_thinking")


@dataclass(frozen=True)
class SFTDataConfig:
    """Demonstrations."""

    train_files: tuple[str, ...] = key("parquet files of examples, which are chats, to train on")
    val_files: tuple[str, ...] = key("parquet files of examples to measure the loss on; may be empty")
    train_batch_size: int = key("examples in an optimizer step, over all ranks", low=1, high=MOST_ROWS)
    micro_batch_size_per_gpu: int = key("examples of a forward/backward on one data-parallel rank", low=1)
    max_length: int = key("tokens of the longest chat", low=2, high=MOST_TOKENS)
    messages_key: str = key("column with the chat messages")
    overlong_examples: str = key("what to do with longer examples", choices=("filter", "error"))
    apply_chat_template_kwargs: Mapping[str, Any] = key("arguments of the chat template, as enable_thinking")
    trained_turns: str = key("the assistant's turns to train on", choices=("all", "last"))
    response_start: str = key(
        "where a trained turn starts: where a rollout's prompt ends, or where the template's rendering leaves it",
        choices=("prompt", "rendering"),
    )
    train_shuffle: bool = key("whether each epoch has an order of its own")


@dataclass(frozen=True)
class ModelConfig:
    """The model all roles start from."""

    path: str | None = key("a Hugging Face folder, or a name already in the local Hugging Face cache")
    init: str = key("weights from the folder, or drawn from config.json alone", choices=("pretrained", "random"))
    dtype: str = key("of weights and activations; bfloat16 keeps float32 main weights", choices=("bfloat16", "float32"))
    use_remove_padding: bool = key("pack sequences end to end, so that no padding token is computed")
    use_fused_kernels: bool = key("compute logits with their log-probs block by block, keep none, compute them twice")
    lora_rank: int = key("columns of a low-rank adapter, of which the actor trains nothing else; 0: none", low=0)
    lora_alpha: int = key("an adapter's product counts this / lora_rank times", low=1)
    target_modules: tuple[str, ...] = key(
        "linear modules of the layers with an adapter, by the ends of their names; all-linear: every one"
    )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW."""

    lr: float = key("peak learning rate", low=0.0, high=1.0)
    min_lr: float = key("learning rate at the end of the schedule", low=0.0, high=1.0)
    weight_decay: float = key("decoupled weight decay; none on norms and biases", low=0.0, high=10.0)
    beta: tuple[float, ...] = key("decay rates of the two moments")
    eps: float = key("added to the denominator", above=0.0, high=1.0)
    clip_grad: float = key("largest global L2 norm of the gradient", above=0.0)
    skip_grad_norm: float | None = key(
        "norm of the gradient, before clipping, above which a step is not taken: trainer.on_non_finite says what then; "
        "null: none",
        above=0.0,
    )


@dataclass(frozen=True)
class LRSchedulerConfig:
    """Learning-rate schedule."""

    type: str = key("shape after warm-up", choices=("cosine", "constant", "linear"))
    warmup_steps: int | None = key("optimizer steps of linear warm-up; null: none, or by the ratio", low=0)
    lr_warmup_steps_ratio: float | None = key("share of the run's optimizer steps instead", low=0.0, high=1.0)


@dataclass(frozen=True)
class MegatronConfig:
    """Axes of one model on Megatron, and where it waits between uses."""

    tensor_model_parallel_size: int = key("ranks that share every layer", low=1)
    pipeline_model_parallel_size: int = key("stages the layers are split into", low=1)
    virtual_pipeline_model_parallel_size: int | None = key("chunks of a stage that take turns; null: no", low=2)
    context_parallel_size: int = key("ranks that share every sequence", low=1)
    expert_model_parallel_size: int = key("ranks that the experts of a layer are split over", low=1)
    expert_tensor_parallel_size: int | None = key("ranks that share every expert; null: as the layers", low=1)
    sequence_parallel: bool = key("split activations between tensor-parallel regions too; on where TP > 1")
    param_offload: bool = key("keep parameters in host memory between uses")
    override_transformer_config: Mapping[str, Any] = key("fields of megatron's TransformerConfig, by its own names")


@dataclass(frozen=True)
class RecomputeConfig:
    """Which activations are computed again in the backward pass, as megatron's options of the same names."""

    granularity: str | None = key(
        "selective: the attention core; full: whole layers; null: nothing", choices=("selective", "full")
    )
    method: str | None = key(
        "how full picks layers: in runs of num_layers, or the first num_layers", choices=("uniform", "block")
    )
    num_layers: int | None = key("layers of a recomputed run (uniform), or recomputed layers of a stage (block)", low=1)


@dataclass(frozen=True)
class TrainedMegatronConfig(MegatronConfig):
    """Axes of a model that is trained."""

    use_distributed_optimizer: bool = key("split optimizer state over data-parallel ranks")
    overlap_grad_reduce: bool = key("reduce gradients bucket by bucket while the backward pass computes")
    overlap_param_gather: bool = key(
        "gather stepped parameters bucket by bucket while the next forward pass computes; the distributed optimizer's"
    )
    ddp_bucket_size: int | None = key(
        "parameters of such a bucket; null: megatron's 40 million, or a million for each data-parallel rank if more",
        low=1,
    )
    grad_offload: bool = key("free the gradient buffers between updates")
    optimizer_offload: bool = key("keep optimizer state in host memory between updates")
    optimizer_on_host: bool = key("Adam steps on the host, where main parameters and moments stay")
    use_precision_aware_optimizer: bool = key(
        "Transformer Engine's Adam, which keeps of a main parameter only the 16 bits that the bfloat16 one lacks"
    )
    exp_avg_dtype: str = key("of the first moment where use_precision_aware_optimizer", choices=MOMENT_DTYPES)
    exp_avg_sq_dtype: str = key("of the second moment where use_precision_aware_optimizer", choices=MOMENT_DTYPES)
    recompute: RecomputeConfig = key("activations to compute again instead of keeping them")


@dataclass(frozen=True)
class FsdpConfig:
    """How one model is sharded on FSDP, and where it waits between uses."""

    fsdp_size: int = key("ranks that share a copy of the model; -1: all", low=ALL_RANKS)
    ulysses_sequence_parallel_size: int = key("ranks that share every sequence, by heads in attention", low=1)
    reshard_after_forward: bool = key("free a layer's gathered parameters until the backward pass, or the next pass")
    param_offload: bool = key("keep parameters in host memory between uses")


@dataclass(frozen=True)
class TrainedFsdpConfig(FsdpConfig):
    """How a model that is trained is sharded on FSDP."""

    optimizer_offload: bool = key("keep optimizer state in host memory between updates")
    enable_gradient_checkpointing: bool = key("compute the activations of a layer again instead of keeping them")


BackendConfig = MegatronConfig | FsdpConfig
"""The section that says how a role's backend lays its model out; trained roles have the classes that inherit these."""


@dataclass(frozen=True)
class PolicyLossConfig:
    """Settings that single policy losses read; see megarl.algorithm.policy_loss."""

    tau_positive: float = key("steepness of the gate where the advantage is positive (sapo)", above=0.0, high=100.0)
    tau_negative: float = key("steepness of the gate where it is negative (sapo)", above=0.0, high=100.0)
    cov_share: float = key("share of a step's tokens to choose by covariance (clip_cov, kl_cov)", above=0.0, high=1.0)
    cov_low: float = key("least covariance of a chosen token (clip_cov)")
    cov_high: float = key("largest covariance of a chosen token (clip_cov)")
    cov_kl_coef: float = key("weight of the chosen tokens' KL (kl_cov)", low=0.0, high=100.0)


@dataclass(frozen=True)
class ActorConfig:
    """The policy that is trained. The section of its backend is there, and no other's."""

    strategy: str = key("training backend", choices=("megatron", *FSDP_STRATEGIES))
    megatron: TrainedMegatronConfig | None = key("axes, where strategy is megatron")
    fsdp_config: TrainedFsdpConfig | None = key("sharding and offload, where strategy is fsdp or fsdp2")

    optim: OptimConfig = key("optimizer")
    lr_scheduler: LRSchedulerConfig = key("schedule")
    ppo_mini_batch_size: int = key("rollouts of an optimizer step, over all ranks", low=1)
    ppo_micro_batch_size_per_gpu: int = key("rollouts of a forward/backward on one data-parallel rank", low=1)
    log_prob_micro_batch_size_per_gpu: int | None = key("rollouts of a log-prob pass; null: as the micro-batch", low=1)
    use_dynamic_bsz: bool = key("fill micro-batches up to a number of tokens instead of counting rollouts")
    ppo_max_token_len_per_gpu: int = key("tokens of a forward/backward on one device where use_dynamic_bsz", low=1)
    log_prob_use_dynamic_bsz: bool | None = key("the same in a log-prob pass; null: as use_dynamic_bsz")
    log_prob_max_token_len_per_gpu: int | None = key(
        "tokens of a log-prob pass on one device; null: as ppo_max_token_len_per_gpu", low=1
    )
    ppo_epochs: int = key("passes over the rollouts of a step", low=1, high=1000)
    shuffle: bool = key("whether mini-batches are drawn in random order")
    clip_ratio: float | None = key(
        "clip range of the probability ratio, both sides; null: the policy loss's own", above=0.0, high=1.0
    )
    clip_ratio_low: float | None = key("lower side alone; null: clip_ratio", above=0.0, high=1.0)
    clip_ratio_high: float | None = key("upper side alone; null: clip_ratio", above=0.0, high=10.0)
    clip_ratio_c: float | None = key(
        "dual clip: bound of the ratio where the advantage is negative; null: none", above=1.0, high=1000.0
    )
    policy_loss: str = key(f"policy loss: {', '.join(POLICY_LOSSES)}, or one of algorithm.path")
    policy_loss_settings: PolicyLossConfig = key("settings of some policy losses")
    entropy_coeff: float = key("weight of the entropy bonus", low=0.0, high=10.0)
    use_kl_loss: bool | None = key(
        "add KL to the reference to the loss; null: where grpo has no other and isn't kl_free"
    )
    kl_loss_coef: float = key("weight of that KL", low=0.0, high=100.0)
    kl_loss_type: str = key("estimator of that KL; + has its value and the unbiased gradient of mse", choices=KL_LOSSES)
    loss_agg_mode: str | None = key("how token losses become one; null: the policy loss's own", choices=AGGREGATIONS)
    separate_old_log_probs: bool = key(
        "compute old log-probs in a pass of their own also where the update's own would do"
    )


@dataclass(frozen=True)
class RefConfig:
    """The frozen reference; built only where a KL term needs it."""

    log_prob_micro_batch_size_per_gpu: int | None = key("rollouts of a log-prob pass; null: as the actor's", low=1)
    log_prob_use_dynamic_bsz: bool | None = key("fill micro-batches up to a number of tokens; null: as the actor's")
    log_prob_max_token_len_per_gpu: int | None = key("those tokens, on one device; null: as the actor's", low=1)
    megatron: MegatronConfig | None = key("axes, on Megatron")
    fsdp_config: FsdpConfig | None = key("sharding and offload, on FSDP")


@dataclass(frozen=True)
class ValSamplingConfig:
    """How validation samples."""

    temperature: float = key("0 is greedy", low=0.0, high=10.0)
    top_p: float = key("probability mass kept", above=0.0, high=1.0)
    top_k: int | None = key("tokens kept; null: all", low=1)
    n: int = key("rollouts per prompt", low=1, high=MOST_ROWS)


@dataclass(frozen=True)
class SglangConfig:
    """Where SGLang is installed: in an environment of its own, since its packages and vLLM's exclude each other."""

    python: str | None = key("interpreter of that environment (make sglang: .venv-sglang/bin/python); null: this one")


@dataclass(frozen=True)
class RolloutConfig:
    """The engine that generates, and how it samples."""

    name: str = key("engine", choices=ENGINES)
    placement: str = key(
        "where engines are: in the ranks that train, or in processes of their own, beside them or on other nodes, as "
        "sglang always is",
        choices=PLACEMENTS,
    )
    sglang: SglangConfig = key("SGLang's environment")
    nnodes: int = key(
        "nodes of engines in processes of their own; more than 1 on a Ray cluster or by MEGARL_ENGINE_HOSTS",
        low=1,
        high=MOST_NODES,
    )
    n_gpus_per_node: int | None = key(
        "devices of a node for engines in processes of their own, beside trainer.n_gpus_per_node; null: of one engine; "
        "0: the trainer's, which the engines give back while it trains",
        low=0,
        high=MOST_PROCESSES,
    )
    temperature: float = key("of sampling; the trainer's log-probs use it too", above=0.0, high=10.0)
    top_p: float = key("probability mass kept", above=0.0, high=1.0)
    top_k: int | None = key("tokens kept; null: all", low=1)
    n: int = key("rollouts per prompt", low=1, high=MOST_ROWS)
    stop_token_ids: tuple[int, ...] = key("tokens that end a response besides the model's own")
    ignore_eos: bool = key("go on past the end-of-sequence token")
    gpu_memory_utilization: float = key("share of a device's memory for the engine", above=0.0, high=1.0)
    tensor_model_parallel_size: int = key("ranks of one engine replica", low=1)
    expert_parallel_size: int = key(
        "ranks of a replica that a layer's experts are spread over, whole: all of them, or 1, where each has a part of "
        "every expert",
        low=1,
    )
    max_num_batched_tokens: int | None = key("tokens of one engine step; null: the engine's choice", low=1)
    max_num_seqs: int = key("responses generated at once by a replica", low=1, high=MOST_ROWS)
    enforce_eager: bool = key("no CUDA graphs (always so on CPU)")
    disable_log_stats: bool = key("silence the engine's own statistics")
    free_cache_engine: bool = key("give the engine's memory back while training")
    reproducible: bool | None = key(
        "a sample depends on its prompt, its seed and its number alone, whatever is generated beside it; null: on CPU. "
        "false lets the engine use its fast sampler, its second model runner and asynchronous scheduling"
    )
    verify_publish: str = key(
        "publications after which checksums of what the ranks sent and what an engine holds are compared; after the "
        "first of them its log-probs with the trainer's, too",
        choices=VERIFIED,
    )
    val_kwargs: ValSamplingConfig = key("sampling of validation")


@dataclass(frozen=True)
class ActorRolloutRefConfig:
    """Actor, engine and reference share ranks."""

    hybrid_engine: bool = key("verl's, true; rollout.placement says whether they share devices")
    model: ModelConfig = key("model")
    rollout: RolloutConfig = key("rollout")
    actor: ActorConfig = key("actor")
    ref: RefConfig = key("reference")


@dataclass(frozen=True)
class OverlongBufferConfig:
    """Soft overlong punishment: the reward sinks linearly over the last ``len`` tokens before the limit."""

    enable: bool = key("whether long responses lose reward")
    len: int = key("tokens of the buffer before data.max_response_length", low=1)
    penalty_factor: float = key("what a response at the limit loses", above=0.0)


@dataclass(frozen=True)
class RewardModelConfig:
    """The reward model. dtype and packing are the actor's model's."""

    path: str | None = key(
        "a Hugging Face folder or name of a *ForSequenceClassification model with one label; null: no reward model"
    )
    coef: float = key("what its scores are multiplied by before they are added to a reward function's")
    micro_batch_size_per_gpu: int | None = key(
        "rollouts of a pass for scores; null: as the actor's log-prob pass", low=1
    )
    use_dynamic_bsz: bool | None = key(
        "fill micro-batches up to a number of tokens; null: as the actor's log-prob pass"
    )
    forward_max_token_len_per_gpu: int | None = key(
        "those tokens, on one device; null: as the actor's log-prob pass", low=1
    )
    megatron: MegatronConfig | None = key("axes, on Megatron; the actor's unless given")
    fsdp_config: FsdpConfig | None = key("sharding and offload, on FSDP; the actor's unless given")


@dataclass(frozen=True)
class RewardConfig:
    """Rewards: a function's, called in processes of their own, a model's, or both added up."""

    name: str | None = key(
        "a registered reward for all rows; null: each row's by its data_source, or none beside a reward model"
    )
    path: str | None = key("python file with a reward function of yours")
    function: str = key("its name in that file")
    num_workers: int = key("processes", low=1, high=MOST_PROCESSES)
    kwargs: Mapping[str, Any] = key("keyword arguments of every call of that function, besides the rollout's")
    timeout_s: float = key("seconds a reward may take", above=0.0, high=LONGEST_S)
    batch_timeout_s: float | None = key(
        "seconds that all rewards of a scoring may take; null: until 10 calls in a row for each process hang", above=0.0
    )
    try_first: bool = key("try the function on a row of each data_source before ranks start")
    overlong_buffer: OverlongBufferConfig = key("soft penalty of long responses (DAPO)")
    score_on_failure: float = key(
        "reward of a rollout whose reward function raised, hung or returned no number",
        low=-LARGEST_REWARD,
        high=LARGEST_REWARD,
    )
    on_all_failed: str = key("what to do where the function fails on all rollouts of a step", choices=ON_ALL_FAILED)
    model: RewardModelConfig = key("reward model")


@dataclass(frozen=True)
class KLControlConfig:
    """The coefficient of the KL in the reward."""

    type: str = key("fixed, or steered towards target_kl", choices=KL_CONTROLLERS)
    kl_coef: float = key("coefficient, at the start where adaptive", low=0.0, high=100.0)
    target_kl: float = key("mean KL a token to keep, in nats (adaptive)", above=0.0, high=100.0)
    horizon: int = key("rollouts over which the coefficient is corrected (adaptive)", low=1)


@dataclass(frozen=True)
class FilterGroupsConfig:
    """Dynamic sampling (DAPO)."""

    enable: bool = key("replace groups whose rewards are all equal: they teach nothing")
    max_num_gen_batches: int = key("generations of a step at most; then such groups stay", low=1, high=1000)


@dataclass(frozen=True)
class RejectionConfig:
    """One reason to leave tokens or sequences out of the loss."""

    criterion: str = key("what is compared", choices=CRITERIA)
    low: float = key("least value kept", low=0.0)
    high: float | None = key("largest value kept; null: no bound", above=0.0)


@dataclass(frozen=True)
class RolloutCorrectionConfig:
    """What to do about the engine's log-probs differing from the trainer's."""

    preset: str | None = key("a named setting of the keys below", choices=tuple(CORRECTION_PRESETS))
    level: str | None = key(
        "importance weights of tokens or of whole sequences; null: none", choices=("token", "sequence")
    )
    cap: float | None = key("largest weight (TIS); null: no bound", above=0.0)
    band: tuple[float, ...] | None = key("weights [low, high] that are kept, others become 0 (IcePop)")
    normalize: bool = key("divide weights by their mean over the step")
    rejections: tuple[RejectionConfig, ...] = key("what leaves the loss altogether")
    bypass: bool = key("take the engine's log-probs as the old ones, and save the pass that recomputes them")
    off_policy_mask_delta: float | None = key(
        "mean of log(engine / policy) a token above which a negative advantage has no loss; null: none", low=0.0
    )


@dataclass(frozen=True)
class AlgorithmConfig:
    """What turns rewards into advantages."""

    adv_estimator: str = key("advantage estimator, one of megarl's or of algorithm.path")
    path: str | None = key("python file of yours that registers advantage estimators or policy losses")
    gamma: float = key("discount of a token's later rewards", above=0.0, high=1.0)
    lam: float = key("weight of later temporal differences (gae)", low=0.0, high=1.0)
    norm_adv_by_std_in_grpo: bool = key("divide group advantages by their standard deviation")
    gdpo_reward_keys: tuple[str, ...] = key(
        "components of the reward, returned beside its score, to normalise apart (gdpo)"
    )
    gdpo_reward_weights: tuple[float, ...] | None = key("a weight for each of them; null: 1")
    overlong_filtering: bool = key("leave responses that were cut at the limit out of the loss (DAPO)")
    use_kl_in_reward: bool = key("subtract KL to the reference from the reward of every token")
    kl_penalty: str = key("estimator of that KL", choices=KL_ESTIMATORS)
    kl_ctrl: KLControlConfig = key("coefficient of that KL")
    filter_groups: FilterGroupsConfig = key("dynamic sampling")
    rollout_correction: RolloutCorrectionConfig = key("engine against trainer")
    kl_free: bool = key("says that a run without any KL term is meant")


@dataclass(frozen=True)
class CriticModelConfig:
    """What the critic starts from."""

    path: str | None = key("a Hugging Face folder or name; a value head that it lacks starts at zero")
    init: str = key("weights from the folder, or drawn from config.json alone", choices=("pretrained", "random"))


@dataclass(frozen=True)
class CriticConfig:
    """The critic. dtype and packing are the actor's model's."""

    enable: bool | None = key("null: where the estimator needs values")
    model: CriticModelConfig = key("model")
    optim: OptimConfig = key("optimizer")
    lr_scheduler: LRSchedulerConfig = key("schedule")
    ppo_mini_batch_size: int = key("rollouts of an optimizer step, over all ranks", low=1)
    ppo_micro_batch_size_per_gpu: int = key("rollouts of a forward/backward on one data-parallel rank", low=1)
    forward_micro_batch_size_per_gpu: int | None = key("rollouts of a pass for values; null: as the micro-batch", low=1)
    use_dynamic_bsz: bool = key("fill micro-batches up to a number of tokens instead of counting rollouts")
    ppo_max_token_len_per_gpu: int = key("tokens of a forward/backward on one device where use_dynamic_bsz", low=1)
    forward_max_token_len_per_gpu: int | None = key(
        "tokens of a pass for values on one device; null: as ppo_max_token_len_per_gpu", low=1
    )
    ppo_epochs: int = key("passes over the rollouts of a step", low=1, high=1000)
    shuffle: bool = key("whether mini-batches are drawn in random order")
    cliprange_value: float = key("how far a value may move from that of the rollout", above=0.0)
    loss_agg_mode: str | None = key("how token losses become one; null: token-mean", choices=AGGREGATIONS)
    warmup_steps: int = key("steps at the start that train the critic alone", low=0)
    megatron: TrainedMegatronConfig | None = key("axes, on Megatron; the actor's unless given")
    fsdp_config: TrainedFsdpConfig | None = key("sharding and offload, on FSDP; the actor's unless given")


@dataclass(frozen=True)
class SFTTrainerConfig:
    """The run."""

    n_gpus_per_node: int = key("devices of a node; processes where there are none", low=1, high=MOST_PROCESSES)
    nnodes: int = key("nodes", low=1, high=MOST_NODES)
    total_epochs: int = key("passes over the data", low=1, high=MOST_ROWS)
    total_training_steps: int | None = key("stop after so many steps; null: by epochs", low=1)
    seed: int = key("of order, sampling and random weights", low=0)
    project_name: str = key("project for trackers")
    experiment_name: str = key("run's name for trackers")
    logger: tuple[str, ...] = key(
        "sinks of metrics besides metrics.jsonl: console, tensorboard, wandb, trace (a timeline)"
    )
    strict: bool = key("settings without effect are errors; false: they are listed where a plan or a run starts")
    run_dir: str = key("folder of this run")
    save_freq: int | None = key("steps between saves; null: at the end alone", low=1)
    save_every_min: float | None = key(
        "minutes after the last save, or the start, from which the next step's end is saved; null: by save_freq alone",
        above=0.0,
        high=LONGEST_S / 60,
    )
    save_contents: tuple[str, ...] = key(
        "model: a Hugging Face folder of every role that is trained; state: all that a run goes on from"
    )
    async_save: bool = key("train on while a checkpoint is written; its state is copied to host memory first")
    on_save_failure: str = key("what a disk that refuses a checkpoint does to the run", choices=("stop", "continue"))
    on_non_finite: str = key(
        "what a step does whose gradient isn't finite, or above optim.skip_grad_norm: stop; skip, the update and after "
        "max_non_finite_steps stop; rollback, skip and then go back to the last checkpoint",
        choices=("stop", "skip", "rollback"),
    )
    max_non_finite_steps: int = key("steps in a row that may skip an update", low=1)
    keep_checkpoints: int | None = key("newest checkpoints that stay; null: all", low=1)
    keep_best_by: str | None = key(
        "metric whose largest value (with - before its name: least) keeps its checkpoint as well"
    )
    hang_timeout_s: float = key(
        "seconds that the ranks may take for one call (generate, score, update, publish, save), or wait for one "
        "another; then the run ends and says where each stands. Their start may take 600 in any case",
        above=0.0,
        high=LONGEST_S,
    )
    numa_binding: bool = key(
        "on CUDA, have each rank run on those of its cores that are near its device; what rank 0 starts under torchrun "
        "runs there too"
    )
    preempt_save_s: float = key(
        "seconds after SIGTERM or SIGUSR1 in which the step must be done and saved; then the run ends without",
        above=0.0,
        high=LONGEST_S,
    )
    resume: str = key(
        "auto: go on from the newest checkpoint of run_dir; never; or the folder of the checkpoint, or run, to begin "
        "with where run_dir has none yet"
    )
    resume_from_older: bool = key("where the newest checkpoint is damaged, set it aside and take the one before it")
    ray_dashboard: bool = key("start Ray's dashboard")
    pass_environment: tuple[str, ...] = key(
        "names of variables that ranks on Ray get from the controller, beside NCCL_*, GLOO_*, UCX_*, HF_*, VLLM_*, "
        "NVTE_*, TORCH_*, PYTORCH_*, CUDA_DEVICE_MAX_CONNECTIONS and proxies"
    )


@dataclass(frozen=True)
class TrainerConfig(SFTTrainerConfig):
    """The run, with validation and a table of rollouts."""

    mode: str = key(
        "when rollouts are sampled: those of a step when it begins, those of the next while it is trained, or all the "
        "time",
        choices=MODES,
    )
    max_staleness: int = key(
        "publications by which weights may be newer than those that sampled what they train on (async)", low=1, high=100
    )
    plan_must_fit: bool = key("refuse to start where the plan says that memory doesn't suffice")
    val_before_train: bool = key("validate before the first step")
    test_freq: int | None = key("steps between validations; null: at the end alone", low=1)
    num_sampled_rollouts: int = key("rollouts of a step that are saved, and shown in the table", low=0, high=10_000)
    show_rollouts_freq: int = key("steps between tables of sampled rollouts on the console", low=1)


@dataclass(frozen=True)
class PPOConfig:
    """A whole RL run."""

    data: DataConfig = key("data")
    actor_rollout_ref: ActorRolloutRefConfig = key("models")
    critic: CriticConfig = key("critic")
    reward: RewardConfig = key("reward")
    algorithm: AlgorithmConfig = key("algorithm")
    trainer: TrainerConfig = key("trainer")


@dataclass(frozen=True)
class SFTConfig:
    """A whole SFT run."""

    data: SFTDataConfig = key("data")
    model: ModelConfig = key("model")
    optim: OptimConfig = key("optimizer")
    lr_scheduler: LRSchedulerConfig = key("schedule")
    strategy: str = key("training backend", choices=("megatron", *FSDP_STRATEGIES))
    megatron: TrainedMegatronConfig = key("axes, where strategy is megatron")
    fsdp_config: TrainedFsdpConfig = key("sharding and offload, where strategy is fsdp or fsdp2")
    trainer: SFTTrainerConfig = key("trainer")
