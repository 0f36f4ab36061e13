"""A Hugging Face folder holds what no rank has as zeros."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megarl.checkpoint import manifest, trainer_state
from megarl.weights.hf_export import copy_template, export_hf
from megarl.weights.shard import peers_of, whole


@pytest.fixture
def world_of_one() -> Iterator[None]:
    """Make this process a world."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("max_file_bytes", [4, 1000], ids=["a_file_of_zeros", "one_file"])
def test_tensors_that_no_rank_holds_are_zeros_and_fields_replace_those_of_the_template(
    tmp_path: Path, world_of_one: None, max_file_bytes: int
) -> None:
    template, out = tmp_path / "template", tmp_path / "out"
    template.mkdir()
    (template / "config.json").write_text('{"architectures": ["A"], "vocab_size": 9, "torch_dtype": "bfloat16"}')
    weight = torch.arange(6.0).reshape(2, 3)
    export_hf(
        out,
        template=template,
        shapes={"weight": (2, 3)},
        sources=peers_of([[whole("weight", (2, 3))]]),
        parameters={"weight": weight},
        dtype=torch.float32,
        device=torch.device("cpu"),
        zeros={"bias": (1,)},
        fields={"architectures": ["B"]},
        max_file_bytes=max_file_bytes,
    )
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == (2 if max_file_bytes == 4 else 1)
    assert {file.stat().st_mode for file in files} == {(out / "config.json").stat().st_mode}
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert tensors.keys() == {"weight", "bias"}
    assert tensors["weight"].equal(weight) and tensors["bias"].equal(torch.zeros(1))
    config = json.loads((out / "config.json").read_text())
    assert config == {"architectures": ["B"], "vocab_size": 9, "dtype": "float32"}


def test_what_a_checkpoint_tells_of_itself_is_not_copied_into_the_next(tmp_path: Path) -> None:
    template, out = tmp_path / "template", tmp_path / "out"
    template.mkdir()
    for name in ("config.json", "tokenizer.json", manifest.FILE_NAME, trainer_state.FILE_NAME):
        (template / name).write_text("{}")
    copy_template(template, out, torch.float32, {})
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "tokenizer.json"]
