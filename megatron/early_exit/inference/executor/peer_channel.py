"""Links between the ranks of a pipeline, from rank to rank, beside those to the engine.

Each rank has one inbox, and one outgoing link to each rank that it sends to (`Layout.targets`). A message is the token
of the run, the struct, and for hidden states their bytes as a third frame. What comes without the token is dropped.
Messages of one link arrive in the order in which they were sent. No link ever waits: what may be under way is bounded
by credit and by the engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec
import zmq

from megatron.early_exit.inference.executor.channels import (
    LARGEST_MESSAGE,
    ConnectionInfo,
    MessageTooLarge,
    encode_checked,
    has_token,
    new_socket,
    own_endpoint,
    own_host,
    plain_endpoint,
    tcp_address,
)
from megatron.early_exit.inference.executor.messages import LinkOpened, PeerMessage

if TYPE_CHECKING:  # it is in collections.abc from Python 3.12 on
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

_SECONDS_UNTIL_FAILURE = 3.0
"""That a link may be broken before its rank fails: the other end may have been told to end first."""

_BROKEN = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


class PeerUnreachable(OSError):
    """A rank cannot send to another."""

    def __init__(self, source: int, target: int, address: str, seconds: float) -> None:
        super().__init__(
            f"worker rank {source} could not reach worker rank {target} at {address} within {seconds:g} seconds; each "
            "machine must accept connections from the others, at all ports"
        )


class PeerChannel:
    """A rank's inbox, and its links to others. It belongs to one thread."""

    def __init__(self, engine: ConnectionInfo, rank: int) -> None:
        """The inbox is a socket beside the engine's, or at the interface by which this machine reaches the engine."""
        self.rank, self._token = rank, engine.token
        self._decoder = msgspec.msgpack.Decoder(PeerMessage)
        self._context = zmq.Context()
        is_tcp = engine.endpoint.startswith("tcp")
        address = tcp_address(own_host(engine.endpoint)) if is_tcp else f"{engine.endpoint}_{rank}"
        self._inbox = new_socket(self._context, zmq.PULL, address)
        self._inbox.setsockopt(zmq.RCVHWM, 0)
        self._inbox.bind(f"{address}:*" if is_tcp else address)
        self.address = plain_endpoint(own_endpoint(self._inbox))
        self._links: dict[int, zmq.Socket[bytes]] = {}
        self._monitors: dict[int, zmq.Socket[bytes]] = {}
        self._addresses: Sequence[str] = ()
        self._broken: dict[int, float] = {}
        """Since when, by rank."""
        self.num_dropped = 0
        """Messages without the token."""

    def connect(self, addresses: Sequence[str], targets: Iterable[int]) -> None:
        """Open a link to each of `targets` and say hello. addresses: of the inboxes of all ranks"""
        self._addresses = addresses
        for rank in targets:
            link = new_socket(self._context, zmq.PUSH, addresses[rank])
            link.setsockopt(zmq.SNDHWM, 0)
            link.setsockopt(zmq.RECONNECT_IVL, -1)  # what was under way would be lost, and nobody would know
            self._monitors[rank] = link.get_monitor_socket(_BROKEN)
            link.connect(addresses[rank])
            self._links[rank] = link
        self.send(LinkOpened(self.rank), self._links)

    def register(self, poller: zmq.Poller) -> None:
        """Have `poller` wake when something has come, or a link is broken."""
        for socket in (self._inbox, *self._monitors.values()):
            poller.register(socket, zmq.POLLIN)

    def send(self, message: PeerMessage, ranks: Collection[int], hidden: Buffer | None = None) -> None:
        """hidden: bytes of hidden states. Raises MessageTooLarge."""
        if not ranks:
            return
        frames: list[Buffer] = [self._token, encode_checked(message)]
        if hidden is not None:
            size = memoryview(hidden).nbytes
            if size > LARGEST_MESSAGE:
                raise MessageTooLarge(f"hidden states of {size} bytes are more than the {LARGEST_MESSAGE} allowed")
            frames.append(hidden)
        for rank in ranks:
            with suppress(zmq.Again):  # the link is broken: see `check_links`
                self._links[rank].send_multipart(frames, zmq.NOBLOCK)

    def receive(self) -> tuple[PeerMessage, memoryview | None] | None:
        """The next message that has come, and the bytes of its hidden states; None if there is none.

        Raises msgspec.DecodeError for a message that has the token and cannot be read."""
        while True:
            try:
                frames = self._inbox.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return None
            if len(frames) in (2, 3) and has_token(frames[0].bytes, self._token):
                return self._decoder.decode(frames[1].buffer), frames[2].buffer if len(frames) == 3 else None
            self.num_dropped += 1
            if self.num_dropped == 1:
                log.warning("a message without the token of this run came over %s and was dropped", self.address)

    def seconds_until_failure(self) -> float | None:
        """How long the ends of links may still be put down to the end of the run; None: no link is broken."""
        now = time.monotonic()
        for rank, monitor in self._monitors.items():
            if rank not in self._broken and monitor.poll(0):
                monitor.recv_multipart()
                self._broken[rank] = now
        if not self._broken:
            return None
        return max(0.0, min(self._broken.values()) + _SECONDS_UNTIL_FAILURE - now)

    def check_links(self) -> None:
        """Raise ConnectionError if a link has been broken for a while."""
        if self.seconds_until_failure() == 0:
            rank = min(self._broken, key=self._broken.__getitem__)
            raise ConnectionError(f"the connection to worker rank {rank} at {self._addresses[rank]} is broken")

    def close(self) -> None:
        """Send what is unsent, for a moment, and close."""
        for link in self._links.values():
            link.disable_monitor()
            link.close(linger=1000)
        for monitor in self._monitors.values():
            monitor.close()
        self._context.destroy(linger=0)
