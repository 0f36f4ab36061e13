"""The layout never changes the mathematics: every layout against Hugging Face's eager float32 model and torch's AdamW.

One pool call answers for a model on a layout; what several tests ask is asked once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch

from megarl.parallel.layout import Layout
from megarl.roles import Role
from megarl.train.actor import Actor
from megarl.train.reference import Reference as FrozenPolicy
from megarl.types import Metrics, Sequences
from megarl.verify.pool import RankPool
from megarl.verify.reference import Reference
from megarl.verify.roles import TRAINING, role_on
from megarl.verify.work import backend_on_rank, score, update
from tests.dist import hf_training
from tests.dist.parity import (
    JOBS,
    MICRO_BATCH_SIZES,
    SFT,
    TELLING,
    TRAINING_TOLERANCE,
    Examiner,
    Trainer,
    ask,
    assert_first_step_is,
    assert_near_in_bf16,
    assert_scored_as,
    assert_steps_are,
    assert_trained_as,
    summed,
    train,
)
from tests.dist.tiny_models import FIVE_LAYERS, MODELS, MOE_MODELS

ONE_RANK = Layout(1)
LAYOUTS = {
    "one_rank": ONE_RANK,
    "tp2": Layout(2, tp=2),
    "tp2+sp": Layout(2, tp=2, sequence_parallel=True),
    "pp2": Layout(2, pp=2),
    "dp2": Layout(2),
    "tp2xpp2": Layout(4, tp=2, pp=2),
    "tp2xpp2+sp": Layout(4, tp=2, pp=2, sequence_parallel=True),
    "tp2xdp2": Layout(4, tp=2),
    "tp2xdp2+sp": Layout(4, tp=2, sequence_parallel=True),
}
QUICK_LAYOUTS = ("one_rank", "dp2", "tp2xpp2+sp")
UNEVEN_LAYOUTS = {
    "tp4": Layout(4, tp=4),
    "tp4+sp": Layout(4, tp=4, sequence_parallel=True),
    "pp2": Layout(2, pp=2),
    "pp4": Layout(4, pp=4),
}
EXPERT_LAYOUTS = {
    "one_rank": ONE_RANK,
    "pp2": Layout(2, pp=2),
    "dp2": Layout(2),
    "tp2+sp": Layout(2, tp=2, sequence_parallel=True),
    "ep2": Layout(2, ep=2),
    "tp2xep2xetp1": Layout(2, tp=2, ep=2, etp=1, sequence_parallel=True),
    "tp2xep2xetp2": Layout(4, tp=2, ep=2, etp=2, sequence_parallel=True),
    "tp2xep2xetp1xdp2": Layout(4, tp=2, ep=2, etp=1, sequence_parallel=True),
    "ep2xetp2xdp4": Layout(4, ep=2, etp=2),
    "tp2xetp4xdp2": Layout(4, tp=2, etp=4, sequence_parallel=True),
    "tp2xetp1xdp2": Layout(4, tp=2, etp=1, sequence_parallel=True),
    "ep2xdp4": Layout(4, ep=2),
    "ep4": Layout(4, ep=4),
    "pp2xep2": Layout(4, pp=2, ep=2),
    "tp2xpp2xep2xetp1": Layout(4, tp=2, pp=2, ep=2, etp=1, sequence_parallel=True),
}
CONTEXT_LAYOUTS = {
    "cp2": Layout(2, cp=2),
    "cp4": Layout(4, cp=4),
    "tp2xcp2": Layout(4, tp=2, cp=2),
    "tp2xcp2+sp": Layout(4, tp=2, cp=2, sequence_parallel=True),
    "cp2xpp2": Layout(4, cp=2, pp=2),
    "cp2xdp2": Layout(4, cp=2),
}
EXPERT_CONTEXT_LAYOUTS = {
    "cp2": Layout(2, cp=2),
    "cp2xep2": Layout(2, cp=2, ep=2),
    "cp2xdp2xep2": Layout(4, cp=2, ep=2),
    "tp2xcp2xep2+sp": Layout(4, tp=2, cp=2, ep=2, sequence_parallel=True),
    "tp2xcp2xep4xetp1+sp": Layout(4, tp=2, cp=2, ep=4, etp=1, sequence_parallel=True),
}
CHUNK_LAYOUTS = {
    "pp2xvpp2": Layout(2, pp=2, vpp=2),
    "pp2xvpp4": Layout(2, pp=2, vpp=4),
    "pp4xvpp2": Layout(4, pp=4, vpp=2),
    "tp2xpp2xvpp2": Layout(4, tp=2, pp=2, vpp=2),
    "tp2xpp2xvpp2+sp": Layout(4, tp=2, pp=2, vpp=2, sequence_parallel=True),
    "pp2xvpp2xdp2": Layout(4, pp=2, vpp=2),
    "cp2xpp2xvpp2": Layout(4, cp=2, pp=2, vpp=2),
}
EXPERT_CHUNK_LAYOUTS = {
    "pp2xvpp2xep2": Layout(4, pp=2, vpp=2, ep=2),
    "tp2xpp2xvpp2xep2xetp1+sp": Layout(4, tp=2, pp=2, vpp=2, ep=2, etp=1, sequence_parallel=True),
}
FSDP_LAYOUTS = {
    "fsdp1": Layout(1, fsdp=1),
    "fsdp2": Layout(2, fsdp=2),
    "fsdp3": Layout(3, fsdp=3),
    "fsdp4": Layout(4, fsdp=4),
    "copies2xfsdp2": Layout(4, fsdp=2),
    "ulysses2": Layout(2, cp=2, fsdp=2),
    "ulysses2xdp2": Layout(4, cp=2, fsdp=4),
    "ulysses4": Layout(4, cp=4, fsdp=2),
}
# Each time, on all layouts but TELLING[0] on tp2xpp2+sp, which takes all jobs.
QUICK_JOBS = ("ppo_token_mean",)
FSDP_JOBS = ("sft", "ppo_token_mean", "ppo_sequence_sum_padded")
EXPERT_JOBS = ("sft_replicated_optimizer", "ppo_token_mean", "ppo_sequence_sum_padded")
QWEN3_MOE, _, QWEN2_MOE = MOE_MODELS
EIGHT_LAYERS = {"num_hidden_layers": 8}


@dataclass(frozen=True)
class Kind:
    """Layouts of one kind, with the models that take them. quick: the pairs of each time; all others are long.

    jobs: names of JOBS. thorough: the pairs whose jobs are all quick. sizes: over the tiny models' own.
    """

    layouts: Mapping[str, Layout]
    pairs: Collection[tuple[str, str]]
    quick: Collection[tuple[str, str]]
    jobs: tuple[str, ...] = tuple(JOBS)
    sizes: dict[str, int] = field(default_factory=dict)
    thorough: Collection[tuple[str, str]] = ()

    def together(self, pair: tuple[str, str], job: str) -> tuple[str, ...]:
        """Return the jobs that are done with one: quick ones wait for no long one."""
        return tuple(other for other in self.jobs if self.is_quick(pair, other) == self.is_quick(pair, job))

    def is_quick(self, pair: tuple[str, str], job: str) -> bool:
        """Return whether a job of a pair is done each time."""
        return pair in self.thorough or (pair in self.quick and job in QUICK_JOBS)


def _all(models: Sequence[str], layouts: Mapping[str, Layout]) -> list[tuple[str, str]]:
    return list(product(models, layouts))


FEWER_KEY_VALUE_HEADS_THAN_RANKS_OR_UNEVEN_STAGES = [
    ("qwen2-tied", "tp4"),
    ("qwen3-untied", "tp4+sp"),
    (FIVE_LAYERS, "pp2"),
    (FIVE_LAYERS, "pp4"),
]
KINDS = (
    Kind(
        LAYOUTS,
        _all(MODELS, LAYOUTS),
        set(product(TELLING[:1], QUICK_LAYOUTS)),  # tests/dist/test_smollm2.py has a Llama
        thorough=[(TELLING[0], "tp2xpp2+sp")],
    ),
    Kind(
        UNEVEN_LAYOUTS,
        FEWER_KEY_VALUE_HEADS_THAN_RANKS_OR_UNEVEN_STAGES,
        {("qwen3-untied", "tp4+sp")},
        jobs=(),
    ),
    Kind(
        EXPERT_LAYOUTS,
        _all(MOE_MODELS, EXPERT_LAYOUTS),
        {(QWEN3_MOE, "tp2xep2xetp1xdp2")},
        EXPERT_JOBS,
    ),
    Kind(
        CONTEXT_LAYOUTS,
        _all((*TELLING, "llama-tied"), CONTEXT_LAYOUTS),
        {(TELLING[1], "tp2xcp2+sp")},
    ),
    Kind(EXPERT_CONTEXT_LAYOUTS, _all(MOE_MODELS, EXPERT_CONTEXT_LAYOUTS), ()),
    Kind(
        CHUNK_LAYOUTS,
        _all(TELLING, CHUNK_LAYOUTS),
        (),  # chunks of a model with experts are quick, below
        sizes=EIGHT_LAYERS,
    ),
    # A dense layer, then layers of experts.
    Kind(
        FSDP_LAYOUTS,
        _all((*MODELS, *MOE_MODELS), [name for name in FSDP_LAYOUTS if name != "fsdp3"]),
        {(TELLING[1], "ulysses4"), (QWEN3_MOE, "fsdp4")},
        FSDP_JOBS,
    ),
    Kind(
        EXPERT_CHUNK_LAYOUTS, _all([QWEN2_MOE], EXPERT_CHUNK_LAYOUTS), {(QWEN2_MOE, "pp2xvpp2xep2")}, sizes=EIGHT_LAYERS
    ),
)


def _param(kind: Kind, pair: tuple[str, str], *job: str) -> Any:
    """Return a model, its sizes, and a layout; with the name of a job also the jobs that are done with it."""
    values = (pair[0], kind.sizes, kind.layouts[pair[1]], *((kind.together(pair, *job), *job) if job else ()))
    is_quick = kind.is_quick(pair, *job) if job else pair in kind.quick
    return pytest.param(*values, id="-".join([*pair, *job]), marks=[] if is_quick else pytest.mark.long)


EXAMINED = pytest.mark.parametrize(
    ("model", "sizes", "layout"), [_param(kind, pair) for kind in KINDS for pair in kind.pairs]
)
PACKING = pytest.mark.parametrize("packing", ["packed", "padded"])


@PACKING
@EXAMINED
def test_logits_and_log_probs_equal_hugging_faces_and_only_output_ranks_report_them(
    examined: Examiner,
    reference: Callable[..., Reference],
    model: str,
    sizes: dict[str, int],
    layout: Layout,
    packing: str,
) -> None:
    answers = [found[packing].scored for found in examined(model, layout, **sizes)]
    assert_scored_as(answers, reference(model, **sizes), layout)


@PACKING
@EXAMINED
def test_loss_and_every_gradient_and_on_every_rank_their_norm_equal_hugging_faces(
    examined: Examiner,
    hf_trained: Callable[..., hf_training.Trained],
    model: str,
    sizes: dict[str, int],
    layout: Layout,
    packing: str,
) -> None:
    """What goes wrong without a word: Megatron leaves parameters out of the norm that nothing has marked as split over
    tensor-parallel ranks; gradients of experts are summed over fewer ranks than others; its schedule multiplies losses
    by the context ranks; messages between two stages that pair wrongly leave the logits right.
    """
    answers = [found[packing] for found in examined(model, layout, **sizes)]
    assert_first_step_is(answers, hf_trained(model, "sft", **sizes), layout)


@pytest.mark.parametrize(
    ("model", "sizes", "layout", "jobs", "job"),
    [_param(kind, pair, job) for kind in KINDS for pair in kind.pairs for job in kind.jobs],
)
def test_three_optimizer_steps_equal_hugging_face_with_adamw(
    trained: Trainer,
    hf_trained: Callable[..., hf_training.Trained],
    model: str,
    sizes: dict[str, int],
    layout: Layout,
    jobs: tuple[str, ...],
    job: str,
) -> None:
    found = [rank[job] for rank in trained(model, layout, jobs, **sizes)]
    assert_trained_as(found, hf_trained(model, job, **sizes), layout)


@pytest.mark.parametrize(
    ("layout", "job"),
    [
        pytest.param(layout, job, marks=[] if layout in QUICK_LAYOUTS and job in QUICK_JOBS else pytest.mark.long)
        for layout in tuple(LAYOUTS)[1:]
        for job in JOBS
    ],
)
def test_every_metric_of_three_optimizer_steps_equals_that_of_one_rank(trained: Trainer, layout: str, job: str) -> None:
    alone, found = (
        [rank[job].metrics for rank in trained(TELLING[0], LAYOUTS[name], KINDS[0].together((TELLING[0], name), job))]
        for name in ("one_rank", layout)
    )
    for step, expected in zip(summed(found, LAYOUTS[layout]), alone[0], strict=True):
        # Some are sums in which tokens of both signs cancel.
        assert step == pytest.approx(expected, rel=TRAINING_TOLERANCE, abs=TRAINING_TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        (LAYOUTS["one_rank"], {}),
        (CHUNK_LAYOUTS["pp2xvpp2"], EIGHT_LAYERS),
        *(pytest.param(LAYOUTS[name], {}, marks=pytest.mark.long) for name in ("dp2", "tp2xpp2+sp")),
        pytest.param(CHUNK_LAYOUTS["pp4xvpp2"], EIGHT_LAYERS, marks=pytest.mark.long),
    ],
    ids=["one_rank", "pp2xvpp2", "dp2", "tp2xpp2+sp", "pp4xvpp2"],
)
def test_the_micro_batch_size_changes_nothing(
    ranks: RankPool,
    reference: Callable[..., Reference],
    hf_trained: Callable[..., hf_training.Trained],
    layout: Layout,
    sizes: dict[str, int],
) -> None:
    """Megatron's interleaved schedule takes multiples of the stages only: here there are 8, 3 and 1 micro-batches."""
    found = reference(TELLING[1], **sizes)
    answers = ask(ranks, train, role_on(layout, found.folder), found.rollouts, MICRO_BATCH_SIZES)
    expected = hf_trained(TELLING[1], "ppo_token_mean", **sizes)
    for size in MICRO_BATCH_SIZES:
        assert_steps_are([rank[size].metrics for rank in answers], expected, layout)


@pytest.mark.parametrize(
    ("layout", "sizes", "jobs"),
    [
        (LAYOUTS["tp2xpp2+sp"], {}, ("sft", "sft_replicated_optimizer")),
        *(
            pytest.param(LAYOUTS[name], {}, ("sft", "sft_replicated_optimizer"), marks=pytest.mark.long)
            for name in ("dp2", "tp2xdp2")
        ),
        pytest.param(CONTEXT_LAYOUTS["tp2xcp2+sp"], {}, ("sft",), marks=pytest.mark.long),
        pytest.param(CHUNK_LAYOUTS["tp2xpp2xvpp2+sp"], EIGHT_LAYERS, ("sft",), marks=pytest.mark.long),
    ],
    ids=["tp2xpp2+sp", "dp2", "tp2xdp2", "tp2xcp2+sp", "tp2xpp2xvpp2+sp"],
)
def test_bf16_training_stays_near_its_own_run_on_one_rank(
    ranks: RankPool, reference: Callable[..., Reference], layout: Layout, sizes: dict[str, int], jobs: tuple[str, ...]
) -> None:
    found = reference(TELLING[0], **sizes)
    asked = found.rollouts, {name: JOBS[name] for name in jobs}
    (alone,), together = (
        ask(ranks, train, role_on(on, found.folder, dtype="bfloat16"), *asked) for on in (ONE_RANK, layout)
    )
    for job in jobs:
        assert_near_in_bf16(summed([rank[job].metrics for rank in together], layout), alone[job].metrics)
        assert {p.values.dtype for rank in together for p in rank[job].weights} == {torch.bfloat16}
        assert all(rank[job].main_dtypes == {torch.float32} for rank in (alone, *together))


# What a role said when it was its turn: metrics of its optimizer step, and log-probs as plain numbers.
Turn = tuple[tuple[Metrics, ...], list[list[float]] | None]


def _take_turns(roles: Mapping[str, Role], batch: Sequences) -> dict[str, list[Turn]]:
    """Let roles score by turns; one that is trained takes an optimizer step before it does."""
    models = {name: (Actor if role.is_trained else FrozenPolicy)(backend_on_rank(role)) for name, role in roles.items()}
    turns: dict[str, list[Turn]] = {name: [] for name in roles}
    for _ in range(3):
        for name, model in models.items():
            metrics = update(model, batch, SFT).metrics if isinstance(model, Actor) else ()
            logprobs_BS = score(model, batch)
            turns[name].append((metrics, None if logprobs_BS is None else logprobs_BS.tolist()))
    return turns


def test_roles_with_layouts_of_their_own_do_not_disturb_each_other(
    ranks: RankPool, reference: Callable[..., Reference]
) -> None:
    found = reference(TELLING[0])
    roles = {
        "actor": role_on(LAYOUTS["tp2xpp2"], found.folder, training=TRAINING),
        "tp4": role_on(UNEVEN_LAYOUTS["tp4"], found.folder, "ref"),
        "dp4": role_on(Layout(4), found.folder, "ref"),
        "fsdp2": role_on(Layout(4, fsdp=2), found.folder, "ref"),
    }
    together = ranks.run(_take_turns, roles, found.rollouts)
    for name in roles:
        alone = ranks.run(_take_turns, {name: roles[name]}, found.rollouts)
        assert [rank[name] for rank in together] == [rank[name] for rank in alone]
