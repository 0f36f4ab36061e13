"""The learning rate of every update, on every backend."""

from __future__ import annotations

import math

from megarl.roles import Training


def learning_rate(training: Training, update: int) -> float:
    """Return the learning rate of the ``update``-th optimizer step, counted from 1.

    It rises linearly over the warm-up of N updates, whose k-th has k / N of the peak. The first update after the
    warm-up has the peak. From there the rate goes down towards min_lr, which the update after the last one of the run
    would have. cosine: min_lr + (lr - min_lr) (1 + cos(pi p)) / 2 with the progress p; linear: lr + (min_lr - lr) p.
    """
    warm_up = training.warm_up
    if update <= warm_up:
        return training.lr * update / warm_up
    if training.schedule == "constant":
        return training.lr
    done, length = update - 1 - warm_up, training.total_steps - warm_up
    progress = min(1.0, done / max(1, length))
    left = (1 + math.cos(math.pi * progress)) / 2 if training.schedule == "cosine" else 1 - progress
    return training.min_lr + (training.lr - training.min_lr) * left
