"""Any file of a checkpoint that isn't as it was saved is named before a byte of it is used, whoever reads it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megarl.checkpoint.folder import CheckpointFolder, verified_state
from megarl.checkpoint.manifest import read_manifest
from megarl.checkpoints import main as checkpoints_main
from megarl.config.schema import SFTTrainerConfig
from megarl.controller.resume import find_resumption
from megarl.errors import CheckpointError
from megarl.export import main as export_main
from tests.security.saved_files import FILES, STATE, record_of, records_of, rewrite_manifest
from tests.security.saving import SEED, STEPS
from tests.unit.composed_configs import sft_config

CONFIG = {"trainer": {"seed": SEED}}


def flip(path: Path, at: float, bit: int = 0) -> None:
    """Change one bit, at a share of the file."""
    content = bytearray(path.read_bytes())
    content[min(int(at * len(content)), len(content) - 1)] ^= 1 << bit
    path.write_bytes(content)


HARMS: dict[str, Callable[[Path], object]] = {
    "its first byte flipped": lambda path: flip(path, 0),
    "a byte in the middle flipped": lambda path: flip(path, 0.5, 3),
    "its last byte flipped": lambda path: flip(path, 1, 7),
    "all of it cut off": lambda path: path.write_bytes(b""),
    "half of it cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a byte cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a byte added": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "deleted": lambda path: path.unlink(),
    "a folder in its place": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.fixture(scope="module")
def trainer() -> SFTTrainerConfig:
    """Return the section of a run as its defaults have it."""
    return sft_config().trainer


def test_the_files_that_are_harmed_here_are_all_that_a_checkpoint_has(newest: Path) -> None:
    there = {path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()}
    assert there == set(FILES)
    verified_state(newest)


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_harmed_is_named(newest: Path, name: str, harm: str) -> None:
    HARMS[harm](newest / name)
    with pytest.raises(CheckpointError) as error:
        verified_state(newest)
    assert name in str(error.value) and str(newest) in str(error.value)
    assert all(other not in str(error.value) for other in set(FILES) - {name} if other not in name)


def test_files_that_were_swapped_are_both_named(newest: Path) -> None:
    kept = {name: (newest / name).read_bytes() for name in FILES if name != "manifest.json"}
    tried = 0
    for one, other in itertools.combinations(kept, 2):
        if kept[one] == kept[other]:
            continue
        (newest / one).write_bytes(kept[other]), (newest / other).write_bytes(kept[one])
        with pytest.raises(CheckpointError) as error:
            verified_state(newest)
        assert one in str(error.value) and other in str(error.value)
        (newest / one).write_bytes(kept[one]), (newest / other).write_bytes(kept[other])
        tried += 1
    assert tried > 100
    verified_state(newest)


@pytest.mark.parametrize("name", ["more.pt", ".metadata", "state/actor-00002.safetensors", "critic/model.bin", "a/b"])
def test_a_file_that_was_added_is_named(newest: Path, name: str) -> None:
    (newest / name).parent.mkdir(exist_ok=True)
    (newest / name).write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        verified_state(newest)
    assert f"{name} is not in the manifest" in str(error.value)


def test_checkpoints_that_were_swapped_are_named(run_dir: Path) -> None:
    folder = CheckpointFolder(run_dir / "checkpoints")
    one, other = (folder.of(step) for step in STEPS)
    one.rename(folder.path / "kept")
    other.rename(one)
    (folder.path / "kept").rename(other)
    for path, step in ((one, STEPS[1]), (other, STEPS[0])):
        with pytest.raises(CheckpointError, match=f"{path.name} holds step {step}"):
            verified_state(path)


def test_a_manifest_with_any_bit_changed_is_named(newest: Path) -> None:
    manifest = newest / "manifest.json"
    content = manifest.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        manifest.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            read_manifest(newest)


# Ways out of a checkpoint's folder.

OUTSIDE = ("../outside", "state/../../outside", "/etc/passwd", "critic/../..", "..", "state//../../outside")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_in_the_manifest_that_leads_outside_is_refused(newest: Path, name: str) -> None:
    outside = newest.parent / "outside"
    outside.write_text("outside")
    rewrite_manifest(newest, [*records_of(newest), record_of(outside, name)])
    with pytest.raises(CheckpointError, match=r"manifest\.json lists .* no file of this folder"):
        verified_state(newest)


def _link_to_a_file(path: Path, copy: Path) -> None:
    path.rename(copy)
    path.symlink_to(copy)


def _link_to_a_folder(path: Path, copy: Path) -> None:
    path.parent.rename(copy)
    path.parent.symlink_to(copy)


@pytest.mark.parametrize(
    ("name", "link", "named"),
    [
        ("state/actor-00000.safetensors", _link_to_a_file, "state/actor-00000.safetensors"),
        ("trainer_state.json", _link_to_a_file, "trainer_state.json"),
        ("manifest.json", _link_to_a_file, "manifest.json"),
        ("state/actor-00000.safetensors", _link_to_a_folder, "state"),
    ],
)
def test_a_link_is_refused_even_to_the_same_bytes(
    newest: Path, tmp_path: Path, name: str, link: Callable[[Path, Path], None], named: str
) -> None:
    link(newest / name, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError) as error:
        verified_state(newest)
    assert named in str(error.value)


def test_a_pipe_is_refused_and_waited_for_by_nobody(newest: Path) -> None:
    (newest / "config.json").unlink()
    os.mkfifo(newest / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json is a link or a special file"):
        verified_state(newest)


# Whoever reads a checkpoint verifies it first.


def _resume(run_dir: Path, trainer: SFTTrainerConfig, **fields: object) -> object:
    section = type(trainer)(**{**vars(trainer), **fields})
    return find_resumption(section, run_dir, CONFIG, [], "")


@pytest.mark.parametrize("resume", ["auto", "run", "checkpoint"])
def test_a_run_does_not_go_on_from_a_harmed_checkpoint(
    run_dir: Path, newest: Path, trainer: SFTTrainerConfig, resume: str
) -> None:
    from_where = {"auto": "auto", "run": str(run_dir), "checkpoint": str(newest)}[resume]
    in_folder = run_dir if resume == "auto" else run_dir.with_name("another")
    assert _resume(in_folder, trainer, resume=from_where) is not None
    flip(newest / STATE[0], 0.5)
    with pytest.raises(CheckpointError, match=STATE[0]):
        _resume(in_folder, trainer, resume=from_where)


@pytest.mark.parametrize("name", FILES)
def test_an_older_checkpoint_is_taken_where_configured_alone_and_that_is_told(
    run_dir: Path, newest: Path, trainer: SFTTrainerConfig, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (newest / name).unlink()
    with pytest.raises(CheckpointError, match=r"trainer\.resume_from_older=true"):
        _resume(run_dir, trainer)
    assert newest.is_dir()
    found = _resume(run_dir, trainer, resume_from_older=True)
    assert found is not None and found.state.step == STEPS[0]  # type: ignore[attr-defined]
    told = capsys.readouterr().out
    assert "DAMAGED" in told and name in told and "step_2.damaged" in told
    assert newest.with_name("step_2.damaged").is_dir() and not newest.exists()


def test_an_export_of_a_harmed_checkpoint_writes_nothing(
    run_dir: Path, newest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(newest / STATE[2], 0.5)
    with pytest.raises(SystemExit):
        export_main([str(run_dir), "--out", str(tmp_path / "out")])
    assert f"CheckpointError: {newest} isn't as it was saved: {STATE[2]} has changed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_are_verified_one_by_one_tell_which_is_harmed(
    run_dir: Path, newest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(newest / "tokenizer.json", 0.5)
    assert checkpoints_main([str(run_dir), "--verify"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert "verified" in first and "DAMAGED" in second and "tokenizer.json has changed" in second


def test_where_no_checkpoint_is_whole_every_one_is_named_and_nothing_starts_anew(
    run_dir: Path, trainer: SFTTrainerConfig
) -> None:
    folder = CheckpointFolder(run_dir / "checkpoints")
    for step in STEPS:
        flip(folder.of(step) / STATE[step], 0.5)
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is whole; start in another folder") as error:
        _resume(run_dir, trainer, resume_from_older=True)
    assert all(STATE[step] in str(error.value) for step in STEPS)
    assert folder.steps() == list(STEPS)
