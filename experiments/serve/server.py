"""The HTTP server around the application: it ends in order when a signal asks for it."""

import asyncio
import contextlib
import pathlib
import signal
import socket
from collections.abc import Iterator

import uvicorn

from experiments.serve.app import Service
from experiments.serve.guard import Guard
from tim4rec_jax.files import named_in_errors

# Seconds that answers under way may take once the service is asked to stop.
LONGEST_DRAIN = 30
_BACKLOG = 2048
# Between two looks at whether everything that was taken in is answered.
_POLL = 0.02


class _Server(uvicorn.Server):
    """Leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listening_at(host: str, port: int) -> socket.socket:
    """Returns a socket at an address.

    Raises:
      OSError: the address is taken, or none of this machine; it is named.
    """
    with named_in_errors(pathlib.Path(f"{host}:{port}")):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
            listening.listen(_BACKLOG)  # Who comes from now on waits.
        except OSError:
            listening.close()
            raise
    return listening


async def _until_asked(
    server: uvicorn.Server, guard: Guard, service: Service, listening: socket.socket, drain_seconds: float
) -> int | None:
    """Serves until a signal comes; returns its number, or None where the service failed."""
    loop, came = asyncio.get_running_loop(), asyncio.Event()
    received: list[int] = []

    def stop(number: int | None = None) -> None:
        received.extend([] if number is None else [number])
        came.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    service.start(lambda: loop.call_soon_threadsafe(stop))
    serving = asyncio.ensure_future(server.serve([listening]))
    waiting = asyncio.ensure_future(came.wait())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    guard.stopping = True
    if not serving.done():
        least = loop.time() + drain_seconds * bool(received)
        most = least + LONGEST_DRAIN
        while loop.time() < least or (guard.open_requests and loop.time() < most):
            await asyncio.sleep(_POLL)
        server.should_exit = True
    await serving
    return received[0] if received else None


def serve(guard: Guard, service: Service, listening: socket.socket, drain_seconds: float) -> int:
    """Warms a service up and serves it until Ctrl-C or SIGTERM; returns the signal's number.

    Args:
      guard: the application.
      service: behind it.
      listening: where requests come.
      drain_seconds: how long at least new requests are refused before the server ends.

    Raises:
      Exception: what kept the service from being warmed up.
      OSError: the server ended by itself.
    """
    config = uvicorn.Config(
        guard,
        log_config=None,  # Logging settings would close the handlers of others.
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=LONGEST_DRAIN,
    )
    received = asyncio.run(_until_asked(_Server(config), guard, service, listening, drain_seconds))
    if service.failed is not None:
        raise service.failed
    if received is None:
        raise OSError("the server ended by itself")
    return received
