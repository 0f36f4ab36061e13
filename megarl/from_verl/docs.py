"""The page of verl's keys, from their table: ``python -m megarl.from_verl.docs > docs/from_verl.md``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from megarl.config.verl_keys import Row, verl_rows
from megarl.from_verl.convert import ACTOR
from megarl.from_verl.read import VerlRun
from megarl.from_verl.translate import translated

_KINDS = {
    "same": "the same",
    "renamed": "renamed",
    "converted": "another value",
    "meaning": "**another meaning**",
    "none": "no effect",
    "missing": "not there",
}
_INTRODUCTION = """\
# Coming from verl

Written by `python -m megarl.from_verl.docs > docs/from_verl.md` from megarl/config/verl_keys.yaml; don't edit it.

```bash
python -m megarl.from_verl run_qwen3_8b_megatron.sh                   # a script, which is read and not run
python -m megarl.from_verl run_qwen3_8b_megatron.sh NNODES=4          # with a variable of its own
python -m megarl.from_verl overrides.yaml                             # a list of overrides, or sections of keys
python -m megarl.from_verl algorithm.adv_estimator=rloo data.train_batch_size=512
```

prints our command with an override a line, and as comments what changed its meaning, has no effect here, isn't there or
is open, and what megarl's checks say of the run. Exit code 0, or 2 where the input can't be read. A run that sets one
of verl's keys by mistake is told ours.

What the script leaves to verl's defaults is set where ours differ: a run means the same. A script's variables, arrays,
`${X:-default}`, arithmetic, `if` and `case` are followed; what only a shell knows stays as it is and is named as open.

**What changes its meaning most:** `ppo_mini_batch_size` counts rollouts here (%s), warm-up
counts optimizer steps, and no prompt is ever cut.
"""


def page() -> str:
    """Return the whole page as Markdown."""
    given = {f"{ACTOR}.ppo_mini_batch_size": 256, "actor_rollout_ref.rollout.n": 5}
    ours = translated(VerlRun(given)).ours[f"{ACTOR}.ppo_mini_batch_size"]
    lines = [_INTRODUCTION % f"256 prompts with n 5 are {ours:,}"]
    for section, rows in groupby(sorted(verl_rows().values(), key=_section), key=_section):
        lines.append(f"## {section}\n\n| verl's key | Here | | Note |\n|---|---|---|---|")
        lines += [*_lines(list(rows), section), ""]
    return "\n".join(lines)


def _section(row: Row) -> str:
    """Return the section that a key is told in: two names of ours where it is one of the actor, rollout and so on."""
    names = row.verl.removesuffix(".*").split(".")
    return ".".join(names[: 2 if names[0] == "actor_rollout_ref" else 1]) if "." in row.verl else "others"


def _lines(rows: list[Row], section: str) -> Iterator[str]:
    """Yield the table's lines; keys that are the same, and those with one note and no counterpart, share one."""
    alike: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        key = f"`{row.verl.removeprefix(section + '.')}`"
        if (row.kind == "same" and row.default is None and not row.note) or row.kind in ("none", "missing"):
            alike.setdefault((row.kind, row.note), []).append(key)
            continue
        default = "" if row.default is None else f"verl's default is {_plain(row.default)}"
        note = "; ".join(part for part in (row.note, default) if part)
        here = "" if row.ours is None else f"`{row.ours}`"
        yield f"| {key} | {here} | {_KINDS[row.kind]} | {note} |"
    order = list(_KINDS)
    for (kind, note), keys in sorted(alike.items(), key=lambda item: order.index(item[0][0])):
        yield f"| {', '.join(keys)} | | {_KINDS[kind]} | {note} |"


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    print(page(), end="")
