"""Files have names that say what they hold, and say nothing of the machine they were written on."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# Spelled in parts, so that this file passes its own test.
HOME_FOLDERS = ("root", "home", "Users", "work", "opt")
MACHINE_PATH = re.compile(r"(?<![\w.~$})/-])/(?:" + "|".join(HOME_FOLDERS) + r")/[\w.-]+")
PACKAGE_INDEX = re.compile(r"index-url[ =]+[\"']?https?://([^/\s\"']+)")


def repository_files() -> Iterator[Path]:
    """Yield the files that are tracked or would be: git's, without those it ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    yield from (path for name in listed.split("\0") if name and (path := REPOSITORY / name).is_file())


def repository_texts() -> Iterator[tuple[str, str]]:
    """Yield name and text of each file that is text."""
    for path in repository_files():
        data = path.read_bytes()
        if b"\0" not in data:
            yield str(path.relative_to(REPOSITORY)), data.decode("utf-8")


def test_no_file_is_named_after_having_no_subject() -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert [str(path) for path in repository_files() if path.suffix == ".py" and path.stem in vague] == []


def test_every_package_has_an_init_file_so_that_the_wheel_holds_it() -> None:
    folders = {path.parent for path in (REPOSITORY / "megarl").rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_init_files_hold_a_docstring_alone_so_that_each_name_has_one_home() -> None:
    found = []
    for path in (REPOSITORY / "megarl").glob("*/**/__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        if [type(node) for node in body] != [ast.Expr]:
            found.append(str(path))
    assert found == []


def test_values_of_the_rooms_that_compute_alone_cannot_be_changed() -> None:
    rooms = ["types.py", "roles.py", *(f"{room}/*.py" for room in ("algorithm", "batching", "config", "parallel"))]
    paths = [path for room in rooms for path in sorted((REPOSITORY / "megarl").glob(room))]
    found, changeable = 0, []
    for path in paths:
        classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
        for node in classes:
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            if any(name.startswith("dataclass") for name in decorators):
                found += 1
                changeable += [] if "dataclass(frozen=True)" in decorators else [f"{path.name}: {node.name}"]
    assert found > 40 and changeable == []


def test_no_text_names_a_path_of_one_machine() -> None:
    found = [f"{name}: {match}" for name, text in repository_texts() for match in MACHINE_PATH.findall(text)]
    assert found == []


def test_packages_come_from_public_indexes_only() -> None:
    hosts = {host for _, text in repository_texts() for host in PACKAGE_INDEX.findall(text)}
    assert hosts <= {"download.pytorch.org", "pypi.org"}


def test_code_is_ascii() -> None:
    found = [name for name, text in repository_texts() if name.endswith((".py", ".sh", ".yaml")) and not text.isascii()]
    assert found == []


@pytest.mark.parametrize("folder", HOME_FOLDERS)
def test_the_check_of_paths_catches_one(folder: str) -> None:
    assert MACHINE_PATH.search(f'path = "/{folder}/someone/model"')


@pytest.mark.parametrize("text", ["~/work/train.parquet", "outputs/work/run", "https://x.org/home/page", "/dev/shm/x"])
def test_the_check_of_paths_lets_pass_what_is_no_ones_machine(text: str) -> None:
    assert not MACHINE_PATH.search(text)
