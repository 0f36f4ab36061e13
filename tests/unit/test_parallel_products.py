"""oneDNN's products of float32 matrices are those of torch, up to rounding, whatever the strides."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megarl.errors import ConfigError
from megarl.parallel.cpu.products import LEAST_COLUMNS, LEAST_ROWS, use_products
from megarl.parallel.environment import faster_products, platform_environment, products_name

ZEN_4 = "vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 9B14\nflags\t\t: fpu sse2 avx2 avx512f avx512dq\n"
ZEN_3 = "vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\nflags\t\t: fpu sse2 fma avx avx2\n"
XEON = "vendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: fpu sse2 avx2 avx512f amx_tile\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd sve\nCPU implementer\t: 0x41\n"

SIZES = st.sampled_from([0, 1, LEAST_ROWS - 1, LEAST_ROWS, 50, LEAST_COLUMNS, 65, 130])


@pytest.fixture(autouse=True)
def _onednn() -> Iterator[None]:
    use_products("onednn")
    yield
    use_products("torch")


def _matrix(rows: int, columns: int, form: str, seed: int) -> Tensor:
    """Return a random matrix that lies in memory as ``form`` says."""
    draw = torch.Generator().manual_seed(seed)
    if form == "transposed":
        return torch.randn(columns, rows, generator=draw).t()
    if form == "part":
        return torch.randn(rows + 3, 2 * columns + 5, generator=draw)[2 : rows + 2, 1 : 2 * columns + 1 : 2]
    if form == "repeated row":
        return torch.randn(1, columns, generator=draw).expand(rows, columns)
    if form == "one number":
        return torch.randn(1, 1, generator=draw).expand(rows, columns)
    return torch.randn(rows, columns, generator=draw)


FORMS = st.sampled_from(["plain", "transposed", "part", "repeated row", "one number"])


@settings(deadline=None, max_examples=150)
@given(SIZES, SIZES, SIZES, FORMS, FORMS, st.integers(0, 3))
def test_products_are_exact_for_every_size_and_stride(
    rows: int, inner: int, columns: int, form_a: str, form_b: str, seed: int
) -> None:
    a, b = _matrix(rows, inner, form_a, seed), _matrix(inner, columns, form_b, seed + 10)
    found, expected = a @ b, a.double() @ b.double()
    assert (found.dtype, found.shape, found.is_contiguous()) == (torch.float32, expected.shape, True)
    bound = torch.finfo(torch.float32).eps * max(1, inner) ** 0.5 * 4 * (a.double().abs() @ b.double().abs())
    assert ((found - expected).abs() <= bound).all()


def test_a_linear_layer_and_both_of_its_gradients_go_through_onednn() -> None:
    x = torch.randn(3, 200, 512, requires_grad=True)
    weight = torch.randn(768, 512, requires_grad=True)
    onednn = torch.ops.mkldnn._linear_pointwise
    out = torch.nn.functional.linear(x, weight)
    grad = torch.randn_like(out)
    out.backward(grad)
    rows, grad_rows = x.detach().view(-1, 512), grad.view(-1, 768)
    plain = weight.detach()
    assert x.grad is not None and weight.grad is not None
    for found, a, b in (
        (out.detach().view(-1, 768), rows, plain),
        (x.grad.view(-1, 512), grad_rows, plain.t()),
        (weight.grad, grad_rows.t(), rows.t()),
    ):
        assert torch.equal(found, onednn(a, b, None, "none", [], ""))
        assert not torch.equal(found, torch.mm(a, b.t(), out=torch.empty_like(found))), "torch's own rounds alike"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_other_dtypes_are_left_to_torch(dtype: torch.dtype) -> None:
    a, b = torch.arange(128 * 64).reshape(128, 64) % 7, torch.arange(64 * 128).reshape(64, 128) % 5
    assert torch.equal((a.to(dtype) @ b.to(dtype)).long(), (a.to(torch.float64) @ b.double()).to(dtype).long())


@pytest.mark.parametrize("b", [torch.ones(65, 64), torch.ones(64, 64, dtype=torch.float64), torch.ones(64)])
def test_what_cannot_be_multiplied_is_an_error(b: Tensor) -> None:
    with pytest.raises((RuntimeError, IndexError)):
        torch.mm(torch.ones(32, 64), b)


def test_products_of_torch_come_back() -> None:
    a, b = torch.randn(64, 512), torch.randn(512, 768)
    use_products("torch")
    assert torch.equal(a @ b, torch.mm(a, b, out=torch.empty(64, 768)))


def test_the_choice_can_be_repeated_without_a_warning() -> None:
    use_products("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use_products("onednn")
        use_products("onednn")


@pytest.mark.parametrize(
    ("processor", "products"), [(ZEN_4, "onednn"), (ZEN_3, "torch"), (XEON, "torch"), (ARM, "torch"), ("", "torch")]
)
def test_the_processor_decides(processor: str, products: str) -> None:
    assert faster_products(processor) == products


def test_the_user_decides_over_the_processor() -> None:
    for asked in ("onednn", "torch"):
        assert products_name({"MEGARL_CPU_PRODUCTS": asked}) == asked
    with pytest.raises(ConfigError, match=r"MEGARL_CPU_PRODUCTS = 'mkl': must be onednn or torch"):
        products_name({"MEGARL_CPU_PRODUCTS": "mkl"})


def test_ranks_on_other_hosts_are_told_the_choice_of_the_first() -> None:
    assert platform_environment({"MEGARL_PLATFORM": "cpu"})["MEGARL_CPU_PRODUCTS"] == products_name({})
    assert "MEGARL_CPU_PRODUCTS" not in platform_environment({"MEGARL_PLATFORM": "cuda"})


def test_the_platform_installs_the_choice() -> None:
    program = (
        "import torch; from megarl.parallel.platform import install_platform; install_platform()\n"
        "a, b = torch.randn(64, 512), torch.randn(512, 768)\n"
        "print(torch.equal(a @ b, torch.ops.mkldnn._linear_pointwise(a, b.t(), None, 'none', [], '')))"
    )
    environ = {"MEGARL_PLATFORM": "cpu", "MEGARL_CPU_PRODUCTS": "onednn", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"
