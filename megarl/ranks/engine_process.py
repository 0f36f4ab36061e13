"""The process of one rank of an engine that isn't in the trainer's ranks.

Rank 0 of an engine hears the controller, and tells the others between two steps, so that all do the same in the same
order. Every rank ends at once where the controller does: its connection says so, whatever the rank is in.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from megarl.errors import MegarlError
from megarl.ranks.join import join_ranks
from megarl.ranks.meeting import tcp_store
from megarl.ranks.spec import EngineStart
from megarl.rollout.served import Busy, Failed, Order, Ready, Rest, Rested, StreamingEngine, Take, Took
from megarl.rollout.sglang import SglangSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FOREVER = timedelta(days=30)  # a training step may take long; a dead peer is noticed at once
_SILENCE_S = 5.0  # after which a busy engine says that it lives


def main(fd: int, listener_fd: int | None) -> None:
    """Serve until the controller closes the connection at ``fd``, then end this process.

    listener_fd: of the socket that the engine's ranks meet at, on rank 0. RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT
    are set.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they are the controller's, which may still have rollouts to wait for
    faulthandler.enable()
    connection = Connection(fd)
    orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
    try:
        start: EngineStart = connection.recv()
        threading.Thread(target=_hear, args=(connection, orders), name="orders", daemon=True).start()
        _serve(connection, orders, start, None if listener_fd is None else socket.socket(fileno=listener_fd))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the controller shall know why the process ends
        known = error if isinstance(error, MegarlError) else None
        connection.send(Failed(traceback.format_exc().rstrip(), known))
    finally:
        os._exit(1)  # at once: a peer inside a collective must see its connection close


def _hear(connection: Connection, orders: queue.SimpleQueue[Order]) -> None:
    """Take in orders; end the process where the controller has gone."""
    try:
        while True:
            orders.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def _serve(
    connection: Connection, orders: queue.SimpleQueue[Order], start: EngineStart, listener: socket.socket | None
) -> None:
    is_sglang = isinstance(start.spec, SglangSpec)
    engine, control = _started_sglang(start, listener) if is_sglang else _started(start, listener)
    is_first = os.environ["RANK"] == "0"
    connection.send(Ready())
    told_s = time.monotonic()
    while True:
        for order in _agreed(control, list(_waiting(orders, engine.is_busy)) if is_first else []):
            answer = _obeyed(engine, order)
            if is_first and answer is not None:
                connection.send(answer)
        ended = engine.step() if engine.is_busy else []
        if is_first and (ended or time.monotonic() - told_s > _SILENCE_S):
            told_s = time.monotonic()
            for done in ended:
                connection.send(done)
            if not ended:
                connection.send(Busy())


def _obeyed(engine: StreamingEngine, order: Order) -> Took | Rested | None:
    """Have the engine do what it is told, and return what is answered to that."""
    match order:
        case Take():
            engine.take(order)
            return Took(order.policy_version)
        case Rest():
            engine.rest()
            return Rested()
        case asks:
            for ask in asks:
                engine.add(ask)
            return None


def _started(start: EngineStart, listener: socket.socket | None) -> tuple[StreamingEngine, ProcessGroup | None]:
    """Return the engine of this rank, and the group by which rank 0 tells the others; None where it is alone."""
    join_ranks(listener)
    import torch.distributed as dist

    from megarl.rollout.taking import WeightsTaker
    from megarl.rollout.vllm import VllmEngine, VllmSpec
    from megarl.rollout.vllm_stream import VllmStream

    assert isinstance(start.spec, VllmSpec)
    split = start.spec.layout
    control = dist.new_group(backend="gloo", timeout=_FOREVER) if split.tp > 1 else None
    engine = VllmEngine(start.spec)
    actor = start.actor
    stream = VllmStream(engine, WeightsTaker(engine, actor.shape, actor.layout, split, dist.get_rank()))
    if start.shares_devices:
        stream.rest()
    return stream, control


def _started_sglang(start: EngineStart, listener: socket.socket | None) -> tuple[StreamingEngine, None]:
    """Return the engine of this process, which starts its ranks itself and has the store that they meet at."""
    import torch

    from megarl.rollout.sglang import SglangStream
    from megarl.rollout.taking import WholeTensors

    assert isinstance(start.spec, SglangSpec)
    dtype, actor = getattr(torch, start.spec.dtype), start.actor
    store = tcp_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), listener)
    weights = WholeTensors(actor.shape, actor.layout, start.spec.layout, dtype)
    return SglangStream(start.spec, weights, store), None


def _waiting(orders: queue.SimpleQueue[Order], is_busy: bool) -> Iterator[Order]:
    """Yield the orders that are there; wait for one where the engine has nothing else to do."""
    if not is_busy:
        yield orders.get()
    while not orders.empty():
        yield orders.get()


def _agreed(control: ProcessGroup | None, orders: list[Order]) -> list[Order]:
    """Return the orders of rank 0 on every rank."""
    if control is None:
        return orders
    import torch.distributed as dist

    told = [orders]
    dist.broadcast_object_list(told, src=0, group=control)
    return told[0]
