"""Verifies layouts of models, one after the other, in processes that live as long as it does."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from megarl.checks.axes import a_tensor_split_fits
from megarl.parallel.layout import Layout
from megarl.verify.figures import Figure, Row, Tolerances
from megarl.verify.layouts import ONE_RANK, Layouts, quick
from megarl.verify.measure import engine_figure, export_figure, logprob_figures, training_figures
from megarl.verify.pool import RanksFailed
from megarl.verify.reference import Reference, greedy, make_reference
from megarl.verify.roles import role_on, training_of
from megarl.verify.site import Site
from megarl.verify.subject import Subject
from megarl.verify.work import GREEDY, Examined, Task, answer, examine, prompts
from megarl.weights.model_shape import ModelShape

MIN_ROWS, LAYOUTS_A_POOL = 8, 40
Report = Callable[[Row], None]


@dataclass(frozen=True)
class Suite:
    """What to verify. timeout_s: of one layout. limit_s: when to begin no other."""

    layouts: Mapping[Subject, Layouts]
    tolerances: Tolerances
    with_engine: bool
    timeout_s: float
    limit_s: float

    @property
    def max_ranks(self) -> int:
        """Ranks of the largest layout."""
        return max(layout.world_size for layouts in self.layouts.values() for layout in layouts.values())


@dataclass(frozen=True)
class Examination:
    """A model, what Hugging Face says of it, and what one rank found. alone: None until it has."""

    subject: Subject
    reference: Reference
    alone: list[Examined] | None = None


def verify(suite: Suite, site: Site, report: Report) -> tuple[list[Row], dict[str, Reference]]:
    """Verify ``suite``, while there is time; tell each row as it is known. Return all, and the references by model."""
    rows: list[Row] = []
    deadline_s = time.monotonic() + suite.limit_s
    references: dict[str, Reference] = {}
    for subject, layouts in suite.layouts.items():
        num_rows = max(MIN_ROWS, *(layout.dp for layout in layouts.values()))
        reference = make_reference(subject.write(site.scratch), subject.shape.vocab_size, num_rows)
        references[subject.name] = reference
        asked = quick(layouts)[:2] if suite.with_engine else []
        alone: list[Examined] | None = None
        for name, layout in layouts.items():
            if rows and time.monotonic() > deadline_s:
                break
            if len(rows) % LAYOUTS_A_POOL == LAYOUTS_A_POOL - 1:
                site.pool.stop()  # ranks that have been laid out often hold on to gigabytes
            row, found = _examined(suite, site, Examination(subject, reference, alone), name, layout)
            alone = found if name == ONE_RANK else alone
            if name in asked and found is not None:
                row = _answered(suite, site, row, subject, reference.folder, layout)
            rows.append(row)
            report(row)
    return rows, references


def _examined(
    suite: Suite, site: Site, of: Examination, name: str, layout: Layout
) -> tuple[Row, list[Examined] | None]:
    """Return the row of a layout without its engine, and what ranks found, None where they failed."""
    start_s, out, reference = time.monotonic(), site.scratch / "exported", of.reference
    role = role_on(layout, reference.folder, training=training_of(of.subject.shape), **of.subject.section(layout))
    task = Task(role, reference.everything, reference.rollouts, out)
    try:
        found = site.pool.run(examine, task, world_size=layout.world_size, timeout_s=suite.timeout_s)
    except RanksFailed as failed:
        return _row(of.subject, name, layout, [], start_s, str(failed)), None
    figures = logprob_figures(found, layout, reference, suite.tolerances)
    if name == ONE_RANK:
        figures += training_figures(found, found, layout, reference.noise, suite.tolerances)
    elif of.alone is not None and of.subject.trains_alike(layout):
        figures += training_figures(found, of.alone, layout, reference.noise, suite.tolerances)
    figures.append(export_figure(reference.folder, out, of.subject.shape))
    shutil.rmtree(out)
    return _row(of.subject, name, layout, figures, start_s), found


def _answered(suite: Suite, site: Site, row: Row, subject: Subject, folder: Path, layout: Layout) -> Row:
    """Return ``row`` with what engines answer that the layout publishes to. Ranks are new before and after."""
    start_s, out = time.monotonic() - row.time_s, site.scratch / "published"
    engine_tp = largest_engine(subject.shape, math.gcd(layout.world_size, site.ranks_together))
    site.pool.stop()  # the engine needs the memory
    try:
        asked = role_on(layout, folder), engine_tp, out
        answers = site.pool.run(answer, *asked, world_size=layout.world_size, timeout_s=suite.timeout_s)
    except RanksFailed as failed:
        return _row(subject, row.layout, layout, list(row.figures.values()), start_s, str(failed))
    finally:
        site.pool.stop()
    expected = greedy(out, prompts(subject.shape.vocab_size), GREEDY.max_tokens)
    shutil.rmtree(out)
    return _row(subject, row.layout, layout, [*row.figures.values(), engine_figure(answers, expected)], start_s)


def largest_engine(shape: ModelShape, num_ranks: int) -> int:
    """Return into how many ranks, that divide ``num_ranks``, an engine of this model can be split."""
    sizes = [size for size in range(num_ranks, 0, -1) if num_ranks % size == 0]
    return next(
        size
        for size in sizes
        if not list(a_tensor_split_fits("", shape, size))
        and shape.expert_ffn_size % size == shape.shared_expert_ffn_size % size == 0
    )


def _row(subject: Subject, name: str, layout: Layout, figures: list[Figure], start_s: float, error: str = "") -> Row:
    by_check = {figure.check: figure for figure in figures}
    return Row(subject.name, name, layout.world_size, by_check, time.monotonic() - start_s, error)


def engine_is_installed() -> bool:
    """Whether vLLM can be imported. Doesn't import it."""
    return find_spec("vllm") is not None
