"""A translated run as text: a command to run, and what to know of it as comments."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from megarl.errors import Problem
from megarl.from_verl.check import written
from megarl.from_verl.translate import Translation


def report_text(found: Translation, problems: Sequence[Problem | str]) -> str:
    """Return the report. problems: what megarl's checks say of the run."""
    arguments = [_argument(key, written(value)) for key, value in {**found.ours, **found.defaults}.items()]
    lines = [" \\\n    ".join([f"python -m megarl.main_ppo --config-name={found.backend}", *arguments])]
    lines += _part("From verl's defaults, where ours differ", list(found.defaults))
    lines += _part("Changed meaning", found.changed)
    lines += _part("No effect here", found.unused)
    lines += _part("Not there", [f"{key}: {what}" for key, what in found.missing.items()])
    lines += _part("Open: values that neither the script nor the table of keys says", found.opened)
    lines += _part("What the checks of megarl say, but for files", [str(problem) for problem in problems])
    if not problems:
        lines.append("\n# The checks of megarl pass, but for files; python -m megarl.plan plans the run.")
    return "\n".join(lines)


def _argument(key: str, value: str) -> str:
    """Return an override for a shell; variables of the user's are left for the shell to expand."""
    text = f"{key}={value}"
    if "$" in value:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return shlex.quote(text)


def _part(title: str, sentences: Sequence[str]) -> list[str]:
    lines = [line for sentence in sentences for line in f"  {sentence}".splitlines()]
    return [f"\n# {title}:", *(f"# {line}" for line in lines)] if sentences else []
