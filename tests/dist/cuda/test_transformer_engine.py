"""Models of Transformer Engine's layers compute what Hugging Face does; the gradient's norm counts everything once.

Its own Python runs, of the first and the last release that megarl is made for, with emulated kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest

from megarl.parallel.layout import Layout
from megarl.verify.reference import Reference
from megarl.verify.roles import TRAINING, role_on
from tests.dist import hf_training
from tests.dist.cuda import te_cases
from tests.dist.cuda.norm_members import members
from tests.dist.cuda.te_process import TeCase, run_with_te
from tests.dist.cuda.te_wheels import LAST, WHEELS, te_source
from tests.dist.parity import (
    JOBS,
    assert_first_step_is,
    assert_scored_as,
    assert_trained_as,
    reference_logits_BSV,
)

MODELS = ("qwen3-untied", "qwen2-tied", "qwen3_moe-untied", "qwen2_moe-tied")
IN_BF16 = ("qwen3-untied", "qwen3_moe-untied")
TRAINED = ("qwen2-tied", "qwen3_moe-untied")
ADDED_IN_PLACE = {"gradient_accumulation_fusion": True}
JOB = {"job": JOBS["ppo_token_mean"]}
# A context axis of Transformer Engine's own attention needs kernels that aren't emulated, so none is in bfloat16.
LAYOUTS = {
    "one rank": Layout(1),
    "tp2": Layout(2, tp=2, sequence_parallel=True),
    "tp2xep2xetp1": Layout(2, tp=2, ep=2, etp=1, sequence_parallel=True),
    "cp2": Layout(2, cp=2),
}
# Of each: which model takes it.
TAKEN = {
    **{("one rank", model): LAYOUTS["one rank"] for model in MODELS},
    ("tp2", "qwen2-tied"): LAYOUTS["tp2"],
    ("cp2", "qwen3-untied"): LAYOUTS["cp2"],
    ("tp2xep2xetp1", "qwen3_moe-untied"): LAYOUTS["tp2xep2xetp1"],
    ("tp2xep2xetp1", "qwen2_moe-tied"): LAYOUTS["tp2xep2xetp1"],
}
# Of more ranks than run here: each is asked what it counts, one after the other, in a world without the others.
NORMS = {
    "tp2xep2xetp1": Layout(4, tp=2, ep=2, etp=1, sequence_parallel=True),
    "tp2xcp2xetp1": Layout(4, tp=2, cp=2, etp=1, sequence_parallel=True),
    "tp2xep2xetp2": Layout(4, tp=2, ep=2, etp=2, sequence_parallel=True),
    "tp2xpp2xep2xetp1": Layout(8, tp=2, pp=2, ep=2, etp=1, sequence_parallel=True),
}
NORM_MODEL, FOUR_LAYERS = "qwen2_moe-tied", {"num_hidden_layers": 4}  # every stage has dense layers and experts

# Each release costs a start of two ranks.
RELEASES = [pytest.param(name, marks=pytest.mark.long) if name != LAST else name for name in WHEELS]

Answers = Mapping[str, list[Any]]


@pytest.fixture(scope="module")
def answered(reference: Callable[..., Reference], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Answers]:
    """Return what all ranks of a release answered to every case, asked once."""

    @cache
    def ask(release: str) -> Answers:
        cases = {}
        for (name, model), layout in TAKEN.items():
            found = reference(model)
            arguments = (role_on(layout, found.folder), found.rollouts)
            cases[f"{name} {model}"] = TeCase(te_cases.examine, arguments, layout.world_size)
        for model in IN_BF16:
            found = reference(model)
            arguments = (role_on(Layout(1), found.folder, dtype="bfloat16"), found.rollouts)
            cases[f"bf16 {model}"] = TeCase(te_cases.examine, arguments)
        for model in TRAINED:
            found = reference(model)
            in_place = role_on(Layout(1), found.folder, override_transformer_config=ADDED_IN_PLACE)
            cases[f"in place {model}"] = TeCase(te_cases.examine, (in_place, found.rollouts))
            cases[f"train {model}"] = TeCase(te_cases.train, (role_on(Layout(1), found.folder), found.rollouts, JOB))
        for name, layout in NORMS.items():
            cases[f"norm {name}"] = TeCase(te_cases.norm_members, (_trained(reference, layout),))
        cases["old device"] = TeCase(te_cases.attention_below_9_0, (cases["bf16 qwen3-untied"].arguments[0],))
        source = te_source(release)
        return run_with_te(tmp_path_factory.mktemp("te"), source, cases)

    return ask


def _trained(reference: Callable[..., Reference], layout: Layout) -> Any:
    return role_on(layout, reference(NORM_MODEL, **FOUR_LAYERS).folder, training=TRAINING)


@pytest.mark.parametrize("taken", TAKEN, ids=" ".join)
@pytest.mark.parametrize("release", RELEASES)
def test_float32_logits_and_every_gradient_are_those_of_hugging_face(
    reference: Callable[..., Reference],
    hf_trained: Callable[..., hf_training.Trained],
    answered: Callable[[str], Answers],
    release: str,
    taken: tuple[str, str],
) -> None:
    found, layout = answered(release)[" ".join(taken)], TAKEN[taken]
    for packing in ("packed", "padded"):
        examined = [rank[packing] for rank, _ in found]
        assert_scored_as([one.scored for one in examined], reference(taken[1]), layout)
        assert_first_step_is(examined, hf_trained(taken[1], "sft"), layout)


@pytest.mark.parametrize("model", TRAINED)
@pytest.mark.parametrize("release", RELEASES)
def test_steps_of_its_adam_are_those_of_torch(
    hf_trained: Callable[..., hf_training.Trained], answered: Callable[[str], Answers], release: str, model: str
) -> None:
    assert_trained_as(
        [rank["job"] for rank in answered(release)[f"train {model}"]], hf_trained(model, "ppo_token_mean"), Layout(1)
    )


@pytest.mark.parametrize("model", TRAINED)
@pytest.mark.parametrize("release", RELEASES)
def test_gradients_that_products_add_up_in_place_are_the_same(
    hf_trained: Callable[..., hf_training.Trained], answered: Callable[[str], Answers], release: str, model: str
) -> None:
    ((examined, built),) = answered(release)[f"in place {model}"]
    assert built.kernels["wgrad_gemm_accum_fp32"], "of the output layer, which is Megatron's own"
    for packing in ("packed", "padded"):
        assert_first_step_is([examined[packing]], hf_trained(model, "sft"), Layout(1))


@pytest.mark.parametrize("model", IN_BF16)
@pytest.mark.parametrize("release", RELEASES)
def test_its_attention_in_bfloat16_is_within_rounding_of_hugging_face(
    reference: Callable[..., Reference], answered: Callable[[str], Answers], release: str, model: str
) -> None:
    ((examined, built),) = answered(release)[f"bf16 {model}"]
    assert "TEDotProductAttention" in built.modules and "CausalAttention" not in built.modules
    assert built.kernels["fused_attn_fwd"] and built.kernels["fused_attn_bwd"]
    expected_BSV = reference_logits_BSV(reference(model))
    for packing in ("packed", "padded"):
        error_BSV = (examined[packing].scored.logits_BSV - expected_BSV).abs()
        assert error_BSV.mean() < 0.02 * expected_BSV.std()


@pytest.mark.parametrize("release", RELEASES)
def test_what_has_no_packed_kernel_attends_itself(answered: Callable[[str], Answers], release: str) -> None:
    ((_, in_float32),) = answered(release)["one rank qwen3-untied"]
    (below_9_0,) = answered(release)["old device"]
    for built in (in_float32, below_9_0):
        assert "CausalAttention" in built.modules and "TEDotProductAttention" not in built.modules
        assert "TELayerNormColumnParallelLinear" in built.modules


@pytest.mark.parametrize("release", RELEASES)
def test_packed_heads_are_rotated_on_the_device(answered: Callable[[str], Answers], release: str) -> None:
    for name in ("one rank qwen3-untied", "bf16 qwen3-untied"):
        ((_, built),) = answered(release)[name]
        assert built.kernels["fused_rope_forward"] and built.kernels["fused_rope_backward"]


@pytest.mark.parametrize("layout", NORMS)
@pytest.mark.parametrize("release", RELEASES)
def test_every_rank_counts_every_element_once_in_the_norm(
    answered: Callable[[str], Answers], release: str, layout: str
) -> None:
    (missed,) = answered(release)[f"norm {layout}"]
    assert missed == {rank: {} for rank in range(NORMS[layout].world_size)}


@pytest.mark.parametrize("is_distributed", [True, False], ids=["distributed", "replicated"])
@pytest.mark.parametrize("layout", NORMS)
def test_so_do_models_of_our_own_layers(reference: Callable[..., Reference], layout: str, is_distributed: bool) -> None:
    role = role_on(
        NORMS[layout],
        reference(NORM_MODEL, **FOUR_LAYERS).folder,
        training=TRAINING,
        use_distributed_optimizer=is_distributed,
    )
    assert members(role) == {rank: {} for rank in range(NORMS[layout].world_size)}
