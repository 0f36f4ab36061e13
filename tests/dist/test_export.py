"""What is loaded is exported bit for bit, whatever the layout and the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megarl.parallel.layout import Layout
from megarl.roles import Role
from megarl.verify.pool import RankPool
from megarl.verify.reference import load
from megarl.verify.roles import role_on
from megarl.verify.work import backend_on_rank
from megarl.weights.hf_export import MAX_FILE_BYTES, export_hf
from megarl.weights.name_map import hf_shapes
from tests.dist.tiny_models import MODELS, save_tiny_model

TP2_PP2 = Layout(4, tp=2, pp=2)
TP2_DP2 = Layout(4, tp=2, sequence_parallel=True)
SMALL_FILE_BYTES = 8192


def _export(role: Role, out: Path, max_file_bytes: int) -> None:
    """Load a model, and write it as a Hugging Face folder."""
    backend = backend_on_rank(role)
    export_hf(
        out,
        template=Path(role.model.here()),
        shapes=hf_shapes(role.shape),
        sources=backend.peers(),
        parameters=backend.parameters(),
        dtype=backend.model.dtype,
        device=backend.device,
        max_file_bytes=max_file_bytes,
    )


@pytest.mark.parametrize("max_file_bytes", [MAX_FILE_BYTES, SMALL_FILE_BYTES], ids=["one_file", "several_files"])
@pytest.mark.parametrize("model", MODELS)
def test_export_writes_what_was_loaded_bit_for_bit(
    ranks: RankPool, tmp_path: Path, model: str, max_file_bytes: int
) -> None:
    folder, out = tmp_path / "loaded", tmp_path / "exported"
    save_tiny_model(model, folder)
    ranks.run(_export, role_on(TP2_PP2, folder), out, max_file_bytes)
    _assert_same_weights(folder, out)
    assert (len(list(out.glob("*.safetensors"))) > 1) == (max_file_bytes == SMALL_FILE_BYTES)
    assert _logits(out).equal(_logits(folder))


@pytest.mark.parametrize("model", ["qwen2-tied", "qwen3-untied"])
def test_an_exported_model_loads_and_exports_again_on_another_layout_in_bf16_too(
    ranks: RankPool, tmp_path: Path, model: str
) -> None:
    folder, first, second = tmp_path / "loaded", tmp_path / "first", tmp_path / "second"
    save_tiny_model(model, folder)
    ranks.run(_export, role_on(TP2_PP2, folder, dtype="bfloat16"), first, SMALL_FILE_BYTES)
    ranks.run(_export, role_on(TP2_DP2, first, dtype="bfloat16"), second, MAX_FILE_BYTES)
    _assert_same_weights(first, second)
    rounded = {name: tensor.bfloat16() for name, tensor in _weights(folder).items()}
    assert [name for name, tensor in _weights(second).items() if not tensor.equal(rounded[name])] == []


def _logits(folder: Path) -> Tensor:
    """Return what Hugging Face's model in ``folder`` answers to its first tokens."""
    with torch.no_grad():
        logits: Tensor = load(folder)(torch.arange(20)[None]).logits
    return logits


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _assert_same_weights(folder: Path, other: Path) -> None:
    expected, found = _weights(folder), _weights(other)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not found[name].equal(expected[name])] == []
    assert {tensor.dtype for tensor in found.values()} == {tensor.dtype for tensor in expected.values()}
