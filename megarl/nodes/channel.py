"""A connection between two nodes: JSON lines, both ends proven to know the job's token, silence noticed."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import threading
from collections.abc import Mapping
from typing import Any

BEAT_S = 5.0
SILENCE_S = 30.0  # a node without power says nothing, not even goodbye
_LONGEST_BYTES = 1 << 20
_BEAT: dict[str, Any] = {}


class Channel:
    """One end. Messages are dicts of plain values; receiving raises OSError where the other end is gone or silent."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(SILENCE_S)
        self.connection = connection
        self.read = b""
        self.writing = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message."""
        with self.writing:
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """Return the next message that isn't a heartbeat. Raises OSError, also for what is no message."""
        while True:
            while b"\n" not in self.read:
                more = self.connection.recv(1 << 16)
                if not more or len(self.read) > _LONGEST_BYTES:
                    raise ConnectionError("closed the connection")
                self.read += more
            line, _, self.read = self.read.partition(b"\n")
            try:
                message = json.loads(line)
            except ValueError:
                raise ConnectionError("sent what is no message") from None
            if isinstance(message, dict) and message != _BEAT:
                return message

    def beat(self) -> None:
        """Send heartbeats from now on, until the connection ends."""

        def beats() -> None:
            while not self.ended.wait(BEAT_S):
                try:
                    self.send(_BEAT)
                except OSError:  # whoever receives here hears of it
                    return

        self.ended = threading.Event()
        threading.Thread(target=beats, daemon=True).start()

    def close(self) -> None:
        """End the connection."""
        self.connection.close()


def challenge(channel: Channel, token: str) -> None:
    """Have the other end prove that it knows the token. Raises ConnectionError where it can't."""
    asked = secrets.token_hex(16)
    channel.send({"challenge": asked})
    if not hmac.compare_digest(str(channel.receive().get("proof", "")), _proof(asked, token)):
        raise ConnectionError("doesn't know the token of this job")


def answer(channel: Channel, token: str) -> None:
    """Prove to the other end that this one knows the token."""
    channel.send({"proof": _proof(str(channel.receive().get("challenge", "")), token)})


def _proof(asked: str, token: str) -> str:
    return hmac.new(token.encode(), asked.encode(), hashlib.sha256).hexdigest()
