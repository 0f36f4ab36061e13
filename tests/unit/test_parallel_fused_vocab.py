"""The fused head against logits that are there as a whole. Shapes: L positions, N tokens, H hidden, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megarl.parallel.fused_vocab import fused_vocab_parallel_logprobs
from megarl.parallel.vocab import vocab_parallel_logprobs

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """A head, positions of which ``rows_N`` count, and weights that make one number of the results."""

    hidden_LH: Tensor
    weight_VH: Tensor
    rows_N: Tensor
    targets_N: Tensor
    vocab_size: int
    logprob_weights_N: Tensor
    entropy_weights_N: Tensor
    temperature: float = 0.7


def _case(
    seed: int,
    *,
    num_tokens: int = 9,
    vocab: int = 301,
    padding: int = 3,
    dtype: torch.dtype = torch.float32,
    entropy: float = 0.5,
    scale: float = 1.0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    randn = partial(torch.randn, generator=generator)
    weight_VH = scale * randn(vocab + padding, 16)
    weight_VH[vocab:] = 50.0  # padding that would often win if it counted
    return Case(
        randn(14, 16).to(dtype),
        weight_VH.to(dtype),
        torch.randperm(14, generator=generator)[:num_tokens],
        torch.randint(vocab, (num_tokens,), generator=generator),
        vocab,
        randn(num_tokens),
        entropy * randn(num_tokens),
    )


def _results(case: Case, compute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return log-probs, entropies, and both gradients of their weighted sum."""
    hidden_LH, weight_VH = (given.clone().requires_grad_() for given in (case.hidden_LH, case.weight_VH))
    logprobs_N, entropy_N = compute(hidden_LH, weight_VH)
    (case.logprob_weights_N @ logprobs_N + case.entropy_weights_N @ entropy_N).backward()
    assert hidden_LH.grad is not None and weight_VH.grad is not None
    return {
        "log-probs": logprobs_N.detach(),
        "entropies": entropy_N.detach(),
        "gradient of hidden states": hidden_LH.grad,
        "gradient of the weight": weight_VH.grad,
    }


def _assert_as_without(case: Case, group: dist.ProcessGroup, chunk_bytes: int) -> None:
    asked = {
        "targets_N": case.targets_N,
        "group": group,
        "vocab_size": case.vocab_size,
        "rows_N": case.rows_N,
        "temperature": case.temperature,
    }
    fused = partial(fused_vocab_parallel_logprobs, **asked, chunk_bytes=chunk_bytes)

    def plain(hidden_LH: Tensor, weight_VH: Tensor) -> tuple[Tensor, Tensor]:
        return vocab_parallel_logprobs(hidden_LH @ weight_VH.T, **asked)

    found, expected = _results(case, fused), _results(case, plain)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        # Log-probs next to 0 are logarithms of sums next to 1, whose rounding errors are what they are.
        atol = TOLERANCE[case.hidden_LH.dtype] * max([1.0, *values.abs().flatten().tolist()])
        torch.testing.assert_close(found[name], values, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


CASES = {
    "usual": _case(0),
    "log-probs alone": _case(1, entropy=0.0),
    "no padding": _case(2, padding=0),
    "no token that counts": _case(3, num_tokens=0),
    "every position counts": _case(4, num_tokens=14),
    "one word": _case(5, vocab=1),
    "sure": _case(6, scale=30.0),
    "bf16": _case(7, dtype=torch.bfloat16),
}


@pytest.mark.parametrize(
    "chunk_bytes", [4 * 9 * 3, 4 * 9 * 200, 1 << 20], ids=["few_columns", "some_columns", "all_columns"]
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks_of_any_width_give_what_whole_logits_give(
    alone: dist.ProcessGroup, case: Case, chunk_bytes: int
) -> None:
    _assert_as_without(case, alone, chunk_bytes)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 400), st.integers(0, 9), st.integers(0, 14), st.integers(20, 500))
def test_any_head_any_positions_and_any_blocks(
    alone: dist.ProcessGroup, seed: int, vocab: int, padding: int, num_tokens: int, width: int
) -> None:
    _assert_as_without(
        _case(seed, vocab=vocab, padding=padding, num_tokens=num_tokens), alone, 4 * max(1, num_tokens) * width
    )


def test_padding_and_positions_that_do_not_count_get_no_gradient(alone: dist.ProcessGroup) -> None:
    case = _case(0)
    hidden_LH, weight_VH = case.hidden_LH.clone().requires_grad_(), case.weight_VH.clone().requires_grad_()
    logprobs_N, entropy_N = fused_vocab_parallel_logprobs(
        hidden_LH, weight_VH, case.targets_N, group=alone, vocab_size=case.vocab_size, rows_N=case.rows_N
    )
    (logprobs_N.sum() + entropy_N.sum()).backward()
    assert hidden_LH.grad is not None and weight_VH.grad is not None
    assert hidden_LH.grad.any(-1).nonzero()[:, 0].tolist() == sorted(case.rows_N.tolist())
    assert weight_VH.grad[: case.vocab_size].any() and not weight_VH.grad[case.vocab_size :].any()


def test_nothing_as_large_as_the_logits_is_kept_nor_ever_made(alone: dist.ProcessGroup) -> None:
    case, largest = _case(0, num_tokens=14, vocab=4000), 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape != case.weight_VH.shape:  # the weight and its gradient may be
                largest = max(largest, out.numel())
            return out

    hidden_LH, weight_VH = case.hidden_LH.clone().requires_grad_(), case.weight_VH.clone().requires_grad_()
    with Watch():
        logprobs_N, entropy_N = fused_vocab_parallel_logprobs(
            hidden_LH,
            weight_VH,
            case.targets_N,
            group=alone,
            vocab_size=case.vocab_size,
            rows_N=case.rows_N,
            chunk_bytes=4 * 14 * 256,
        )
        (logprobs_N.sum() + entropy_N.sum()).backward()
    assert 0 < largest <= 16 * 256
