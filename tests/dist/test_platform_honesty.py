"""The CPU platform is for Megatron alone: to everybody else in the same process, torch has no CUDA."""

from __future__ import annotations

import pytest
import torch

from megarl.parallel.platform import install_platform
from megarl.verify.pool import RankPool


def _is_honest() -> bool:
    assert not torch.cuda.is_available()
    assert torch.ones(1).type() == "torch.FloatTensor"
    for asks_for_cuda in (torch.ones(1).cuda, torch.nn.Linear(1, 1).cuda, lambda: torch.zeros(1, device="cuda")):
        with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
            asks_for_cuda()
    return True


def _is_installed_once() -> bool:
    before = torch.Tensor.type, torch.Tensor.cuda
    install_platform()
    return before == (torch.Tensor.type, torch.Tensor.cuda)


def _views_of_torch() -> tuple[bool, bool]:
    from megatron.core.optimizer import clip_grads

    return clip_grads.torch is torch, clip_grads.torch.Tensor is torch.Tensor


def test_torch_stays_an_honest_cpu_torch_where_megatron_runs(ranks: RankPool) -> None:
    assert ranks.run(_is_honest, world_size=1) == [True]


def test_installing_again_changes_nothing(ranks: RankPool) -> None:
    assert ranks.run(_is_installed_once, world_size=1) == [True]


def test_megatron_sees_its_own_view_of_torch_with_the_same_types(ranks: RankPool) -> None:
    assert ranks.run(_views_of_torch, world_size=1) == [(False, True)]
