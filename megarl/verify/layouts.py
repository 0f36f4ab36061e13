"""Every layout that the rules of a config let a model have on up to so many ranks, by name. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from megarl.checks.axes import (
    axes_divide_the_ranks,
    chunks_take_turns_on_a_pipeline,
    the_model_fits_its_axes,
    what_is_said_of_experts_has_some,
)
from megarl.checks.backends import ulysses_splits_the_heads
from megarl.errors import Absent, ConfigError, Problem, nearest
from megarl.parallel.layout import Layout
from megarl.verify.roles import fsdp_section, megatron_section
from megarl.weights.model_shape import ModelShape

ONE_RANK = "one_rank"
ALL, QUICK = "all", "quick"
_ALWAYS_NAMED = ("etp", "fsdp")
Layouts = dict[str, Layout]


def name_of(layout: Layout) -> str:
    """Return the axes in use with their sizes, as in ``tp2xpp2+sp`` or ``fsdp2xulysses2``; ``one_rank`` for none."""
    sizes = {name: size for name, size in _sizes(layout).items() if size > 1 or name in _ALWAYS_NAMED}
    axes = "x".join(f"{name}{size}" for name, size in sizes.items())
    return (axes or ONE_RANK) + ("+sp" if layout.sequence_parallel else "")


def _sizes(layout: Layout) -> dict[str, int]:
    if layout.is_fsdp:
        return {"fsdp": layout.fsdp, "copies": layout.world_size // layout.fsdp, "ulysses": layout.cp}
    sizes = {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "cp": layout.cp, "dp": layout.dp, "ep": layout.ep}
    return sizes if layout.etp is None else sizes | {"etp": layout.etp}


def axes_of(layout: Layout) -> frozenset[str]:
    """Return the axes that a layout uses, sequence parallelism (``sp``) among them."""
    axes = {name for name, size in _sizes(layout).items() if size > 1 or name in _ALWAYS_NAMED}
    return frozenset(axes | ({"sp"} if layout.sequence_parallel else set()))


def layouts_of(shape: ModelShape, max_ranks: int) -> Layouts:
    """Return every layout of 1, 2, 4, ... ranks that the rules allow, with axes that are powers of two.

    Of FSDP with one copy of the model, and with two.
    """
    found = [layout for ranks in _powers(max_ranks) for layout in _layouts(ranks) if _is_allowed(shape, layout)]
    found += [layout for ranks in _powers(max_ranks) for layout in _fsdp_layouts(shape, ranks)]
    return {name_of(layout): layout for layout in found}


def chosen(layouts: Mapping[str, Layout], asked: str) -> Layouts:
    """Return the layouts that ``asked`` names: ``all``, ``quick`` or names with commas between them.

    The one rank that training is compared with is always there, and first. Names that other models have are left out.
    """
    if asked == ALL:
        return dict(layouts)
    names = quick(layouts) if asked == QUICK else [name for name in asked.split(",") if name in layouts]
    return {name: layouts[name] for name in dict.fromkeys([ONE_RANK, *names])}


def quick(layouts: Mapping[str, Layout]) -> list[str]:
    """Return the names of few layouts that use every axis between them: each adds the most that is new."""
    found, missing = [], frozenset[str]().union(*map(axes_of, layouts.values()))
    while missing:
        name = max(layouts, key=lambda name: (len(axes_of(layouts[name]) & missing), -layouts[name].world_size))
        found.append(name)
        missing -= axes_of(layouts[name])
    return found


def check_names(asked: str, models: Sequence[Mapping[str, Layout]], max_ranks: int) -> None:
    """Raise ConfigError for each name of ``asked`` that no model has a layout of."""
    known = list(dict.fromkeys(name for layouts in models for name in layouts))
    unknown = [] if asked in (ALL, QUICK) else [name for name in asked.split(",") if name not in known]
    allowed = f"is no layout of these models on up to {max_ranks} ranks"
    problems = [
        Problem(f"--layouts {name}", Absent(), allowed, nearest(name, known) or f"such are {', '.join(known[:8])}, ...")
        for name in unknown
    ]
    if problems:
        raise ConfigError(problems)


def _powers(limit: int) -> list[int]:
    """Return 1, 2, 4, ... up to ``limit``."""
    return [1 << i for i in range(limit.bit_length())]


def _layouts(ranks: int) -> Iterator[Layout]:
    """Yield combinations of axes, also those that can't be."""
    sizes = _powers(ranks)
    for tp, pp, cp, ep in product(sizes, repeat=4):
        for is_sequence_parallel in (False, True) if tp > 1 else (False,):
            for vpp in (1, 2) if pp > 1 else (1,):
                for etp in (None, *(size for size in sizes if size != tp)):
                    yield Layout(ranks, tp, pp, is_sequence_parallel, cp, ep, etp, vpp)


def _fsdp_layouts(shape: ModelShape, ranks: int) -> Iterator[Layout]:
    for cp, size in product(_powers(ranks), (ranks, ranks // 2) if ranks > 1 else (ranks,)):
        layout = Layout(ranks, cp=cp, fsdp=size)
        if not list(ulysses_splits_the_heads("", shape, fsdp_section(layout))):
            yield layout


def _is_allowed(shape: ModelShape, layout: Layout) -> bool:
    if layout.etp is not None and not shape.num_experts:
        return False  # of size 1 it says nothing
    megatron, key = megatron_section(layout), ""
    broken = [
        *axes_divide_the_ranks(key, megatron, layout.world_size),
        *chunks_take_turns_on_a_pipeline(key, megatron),
        *the_model_fits_its_axes(key, shape, megatron),
        *what_is_said_of_experts_has_some(key, shape, megatron),
    ]
    return not broken
