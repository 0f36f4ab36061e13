"""Every name and keyword that megarl takes from megatron-core is there: in the installed release, and in the newest.

Of the newest, which needs another Python, a file has the facts. A name that is new in megarl has to be added to it:
see ``megatron_facts``.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from megarl.checks.transformer_fields import megatron_folder
from tests.structure.megatron_facts import ANY, Parameters, Release, open_release
from tests.structure.megatron_uses import LEFT_OUT, REPOSITORY, THROUGH_OBJECTS, Use, megarl_uses, uses

NEWEST = Path(__file__).with_name("megatron_0_19_2.json")

Facts = dict[tuple[str, str], Parameters | None]


def facts_of_newest() -> Facts:
    """Return the file's facts."""
    read = json.loads(NEWEST.read_text(encoding="utf-8"))
    return {tuple(name.split(":")): None if taken is None else tuple(taken) for name, taken in read.items()}


def missing(found: list[Use], facts: Facts) -> list[str]:
    """Return a sentence for each use that a release doesn't know."""
    lines = []
    for use in found:
        if (use.module, use.name) not in facts:
            lines.append(f"{use.where}: {use.module} {use.name} isn't in {NEWEST.name}: write it anew")
            continue
        taken = facts[use.module, use.name]
        if taken is None:
            lines.append(f"{use.where}: {use.module} has no {use.name}")
        elif ANY not in taken:
            lines += [f"{use.where}: {use.name} takes no {word}" for word in sorted(use.keywords - set(taken))]
    return lines


def facts_of(release: Release, found: list[Use]) -> Facts:
    """Return what a release says of the names that are used."""
    return {(use.module, use.name): release.parameters(use.module, use.name) for use in found}


def test_the_installed_release_has_every_name_and_keyword() -> None:
    folder = megatron_folder()
    if folder is None:
        pytest.skip("megatron-core isn't installed")
    found = megarl_uses()
    lines = missing(found, facts_of(open_release(folder.parent), found))
    assert not lines, "\n" + "\n".join(lines)


def test_the_newest_release_has_every_name_and_keyword() -> None:
    lines = missing(megarl_uses(), facts_of_newest())
    assert not lines, "\n" + "\n".join(lines)


def test_the_scan_sees_what_the_model_is_built_with() -> None:
    keywords = {
        use.name: set(use.keywords)
        for use in megarl_uses()
        if use.where.startswith("megarl/train/megatron/build.py:") and use.keywords
    }
    assert {"num_layers", "moe_router_topk", "recompute_method"} <= keywords["TransformerConfig"]  # also through **
    assert "rotary_base" in keywords["GPTModel"]
    packing = [use for use in megarl_uses() if use.name == "PackedSeqParams" and use.keywords]
    assert packing and all("same_length" not in use.keywords for use in packing)  # a field of megarl's subclass


def test_files_that_are_left_out_or_reach_through_objects_exist() -> None:
    files = {*LEFT_OUT, *(file for file, *_ in THROUGH_OBJECTS)}
    assert [file for file in files if not (REPOSITORY / file).exists()] == []


def test_every_file_that_imports_megatron_is_scanned() -> None:
    scanned = {use.where.split(":")[0] for use in megarl_uses()}
    importing = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "megarl").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron")
        or (isinstance(node, ast.Import) and any(a.name.split(".")[0] == "megatron" for a in node.names))
    }
    assert importing and importing <= scanned


SOURCES = {
    "megatron/core/__init__.py": "from megatron.core import inner\nfrom .inner import Base as Shown",
    "megatron/core/inner.py": """
from dataclasses import dataclass
try:
    import apex
    def fused(x, *, y): ...
except ImportError:
    fused = None
@dataclass
class Base:
    width: int
@dataclass
class Config(Base):
    depth: int = 1
    def __post_init__(self):
        self.derived = 2
class Net:
    def __init__(self, config, **rest):
        self.head, self.body = config, None
    def run(self, tokens, *, mask=None): ...
class Deep(Net):
    pass
""",
}


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        ("megatron.core", "inner", ()),
        ("megatron.core", "Shown", ("width",)),
        ("megatron.core.inner", "Config", ("width", "depth")),
        ("megatron.core.inner", "Config.derived", ()),
        ("megatron.core.inner", "Config.width", ()),
        ("megatron.core.inner", "Config.nothing", None),
        ("megatron.core.inner", "Deep", ("config", ANY)),
        ("megatron.core.inner", "Deep.run", ("tokens", "mask")),
        ("megatron.core.inner", "Deep.body", ()),
        ("megatron.core.inner", "fused", ("x", "y")),
        ("megatron.core.inner", "gone", None),
        ("megatron.core.gone", "", None),
    ],
)
def test_facts_are_read_from_source(module: str, name: str, expected: Parameters | None) -> None:
    assert Release(SOURCES.get).parameters(module, name) == expected


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("from megatron.core.inner import gone", "a.py: megatron.core.inner has no gone"),
        ("from megatron.core.other import x", "a.py: megatron.core.other has no x"),
        ("from megatron.core import inner\ninner.gone()", "a.py:2: megatron.core.inner has no gone"),
        ("from megatron.core.inner import Config\nConfig(width=1, high=2)", "a.py:2: Config takes no high"),
        ("import megatron.core.inner as i\ni.fused(1, z=2)", "a.py:2: fused takes no z"),
        (
            "from megatron.core.inner import Config\ndef more():\n    return {'high': 1}\nConfig(**more())",
            "a.py:4: Config takes no high",
        ),
        (
            "from megatron.core.inner import Config\n@dataclass\nclass Own(Config):\n    x: int\nOwn(x=1, high=2)",
            "a.py:5: Config takes no high",
        ),
    ],
)
def test_the_check_catches_what_a_release_lacks(source: str, sentence: str) -> None:
    found = uses(source, "a.py")
    assert sentence in missing(found, facts_of(Release(SOURCES.get), found))


def test_the_check_lets_pass_what_is_there() -> None:
    source = (
        "from megatron.core.inner import Config, Deep, fused\nDeep(Config(width=1, depth=2), extra=3)\nfused(1, y=2)"
    )
    found = uses(source, "a.py")
    assert missing(found, facts_of(Release(SOURCES.get), found)) == []
