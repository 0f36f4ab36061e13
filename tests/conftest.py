"""What makes many tests quicker, and what the tests of whole runs share: the tiny task."""

from __future__ import annotations

import copy
import functools
import gc
from pathlib import Path

import omegaconf._utils
import omegaconf.base
import pytest
from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult

from megarl.config.files import OURS

# Hundreds of tests compose the same config: each interpolation in it is parsed once a process.
for module in (omegaconf.base, omegaconf._utils):
    module.parse = functools.cache(module.parse)

_READ = ConfigRepository.load_config
_READ_ONCE: dict[tuple[str, str, str], ConfigResult | None] = {}


def _load_config(self: ConfigRepository, config_path: str) -> ConfigResult | None:
    """Read each file of megarl's and Hydra's own once a process."""
    source = self._find_object_source(config_path, ObjectType.CONFIG)
    if source is None or source.path not in (str(OURS), "megarl.conf", "hydra.conf"):
        return _READ(self, config_path)
    place = source.provider, source.path, config_path
    if place not in _READ_ONCE:
        _READ_ONCE[place] = _READ(self, config_path)
    return copy.deepcopy(_READ_ONCE[place])


ConfigRepository.load_config = _load_config


def pytest_collection_finish() -> None:
    """Have Python's collector leave alone what was imported: it stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def tiny_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny task, which the tests of one module may change and run in."""
    from tests.tiny_task import write_tiny_task  # here, since other tests shouldn't wait for transformers

    return write_tiny_task(tmp_path_factory.mktemp("tiny_task"))
