"""Products of float32 matrices by oneDNN, on processors where those of torch are slower.

torch multiplies by MKL, which leaves AVX-512 unused on processors that Intel didn't make. oneDNN, which torch carries
as well, uses it. Which of the two it is follows from the processor and not from a measurement, so that a run can be
repeated: ``megarl.parallel.environment`` chooses.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from megarl.parallel.environment import ProductsName

# Smaller ones don't pay: a call takes longer to prepare.
LEAST_ROWS, LEAST_COLUMNS = 16, 64

_libraries: list[torch.library.Library] = []


def use_products(name: ProductsName) -> None:
    """Have ``torch.mm``, and with it every linear layer forward and backward, multiply by ``name`` in this process."""
    if name == "torch":
        while _libraries:
            _libraries.pop()._destroy()
    elif not _libraries:
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators,  other operators may also be")
            library.impl("mm", _mm, "CPU")
        _libraries.append(library)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of [rows, inner] and [inner, columns]."""
    rows, inner, columns = *a.shape, b.shape[1]
    if a.dtype is torch.float32 and rows >= LEAST_ROWS and min(inner, columns) >= LEAST_COLUMNS:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
        return product
    # What writes into a given tensor is torch's own still.
    return torch.mm(a, b, out=a.new_empty(rows, columns))
