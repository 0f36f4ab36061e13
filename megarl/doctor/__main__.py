"""Examine this machine, or all nodes of an allocation, before a run: ``python -m megarl.doctor [--json] [--nodes]``.

``--gpu-check`` runs small trainings on the GPUs instead, in a program of its own: the doctor loads nothing heavy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

from megarl.config.command_line import end_quietly_with_the_reader
from megarl.config.compose import errors_reported
from megarl.doctor.examine import examine
from megarl.doctor.finding import as_json, as_text, exit_code
from megarl.doctor.nodes import examine_nodes, report_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings and return the exit code: 1 where anything failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m megarl.doctor", description="Examine this machine before a run.")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of lines")
    parser.add_argument("--nodes", action="store_true", help="examine all nodes of this allocation of Slurm")
    parser.add_argument("--gpu-check", action="store_true", help="prove the path on GPUs; --gpu-check --help says more")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--gpu-check" in given:
        given.remove("--gpu-check")
        return subprocess.run([sys.executable, "-m", "megarl.gpu_check", *given], check=False).returncode
    asked = parser.parse_args(given)
    if asked.nodes:
        with errors_reported():
            report = examine_nodes()
        print(json.dumps(asdict(report)) if asked.json else report_text(report))
        return max(exit_code(found) for found in report.findings.values())
    findings = examine()
    print(as_json(findings) if asked.json else as_text(findings))
    return exit_code(findings)


if __name__ == "__main__":
    end_quietly_with_the_reader()
    sys.exit(main())
