"""The layout never changes the mathematics: every layout against Hugging Face's eager float32 model and torch's AdamW.

One pool call answers for a model on a layout; what several tests ask is asked once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megarl.algorithm.policy_loss import PolicyLossSettings
from megarl.data.batch import sequences_to_batch
from megarl.parallel.layout import Layout
from megarl.train.optimizer import OptimizerSpec
from megarl.train.work import Metrics, PolicyLossSpec
from megarl.types import Batch
from tests.dist import hf_reference
from tests.dist.parity_cases import (
    Examined,
    Job,
    Piece,
    Setup,
    Trained,
    examine,
    take_turns,
    train,
)
from tests.dist.ranks import RankPool
from tests.dist.tiny_models import FIVE_LAYERS, MODELS, VOCAB_SIZE, save_tiny_model

TOLERANCE = 2e-5
TRAINING_TOLERANCE = 1e-5
BF16_TOLERANCE = 2e-2
TEMPERATURE = 0.7

LAYOUTS = {
    "one_rank": Layout(1),
    "tp2": Layout(2, tp=2),
    "tp2+sp": Layout(2, tp=2, sequence_parallel=True),
    "pp2": Layout(2, pp=2),
    "dp2": Layout(2),
    "tp2xpp2": Layout(4, tp=2, pp=2),
    "tp2xpp2+sp": Layout(4, tp=2, pp=2, sequence_parallel=True),
    "tp2xdp2": Layout(4, tp=2),
    "tp2xdp2+sp": Layout(4, tp=2, sequence_parallel=True),
    "tp4": Layout(4, tp=4),
    "tp4+sp": Layout(4, tp=4, sequence_parallel=True),
    "pp4": Layout(4, pp=4),
    "dp4": Layout(4),
}
USUAL = tuple(LAYOUTS)[:9]
TELLING = ("qwen2-tied", "qwen3-untied")
"""The models that take every layout each time: between them they have all that families differ in but Llama's RoPE."""

FEWER_KV_HEADS_THAN_RANKS = [("qwen2-tied", "tp4"), ("qwen3-untied", "tp4+sp")]
UNEVEN_STAGES = [(FIVE_LAYERS, "pp2"), (FIVE_LAYERS, "pp4")]

LENGTHS = (9, 12, 12, 7, 16, 5, 9, 3)
PROMPT_LENGTH = 2
"""Rows of different and of equal lengths, odd sums; the last row has no token that is trained on."""

# An epsilon far above the rounding errors of gradients: Adam would blow them up where the gradient is next to zero.
OPTIMIZER = OptimizerSpec(
    lr=2e-4,
    min_lr=0.0,
    weight_decay=0.1,
    betas=(0.9, 0.95),
    eps=1e-5,
    clip_grad=1.0,
    schedule="constant",
    warmup_steps=0,
    total_steps=10,
    use_distributed_optimizer=True,
)
REPLICATED = replace(OPTIMIZER, use_distributed_optimizer=False)
# Takes a step that leaves gradients and weights as they are.
LOOKING = replace(REPLICATED, lr=0.0, clip_grad=1e9)

PPO = PolicyLossSpec(
    PolicyLossSettings(clip_low=0.2, clip_high=0.25, clip_c=1.3),
    loss_agg_mode="token-mean",
    kl_coef=0.1,
    kl_type="low_var_kl",
    temperature=TEMPERATURE,
)
SEQUENCE_SUM = replace(PPO, loss_agg_mode="seq-mean-token-sum", kl_type="mse")
SEQUENCE_SUM_NORM = replace(PPO, loss_agg_mode="seq-mean-token-sum-norm", max_tokens=20, entropy_coef=0.05)
SEQUENCE_MEAN = replace(PPO, loss_agg_mode="seq-mean-token-mean", kl_coef=None)
JOBS = {
    "sft": Job(None, OPTIMIZER),
    "sft_replicated_optimizer": Job(None, REPLICATED),
    "ppo_token_mean": Job(PPO, OPTIMIZER),
    "ppo_sequence_sum_padded": Job(SEQUENCE_SUM, OPTIMIZER, packed=False),
    "ppo_sequence_sum_norm": Job(SEQUENCE_SUM_NORM, REPLICATED, packed=False),
    "ppo_sequence_mean": Job(SEQUENCE_MEAN, REPLICATED),
}
MICRO_BATCH_SIZES = {f"{size}": replace(JOBS["ppo_token_mean"], micro_batch_size=size) for size in (1, 3, 8)}


@dataclass(frozen=True)
class Reference:
    """A model and what Hugging Face says of its batch; log-probs are those of every token."""

    folder: Path
    batch: Batch
    logits_BSV: Tensor
    logprobs_BS: Tensor


def _pairs(models: Sequence[str], always: Sequence[tuple[str, str]] = ()) -> list[object]:
    """Return (model, layout) parameters: all layouts of telling models and one of the others, the rest marked long."""
    quick = {*product(TELLING, USUAL), *product(models, ["tp2xpp2+sp"]), *always}
    pairs = dict.fromkeys([*product(models, USUAL), *always])
    return [pytest.param(*p, id="-".join(p), marks=[] if p in quick else pytest.mark.long) for p in pairs]


EXAMINED = pytest.mark.parametrize(("model", "layout"), _pairs(MODELS, FEWER_KV_HEADS_THAN_RANKS + UNEVEN_STAGES))
PACKING = pytest.mark.parametrize("packing", ["packed", "padded"])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Return the maker of references by model."""
    folder = tmp_path_factory.mktemp("models")

    @cache
    def make(model: str) -> Reference:
        save_tiny_model(model, folder / model)
        return make_reference(folder / model)

    return make


@pytest.fixture(scope="module")
def hf_training(reference: Callable[[str], Reference]) -> Callable[[str, str], hf_reference.Training]:
    """Return the runner of training jobs with Hugging Face and torch, by model and job."""

    @cache
    def run(model: str, job: str) -> hf_reference.Training:
        found, asked = reference(model), JOBS[job]
        return hf_reference.train(found.folder, found.batch, asked.loss, asked.optimizer, asked.steps)

    return run


@pytest.fixture(scope="module")
def examined(ranks: RankPool, reference: Callable[[str], Reference]) -> Callable[[str, str], list[dict[str, Examined]]]:
    """Return the examiner by model and layout: its answers by rank and packing."""

    @cache
    def run(model: str, layout: str) -> list[dict[str, Examined]]:
        setup = Setup(reference(model).folder, LAYOUTS[layout])
        batch, world_size = reference(model).batch, LAYOUTS[layout].world_size
        return ranks.run(examine, setup, batch, LOOKING, TEMPERATURE, world_size=world_size)

    return run


@pytest.fixture(scope="module")
def trained(ranks: RankPool, reference: Callable[[str], Reference]) -> Callable[[str, str], list[dict[str, Trained]]]:
    """Return the runner of all JOBS by model and layout: its answers by rank and job."""

    @cache
    def run(model: str, layout: str) -> list[dict[str, Trained]]:
        setup = Setup(reference(model).folder, LAYOUTS[layout])
        return ranks.run(train, setup, reference(model).batch, JOBS, world_size=LAYOUTS[layout].world_size)

    return run


def make_reference(folder: Path) -> Reference:
    """Ask Hugging Face about the model in ``folder`` and a random batch, as rollouts of a policy close to it."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]
    everything = sequences_to_batch(tokens, [[True] * length for length in LENGTHS])
    trained_on = sequences_to_batch(tokens, [_mask(length) for length in LENGTHS])
    model = hf_reference.load(folder)
    with torch.no_grad():
        logits_BSV = hf_reference.logits_BSV(model, everything)
        logprobs_BS = hf_reference.logprobs_BS(model, everything, TEMPERATURE)

    def near_logprobs() -> Tensor:
        noise_BS = 0.2 * torch.randn(logprobs_BS.shape, generator=generator)
        return (logprobs_BS + noise_BS) * trained_on.mask_BS

    batch = replace(
        trained_on,
        old_logprobs_BS=near_logprobs(),
        ref_logprobs_BS=near_logprobs(),
        advantages_BS=torch.randn(logprobs_BS.shape, generator=generator) * trained_on.mask_BS,
    )
    return Reference(folder, batch, logits_BSV, logprobs_BS)


def _mask(length: int) -> list[bool]:
    return [position >= PROMPT_LENGTH and length > PROMPT_LENGTH + 1 for position in range(length)]


def summed(results: Sequence[Sequence[Metrics]], layout: Layout) -> list[Metrics]:
    """Add up the shares of the ranks that report; gradient norm and learning rate are the same on all."""
    shares = [results[rank] for rank in layout.output_ranks()]
    return [
        {name: value if name in ("grad_norm", "lr") else sum(s[name] for s in step) for name, value in step[0].items()}
        for step in zip(*shares, strict=True)
    ]


def assert_pieces_are(pieces: Sequence[Piece], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare each piece with its part of Hugging Face's tensor, to ``tolerance`` of that one's largest value.

    Every part of every tensor has to be there, and padding has to be zero.
    """
    missing = {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in expected.items()}
    for piece in pieces:
        if piece.name is None:
            assert not piece.values.any(), "padding isn't zero"
            continue
        whole, length = expected[piece.name], piece.stop - piece.start
        part, scale = whole.narrow(piece.dim, piece.start, length), float(whole.abs().max())
        missing[piece.name].narrow(piece.dim, piece.start, length).fill_(False)
        name_it = partial("{}: {}".format, piece.name)
        torch.testing.assert_close(piece.values, part, rtol=0, atol=tolerance * scale, msg=name_it)
    assert [name for name, rows in missing.items() if rows.any()] == []


@PACKING
@EXAMINED
def test_logits_equal_hugging_faces(
    examined: Callable[[str, str], list[dict[str, Examined]]],
    reference: Callable[[str], Reference],
    model: str,
    layout: str,
    packing: str,
) -> None:
    scored = [examined(model, layout)[rank][packing].scored for rank in LAYOUTS[layout].output_ranks()]
    logits_BSV = torch.cat([found.logits_BSV for found in scored if found is not None])
    torch.testing.assert_close(logits_BSV, reference(model).logits_BSV, rtol=0, atol=TOLERANCE)


@PACKING
@EXAMINED
def test_log_probs_at_the_sampling_temperature_equal_hugging_faces(
    examined: Callable[[str, str], list[dict[str, Examined]]],
    reference: Callable[[str], Reference],
    model: str,
    layout: str,
    packing: str,
) -> None:
    scored = [examined(model, layout)[rank][packing].scored for rank in LAYOUTS[layout].output_ranks()]
    logprobs_BS = torch.cat([found.logprobs_BS for found in scored if found is not None])
    torch.testing.assert_close(logprobs_BS, reference(model).logprobs_BS, rtol=0, atol=TOLERANCE)


@EXAMINED
def test_only_output_ranks_report_log_probs(
    examined: Callable[[str, str], list[dict[str, Examined]]], model: str, layout: str
) -> None:
    reporting = [r for r, found in enumerate(examined(model, layout)) if found["packed"].scored is not None]
    assert tuple(reporting) == LAYOUTS[layout].output_ranks()


@PACKING
@EXAMINED
def test_the_gradient_of_every_parameter_equals_hugging_faces(
    examined: Callable[[str, str], list[dict[str, Examined]]],
    hf_training: Callable[[str, str], hf_reference.Training],
    model: str,
    layout: str,
    packing: str,
) -> None:
    pieces = [piece for found in examined(model, layout) for piece in found[packing].gradients]
    assert_pieces_are(pieces, hf_training(model, "sft").first_gradients, TOLERANCE)


@PACKING
@EXAMINED
def test_loss_and_gradient_norm_equal_hugging_faces_on_every_rank(
    examined: Callable[[str, str], list[dict[str, Examined]]],
    hf_training: Callable[[str, str], hf_reference.Training],
    model: str,
    layout: str,
    packing: str,
) -> None:
    """Megatron leaves parameters out of the norm that nothing has marked as split over tensor-parallel ranks."""
    found, expected = [rank[packing].metrics for rank in examined(model, layout)], hf_training(model, "sft")
    (step,) = summed([[metrics] for metrics in found], LAYOUTS[layout])
    assert step["loss"] == pytest.approx(expected.losses[0], rel=TRAINING_TOLERANCE)
    norms = [metrics["grad_norm"] for metrics in found]
    assert norms == pytest.approx([expected.grad_norms[0]] * len(norms), rel=TRAINING_TOLERANCE)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(("model", "layout"), _pairs(MODELS))
def test_three_optimizer_steps_equal_hugging_face_with_adamw(
    trained: Callable[[str, str], list[dict[str, Trained]]],
    hf_training: Callable[[str, str], hf_reference.Training],
    model: str,
    layout: str,
    job: str,
) -> None:
    found, expected = [rank[job] for rank in trained(model, layout)], hf_training(model, job)
    steps = summed([rank.metrics for rank in found], LAYOUTS[layout])
    assert [s["loss"] for s in steps] == pytest.approx(expected.losses, rel=TRAINING_TOLERANCE, abs=1e-6)
    assert [s["grad_norm"] for s in steps] == pytest.approx(expected.grad_norms, rel=TRAINING_TOLERANCE)
    assert_pieces_are([piece for rank in found for piece in rank.weights], expected.weights, TRAINING_TOLERANCE)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("layout", USUAL[1:])
def test_every_metric_of_three_optimizer_steps_equals_that_of_one_rank(
    trained: Callable[[str, str], list[dict[str, Trained]]], layout: str, job: str
) -> None:
    alone = [rank[job].metrics for rank in trained(TELLING[0], "one_rank")]
    found = [rank[job].metrics for rank in trained(TELLING[0], layout)]
    for step, expected in zip(summed(found, LAYOUTS[layout]), alone[0], strict=True):
        # Some are sums in which tokens of both signs cancel.
        assert step == pytest.approx(expected, rel=TRAINING_TOLERANCE, abs=TRAINING_TOLERANCE)


@pytest.mark.parametrize("layout", ["one_rank", "dp2", "tp2xpp2+sp"])
def test_the_micro_batch_size_changes_nothing(
    ranks: RankPool,
    reference: Callable[[str], Reference],
    hf_training: Callable[[str, str], hf_reference.Training],
    layout: str,
) -> None:
    setup = Setup(reference(TELLING[1]).folder, LAYOUTS[layout])
    batch, world_size = reference(TELLING[1]).batch, LAYOUTS[layout].world_size
    answers = ranks.run(train, setup, batch, MICRO_BATCH_SIZES, world_size=world_size)
    expected = hf_training(TELLING[1], "ppo_token_mean")
    for size in MICRO_BATCH_SIZES:
        steps = summed([rank[size].metrics for rank in answers], LAYOUTS[layout])
        assert [s["loss"] for s in steps] == pytest.approx(expected.losses, rel=TRAINING_TOLERANCE, abs=1e-6)
        assert [s["grad_norm"] for s in steps] == pytest.approx(expected.grad_norms, rel=TRAINING_TOLERANCE)


@pytest.mark.parametrize("layout", ["dp2", "tp2xpp2+sp", "tp2xdp2"])
def test_bf16_training_stays_near_its_own_run_on_one_rank(
    ranks: RankPool, reference: Callable[[str], Reference], layout: str
) -> None:
    found = reference(TELLING[0])
    jobs = {name: JOBS[name] for name in ("sft", "sft_replicated_optimizer")}

    def run(layout: Layout) -> list[dict[str, Trained]]:
        setup = Setup(found.folder, layout, dtype=torch.bfloat16)
        return ranks.run(train, setup, found.batch, jobs, world_size=layout.world_size)

    (alone,), together = run(LAYOUTS["one_rank"]), run(LAYOUTS[layout])
    for job in jobs:
        steps = summed([rank[job].metrics for rank in together], LAYOUTS[layout])
        for name in ("loss", "grad_norm"):
            expected = [s[name] for s in alone[job].metrics]
            assert [s[name] for s in steps] == pytest.approx(expected, rel=BF16_TOLERANCE)
        assert {p.values.dtype for rank in together for p in rank[job].weights} == {torch.bfloat16}
        assert all(rank[job].main_dtypes == {torch.float32} for rank in (alone, *together))


def test_roles_with_layouts_of_their_own_do_not_disturb_each_other(
    ranks: RankPool, reference: Callable[[str], Reference]
) -> None:
    layouts = {"actor": "tp2xpp2", "reference": "tp4", "reward_model": "dp4"}
    folder, batch = reference(TELLING[0]).folder, reference(TELLING[0]).batch
    setups = {role: Setup(folder, LAYOUTS[layout]) for role, layout in layouts.items()}
    together = ranks.run(take_turns, setups, batch, OPTIMIZER)
    for role in setups:
        alone = ranks.run(take_turns, {role: setups[role]}, batch, OPTIMIZER)
        assert [rank[role] for rank in together] == [rank[role] for rank in alone]
