"""Python's collector rests during heavy imports, and afterwards leaves what they made alone."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator

import pytest

from megarl.parallel.importing import heavy_imports


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """Leave the collector as it was."""
    yield
    gc.unfreeze()
    gc.enable()


def test_the_collector_rests_and_forgets_what_was_made() -> None:
    frozen = gc.get_freeze_count()
    with heavy_imports():
        assert not gc.isenabled()
        made = [[i] for i in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() - frozen >= len(made)


def test_the_collector_works_again_after_an_import_that_fails() -> None:
    with pytest.raises(ModuleNotFoundError), heavy_imports():
        importlib.import_module("no_such_module")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with heavy_imports():
        pass
    assert not gc.isenabled()
