"""Where processes of a test meet."""

from __future__ import annotations

import socket


def free_port() -> str:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])
