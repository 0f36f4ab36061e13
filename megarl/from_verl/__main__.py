"""A run of verl's as a run of ours: ``python -m megarl.from_verl SCRIPT.sh``. Runs nothing of the script."""

from __future__ import annotations

import sys

from megarl.config.command_line import end_quietly_with_the_reader
from megarl.config.compose import errors_reported
from megarl.from_verl.check import needed, problems
from megarl.from_verl.read import read_run
from megarl.from_verl.report import report_text
from megarl.from_verl.translate import translated

HELP = """\
usage: python -m megarl.from_verl SCRIPT.sh [NAME=value ...] [key=value ...]
       python -m megarl.from_verl OVERRIDES.yaml [key=value ...]
       python -m megarl.from_verl key=value ...

  SCRIPT.sh       a shell script that calls verl's trainer; it is read, not run
  NAME=value      a variable of the script, as in NNODES=2
  OVERRIDES.yaml  a list of overrides, or sections of keys
  key=value       an override of verl's

Prints our command with an override a line, what changed its meaning, has no effect here, isn't there or is open, and
what megarl's checks say of the run. Exit code 0, or 2 where the input can't be read. Every key: docs/from_verl.md."""


def main() -> None:
    """Read, translate, check, print."""
    end_quietly_with_the_reader()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        sys.exit(0 if arguments else 2)
    with errors_reported():
        run = read_run(arguments)
    found = needed(translated(run))
    print(report_text(found, problems(found)))


if __name__ == "__main__":
    main()
