"""A port at which processes of one machine meet."""

from __future__ import annotations

import random
import socket
from pathlib import Path

LOWEST = 20_000
OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")
NUM_TRIES = 100


def free_port() -> int:
    """A TCP port that is free now, and below those that the system gives to outgoing connections, so that none of them
    can take it before it is used. Where there are no ports below, one that the system gives."""
    first_outgoing = int(OUTGOING.read_text().split()[0]) if OUTGOING.exists() else 0
    generator = random.SystemRandom()  # equal seeds must not lead to equal ports
    tries = [generator.randrange(LOWEST, first_outgoing) for _ in range(NUM_TRIES)] if first_outgoing > LOWEST else []
    for port in [*tries, 0]:
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise AssertionError("the system gives a port whenever it is asked for any")
