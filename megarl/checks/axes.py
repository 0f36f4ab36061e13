"""What must hold between the axes of a model, the ranks, and the model's own sizes."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from megarl.batching.divisors import divisors
from megarl.checks.overrides import overridden_fields_can_be_run
from megarl.checks.transformer_fields import OURS, transformer_fields
from megarl.config.router_losses import router_losses_are_whole
from megarl.config.schema import MegatronConfig, RecomputeConfig, TrainedMegatronConfig
from megarl.errors import Problem, nearest
from megarl.parallel.layout import layers_of_stages
from megarl.weights.model_shape import ModelShape

Problems = Iterator[Problem]

RANKS = "ranks (trainer.nnodes x trainer.n_gpus_per_node)"


def axes_divide_the_ranks(key: str, megatron: MegatronConfig, ranks: int) -> Problems:
    """TP x CP x PP divides the ranks, and so does what experts are split by."""
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    cp, ep = megatron.context_parallel_size, megatron.expert_model_parallel_size
    etp = megatron.expert_tensor_parallel_size
    dense = {"tensor_model_parallel_size": tp, "context_parallel_size": cp, "pipeline_model_parallel_size": pp}
    shared = {"expert_tensor_parallel_size": etp} if etp else {"tensor_model_parallel_size": tp}
    expert = {**shared, "expert_model_parallel_size": ep, "pipeline_model_parallel_size": pp}
    for axes in (dense, expert) if ep > 1 or etp else (dense,):
        split = {name: size for name, size in axes.items() if size > 1}
        product = prod(split.values())
        if ranks % product:
            sizes = ", ".join(map(str, divisors(ranks)))
            yield Problem(
                " x ".join(f"{key}.{name}" for name in split),
                product if len(split) == 1 else f"{' x '.join(str(size) for size in split.values())} = {product}",
                f"must divide the {ranks} {RANKS}; products that do: {sizes}",
                f"trainer.n_gpus_per_node={product}, or other axis sizes",
            )


def chunks_take_turns_on_a_pipeline(key: str, megatron: MegatronConfig) -> Problems:
    """Virtual stages need a pipeline."""
    vpp = megatron.virtual_pipeline_model_parallel_size
    if vpp and megatron.pipeline_model_parallel_size == 1:
        name = f"{key}.virtual_pipeline_model_parallel_size"
        yield Problem(name, vpp, f"has no effect where {key}.pipeline_model_parallel_size is 1", f"{name}=null")


def recomputation_is_complete(key: str, recompute: RecomputeConfig) -> Problems:
    """Full recomputation says how it picks layers."""
    for name in ("method", "num_layers"):
        if recompute.granularity == "full" and getattr(recompute, name) is None:
            fix = f"{key}.recompute.method=uniform {key}.recompute.num_layers=1"
            yield Problem(f"{key}.recompute.{name}", None, "must be set where granularity is full", fix)


def recomputation_has_layers_to_pick(key: str, recompute: RecomputeConfig) -> Problems:
    """Selective recomputation has nothing to pick, and none has neither."""
    for name in ("method", "num_layers"):
        if recompute.granularity != "full" and getattr(recompute, name) is not None:
            allowed = f"has no effect where {key}.recompute.granularity is {recompute.granularity or 'null'}"
            fix = f"{key}.recompute.granularity=full"
            yield Problem(f"{key}.recompute.{name}", getattr(recompute, name), allowed, fix)


def an_optimizer_on_the_host_is_split_and_stays(key: str, megatron: TrainedMegatronConfig) -> Problems:
    """Adam on the host steps this rank's share of a distributed optimizer, and leaves nothing on the device to move."""
    if not megatron.optimizer_on_host:
        return
    if not megatron.use_distributed_optimizer:
        allowed = f"must be true where {key}.optimizer_on_host is true: megatron has no other optimizer for the host"
        yield Problem(f"{key}.use_distributed_optimizer", False, allowed, f"{key}.use_distributed_optimizer=true")
    if megatron.optimizer_offload:
        name = f"{key}.optimizer_offload"
        allowed = f"contradicts {key}.optimizer_on_host=true: optimizer state stays in host memory, nothing has to move"
        yield Problem(name, True, allowed, f"{name}=false")


def late_parameters_are_those_of_buckets(key: str, megatron: TrainedMegatronConfig) -> Problems:
    """Parameters are gathered late where each rank has stepped a share of them, in the buckets of early gradients."""
    name, reduces = f"{key}.overlap_param_gather", f"{key}.overlap_grad_reduce"
    if not megatron.overlap_param_gather:
        return
    if not megatron.use_distributed_optimizer:
        allowed = f"must be true where {name} is true: otherwise every rank steps all parameters, and none is gathered"
        yield Problem(f"{key}.use_distributed_optimizer", False, allowed, f"{key}.use_distributed_optimizer=true")
    if not megatron.overlap_grad_reduce:
        yield Problem(
            reduces, False, f"must be true where {name} is true, which goes by its buckets", f"{reduces}=true"
        )


def buckets_are_reduced_early(key: str, megatron: TrainedMegatronConfig) -> Problems:
    """A size of buckets says when the next ones are reduced."""
    if megatron.ddp_bucket_size is not None and not megatron.overlap_grad_reduce:
        allowed = f"has an effect only where {key}.overlap_grad_reduce is true"
        yield Problem(f"{key}.ddp_bucket_size", megatron.ddp_bucket_size, allowed, f"{key}.overlap_grad_reduce=true")


def a_precision_aware_optimizer_has_its_place(key: str, megatron: TrainedMegatronConfig, dtype: str) -> Problems:
    """Transformer Engine's Adam steps a share of bfloat16 parameters on the device. dtype: of the model."""
    name = f"{key}.use_precision_aware_optimizer"
    if not megatron.use_precision_aware_optimizer:
        return
    if not megatron.use_distributed_optimizer:
        allowed = f"must be true where {name} is true: megatron has it only for the distributed optimizer"
        yield Problem(f"{key}.use_distributed_optimizer", False, allowed, f"{key}.use_distributed_optimizer=true")
    if megatron.optimizer_on_host:
        yield Problem(f"{key}.optimizer_on_host", True, f"contradicts {name}=true, which steps on the device")
    if dtype != "bfloat16":
        yield Problem(name, True, f"steps a bfloat16 model alone; this one is {dtype}", f"{name}=false")


def moments_of_16_bits_are_those_of_an_optimizer_that_has_them(key: str, megatron: TrainedMegatronConfig) -> Problems:
    """Only Transformer Engine's Adam chooses the dtype of its moments."""
    name = f"{key}.use_precision_aware_optimizer"
    for moment in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        if not megatron.use_precision_aware_optimizer and getattr(megatron, moment) != "float32":
            allowed = f"has an effect only where {name} is true"
            yield Problem(f"{key}.{moment}", getattr(megatron, moment), allowed, f"{name}=true")


def overridden_fields_exist_and_are_free(key: str, megatron: MegatronConfig) -> Problems:
    """override_transformer_config names fields that megatron has and that megarl doesn't decide."""
    overrides = megatron.override_transformer_config
    if not overrides:
        return
    fields = transformer_fields()
    for name, value in overrides.items():
        path = f"{key}.override_transformer_config.{name}"
        if name in OURS:
            allowed = "is decided by megarl from other keys and the model's config.json"
            fix = f"set {key}.{OURS[name]}" if OURS[name] else "leave it out"
            yield Problem(path, value, allowed, fix)
        elif fields is None:
            allowed = "can't be checked: megatron-core, which has the fields, isn't installed"
            yield Problem(path, value, allowed, "pip install 'megarl[cpu]' or 'megarl[gpu]'")
        elif name not in fields:
            hint = nearest(name, fields)
            yield Problem(path, value, "is no field of the installed megatron-core's TransformerConfig", hint)
    yield from router_losses_are_whole(f"{key}.override_transformer_config", overrides)
    yield from overridden_fields_can_be_run(f"{key}.override_transformer_config", overrides)


def the_model_fits_its_axes(key: str, shape: ModelShape, megatron: MegatronConfig) -> Problems:
    """Heads, feed-forward sizes, experts and layers can be split as asked, and every axis has something to split."""
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    yield from a_tensor_split_fits(f"{key}.tensor_model_parallel_size", shape, tp)
    if shape.num_layers < pp:
        allowed = f"must be at most the model's {shape.num_layers} layers"
        yield Problem(f"{key}.pipeline_model_parallel_size", pp, allowed)
    chunks = pp * (megatron.virtual_pipeline_model_parallel_size or 1) if pp > 1 else 1
    if chunks > pp and shape.num_layers % chunks:
        allowed = f"x the {pp} stages must divide the model's {shape.num_layers} layers"
        name = f"{key}.virtual_pipeline_model_parallel_size"
        yield Problem(name, megatron.virtual_pipeline_model_parallel_size, allowed, f"{name}=null")
    if isinstance(megatron, TrainedMegatronConfig) and shape.num_layers >= chunks:
        yield from _recomputed_layers_fit(key, layers_of_stages(shape.num_layers, chunks), megatron.recompute)
    yield from _experts_fit(key, shape, megatron)


def a_tensor_split_fits(key: str, shape: ModelShape, tp: int) -> Problems:
    """Heads and feed-forward size divide by the ranks that share a layer. key: of the number of those."""
    parts = {"attention heads": shape.num_heads}
    if len(shape.dense_layers) or not shape.num_experts:
        parts["feed-forward size"] = shape.ffn_size
    for what, size in parts.items():
        if size % tp:
            yield Problem(key, tp, f"must divide the model's {size} {what}")
    if shape.num_kv_heads % tp and tp % shape.num_kv_heads:
        allowed = f"must divide the model's {shape.num_kv_heads} key-value heads, or be a multiple of them"
        yield Problem(key, tp, allowed)


def _recomputed_layers_fit(key: str, stages: tuple[int, ...], recompute: RecomputeConfig) -> Problems:
    """Runs of recomputed layers fill every stage; no stage is asked for more layers than it has. stages: layers."""
    size, name = recompute.num_layers, f"{key}.recompute.num_layers"
    if recompute.granularity != "full" or size is None:
        return
    sizes = ", ".join(str(layers) for layers in sorted(set(stages)))
    if recompute.method == "uniform" and any(layers % size for layers in stages):
        allowed = f"must divide the layers of every pipeline stage ({sizes}) where recompute.method is uniform"
        yield Problem(name, size, allowed, f"{name}=1, or {key}.recompute.method=block")
    if recompute.method == "block" and size > max(stages):
        allowed = f"must be at most the {max(stages)} layers of a pipeline stage where recompute.method is block"
        yield Problem(name, size, allowed, f"{name}={max(stages)}")


def _experts_fit(key: str, shape: ModelShape, megatron: MegatronConfig) -> Problems:
    tp, ep = megatron.tensor_model_parallel_size, megatron.expert_model_parallel_size
    etp, name = megatron.expert_tensor_parallel_size, f"{key}.expert_model_parallel_size"
    if not shape.num_experts:
        return
    if shape.num_experts % ep:
        yield Problem(name, ep, f"must divide the model's {shape.num_experts} experts")
    if shape.shared_expert_ffn_size % tp:
        axis = f"{key}.tensor_model_parallel_size"
        yield Problem(axis, tp, f"must divide the shared expert's feed-forward size of {shape.shared_expert_ffn_size}")
    if shape.expert_ffn_size % (etp or tp):
        axis = f"{key}.expert_tensor_parallel_size"
        allowed = f"must divide the {shape.expert_ffn_size} of an expert's feed-forward size"
        yield Problem(axis, etp or tp, allowed, f"{axis}=1")
    if megatron.override_transformer_config.get("moe_enable_deepep") and ep * (etp or tp) == 1:
        field = f"{key}.override_transformer_config.moe_enable_deepep"
        yield Problem(field, True, f"exchanges tokens between the ranks of {name}, and there is one", "leave it out")
    if tp > 1 and not megatron.sequence_parallel:
        allowed = "must be true where a model with experts is split by tensor parallelism: megatron demands it"
        yield Problem(f"{key}.sequence_parallel", False, allowed, f"{key}.sequence_parallel=true")


def what_is_said_of_experts_has_some(key: str, shape: ModelShape, megatron: MegatronConfig) -> Problems:
    """Axes and fields of experts mean a model that has experts."""
    if shape.num_experts:
        return
    axes = (f"{key}.expert_model_parallel_size", f"{key}.expert_tensor_parallel_size")
    sizes = (megatron.expert_model_parallel_size, megatron.expert_tensor_parallel_size)
    for axis, size in zip(axes, sizes, strict=True):
        if (size or 1) > 1:
            yield Problem(axis, size, "has no effect: the model has no experts", f"{axis}=1")
    for field, value in megatron.override_transformer_config.items():
        if field.startswith("moe_") and field not in OURS:
            path = f"{key}.override_transformer_config.{field}"
            yield Problem(path, value, "has no effect: the model has no experts", "leave it out")
