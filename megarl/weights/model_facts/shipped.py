"""The config.json facts that ship with megarl, so that a model can be planned before it is downloaded.

A file is named after its model on Hugging Face, with ``--`` for the slash. It holds what decides sizes and mathematics,
as the model's own config.json states it; defaults that config.json leaves out are left out here too.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from megarl.errors import nearest

_FOLDER = resources.files("megarl.weights.model_facts")


def shipped_names() -> tuple[str, ...]:
    """Return the models whose facts ship, as ``owner/name``, sorted."""
    files = (entry.name for entry in _FOLDER.iterdir() if entry.name.endswith(".json"))
    return tuple(sorted(name.removesuffix(".json").replace("--", "/", 1) for name in files))


def shipped_config(name: str) -> dict[str, Any] | None:
    """Return the config.json facts of a model, or None where none ship.

    name: as on Hugging Face, in any case; without its owner where only one owner has a model of this name.
    """
    wanted = name.lower()
    known = shipped_names()
    exact = [full for full in known if full.lower() == wanted]
    bare = [full for full in known if full.lower().split("/")[1] == wanted]
    found = exact or bare
    if len(found) != 1:
        return None
    text = (_FOLDER / f"{found[0].replace('/', '--', 1)}.json").read_text(encoding="utf-8")
    facts: dict[str, Any] = json.loads(text)
    return facts


def nearest_shipped(name: str) -> str:
    """Return ``did you mean 'owner/name'?`` for the model whose name is closest, or an empty string.

    name: as on Hugging Face; what is written as a folder is near to none.
    """
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        return ""
    known = {(full if "/" in name else full.split("/")[1]).lower(): full for full in shipped_names()}
    found = nearest(name.lower(), known)
    return next((f"did you mean {full!r}?" for lower, full in known.items() if repr(lower) in found), "")
