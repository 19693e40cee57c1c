"""An ASGI application within the test's process: asked directly, or served at a port."""

import asyncio
import contextlib
import socket
import threading
import time

import httpx
import uvicorn

from tim4rec_jax.serving.prepared import compilations


class Client:
    """Sends one request at a time in an event loop of its own; several threads may use it at once.

    Attributes:
      compiled: programs that were compiled while requests were under way.
    """

    def __init__(self, app):
        self.app, self.compiled, self._counter = app, 0, compilations()

    def request(self, method, path, **options):
        async def sent():
            transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
                return await client.request(method, path, **options)

        before = self._counter.count
        answer = asyncio.run(sent())
        self.compiled += self._counter.count - before
        return answer

    def get(self, path, **options):
        return self.request("GET", path, **options)

    def post(self, path, **options):
        return self.request("POST", path, **options)

    def delete(self, path, **options):
        return self.request("DELETE", path, **options)


@contextlib.contextmanager
def at_a_port(app):
    """Serves an application in a thread; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(app, log_config=None, lifespan="off", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        until = time.monotonic() + 60
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(60)
