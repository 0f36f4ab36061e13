"""Small models of every family, and layouts they can be split over, for tests that try thousands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st

from megarl.parallel.layout import EngineLayout, Layout
from megarl.weights.model_shape import FAMILIES, ModelShape, Rope


def model_shape(family: str = "Qwen3ForCausalLM", *, tied: bool = False) -> ModelShape:
    """Return a model of 3 layers, 4 heads and 2 key-value heads whose tensors all have different shapes.

    Of those with experts the first layer is dense in Qwen, and tokens take 2 experts of 4.
    """
    has_experts, is_mixtral = "Moe" in family or family == "MixtralForCausalLM", family == "MixtralForCausalLM"
    return ModelShape(
        family=family,
        num_layers=3,
        hidden_size=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        ffn_size=8,
        vocab_size=10,
        max_positions=32,
        norm_eps=1e-6,
        rope=Rope(10000.0),
        tied=tied,
        qkv_bias=family.startswith("Qwen2"),
        qk_norm=family.startswith("Qwen3"),
        num_experts=4 * has_experts,
        experts_per_token=2 * has_experts,
        expert_ffn_size=(8 if is_mixtral else 12) * has_experts,
        shared_expert_ffn_size=16 * (family == "Qwen2MoeForCausalLM"),
        gated_shared_expert=family == "Qwen2MoeForCausalLM",
        norm_topk_prob=family in ("Qwen3MoeForCausalLM", "MixtralForCausalLM"),
        dense_layers=(0,) if has_experts and not is_mixtral else (),
    )


@st.composite
def model_shapes(draw: st.DrawFn) -> ModelShape:
    """Draw a model of any family that TP 1, 2 and 4 can split."""
    num_kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    groups = [group for group in (1, 2, 3, 4) if num_kv_heads * group % 4 == 0]
    return replace(
        model_shape(draw(st.sampled_from(FAMILIES)), tied=draw(st.booleans())),
        num_layers=draw(st.integers(1, 4)),
        hidden_size=draw(st.integers(1, 3)),
        num_heads=num_kv_heads * draw(st.sampled_from(groups)),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([2, 4])),
        ffn_size=draw(st.sampled_from([4, 8])),
        vocab_size=draw(st.integers(1, 70)),
    )


@st.composite
def engines_of(draw: st.DrawFn, shape: ModelShape, sizes: Sequence[int] = (1, 2, 4)) -> EngineLayout:
    """Draw how an engine of one of ``sizes`` ranks splits ``shape``."""
    tp = draw(st.sampled_from(sizes))
    return EngineLayout(tp, draw(st.sampled_from([1, tp])) if shape.num_experts else 1)


@st.composite
def layouts_of(draw: st.DrawFn, shape: ModelShape) -> Layout:
    """Draw a layout that ``shape`` can be trained on, of 12 ranks at most."""
    tp = draw(st.sampled_from([1, 2, 4]))
    pp = draw(st.integers(1, min(3, shape.num_layers)))
    vpp = draw(st.integers(1, min(3, shape.num_layers // pp))) if pp > 1 else 1
    dp = draw(st.integers(1, max(1, 8 // (tp * pp))))
    if not shape.num_experts:
        return Layout(tp * pp * dp, tp, pp, vpp=vpp)
    splits = [(ep, etp) for ep in (1, 2, 4) for etp in (1, 2, 4) if tp * dp % (ep * etp) == 0]
    ep, etp = draw(st.sampled_from(splits))
    return Layout(tp * pp * dp, tp, pp, ep=ep, etp=etp, vpp=vpp)
