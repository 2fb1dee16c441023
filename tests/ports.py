"""Ports for processes that tests start. It does not import torch."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

_PORTS = range(20_000, 32_768)
"""Below those that Linux gives to whoever asks for any: a process that needs seconds to start finds its port free."""
_random = random.SystemRandom()  # tests seed the other one, and two processes run tests


def free_port() -> int:
    """A port of this machine that nobody uses."""
    while True:
        port = _random.choice(_PORTS)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
