"""What a run shows to others on its machine while all of its processes are up, as one of its reward workers sees it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tests.launch import MARKER

SECRET = "hf_a_secret_of_the_environment"
TOKEN = "reward.kwargs.token=${oc.env:HF_TOKEN}"
# The start of a reward function's file: look() writes seen.json.
LOOK = f"""
import json, os, psutil, tempfile

def look(token):
    assert token == {SECRET!r}
    found, segments = [], {{}}
    for process in psutil.process_iter():
        try:
            if process.environ().get({MARKER!r}) == os.environ[{MARKER!r}]:
                listening = [c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
                found.append((" ".join(process.cmdline()), listening))
                for line in open(f"/proc/{{process.pid}}/maps"):
                    addresses, _, _, _, inode, *path = line.split(maxsplit=5)
                    if path and path[0].startswith("/dev/shm/"):
                        start, end = (int(address, 16) for address in addresses.split("-"))
                        segments[inode] = (path[0].removeprefix("/dev/shm/"), end - start)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    folder = tempfile.gettempdir()
    modes = {{name: oct(os.stat(os.path.join(folder, name)).st_mode & 0o777) for name in os.listdir(folder)}}
    with open("seen.json", "w") as file:
        json.dump([found, modes, list(segments.values())], file)
"""


@dataclass(frozen=True)
class Seen:
    """What was seen of a run.

    processes: command lines with the addresses that they listen on. modes: by name in the temporary folder. segments:
    name and bytes of what they mapped of /dev/shm.
    """

    processes: list[tuple[str, list[str]]]
    modes: dict[str, str]
    segments: list[tuple[str, int]]

    @property
    def listening(self) -> list[tuple[str, str]]:
        """Command lines with one address each that they listen on."""
        return [(line, address) for line, addresses in self.processes for address in addresses]

    @property
    def reachable(self) -> list[str]:
        """Command lines of what listens on more than the loopback interface."""
        return [line for line, address in self.listening if address not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")]

    @property
    def sessions(self) -> list[str]:
        """The modes of the folders that a Ray of the run's own lives in."""
        return [mode for name, mode in self.modes.items() if name.startswith("megarl_")]

    def telling(self, folder: Path, output: str) -> list[bytes]:
        """Return the files in the run's ``folder``, the command lines and the ``output`` that hold the secret."""
        texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
        assert len(texts) > 10
        lines = [line for line, _ in self.processes]
        return [text for text in (*texts, *map(str.encode, (*lines, output))) if SECRET.encode() in text]


def read_seen(folder: Path) -> Seen:
    """Return what was seen of the run that started in ``folder``."""
    return Seen(*json.loads((folder / "seen.json").read_text()))
