"""The vocabulary-parallel log-probs against torch's log_softmax. Shapes: N tokens, V vocabulary, P with its padding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megarl.parallel.vocab import vocab_parallel_logprobs
from tests.processes import CONTEXT


@dataclass(frozen=True)
class Case:
    """Logits over a padded vocabulary, and weights that make one number of the results."""

    logits_NP: Tensor
    targets_N: Tensor
    vocab_size: int
    logprob_weights_N: Tensor
    entropy_weights_N: Tensor


@dataclass(frozen=True)
class Result:
    """Log-probs, entropies, and the gradient of their weighted sum."""

    logprobs_N: Tensor
    entropy_N: Tensor
    grad_NP: Tensor


def _case(
    seed: int, *, num_tokens: int = 6, vocab: int = 7, padded: int = 8, scale: float = 3.0, garbage: float = 50.0
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    logits_NP = scale * torch.randn(num_tokens, padded, generator=generator)
    logits_NP[:, vocab:] = garbage
    targets_N = torch.randint(vocab, (num_tokens,), generator=generator)
    weights_2N = torch.randn(2, num_tokens, generator=generator)
    return Case(logits_NP, targets_N, vocab, weights_2N[0], weights_2N[1])


def _computed(case: Case, group: dist.ProcessGroup) -> Result:
    """Return this rank's result, its gradient for its own slice of the logits."""
    width = case.logits_NP.shape[1] // dist.get_world_size(group)
    first = dist.get_rank(group) * width
    logits = case.logits_NP[:, first : first + width].clone().requires_grad_()
    logprobs_N, entropy_N = vocab_parallel_logprobs(logits, case.targets_N, group=group, vocab_size=case.vocab_size)
    (case.logprob_weights_N @ logprobs_N + case.entropy_weights_N @ entropy_N).backward()
    assert logits.grad is not None
    return Result(logprobs_N.detach(), entropy_N.detach(), logits.grad)


def _reference(case: Case) -> Result:
    """Return the same by torch's log_softmax over the whole vocabulary, in double precision."""
    logits = case.logits_NP.double().requires_grad_()
    log_probs_NV = logits[:, : case.vocab_size].log_softmax(-1)
    logprobs_N = log_probs_NV.gather(1, case.targets_N[:, None])[:, 0]
    entropy_N = -(log_probs_NV.exp() * log_probs_NV).sum(-1)
    (case.logprob_weights_N.double() @ logprobs_N + case.entropy_weights_N.double() @ entropy_N).backward()
    assert logits.grad is not None
    return Result(logprobs_N.detach(), entropy_N.detach(), logits.grad)


def _assert_close(found: Result, expected: Result) -> None:
    torch.testing.assert_close(found.logprobs_N, expected.logprobs_N.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.entropy_N, expected.entropy_N.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.grad_NP, expected.grad_NP.float(), rtol=1e-4, atol=1e-5)


# Padding that a rank might really hold: zero rows give zero, uninitialised ones anything.
GARBAGE = [0.0, 50.0, 1e30, float("inf"), float("nan"), float("-inf")]
# All of the vocabulary real; some padding; a second half of padding alone.
VOCABULARIES = [8, 7, 5, 4, 3, 1]
# Differences of thousands overflow exp, and probabilities of 0 and 1 take the logarithm of 0.
SCALES = [0.0, 1.0, 100.0, 1e4]
CASES = [
    *[_case(0, vocab=7, garbage=garbage) for garbage in GARBAGE],
    *[_case(1, vocab=vocab) for vocab in VOCABULARIES],
    *[_case(2, scale=scale) for scale in SCALES],
    _case(3, num_tokens=0),
]


@pytest.mark.parametrize("case", CASES)
def test_one_rank_computes_log_softmax_its_entropy_and_their_gradients(alone: dist.ProcessGroup, case: Case) -> None:
    _assert_close(_computed(case, alone), _reference(case))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 40), st.integers(0, 9), st.floats(0.0, 100.0))
def test_any_logits_over_any_padded_vocabulary(
    alone: dist.ProcessGroup, seed: int, vocab: int, padding: int, scale: float
) -> None:
    case = _case(seed, vocab=vocab, padded=vocab + padding, scale=scale)
    _assert_close(_computed(case, alone), _reference(case))


def test_padding_has_no_probability_and_gets_no_gradient(alone: dist.ProcessGroup) -> None:
    case = _case(0, vocab=5, garbage=1e30)
    result = _computed(case, alone)
    assert not result.grad_NP[:, 5:].any()
    uniform = Case(torch.zeros(1, 8), torch.tensor([0]), 5, torch.ones(1), torch.ones(1))
    assert _computed(uniform, alone).entropy_N.item() == pytest.approx(torch.tensor(5.0).log().item())


def test_logits_in_half_precision_are_scored_in_single(alone: dist.ProcessGroup) -> None:
    case = _case(0)
    logits = case.logits_NP.bfloat16().requires_grad_()
    logprobs_N, entropy_N = vocab_parallel_logprobs(logits, case.targets_N, group=alone, vocab_size=7)
    assert logprobs_N.dtype == entropy_N.dtype == torch.float32
    expected_NV = logits.float()[:, :7].log_softmax(-1)
    torch.testing.assert_close(logprobs_N, expected_NV.gather(1, case.targets_N[:, None])[:, 0])
    logprobs_N.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_the_logits_themselves_are_left_as_they_were(alone: dist.ProcessGroup) -> None:
    logits = _case(0).logits_NP
    before = logits.clone()
    vocab_parallel_logprobs(logits, _case(0).targets_N, group=alone, vocab_size=7)
    torch.testing.assert_close(logits, before, rtol=0, atol=0)


def _run_rank(rank: int, folder: Path, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    assert dist.group.WORLD is not None
    results = [vars(_computed(case, dist.group.WORLD)) for case in cases]
    torch.save(results, folder / f"rank{rank}")
    dist.destroy_process_group()


def test_two_ranks_with_half_the_vocabulary_each_agree_with_one_that_has_it_all(tmp_path: Path) -> None:
    processes = [CONTEXT.Process(target=_run_rank, args=(rank, tmp_path, CASES)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    by_rank = [[Result(**result) for result in torch.load(tmp_path / f"rank{rank}")] for rank in range(2)]
    for case, first, second in zip(CASES, *by_rank, strict=True):
        torch.testing.assert_close(first.logprobs_N, second.logprobs_N, rtol=0, atol=0)
        torch.testing.assert_close(first.entropy_N, second.entropy_N, rtol=0, atol=0)
        grad_NP = torch.cat([first.grad_NP, second.grad_NP], dim=1)
        _assert_close(Result(first.logprobs_N, first.entropy_N, grad_NP), _reference(case))


@pytest.mark.parametrize("chunk_bytes", [1, 3 * 8 * 4, 1 << 20])
def test_rows_temperature_and_chunks_change_nothing_but_what_they_say(
    alone: dist.ProcessGroup, chunk_bytes: int
) -> None:
    case = _case(4, num_tokens=9)
    rows_N = torch.tensor([7, 0, 3, 8, 2])
    targets_N, temperature = case.targets_N[rows_N], 0.7
    weights_N = case.logprob_weights_N[rows_N]

    logits = case.logits_NP.clone().requires_grad_()
    logprobs_N, entropy_N = vocab_parallel_logprobs(
        logits,
        targets_N,
        group=alone,
        vocab_size=7,
        rows_N=rows_N,
        temperature=temperature,
        chunk_bytes=chunk_bytes,
    )
    (weights_N @ logprobs_N + weights_N @ entropy_N).backward()

    expected = case.logits_NP.double().requires_grad_()
    log_probs_NV = (expected[rows_N, :7] / temperature).log_softmax(-1)
    chosen_N = log_probs_NV.gather(1, targets_N[:, None])[:, 0]
    plain_N = -(log_probs_NV.exp() * log_probs_NV).sum(-1)
    (weights_N.double() @ chosen_N + weights_N.double() @ plain_N).backward()
    torch.testing.assert_close(logprobs_N.double(), chosen_N, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy_N.double(), plain_N, rtol=1e-4, atol=1e-5)
    assert logits.grad is not None and expected.grad is not None
    torch.testing.assert_close(logits.grad.double(), expected.grad, rtol=1e-4, atol=1e-5)
    assert not logits.grad[[1, 4, 5, 6]].any()


@pytest.mark.parametrize("which", [0, 1], ids=["log-probs", "entropies"])
def test_a_loss_of_one_of_both_has_the_gradient_of_that_one(which: int) -> None:
    case = _case(3, vocab=8)
    gradients = []
    for weights_N in (case.logprob_weights_N, case.entropy_weights_N):
        logits = case.logits_NP.clone().requires_grad_()
        results = vocab_parallel_logprobs(logits, case.targets_N, group=None, vocab_size=8)
        (weights_N @ results[which]).backward()
        log_p_NV = case.logits_NP.clone().requires_grad_()
        log_probs_NV = log_p_NV.log_softmax(-1)
        expected = (
            log_probs_NV.gather(-1, case.targets_N[:, None])[:, 0],
            -(log_probs_NV.exp() * log_probs_NV).sum(-1),
        )
        (weights_N @ expected[which]).backward()
        torch.testing.assert_close(logits.grad, log_p_NV.grad, rtol=0, atol=1e-6)
        gradients.append(logits.grad)
    assert not torch.equal(*gradients)
