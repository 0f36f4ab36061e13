from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.weights.files import plan_files

shapes = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), max_size=12).map(
    lambda found: {f"t{i}": shape for i, shape in enumerate(found)}
)


def test_tensors_fill_files_in_order() -> None:
    sizes = {"a": (2, 2), "b": (4,), "c": (1,), "d": (8,), "e": (3,)}
    assert plan_files(sizes, itemsize=2, max_bytes=16) == (("a", "b"), ("c",), ("d",), ("e",))
    assert plan_files(sizes, itemsize=2, max_bytes=18) == (("a", "b", "c"), ("d",), ("e",))
    assert plan_files(sizes, itemsize=2, max_bytes=1 << 20) == (("a", "b", "c", "d", "e"),)


def test_a_tensor_larger_than_a_file_has_one_of_its_own() -> None:
    sizes = {"small": (1,), "large": (100,), "next": (1,), "last": (1,)}
    assert plan_files(sizes, itemsize=4, max_bytes=8) == (("small",), ("large",), ("next", "last"))
    assert plan_files({"large": (100,)}, itemsize=4, max_bytes=8) == (("large",),)


def test_a_model_without_tensors_has_no_files() -> None:
    assert plan_files({}, itemsize=4) == ()


@settings(max_examples=300, deadline=None)
@given(shapes, st.sampled_from([1, 2, 4]), st.integers(1, 300))
def test_every_tensor_is_in_one_file_and_no_file_is_too_large_or_needless(
    sizes: dict[str, tuple[int, ...]], itemsize: int, max_bytes: int
) -> None:
    files = plan_files(sizes, itemsize, max_bytes)
    num_bytes = {name: math.prod(shape) * itemsize for name, shape in sizes.items()}
    assert [name for names in files for name in names] == list(sizes)
    for i, names in enumerate(files):
        filled = sum(num_bytes[name] for name in names)
        assert filled <= max_bytes or len(names) == 1
        if i + 1 < len(files):
            assert filled + num_bytes[files[i + 1][0]] > max_bytes
