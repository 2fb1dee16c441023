"""Sockets between the engine's process and its worker ranks (ZMQ and MessagePack, no pickle).

A message is two frames: the token of the run, then the struct. What comes without the token is dropped, and larger
frames than `LARGEST_MESSAGE` end their connection. Messages of one rank arrive in the order in which they were sent;
none is lost while both sides live: a sender waits where a queue is full, and one whose peer is gone is told.

A socket belongs to one thread.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import logging
import re
import secrets
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from megatron.early_exit.inference.executor.messages import FromWorker, Hello, PeerMessage, ToWorker

log = logging.getLogger(__name__)

LARGEST_MESSAGE = 1 << 28
"""Bytes: all logits of some 500 rows of a vocabulary of 128,000."""

_TOKEN_BYTES = 32
_HEARTBEAT_SECONDS = 1
_SECONDS_UNTIL_LOST = 4
"""Without an answer to a heartbeat."""

_encode = msgspec.msgpack.Encoder().encode


class MessageTooLarge(ValueError):
    """A message has more than `LARGEST_MESSAGE` bytes; nothing was sent."""


class RankUnreachable(Exception):
    """The connection to a rank has ended; the message was not sent."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"worker rank {rank} has closed its connection")
        self.rank = rank


class ConnectionTorn(Exception):
    """Ctrl-C came in the middle of a message, or of sending one to all ranks: what follows would be misread."""


class ConnectionInfo(msgspec.Struct, frozen=True):
    """What a rank needs to reach the engine."""

    endpoint: str
    token: bytes


class EngineChannel:
    """The engine's end, for all its ranks."""

    def __init__(self, address: str, num_ranks: int) -> None:
        """address: "ipc://FILE" or "tcp://IP"; a free port is chosen. Raises OSError if it cannot be bound."""
        self._num_ranks = num_ranks
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._decoder = msgspec.msgpack.Decoder(FromWorker)
        self._routing_ids: dict[int, bytes] = {}
        self._ranks: dict[bytes, int] = {}
        self.num_dropped = 0
        """Messages without the token, or of nobody who said hello."""
        self.is_torn = False
        """See `ConnectionTorn`."""
        self._context = zmq.Context()
        self._socket = new_socket(self._context, zmq.ROUTER, address)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # else messages for a lost rank would vanish
        self._socket.setsockopt(zmq.SNDHWM, 0)  # the engine never waits for a rank; few steps are in flight
        try:
            self._socket.bind(f"{address}:*" if address.startswith("tcp") else address)
        except zmq.ZMQError as error:
            self.close()
            raise OSError(f"{address} cannot be bound ({error.strerror})") from error
        self.info = ConnectionInfo(own_endpoint(self._socket), self._token)

    @property
    def known_ranks(self) -> Collection[int]:
        """Ranks that have said hello."""
        return self._routing_ids.keys()

    def send(self, message: ToWorker, ranks: Collection[int]) -> None:
        """Raises MessageTooLarge; RankUnreachable when the ranks before that one have got it; ConnectionTorn."""
        payload = encode_checked(message)
        with self._whole():
            for rank in ranks:
                try:
                    self._socket.send_multipart((self._routing_ids[rank], self._token, payload))
                except zmq.ZMQError as error:
                    if error.errno == errno.EHOSTUNREACH:
                        raise RankUnreachable(rank) from error
                    raise

    def receive(self) -> tuple[int, FromWorker] | None:
        """(rank, message) of the next message that has come; None if there is none.

        Raises ConnectionTorn, and msgspec.DecodeError for a message that has the token and cannot be read."""
        while True:
            try:
                with self._whole():
                    routing_id, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            if len(frames) != 2 or not has_token(frames[0], self._token):
                self._drop("a message without the token of this run")
                continue
            message = self._decoder.decode(frames[1])
            if isinstance(message, Hello) and not self._introduce(message.rank, routing_id):
                continue
            if routing_id in self._ranks:
                return self._ranks[routing_id], message
            self._drop("a message of somebody who has not said hello")

    def _introduce(self, rank: int, routing_id: bytes) -> bool:
        if rank in self._routing_ids or routing_id in self._ranks or not 0 <= rank < self._num_ranks:
            self._drop(f"a second rank {rank}, or one too many")
            return False
        self._routing_ids[rank], self._ranks[routing_id] = routing_id, rank
        return True

    def _drop(self, what: str) -> None:
        self.num_dropped += 1
        if self.num_dropped == 1:
            log.warning("%s came over %s and was dropped; more of them will not be reported", what, self.info.endpoint)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        if self.is_torn:
            raise ConnectionTorn("the engine was interrupted while it spoke with the workers")
        self.is_torn = True
        try:
            yield
        except Exception:
            self.is_torn = False
            raise
        self.is_torn = False

    def wait(self, seconds: float) -> None:
        """Return when a message has come, or after `seconds`."""
        self._socket.poll(max(0, round(seconds * 1000)))

    def close(self) -> None:
        """Drop what is unsent. May be called twice."""
        self._context.destroy(linger=0)


class WorkerChannel:
    """A rank's end."""

    def __init__(self, info: ConnectionInfo, on_lost: Callable[[], object]) -> None:
        """on_lost: called from a thread of its own when the engine is gone."""
        self.info, self._token = info, info.token
        self._decoder = msgspec.msgpack.Decoder(ToWorker)
        self._context = zmq.Context()
        self._socket = new_socket(self._context, zmq.DEALER, info.endpoint)
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)  # a new connection would be that of a stranger
        self._is_closing = False
        monitor = self._socket.get_monitor_socket(
            zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        )
        threading.Thread(target=self._watch, args=(monitor, on_lost), daemon=True).start()
        self._socket.connect(info.endpoint)

    def _watch(self, monitor: zmq.Socket[bytes], on_lost: Callable[[], object]) -> None:
        with monitor:
            try:
                recv_monitor_message(monitor)
            except zmq.ZMQError:  # the context ends
                return
        if not self._is_closing:
            on_lost()

    def send(self, message: FromWorker) -> None:
        """Raises MessageTooLarge."""
        self._socket.send_multipart((self._token, encode_checked(message)))

    def register(self, poller: zmq.Poller) -> None:
        """Have `poller` wake when something has come."""
        poller.register(self._socket, zmq.POLLIN)

    def receive(self) -> ToWorker:
        """The next message; waits for it. Raises msgspec.DecodeError if it cannot be read."""
        while (message := self._receive(flags=0)) is None:
            pass
        return message

    def receive_if_any(self) -> ToWorker | None:
        """As `receive`, but None if there is none."""
        try:
            while (message := self._receive(zmq.NOBLOCK)) is None:
                pass
        except zmq.Again:
            return None
        return message

    def _receive(self, flags: int) -> ToWorker | None:
        """The next message, or None in place of one of a stranger."""
        frames = self._socket.recv_multipart(flags)
        if len(frames) == 2 and has_token(frames[0], self._token):
            message: ToWorker = self._decoder.decode(frames[1])
            return message
        log.warning("a message without the token of this run was dropped")
        return None

    def close(self, last: FromWorker, linger_seconds: float = 2.0) -> None:
        """Send a last message, if there is still somebody to read it."""
        self._is_closing = True
        self._socket.sndtimeo = self._socket.linger = round(linger_seconds * 1000)
        with suppress(zmq.Again):  # nobody is there
            self.send(last)
        self._socket.close()
        self._context.term()


def own_endpoint(socket: zmq.Socket[bytes]) -> str:
    """Where a socket that was bound can be reached, with the port that was chosen."""
    return socket.get_string(zmq.LAST_ENDPOINT)


def new_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str) -> zmq.Socket[bytes]:
    """A socket for an address, with the limits of this module."""
    socket = context.socket(kind)
    socket.linger = 0
    socket.setsockopt(zmq.MAXMSGSIZE, LARGEST_MESSAGE)
    if address.startswith("tcp"):
        # The end of a process closes its connections; a machine or a network that is gone does not. Between processes
        # of one machine a heartbeat would only mistake a suspended process for a dead one.
        socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_SECONDS * 1000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _SECONDS_UNTIL_LOST * 1000)
        socket.setsockopt(zmq.IPV6, 1)
    return socket


def own_host(endpoint: str) -> str:
    """Address of this machine's interface by which it reaches the engine."""
    if not endpoint.startswith("tcp"):
        return "127.0.0.1"
    host, _, port = plain_endpoint(endpoint).removeprefix("tcp://").rpartition(":")
    host = host.strip("[]")
    family, kind, *_, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


def plain_endpoint(endpoint: str) -> str:
    """An endpoint as people write it: ZMQ maps addresses of IPv4 to IPv6."""
    return re.sub(r"\[::ffff:([\d.]+)\]", r"\1", endpoint)


def tcp_address(ip: str) -> str:
    """The address of a machine's interface, for `EngineChannel`."""
    return f"tcp://[{ip}]" if ipaddress.ip_address(ip.partition("%")[0]).version == 6 else f"tcp://{ip}"


def encode_checked(message: ToWorker | FromWorker | PeerMessage) -> bytes:
    """Raises MessageTooLarge."""
    payload = _encode(message)
    if len(payload) > LARGEST_MESSAGE:
        raise MessageTooLarge(f"a message of {len(payload)} bytes is more than the {LARGEST_MESSAGE} that are allowed")
    return payload


def has_token(frame: bytes, token: bytes) -> bool:
    return hmac.compare_digest(frame, token)
