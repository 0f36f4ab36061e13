"""Numbers of a pass without gradients, put back in the rows and columns that they are of.

Shape suffixes: B rollouts, S sequence, N predicted tokens of a micro-batch that count, R rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megarl.batching.pack import MicroBatch
from megarl.train.backend import Backend, Output
from megarl.train.work import Micros, ScoreWork
from megarl.types import Sequences


def token_logprobs(backend: Backend, work: ScoreWork) -> Tensor | None:
    """Return log-probs [B, S] of the masked tokens on the ranks that report results, else None.

    They are of softmax(logits / temperature), the distribution that the engine samples from.
    """
    return score_tokens(
        backend, work.sequences, work.micro_batches, lambda _, output: output.logprobs(work.temperature).logprobs_N
    )


def score_tokens(
    backend: Backend, sequences: Sequences, micros: Micros, read: Callable[[MicroBatch, Output], Tensor]
) -> Tensor | None:
    """Return one number for each masked token, as float32 [B, S], on the ranks that report results, else None.

    read: turns a micro-batch and its output into the numbers [N].
    """
    results = read_micro_batches(backend, sequences, micros, read)
    return on_tokens(sequences, results) if backend.place.reports else None


def on_tokens(sequences: Sequences, results: Sequence[tuple[MicroBatch, Tensor]]) -> Tensor:
    """Return numbers [N] of micro-batches where their tokens stand, as float32 [B, S]; zero elsewhere."""
    scores_BS = torch.zeros(sequences.tokens_BS.shape)
    for micro, scores_N in results:
        scores_BS[micro.row_N, micro.column_N] = scores_N.cpu()
    return scores_BS


def read_micro_batches(
    backend: Backend, sequences: Sequences, micros: Micros, read: Callable[[MicroBatch, Output], Tensor]
) -> list[tuple[MicroBatch, Tensor]]:
    """Return each micro-batch with what ``read`` makes of it, on the host; only the last stage has any."""
    packed = backend.pack(sequences, micros)
    return backend.forward(packed, lambda micro, output: (micro, read(micro, output).cpu()))


def score_rows(
    backend: Backend, sequences: Sequences, micros: Micros, read: Callable[[MicroBatch, Output], Tensor]
) -> Tensor | None:
    """Return one number for each row, as float32 [B], on the ranks that report results, else None.

    read: turns a micro-batch and its output into the numbers [R].
    """
    results = read_micro_batches(backend, sequences, micros, read)
    if not backend.place.reports:
        return None
    scores_B = torch.zeros(len(sequences))
    for micro, scores_R in results:
        scores_B[micro.row_R] = scores_R
    return scores_B
