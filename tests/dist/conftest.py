"""Fixtures of the tests that run on several ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from megarl.parallel.environment import apply_environment
from megarl.parallel.layout import Layout
from megarl.parallel.platform import install_platform
from megarl.verify.pool import RankPool
from tests.dist.ranks import cpu_pool

# Test modules import megatron.core through megarl when pytest collects them: the platform has to be there first.
apply_environment()
install_platform()
pytest.register_assert_rewrite("tests.dist.parity")

from megarl.verify.reference import Reference, make_reference  # noqa: E402
from megarl.verify.roles import role_on  # noqa: E402
from tests.dist import hf_training  # noqa: E402
from tests.dist.parity import JOBS, Examined, Examiner, Trained, Trainer, ask, examine, train  # noqa: E402
from tests.dist.tiny_models import VOCAB_SIZE, save_tiny_model  # noqa: E402


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Yield the pool of four ranks that all tests share."""
    pool = cpu_pool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reference]:
    """Return the maker of references, by model and sizes over the tiny models' own."""

    @cache
    def make(model: str, **sizes: int) -> Reference:
        folder = tmp_path_factory.mktemp(model)
        save_tiny_model(model, folder, **sizes)
        return make_reference(folder, VOCAB_SIZE)

    return make


@pytest.fixture(scope="module")
def hf_trained(reference: Callable[..., Reference]) -> Callable[..., hf_training.Trained]:
    """Return the runner of JOBS with Hugging Face and torch, by model, job and sizes."""

    @cache
    def run(model: str, job: str, **sizes: int) -> hf_training.Trained:
        found, asked = reference(model, **sizes), JOBS[job]
        return hf_training.train(found.folder, found.rollouts, asked.loss, asked.training, asked.steps)

    return run


@pytest.fixture(scope="module")
def examined(ranks: RankPool, reference: Callable[..., Reference]) -> Examiner:
    """Return the Examiner, which asks once what several tests want to know."""

    @cache
    def run(model: str, layout: Layout, **sizes: int) -> list[dict[str, Examined]]:
        found = reference(model, **sizes)
        return ask(ranks, examine, role_on(layout, found.folder), found.rollouts)

    return run


@pytest.fixture(scope="module")
def trained(ranks: RankPool, reference: Callable[..., Reference]) -> Trainer:
    """Return the Trainer, which does once what several tests want to know of."""

    @cache
    def run(model: str, layout: Layout, jobs: tuple[str, ...] = tuple(JOBS), **sizes: int) -> list[dict[str, Trained]]:
        found, asked = reference(model, **sizes), {name: JOBS[name] for name in jobs}
        return ask(ranks, train, role_on(layout, found.folder), found.rollouts, asked)

    return run
