"""One GPU computes what Hugging Face does, with Transformer Engine's layers and with Megatron's own.

Skipped where there is no GPU. The references are computed on CPU in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megarl.parallel.environment import platform_name
from megarl.parallel.layout import Layout
from tests.dist import hf_reference
from tests.dist.parity import JOBS, TEMPERATURE, Reference, assert_pieces_are, make_reference
from tests.dist.parity_cases import Setup, train
from tests.dist.publish_case import PROMPTS
from tests.dist.tiny_models import save_tiny_model
from tests.gpu.gpu_cases import (
    all_logprobs,
    answers_after_publishing,
    answers_of_plain_vllm,
    builds_with_transformer_engine,
    with_every_token,
)
from tests.gpu.gpu_process import run_alone

pytestmark = pytest.mark.skipif(platform_name() != "cuda", reason="needs an NVIDIA GPU, and this machine shows none")

DEVICE = "cuda:0"
MODELS = ("qwen3-untied", "qwen3_moe-untied")
# Head sizes of 8 or 16, as the models of other tests have, are none that fused kernels are made for.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "head_dim": 64,
    "moe_intermediate_size": 256,
}


@dataclass(frozen=True)
class Build:
    """How the model is built. tolerance: of float32 log-probs; TE multiplies float32 matrices in TF32."""

    te: bool
    dtype: torch.dtype
    packed: bool = True
    tolerance: float = 1e-4


BUILDS = {
    "own_layers-fp32": Build(False, torch.float32),
    "own_layers-bf16": Build(False, torch.bfloat16),
    "te-fp32": Build(True, torch.float32, packed=False, tolerance=3e-2),  # no kernel of TE packs float32
    "te-bf16": Build(True, torch.bfloat16),
}
# A bf16 model may be off by as much again as Hugging Face's own in bf16.
BF16_FACTOR = 2.0
FIRST_STEP_TOLERANCE = 2e-2
LR = 1e-6  # a wide model with such large weights explodes at that of the other tests

HAS_TE = find_spec("transformer_engine") is not None
ALL = pytest.mark.parametrize(
    "build",
    [
        pytest.param(
            build,
            id=name,
            marks=pytest.mark.skipif(build.te and not HAS_TE, reason="needs Transformer Engine, which isn't installed"),
        )
        for name, build in BUILDS.items()
    ],
)


@pytest.fixture(scope="module", params=MODELS)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Return a model and what Hugging Face says of its batch in float32."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(request.param, folder, **SIZES)
    return make_reference(folder)


@cache
def hf_bf16_logprobs_BS(folder: Path) -> Tensor:
    """Return the log-probs of Hugging Face's model in bf16."""
    batch = with_every_token(make_reference(folder).batch)
    with torch.no_grad():
        return hf_reference.logprobs_BS(hf_reference.load(folder, torch.bfloat16), batch, TEMPERATURE).float()


def mean_error(logprobs_BS: Tensor, reference: Reference) -> float:
    """Return the mean distance to the reference's log-probs."""
    return float((logprobs_BS - reference.logprobs_BS).abs().mean())


@ALL
def test_megatron_is_built_of_the_layers_that_were_asked_for(tmp_path: Path, build: Build) -> None:
    assert run_alone(tmp_path, builds_with_transformer_engine, te=build.te) == build.te


@ALL
def test_log_probs_equal_hugging_faces(tmp_path: Path, reference: Reference, build: Build) -> None:
    setup = Setup(reference.folder, Layout(1), build.packed, build.dtype, device=DEVICE)
    scored = run_alone(tmp_path, all_logprobs, setup, reference.batch, TEMPERATURE, te=build.te)
    if build.dtype == torch.float32:
        torch.testing.assert_close(scored, reference.logprobs_BS, rtol=0, atol=build.tolerance)
    else:
        allowed = BF16_FACTOR * mean_error(hf_bf16_logprobs_BS(reference.folder), reference)
        assert mean_error(scored, reference) <= allowed


@pytest.mark.parametrize("job", JOBS)
def test_three_optimizer_steps_equal_hugging_face_with_adamw(tmp_path: Path, reference: Reference, job: str) -> None:
    asked = replace(JOBS[job], optimizer=replace(JOBS[job].optimizer, lr=LR))
    setup = Setup(reference.folder, Layout(1), device=DEVICE)
    found = run_alone(tmp_path, train, setup, reference.batch, {job: asked}, te=False)[job]
    expected = hf_reference.train(reference.folder, reference.batch, asked.loss, asked.optimizer, asked.steps)
    assert [s["loss"] for s in found.metrics] == pytest.approx(expected.losses, rel=1e-4, abs=1e-4)
    assert [s["grad_norm"] for s in found.metrics] == pytest.approx(expected.grad_norms, rel=1e-3)
    assert_pieces_are(found.weights, expected.weights, 1e-4)


@ALL
def test_training_begins_as_hugging_faces_and_lowers_the_loss(
    tmp_path: Path, reference: Reference, build: Build
) -> None:
    """Rounded weights take a path of their own after the first step."""
    asked = replace(JOBS["sft"], packed=build.packed)
    setup = Setup(reference.folder, Layout(1), dtype=build.dtype, device=DEVICE)
    found = run_alone(tmp_path, train, setup, reference.batch, {"sft": asked}, te=build.te)["sft"]
    expected = hf_reference.train(reference.folder, reference.batch, None, asked.optimizer, steps=1)
    assert found.metrics[0]["loss"] == pytest.approx(expected.losses[0], rel=FIRST_STEP_TOLERANCE)
    assert found.metrics[0]["grad_norm"] == pytest.approx(expected.grad_norms[0], rel=FIRST_STEP_TOLERANCE)
    losses = [step["loss"] for step in found.metrics]
    assert losses == sorted(losses, reverse=True)
    assert found.main_dtypes == {torch.float32}


@pytest.mark.skipif(not HAS_TE, reason="needs Transformer Engine, which isn't installed")
@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_precision_aware_optimizer_trains_as_the_one_with_float32_state(
    tmp_path: Path, reference: Reference, moment_dtype: torch.dtype
) -> None:
    plain = replace(JOBS["sft"], optimizer=replace(JOBS["sft"].optimizer, lr=LR))
    precise = replace(plain, optimizer=replace(plain.optimizer, moment_dtypes=(moment_dtype, moment_dtype)))
    setup = Setup(reference.folder, Layout(1), dtype=torch.bfloat16, device=DEVICE)
    found = run_alone(tmp_path, train, setup, reference.batch, {"plain": plain, "precise": precise}, te=True)
    for name in ("loss", "grad_norm"):
        expected = [step[name] for step in found["plain"].metrics]
        assert [step[name] for step in found["precise"].metrics] == pytest.approx(expected, rel=FIRST_STEP_TOLERANCE)


def test_a_published_engine_answers_as_a_vllm_started_on_the_same_weights(tmp_path: Path, reference: Reference) -> None:
    published = run_alone(tmp_path, answers_after_publishing, reference.folder, DEVICE)
    assert published == run_alone(tmp_path, answers_of_plain_vllm, reference.folder)
    assert len({tuple(answer) for answer in published}) == len(PROMPTS)
