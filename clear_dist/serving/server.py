"""HTTP in a thread beside the drawing, which keeps the main one."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from clear_dist.launch.interrupts import undisturbed
from clear_dist.options import Refusal

SECONDS_TO_LEAVE = 3
WAITING = 128
"""Connections that the kernel holds until they are accepted."""


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens; raises a Refusal where it cannot."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(WAITING)
    except OSError as error:
        why = error.strerror or str(error)
        raise Refusal(f"the server must be able to listen at {host}, port {port} ({why}); nearest: --port 0") from error
    return listening


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def answering(app: Any, listening: socket.socket) -> Iterator[None]:
    """Context in which `app` answers; at its end clients have a few seconds to take what they are owed."""
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", http="h11", loop="asyncio", server_header=False,
        timeout_graceful_shutdown=SECONDS_TO_LEAVE, ws="none",
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    with undisturbed():  # signals are the main thread's
        thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(SECONDS_TO_LEAVE + 1)
        listening.close()
