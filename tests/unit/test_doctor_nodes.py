"""The doctor's report on several nodes."""

from __future__ import annotations

import pytest

from megarl.doctor.finding import Finding, ok
from megarl.doctor.nodes import NodesReport, Transfer, examine_nodes, report_text
from megarl.errors import ResourceError


def test_what_all_nodes_found_is_said_once_and_the_rest_with_names() -> None:
    bad = Finding("FAIL", "gpus", "7 of 8", "look at node b")
    report = NodesReport(
        {
            "a": (ok("python", "3.11.7"), ok("memory", "2.0 TiB"), ok("gpus", "8")),
            "b": (ok("python", "3.11.7"), ok("memory", "1.9 TiB"), bad),
        },
        (Transfer("a", "b", 48.123),),
    )
    assert report_text(report).splitlines() == [
        "2 nodes: a, b",
        "ok    python  3.11.7",
        "ok    memory  2.0 TiB",
        "ok    gpus    8  [a]",
        "FAIL  gpus    7 of 8  [b]",
        "              fix: look at node b",
        "a -> b: 48.12 GB/s",
    ]


def test_outside_of_an_allocation_there_are_no_nodes_to_look_at() -> None:
    with pytest.raises(ResourceError, match="salloc --nodes=N"):
        examine_nodes({})
