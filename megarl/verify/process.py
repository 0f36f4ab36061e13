"""A rank of a pool as a process of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path

from megarl.parallel.environment import platform_name
from megarl.verify.rank import Case, Outcome, serve

STACK_S = 0.3  # for a signalled rank to write its stack


class RankProcess:
    """A process that runs cases of one rank, one after the other. Its first outcome says that it has started."""

    def __init__(
        self, number: int, local_rank: int, folder: Path, context: ForkServerContext, environ: Mapping[str, str]
    ) -> None:
        """Start rank ``number``.

        local_rank: its number on its node. folder: for its stacks. context: starts it. environ: variables of the rank.
        """
        self.number, self._stacks = number, folder / f"stacks{number}"
        self.connection, there = context.Pipe()
        args = (number, local_rank, there, self._stacks, dict(environ))
        self.process = context.Process(target=serve, args=args, name=f"rank {number}", daemon=True)
        self.process.start()
        there.close()  # so that the rank holds the only copy, and its death closes the connection

    def send(self, case: Case) -> None:
        """Have the rank run a case; ``outcome`` tells where it has died."""
        with suppress(OSError):
            self.connection.send(case)

    def outcome(self) -> Outcome:
        """Return the outcome that is there, or tell of the death that closed the connection."""
        try:
            outcome: Outcome = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            # Other ranks notice before we do; time 0 makes the death the first of the errors, which it is.
            return Outcome(error=f"died with exit code {self.process.exitcode}\n", time_s=0.0, has_ended=True)
        return outcome

    def ask_for_stack(self) -> None:
        """Have the rank write where it is, which takes ``STACK_S``."""
        if self.process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGUSR1)

    def unfinished(self) -> Outcome:
        """Return the error of a rank that hasn't finished and was asked for its stack."""
        where = self._stacks.read_text() if self._stacks.is_file() else "its imports\n"
        return Outcome(error=f"didn't finish; it is at\n{where}", has_ended=True)

    def kill(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def rank_context(with_engine: bool) -> ForkServerContext:
    """Return the context that forks ranks from a server, which on CPU has imported all they need, once for all."""
    context = multiprocessing.get_context("forkserver")
    on_cpu = ["megarl.verify.preload_engine" if with_engine else "megarl.verify.preload"]
    context.set_forkserver_preload(on_cpu if platform_name() == "cpu" else ["torch"])
    return context
