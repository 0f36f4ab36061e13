"""What keeps nodes from running together is said of each, with names."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from megarl.nodes.facts import NodeFacts, active_ports, differences, read_facts, report, source_digest

RUN_FOLDER = Path("outputs")
FIRST = NodeFacts(
    node_rank=0,
    name="node1",
    address="10.0.0.1",
    platform="cuda",
    versions={"Python": "3.11.7", "megarl": "0.1.0 (aaaaaaaa)", "torch": "2.9.0"},
    driver="570.86.15",
    fabric="8 x 400 Gb/sec (4X NDR) InfiniBand",
    num_devices=8,
    files={"data": "2 files, 10 bytes, abcdef"},
    sees_run_folder=True,
    own_folder="",
)
SECOND = replace(FIRST, node_rank=1, name="node2", address="10.0.0.2")


def found(**changes: object) -> list[str]:
    return list(differences([FIRST, replace(SECOND, **changes)], 8, RUN_FOLDER))  # type: ignore[arg-type]


def test_equal_nodes_differ_in_nothing_and_drivers_and_fabrics_may_differ() -> None:
    assert found() == [] and found(driver="550.54.14", fabric="") == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sees_run_folder": False}, "node2 doesn't see what node1 writes in outputs"),
        ({"own_folder": "/tmp/megarl_1 can't be written: no room"}, "/tmp/megarl_1 can't be written: no room on node2"),
        (
            {"taken_ports": (20002, 20005)},
            "another program listens on node2 at what this job would: 20002, 20005. fix:",
        ),
        ({"num_devices": 7}, "node2 has 7 GPUs, and 8 are wanted"),
        ({"platform": "cpu", "num_devices": None}, "node2 is a cpu machine, node1 a cuda machine"),
        ({"versions": {**FIRST.versions, "torch": "2.8.0"}}, "torch is 2.8.0 on node2 and 2.9.0 on node1"),
        ({"versions": {**FIRST.versions, "vllm": "1"}}, "vllm is 1 on node2 and None on node1"),
        ({"files": {"data": "not there"}}, "data isn't the same on node2 (not there) as on node1 (2 files"),
    ],
)
def test_a_difference_that_matters_is_one_sentence_with_both_nodes(changes: dict[str, object], said: str) -> None:
    [sentence] = found(**changes)
    assert sentence.startswith(said)


def test_several_differences_are_all_said() -> None:
    assert len(found(num_devices=7, sees_run_folder=False)) == 2


def test_the_report_names_all_nodes_and_drivers_and_fabrics_that_differ() -> None:
    versions = {**FIRST.versions, "nvidia-nccl-cu13": "2.28.9"}
    nodes = [replace(FIRST, versions=versions), replace(SECOND, versions=versions)]
    alike = (
        "2 nodes: node1 (10.0.0.1), node2 (10.0.0.2); cuda, Python 3.11.7, torch 2.9.0, nvidia-nccl-cu13 2.28.9, "
        "driver 570.86.15, fabric 8 x 400 Gb/sec (4X NDR) InfiniBand"
    )
    assert report(nodes) == alike
    assert report([nodes[0], replace(nodes[1], driver="550.54.14", fabric="")]).splitlines() == [
        alike,
        "drivers differ: node1 570.86.15, node2 550.54.14",
        "fabrics differ: node1 8 x 400 Gb/sec (4X NDR) InfiniBand, node2 none",
    ]


def test_active_ports_are_counted_by_rate_and_kind(tmp_path: Path) -> None:
    infiniband, ethernet = "400 Gb/sec (4X NDR) InfiniBand", "25 Gb/sec (1X EDR) Ethernet"
    for name, state, told in (
        ("mlx5_0", "4: ACTIVE", infiniband),
        ("mlx5_1", "4: ACTIVE", infiniband),
        ("mlx5_2", "1: DOWN", infiniband),
        ("mlx5_bond_0", "4: ACTIVE", ethernet),
    ):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        rate, link_layer = told.rsplit(" ", 1)
        for file, text in (("state", state), ("rate", rate), ("link_layer", link_layer)):
            (port / file).write_text(f"{text}\n")
    assert active_ports(tmp_path) == f"1 x {ethernet}, 2 x {infiniband}"
    assert active_ports(tmp_path / "none") == ""


def test_files_are_told_apart_by_number_size_and_names(tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    probe.touch()

    def files(path: Path) -> str:
        return read_facts(0, "", [path], probe, tmp_path / "own").files[str(path)]

    folder = tmp_path / "model"
    assert files(folder) == "not there"
    folder.mkdir()
    (folder / "a").write_text("123")
    first = files(folder)
    assert first.startswith("1 files, 3 bytes, ") and files(folder / "a") == "3 bytes"
    (folder / "a").rename(folder / "b")
    assert files(folder) != first


def test_a_folder_of_its_own_that_a_node_cannot_use_is_said(tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    probe.touch()

    def own_folder(folder: Path) -> str:
        return read_facts(0, "", [], probe, folder).own_folder

    assert own_folder(tmp_path / "own") == "" and (tmp_path / "own").stat().st_mode & 0o777 == 0o700
    assert list((tmp_path / "own").iterdir()) == []
    assert own_folder(probe) == f"{probe} can't be written: File exists"
    if os.geteuid() == 0:
        os.chown(tmp_path / "own", 12345, -1)
        assert own_folder(tmp_path / "own") == f"{tmp_path / 'own'} is another user's"


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_a_port_is_taken_where_anything_listens_on_it(tmp_path: Path, host: str) -> None:
    def taken(*ports: int) -> list[int]:
        return list(read_facts(0, "", [], tmp_path, tmp_path / "own", ports).taken_ports)

    with socket.create_server((host, 0)) as server, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, other = server.getsockname()[1], free.getsockname()[1]
        free.close()
        assert taken(port, other) == [port]
    assert taken(port) == []


def test_one_changed_source_file_changes_the_digest(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = source_digest(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    assert source_digest(tmp_path) != before and len(before) == 8
