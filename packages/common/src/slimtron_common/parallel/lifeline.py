"""Processes of one job notice when one of them is gone.

A process that waits in a collective for another that was killed would wait until the timeout, half
an hour. Here every process holds a connection to rank 0, which the system closes however a process
ends, and which keep-alive probes end when a host is lost.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import selectors
import socket
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["lifeline"]

logger = logging.getLogger(__name__)

GRACE = 10.0
"""Seconds in which a process may end by itself, with a message of its own."""

_KEY = "lifeline"
_FAREWELL = -1
_PROBES = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""A host that is silent for so long (seconds, seconds, times) is lost."""


@contextlib.contextmanager
def lifeline(store: Any, rank: int, world_size: int) -> Iterator[None]:
    """Ends this process, with an error that names the rank, when another of the job is gone.

    That is: when it ended within its block, killed or by an exception. Where the processes cannot
    connect to rank 0, a warning says that nothing is watched.

    Args:
        store: What the processes met by, a store of torch.distributed.
        rank: This process's.
        world_size: Number of processes.
    """
    try:
        watch = _Hub(store, world_size) if rank == 0 else _Spoke(store, rank)
    except OSError as error:
        logger.warning("the processes cannot watch each other: rank %d: %s", rank, error)
        yield
        return
    # A fork that lives on, a writer of checkpoints say, must not hold connections open.
    os.register_at_fork(after_in_child=watch.close)
    thread = threading.Thread(target=watch.run, name="lifeline", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        watch.fail()
        raise
    watch.leave()
    thread.join(GRACE)


class _Watch:
    """One end of the connections.

    ``leave`` says farewell; ``fail`` ends them without, so that the others take notice; ``close``
    forgets them and leaves those of another process as they are.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._ended = threading.Event()

    def _stop(self, lost: int) -> None:
        """Ends the process, for a rank that is gone."""
        logger.error(
            "rank %d has ended before the others, so rank %d stops, too\n"
            "  do this: see what rank %d, or its host, says; a job goes on with --resume",
            lost,
            self._rank,
            lost,
        )
        if not self._ended.wait(GRACE):
            # The main thread may wait for the lost one for good.
            os._exit(1)


class _Hub(_Watch):
    """Rank 0, which hears of the end of every other and passes it on."""

    def __init__(self, store: Any, world_size: int) -> None:
        super().__init__(0)
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        try:
            self._server = socket.create_server(
                ("", 0), family=family, backlog=world_size, dualstack_ipv6=dual
            )
        except OSError:
            store.set(_KEY, "")
            raise
        self._token = secrets.token_bytes(16)
        self._wake, self._woken = socket.socketpair()
        self._peers: dict[socket.socket, int] = {}
        store.set(_KEY, f"{self._server.getsockname()[1]} {self._token.hex()}")

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    source = key.fileobj
                    assert isinstance(source, socket.socket)
                    if source is self._woken:
                        self._tell(_FAREWELL)
                        return
                    if source is self._server:
                        if (peer := self._accept()) is not None:
                            selector.register(peer, selectors.EVENT_READ)
                        continue
                    selector.unregister(source)
                    rank, message = self._peers.pop(source), _receive(source)
                    if self._ended.is_set():
                        return
                    if message != _FAREWELL:
                        self._tell(rank)
                        self._stop(rank)
                        return

    def leave(self) -> None:
        self._ended.set()
        self._wake.send(b"\0")

    def fail(self) -> None:
        self._ended.set()
        for peer in list(self._peers):
            _shut(peer)

    def close(self) -> None:
        for connection in (self._server, self._wake, self._woken, *self._peers):
            connection.close()

    def _accept(self) -> socket.socket | None:
        connection, _ = self._server.accept()
        connection.settimeout(GRACE)
        try:
            known = secrets.compare_digest(_exactly(connection, 16), self._token)
            rank = _receive(connection)
        except OSError:
            known, rank = False, None
        if not known or rank is None:
            connection.close()
            return None
        _probe(connection)
        self._peers[connection] = rank
        return connection

    def _tell(self, message: int) -> None:
        for peer in self._peers:
            # It may be gone as well.
            with contextlib.suppress(OSError):
                _send(peer, message)


class _Spoke(_Watch):
    """Any other rank, which hears of the end of all through rank 0."""

    def __init__(self, store: Any, rank: int) -> None:
        super().__init__(rank)
        offer = store.get(_KEY).decode()
        if not offer:
            raise ConnectionError("rank 0 cannot listen")
        port, token = offer.split()
        address = os.environ.get("MASTER_ADDR", "localhost"), int(port)
        self._hub = socket.create_connection(address, timeout=GRACE)
        _probe(self._hub)
        self._hub.sendall(bytes.fromhex(token))
        _send(self._hub, rank)

    def run(self) -> None:
        message = _receive(self._hub)
        if message != _FAREWELL and not self._ended.is_set():
            self._stop(0 if message is None else message)

    def leave(self) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            _send(self._hub, _FAREWELL)
        _shut(self._hub)

    def fail(self) -> None:
        self._ended.set()
        _shut(self._hub)

    def close(self) -> None:
        self._hub.close()


def _shut(connection: socket.socket) -> None:
    # Unlike `close`, it reaches a thread that is reading, and the other side.
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _probe(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(connection: socket.socket, number: int) -> None:
    connection.sendall(number.to_bytes(4, "big", signed=True))


def _receive(connection: socket.socket) -> int | None:
    """The number that comes; None where the connection ends."""
    try:
        return int.from_bytes(_exactly(connection, 4), "big", signed=True)
    except OSError:
        return None


def _exactly(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise ConnectionError("the connection has ended")
        received += part
    return received
