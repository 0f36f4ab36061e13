"""Fixtures of the tests that run on several ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from megarl.parallel.environment import apply_environment
from megarl.parallel.platform import install_platform
from megarl.verify.pool import RankPool
from tests.dist.ranks import cpu_pool

# Test modules import megatron.core through megarl when pytest collects them: the platform has to be there first.
apply_environment()
install_platform()
pytest.register_assert_rewrite("tests.dist.parity")

from tests.dist import hf_reference  # noqa: E402
from tests.dist.parity import JOBS, LOOKING, TEMPERATURE, Reference, make_reference  # noqa: E402
from tests.dist.parity_cases import Examined, Setup, Trained, examine, train  # noqa: E402
from tests.dist.tiny_models import save_tiny_model  # noqa: E402


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Yield the pool of four ranks that all tests share."""
    pool = cpu_pool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()


@pytest.fixture(scope="module")
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Return the maker of references by model. MODEL_SIZES of the test module: over the tiny models' own."""
    folder, sizes = tmp_path_factory.mktemp("models"), getattr(request.module, "MODEL_SIZES", {})

    @cache
    def make(model: str) -> Reference:
        save_tiny_model(model, folder / model, **sizes)
        return make_reference(folder / model)

    return make


@pytest.fixture(scope="module")
def hf_training(reference: Callable[[str], Reference]) -> Callable[[str, str], hf_reference.Training]:
    """Return the runner of training jobs with Hugging Face and torch, by model and job."""

    @cache
    def run(model: str, job: str) -> hf_reference.Training:
        found, asked = reference(model), JOBS[job]
        return hf_reference.train(found.folder, found.batch, asked.loss, asked.optimizer, asked.steps)

    return run


@pytest.fixture(scope="module")
def examined(
    request: pytest.FixtureRequest, ranks: RankPool, reference: Callable[[str], Reference]
) -> Callable[[str, str], list[dict[str, Examined]]]:
    """Return the examiner by model and one of the test module's LAYOUTS: its answers by rank and packing."""

    @cache
    def run(model: str, layout: str) -> list[dict[str, Examined]]:
        asked = request.module.LAYOUTS[layout]
        setup, batch = Setup(reference(model).folder, asked), reference(model).batch
        return ranks.run(examine, setup, batch, LOOKING, TEMPERATURE, world_size=asked.world_size)

    return run


@pytest.fixture(scope="module")
def trained(
    request: pytest.FixtureRequest, ranks: RankPool, reference: Callable[[str], Reference]
) -> Callable[[str, str], list[dict[str, Trained]]]:
    """Return the runner of the test module's TRAINING jobs, else all, by model and one of its LAYOUTS, likewise."""

    @cache
    def run(model: str, layout: str) -> list[dict[str, Trained]]:
        asked, jobs = request.module.LAYOUTS[layout], getattr(request.module, "TRAINING", JOBS)
        setup = Setup(reference(model).folder, asked)
        return ranks.run(train, setup, reference(model).batch, jobs, world_size=asked.world_size)

    return run
