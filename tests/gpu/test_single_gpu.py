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
from megarl.verify.reference import TEMPERATURE, Reference, hf_logits_BSV, load, make_reference
from megarl.verify.roles import role_on
from tests.dist import hf_training
from tests.dist.parity import JOBS, SFT, Job, assert_pieces_are, train
from tests.dist.publish_case import PROMPTS
from tests.dist.tiny_models import VOCAB_SIZE, save_tiny_model
from tests.gpu.gpu_cases import (
    all_logprobs,
    answers_after_publishing,
    answers_of_plain_vllm,
    builds_with_transformer_engine,
)
from tests.gpu.gpu_process import run_alone

pytestmark = pytest.mark.skipif(platform_name() != "cuda", reason="needs an NVIDIA GPU, and this machine shows none")

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
    """How the model is built. tolerance: of float32 log-probs."""

    te: bool
    dtype: str
    packed: bool = True
    tolerance: float = 1e-4


BUILDS = {
    "own_layers-fp32": Build(False, "float32"),
    "own_layers-bf16": Build(False, "bfloat16"),
    "te-fp32": Build(True, "float32"),
    "te-bf16": Build(True, "bfloat16"),
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
    return make_reference(folder, VOCAB_SIZE)


@cache
def hf_bf16_logprobs_BS(reference: Reference) -> Tensor:
    """Return the log-probs of Hugging Face's model in bf16, which it rounds to that too."""
    everything = reference.everything
    with torch.no_grad():
        logits_BSV = hf_logits_BSV(load(reference.folder, torch.bfloat16), everything)
    logprobs_BSV = (logits_BSV.bfloat16() / TEMPERATURE).log_softmax(-1)
    return (logprobs_BSV.gather(-1, everything.tokens_BS[..., None])[..., 0] * everything.mask_BS).float()


def mean_error(logprobs_BS: Tensor, reference: Reference) -> float:
    """Return the mean distance to the reference's log-probs."""
    return float((logprobs_BS - reference.logprobs_BS).abs().mean())


def _at_lr(job: Job) -> Job:
    return replace(job, training=replace(job.training, lr=LR))


def _expected(reference: Reference, job: Job) -> hf_training.Trained:
    return hf_training.train(reference.folder, reference.rollouts, job.loss, job.training, job.steps)


@ALL
def test_megatron_is_built_of_the_layers_that_were_asked_for(tmp_path: Path, build: Build) -> None:
    assert run_alone(tmp_path, builds_with_transformer_engine, te=build.te) == build.te


@ALL
def test_log_probs_equal_hugging_faces(tmp_path: Path, reference: Reference, build: Build) -> None:
    role = role_on(Layout(1), reference.folder, "ref", dtype=build.dtype, packed=build.packed)
    scored = run_alone(tmp_path, all_logprobs, role, reference.everything, TEMPERATURE, te=build.te)
    if build.dtype == "float32":
        torch.testing.assert_close(scored, reference.logprobs_BS, rtol=0, atol=build.tolerance)
    else:
        allowed = BF16_FACTOR * mean_error(hf_bf16_logprobs_BS(reference), reference)
        assert mean_error(scored, reference) <= allowed


@pytest.mark.parametrize("job", JOBS)
def test_three_optimizer_steps_equal_hugging_face_with_adamw(tmp_path: Path, reference: Reference, job: str) -> None:
    asked = _at_lr(JOBS[job])
    role, expected = role_on(Layout(1), reference.folder), _expected(reference, asked)
    found = run_alone(tmp_path, train, role, reference.rollouts, {job: asked}, te=False)[job]
    assert [s["loss"] for s in found.metrics] == pytest.approx(expected.losses, rel=1e-4, abs=1e-4)
    assert [s["grad_norm"] for s in found.metrics] == pytest.approx(expected.grad_norms, rel=1e-3)
    assert_pieces_are(found.weights, expected.weights, 1e-4)


@ALL
def test_training_begins_as_hugging_faces_and_lowers_the_loss(
    tmp_path: Path, reference: Reference, build: Build
) -> None:
    """Rounded weights take a path of their own after the first step."""
    asked = replace(JOBS["sft"], packed=build.packed)
    role = role_on(Layout(1), reference.folder, dtype=build.dtype)
    found = run_alone(tmp_path, train, role, reference.rollouts, {"sft": asked}, te=build.te)["sft"]
    expected = _expected(reference, replace(asked, steps=1))
    assert found.metrics[0]["loss"] == pytest.approx(expected.losses[0], rel=FIRST_STEP_TOLERANCE)
    assert found.metrics[0]["grad_norm"] == pytest.approx(expected.grad_norms[0], rel=FIRST_STEP_TOLERANCE)
    losses = [step["loss"] for step in found.metrics]
    assert losses == sorted(losses, reverse=True)
    assert found.main_dtypes == {torch.float32}


@pytest.mark.skipif(not HAS_TE, reason="needs Transformer Engine, which isn't installed")
@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_the_precision_aware_optimizer_trains_as_the_one_with_float32_state(
    tmp_path: Path, reference: Reference, moment_dtype: str
) -> None:
    precise = {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": moment_dtype,
        "exp_avg_sq_dtype": moment_dtype,
    }
    jobs = {"plain": _at_lr(Job(SFT)), "precise": _at_lr(Job(SFT, precise))}
    role = role_on(Layout(1), reference.folder, dtype="bfloat16")
    found = run_alone(tmp_path, train, role, reference.rollouts, jobs, te=True)
    for name in ("loss", "grad_norm"):
        expected = [step[name] for step in found["plain"].metrics]
        assert [step[name] for step in found["precise"].metrics] == pytest.approx(expected, rel=FIRST_STEP_TOLERANCE)


def test_a_published_engine_answers_as_a_vllm_started_on_the_same_weights(tmp_path: Path, reference: Reference) -> None:
    published = run_alone(tmp_path, answers_after_publishing, role_on(Layout(1), reference.folder, dtype="bfloat16"))
    assert published == run_alone(tmp_path, answers_of_plain_vllm, reference.folder)
    assert len({tuple(answer) for answer in published}) == len(PROMPTS)
