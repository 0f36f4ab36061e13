"""Where config files are: the user's folder, where --config-dir names one, and then megarl's own, conf/."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

OURS = Path(str(files("megarl.conf")))


def find_config(folder: Path | None, name: str) -> Path | None:
    """Return the file of a config such as ``actor/dp_actor``: the user's in ``folder``, else megarl's; None if none."""
    paths = [Path(place, f"{name.removesuffix('.yaml')}.yaml") for place in _places(folder)]
    return next((path for path in paths if path.is_file()), None)


def names_in(folder: Path | None, group: str) -> list[str]:
    """Return the names of a group's configs, of the main configs for ""."""
    return sorted({path.stem for place in _places(folder) for path in Path(place, group).glob("*.yaml")})


def group_names(folder: Path | None) -> set[str]:
    """Return the names of all groups of configs that are in no other group."""
    return {path.name for place in _places(folder) for path in place.glob("*/")}


def shown_path(path: Path) -> str:
    """Return a file's name as a user knows it: ``conf/...`` for megarl's, relative to here where it lies below."""
    path = path.absolute()
    for folder, name in ((OURS, "conf/"), (Path.cwd(), "")):
        if path.is_relative_to(folder):
            return f"{name}{path.relative_to(folder)}"
    return str(path)


def _places(folder: Path | None) -> tuple[Path, ...]:
    return (OURS,) if folder is None else (folder, OURS)
