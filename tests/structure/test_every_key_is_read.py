"""A key that nobody reads is a promise that nobody keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.structure.schema_reads import unread_keys

MEGARL = Path(__file__).resolve().parents[2] / "megarl"
SCHEMA = MEGARL / "config" / "schema.py"
# They go through all keys alike, whatever each of them means.
NO_READERS = {SCHEMA, MEGARL / "config" / "docs.py"}
RULES = {MEGARL / "checks" / f"{name}.py" for name in ("rules", "algorithm", "axes", "effects")}

# Rules are all that these are for: of what they may say, one thing is built.
READ_BY_RULES_ALONE = {"ActorRolloutRefConfig.hybrid_engine"}


def _unread_by_megarl(without: set[Path]) -> set[str]:
    sources = [path.read_text(encoding="utf-8") for path in sorted(MEGARL.rglob("*.py")) if path not in without]
    return set(unread_keys(SCHEMA.read_text(encoding="utf-8"), sources))


def test_every_key_of_the_schema_is_read() -> None:
    assert _unread_by_megarl(NO_READERS) == set()


def test_a_key_that_only_rules_read_is_one_that_only_they_need() -> None:
    assert _unread_by_megarl(NO_READERS | RULES) == READ_BY_RULES_ALONE


SYNTHETIC = """
class OptimConfig:
    lr: float
    beta: tuple[float, ...]

class RoleConfig:
    size: int | None
    optim: OptimConfig

class TrainedConfig(RoleConfig):
    epochs: int

class Rejection:
    low: float
    size: int

class Config:
    actor: TrainedConfig
    critic: TrainedConfig
    rejections: tuple[Rejection, ...]
    seed: int
"""
ALL_READ = """
def build(config: Config):
    actor = config.actor
    print(actor.size, actor.epochs, actor.optim.lr, actor.optim.beta, config.seed)
    return [r.low + r.size for r in config.rejections]
"""


def test_keys_that_are_all_read_are_none_unread() -> None:
    assert unread_keys(SYNTHETIC, [ALL_READ]) == []


def test_a_key_that_is_added_and_that_nobody_reads_is_found() -> None:
    added = SYNTHETIC.replace("    epochs: int\n", "    epochs: int\n    shuffle: bool\n")
    assert unread_keys(added, [ALL_READ]) == ["TrainedConfig.shuffle"]
    # A word that another section has too, read there alone.
    homonym = SYNTHETIC.replace("    lr: float\n", "    lr: float\n    seed: int\n")
    assert unread_keys(homonym, [ALL_READ]) == ["OptimConfig.seed"]


@pytest.mark.parametrize(
    "source",
    [
        "def f(c: Config): return c.actor.size",
        "def f(c: 'Config | None'): return c and c.critic.size",
        "def f(role: RoleConfig): return role.size",
        "def f(c: Config):\n    a, b = c.actor, 1\n    return a.size",
        "def f(c: Config):\n    for role in (c.actor, c.critic):\n        yield role.size",
        "def f(c: Config):\n    if role := c.actor:\n        return role.size",
        "def f(c: Config): return getattr(c.actor, 'size')",
        "def f(c: Config): return replace(c.actor, epochs=1).size",
        "def f(c: Config): return (c.actor if c else c.critic).size",
        "def f(c: Config): return {'a': c.actor}['a'].size",
        "def f(c: Config):\n    def inner(): return c.actor.size\n    return inner",
        "def f(values): return build_config(Config, values).actor.size",
        "def role_of(c) -> RoleConfig: ...\ndef f(c): return role_of(c).size",
        "class Run:\n    config: Config\n    def f(self): return self.config.actor.size",
        "class Run:\n    def f(self): return self.c.actor.size\n    def __init__(self, c: Config): self.c = c",
        "class Run:\n    @property\n    def actor(self) -> RoleConfig: ...\ndef f(run: Run): return run.actor.size",
        "Either = RoleConfig | Rejection\ndef f(role: Either): return role.size",
        "C = TypeVar('C', Config, Rejection)\nclass Run(Generic[C]):\n    c: C\ndef f(run: Run): run.c.actor.size",
        "class Made:\n    c: Config\ndef open_it() -> Made: ...\nwith open_it() as made:\n    made.c.actor.size",
    ],
)
def test_a_key_is_read_however_its_section_is_come_by(source: str) -> None:
    assert "RoleConfig.size" not in unread_keys(SYNTHETIC, [source])


@pytest.mark.parametrize(
    "source",
    [
        "def f(r: Rejection): return r.size",
        "def f(tensor): return tensor.size",  # nobody knows what it is, and two sections have the name
        "def f(c: Config): c.actor.size = 1",
        "def f(c: Config): return replace(c.actor, size=1)",
        "class Layout:\n    size: int\ndef f(layout: Layout): return layout.size",
        "size = 'size'",
    ],
)
def test_what_only_looks_like_a_reader_of_a_key_is_none(source: str) -> None:
    assert "RoleConfig.size" in unread_keys(SYNTHETIC, [source])


def test_where_nothing_is_known_of_a_section_a_name_counts_if_no_other_section_has_it() -> None:
    assert "Config.seed" not in unread_keys(SYNTHETIC, ["def f(anything): return anything.seed"])
