"""What ranks do to save the checkpoint that the tests of this folder harm."""

from __future__ import annotations

from pathlib import Path

import torch

from megarl.checkpoint.rank_save import SavedPart
from megarl.ranks.spec import RankSpec
from megarl.ranks.work import SaveWork
from megarl.ranks.worker import Worker
from megarl.roles import Role

SEED, STEPS = 0, (1, 2)


def save(roles: tuple[Role, ...], folder: Path) -> SavedPart:
    """Save the roles as a run does. Collective."""
    worker = Worker(RankSpec(roles, SEED, hang_timeout_s=60.0), torch.device("cpu"))
    worker.save(SaveWork(str(folder), models=True, state=True, in_background=False))
    part = worker.saved(True)
    assert part is not None
    return part
