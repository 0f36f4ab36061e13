from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megarl.checks.transformer_fields import OURS, class_fields, megatron_folder, transformer_fields
from megarl.config.schema import RecomputeConfig, TrainedMegatronConfig

SOURCE = """
class Base: ...
@dataclass
class Config(Base):
    num_layers: int = 0
    dtype: torch.dtype = torch.float32
    window: Optional[Tuple[int, int]] = None
    rate: Optional[Union[float, List[float]]] = field(default=None)
    kinds: ClassVar[int] = 3
    _context: Optional[int] = None
    plain = 1
    def method(self) -> None:
        inner: int = 3
"""
needs_megatron = pytest.mark.skipif(megatron_folder() is None, reason="megatron-core isn't installed")


def test_fields_are_read_with_their_types_from_source_alone() -> None:
    assert class_fields(SOURCE, "Config") == {
        "num_layers": "int",
        "dtype": "torch.dtype",
        "window": "Tuple[int, int] | None",
        "rate": "float | List[float] | None",
    }


def test_a_class_that_is_gone_is_an_error_that_names_it() -> None:
    with pytest.raises(RuntimeError, match="TransformerConfig"):
        class_fields(SOURCE, "TransformerConfig")


@needs_megatron
def test_the_installed_megatron_gives_its_own_fields_and_those_of_its_base() -> None:
    fields = transformer_fields()
    assert fields is not None
    assert fields["hidden_size"] == "int"  # TransformerConfig
    assert fields["tensor_model_parallel_size"] == "int"  # ModelParallelConfig
    assert fields["moe_aux_loss_coeff"] == "float | List[float]"


@needs_megatron
def test_reading_the_fields_imports_neither_megatron_nor_torch() -> None:
    script = (
        "import sys; from megarl.checks.transformer_fields import transformer_fields as f; assert f()\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('megatron', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@needs_megatron
def test_the_real_class_has_no_other_bases() -> None:
    folder = megatron_folder()
    assert folder is not None
    module = ast.parse((folder / "core/transformer/transformer_config.py").read_text(encoding="utf-8"))
    (found,) = (s for s in module.body if isinstance(s, ast.ClassDef) and s.name == "TransformerConfig")
    assert [ast.unparse(base) for base in found.bases] == ["ModelParallelConfig"]


@needs_megatron
def test_every_field_that_megarl_decides_is_one_of_megatrons() -> None:
    assert not set(OURS) - set(transformer_fields() or {})


def test_every_field_that_the_model_is_built_with_is_megarls() -> None:
    source = (Path(__file__).parents[2] / "megarl/train/megatron/build.py").read_text(encoding="utf-8")
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    passed = {
        keyword.arg
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "TransformerConfig"
        for keyword in call.keywords
        if keyword.arg
    }
    assert "num_layers" in passed
    assert not passed - set(OURS)


def test_the_key_to_use_instead_exists() -> None:
    sections: dict[str, Any] = {
        "": TrainedMegatronConfig.__dataclass_fields__,
        "recompute": RecomputeConfig.__dataclass_fields__,
        "override_transformer_config": transformer_fields() or {},
    }
    for field, key in OURS.items():
        section, _, name = key.rpartition(".")
        assert not key or name in sections[section], f"{field}: {key}"
