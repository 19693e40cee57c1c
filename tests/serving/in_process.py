"""Requests to an ASGI application within the test's process; an error that it does not answer is raised."""

import asyncio

import httpx

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
