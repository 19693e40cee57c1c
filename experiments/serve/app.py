"""The service's application: HTTP in, questions to the one thread that answers them, answers out."""

import asyncio
import contextvars
import gc
import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from experiments.serve import schemas
from experiments.serve.guard import OPEN, Guard
from experiments.serve.limits import Limits
from experiments.serve.measured import Measured
from tim4rec_jax.checks import shortened
from tim4rec_jax.serving import answers
from tim4rec_jax.serving.batching import Batcher, Overloaded
from tim4rec_jax.serving.json_lines import as_json, raw_id, read_json
from tim4rec_jax.serving.prepared import compilations
from tim4rec_jax.serving.user_table import Event

FOLDER = pathlib.Path(__file__).parent
# Rows that wait for an answer; beyond them requests are refused.
MOST_WAITING = 8192
_MESSAGE = 280
REHEARSALS = 20
_REHEARSING: contextvars.ContextVar[bool] = contextvars.ContextVar("rehearsing", default=False)
_KINDS_OF_IDS = ("constrained-str", "constrained-int", "str", "int")
_REFUSED = {
    400: "The body is no JSON",
    401: "No valid token",
    413: "The body is too large",
    422: "What is asked for cannot be done; the one line says why",
    503: "Warming up, stopping, or overloaded",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Error, "description": about} for status, about in _REFUSED.items()
}


class Service:
    """A run being served.

    Attributes:
      answering: answers questions, in one thread.
      limits: of a request.
      measured: what Prometheus reads.
      batcher: hands questions over.
      failed: why it could not be warmed up.
      rehearsed: the application, which answers some requests of its own before it is ready.
    """

    def __init__(self, answering: answers.Answering, limits: Limits, *, batch_seconds: float) -> None:
        """Takes what answers; `start` warms it up."""
        self.answering, self.measured = answering, Measured()
        self.limits = replace(limits, k=answering.prepared.k)
        self.failed: Exception | None = None
        self.rehearsed: Any = None
        self._ready, self._stopping = threading.Event(), threading.Event()
        self._warm_up: threading.Thread | None = None
        self._compiled_when_ready = 0
        rows = answering.prepared.rows
        self.batcher = Batcher(self._answer, rows=rows, seconds=batch_seconds, most_waiting=MOST_WAITING)
        self._counter, histories, watch = compilations(), answering.durable.histories, self.measured.watch
        watch("tim4rec_ready", "Whether every program is compiled", lambda: float(self.ready))
        watch("tim4rec_users", "Users with a history", lambda: len(histories))
        watch("tim4rec_waiting_rows", "Rows that wait for an answer", lambda: self.batcher.waiting)
        watch("tim4rec_compilations", "Programs compiled or fetched", lambda: self._counter.count)
        watch("tim4rec_compilations_after_ready", "Programs compiled by requests", lambda: self.compiled_since_ready)
        states = answering.prepared.states
        if states is not None:
            watch("tim4rec_kept_states", "Users whose states are kept", lambda: len(states))
        watch("tim4rec_unsaved_events", "Events that only the journal holds", lambda: answering.durable.unsaved)

    @property
    def ready(self) -> bool:
        """Everything is compiled."""
        return self._ready.is_set()

    @property
    def compiled_since_ready(self) -> int:
        """Programs that requests have compiled; should stay 0."""
        return self._counter.count - self._compiled_when_ready if self.ready else 0

    def start(self, when_failed: Callable[[], None] = lambda: None) -> None:
        """Begins to warm up, in a thread of its own, and then to answer."""

        def warm() -> None:
            try:
                for _ in self.answering.warming():
                    if self._stopping.is_set():
                        return
                self.batcher.start()
                asyncio.run(self._rehearse())
            except Exception as error:
                self.failed = error
                when_failed()
                return
            # What was made so far stays: looking through all of it again would hold requests up for long.
            gc.collect()
            gc.freeze()
            self._compiled_when_ready = self._counter.count
            self._ready.set()

        self._warm_up = threading.Thread(target=warm, name="warm-up", daemon=True)
        self._warm_up.start()

    def stop(self) -> None:
        """Answers what was taken in, and ends; a program that is being compiled is waited for."""
        self._stopping.set()
        gc.unfreeze()
        if self._warm_up is not None:
            self._warm_up.join()
        self.batcher.stop()

    async def _rehearse(self) -> None:
        """Takes some requests through the whole application, so that the first of a client finds nothing cold."""
        _REHEARSING.set(True)
        user = self.answering.known.users[0]
        body = as_json({"users": [user], "k": 1, "exclude_seen": True})
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        for _ in range(REHEARSALS if self.rehearsed is not None else 0):
            sent: list[Any] = []

            async def receive() -> dict[str, Any]:
                return {"type": "http.request", "body": body, "more_body": False}

            async def send(message: Any, sent: list[Any] = sent) -> None:
                sent.append(message)

            scope = {
                "type": "http",
                "http_version": "1.1",
                "method": "POST",
                "path": "/v1/recommend",
                "headers": headers,
            }
            scope |= {"query_string": b"", "root_path": "", "scheme": "http", "server": ("service", 80)}
            await self.rehearsed(scope, receive, send)
            if sent[0]["status"] != 200:
                raise ValueError(f"a first request was answered {sent[0]['status']}: {sent[1]['body'][:200]!r}")

    def wait_until_ready(self, seconds: float) -> bool:
        """Waits so long at most; returns whether it is ready."""
        return self._ready.wait(seconds)

    def _answer(self, questions: Sequence[Any]) -> list[Any]:
        began = time.perf_counter()
        found = self.answering.answer(questions)
        self.measured.batch_rows.observe(sum(map(_rows, questions)))
        self.measured.batch_seconds.observe(time.perf_counter() - began)
        return found

    async def ask(self, question: Any) -> Any:
        """Returns the answer to a question of `answers`.

        Raises:
          HTTPException: it is refused, with the status and the reason.
        """
        if not self.ready and not _REHEARSING.get():
            raise HTTPException(503, "warming up; /ready says when it is done", {"retry-after": "1"})
        try:
            return await asyncio.wrap_future(self.batcher.submit(question, _rows(question)))
        except ValueError as error:
            raise HTTPException(422, shortened(str(error), _MESSAGE)) from None
        except answers.NotKept as error:
            raise HTTPException(409, str(error)) from None
        except (answers.DiskFull, FloatingPointError) as error:
            raise HTTPException(503, shortened(str(error), _MESSAGE)) from None
        except Overloaded as error:
            raise HTTPException(503, str(error), {"retry-after": "1"}) from None


def _rows(question: Any) -> int:
    if isinstance(question, answers.RecommendQuestion):
        return len(question.users) + len(question.histories)
    return len(question.pairs) // 8 + 1 if isinstance(question, answers.ScoreQuestion) else 1


class _StrictRequest(fastapi.Request):
    """JSON in which no name stands twice and every number is one."""

    async def json(self) -> Any:
        try:
            return read_json(await self.body())
        except ValueError as error:
            raise HTTPException(400, shortened(str(error), _MESSAGE)) from None


class _StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[fastapi.Request], Any]:
        handler = super().get_route_handler()

        async def strict(request: fastapi.Request) -> Any:
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict


def _json(content: Any, status: int = 200, headers: Any = None) -> fastapi.Response:
    return fastapi.Response(as_json(content), status, headers, media_type="application/json")


async def _refused(request: fastapi.Request, error: Any) -> fastapi.Response:
    return _json({"error": str(error.detail)}, error.status_code, error.headers)


async def _not_as_described(request: fastapi.Request, error: Any) -> fastapi.Response:
    errors = error.errors()
    first = errors[0]
    if first["type"] in ("model_attributes_type", "missing") and first["loc"] == ("body",):
        return _json({"error": "the body must be a JSON object, sent as Content-Type: application/json"}, 422)
    # An id may be a text or a number, of which Pydantic complains one by one.
    parts = [str(part) for part in first["loc"] if part not in ("body", "query") and part not in _KINDS_OF_IDS]
    places = {tuple(part for part in one["loc"] if part not in _KINDS_OF_IDS) for one in errors}
    more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
    return _json({"error": shortened(f"{'.'.join(parts) or 'the body'}: {first['msg']}{more}", _MESSAGE)}, 422)


async def _unexpected(request: fastapi.Request, error: Exception) -> fastapi.Response:
    return _json({"error": f"unexpected {type(error).__name__}; the service's log says more"}, 500)


def _ids(values: Sequence[Any]) -> list[str]:
    return [raw_id(value) for value in values]


def _choice(word: str | None, yes: str) -> bool | None:
    return None if word is None else word == yes


def make_app(service: Service, tokens: Sequence[str] = (), version: str = "") -> Guard:
    """Returns the ASGI application.

    Args:
      service: answers.
      tokens: see `Guard`.
      version: shown in OpenAPI.
    """
    app = fastapi.FastAPI(
        title="tim4rec_jax",
        summary="Recommendations of a trained run",
        version=version or "0",
        docs_url=None,  # They would load their scripts from elsewhere.
        redoc_url=None,
    )
    app.router.route_class = _StrictRoute
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _not_as_described)
    app.add_exception_handler(Exception, _unexpected)
    service.rehearsed = app
    guard = Guard(app, tokens, service.limits.body, service.measured)
    _add_status(app, service, guard)
    bearer = [fastapi.Depends(fastapi.security.HTTPBearer(auto_error=False))] if tokens else []
    _add_answers(app, service, bearer)
    _add_lists(app, service, bearer)
    return guard


def _add_status(app: fastapi.FastAPI, service: Service, guard: Guard) -> None:
    health: dict[str, Any] = {"response_model": schemas.Health}

    @app.get("/health", **health)
    async def alive() -> fastapi.Response:
        """Answers while the process is alive."""
        return _json({"status": "alive"})

    @app.get("/ready", **health, responses={503: {"model": schemas.Health}})
    async def ready() -> fastapi.Response:
        """Answers 200 once every program is compiled, and 503 before and while the service stops."""
        if guard.stopping or not service.ready:
            return _json({"status": "stopping" if guard.stopping else "warming up"}, 503)
        return _json({"status": "ready"})

    @app.get("/metrics", response_class=fastapi.responses.PlainTextResponse, responses={401: _ERRORS[401]})
    async def metrics() -> fastapi.Response:
        """Returns counters in the text format of Prometheus."""
        return fastapi.Response(service.measured.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    limits = service.limits
    body = f'<body data-last="{limits.last}" data-k="{limits.k}">'
    page = (FOLDER / "page.html").read_text(encoding="utf-8").replace("<body>", body)
    _add_file(app, "/", page, "text/html")
    _add_file(app, "/page.js", (FOLDER / "page.js").read_text(encoding="utf-8"), "text/javascript")


def _add_file(app: fastapi.FastAPI, path: str, content: str, kind: str) -> None:
    headers = {"content-security-policy": "default-src 'self'; style-src 'unsafe-inline'; base-uri 'none'"}
    assert path in OPEN

    @app.get(path, include_in_schema=False)
    async def shown() -> fastapi.Response:
        return fastapi.Response(content, headers=headers, media_type=f"{kind}; charset=utf-8")


def _add_answers(app: fastapi.FastAPI, service: Service, bearer: list[Any]) -> None:
    asked: SimpleNamespace = schemas.requests(service.limits)
    about: dict[str, Any] = {"responses": _ERRORS, "dependencies": bearer, "tags": ["answers"]}

    def rules(body: Any) -> dict[str, Any]:
        return {
            "k": body.k,
            "allow": None if body.allow is None else _ids(body.allow),
            "deny": _ids(body.deny),
            "where": body.where,
            "skip_items": _choice(body.unknown_items, "skip"),
        }

    @app.post("/v1/recommend", response_model=schemas.RecommendAnswer, **about)
    async def recommend(body: asked.Recommend) -> fastapi.Response:  # pyright: ignore[reportInvalidTypeForm]
        """Returns what comes next most likely for users and after given histories."""
        if not 1 <= len(body.users) + len(body.histories) <= service.limits.users:
            raise HTTPException(422, f"give 1 to {service.limits.users} users and histories together")
        question = answers.RecommendQuestion(
            users=_ids(body.users),
            histories=[
                answers.GivenHistory(_ids(h.items), h.times, None if h.name is None else raw_id(h.name))
                for h in body.histories
            ],
            exclude_seen=body.exclude_seen,
            popular_users=_choice(body.unknown_users, "popularity"),
            **rules(body),
        )
        return _json(await service.ask(question))

    @app.post("/v1/score", response_model=schemas.ScoreAnswer, **about)
    async def score(body: asked.Pairs) -> fastapi.Response:  # pyright: ignore[reportInvalidTypeForm]
        """Returns the scores of pairs of a user and an item, whatever rules there are."""
        question = answers.ScoreQuestion(
            [(raw_id(pair.user), raw_id(pair.item)) for pair in body.pairs],
            _choice(body.unknown_items, "skip"),
            _choice(body.unknown_users, "popularity"),
        )
        return _json(await service.ask(question))

    @app.post("/v1/similar", response_model=schemas.SimilarAnswer, **about)
    async def similar_to_items(body: asked.Similar) -> fastapi.Response:  # pyright: ignore[reportInvalidTypeForm]
        """Returns the items most like others, by the cosine of their embeddings."""
        return _json(await service.ask(answers.SimilarQuestion(_ids(body.items), **rules(body))))

    @app.get("/v1/similar", response_model=schemas.SimilarAnswer, **about)
    async def similar(
        item: str, k: Annotated[int, fastapi.Query(ge=1, le=service.limits.k)] = min(10, service.limits.k)
    ) -> fastapi.Response:
        """Returns the items most like one."""
        return _json(await service.ask(answers.SimilarQuestion([item], k=k)))

    about["responses"] = _ERRORS | {409: {"model": schemas.Error, "description": "Events are not kept"}}

    @app.post("/v1/events", response_model=schemas.EventsAnswer, **about)
    async def events(body: asked.Events) -> fastapi.Response:  # pyright: ignore[reportInvalidTypeForm]
        """Takes in events of users, all or none; the answer means that they are on the disk."""
        new = [Event(raw_id(e.user), raw_id(e.item), e.timestamp) for e in body.events]
        answer = await service.ask(answers.NewEvents(new, _choice(body.unknown_items, "skip")))
        service.measured.events.inc(answer["accepted"])
        return _json(answer)


def _add_lists(app: fastapi.FastAPI, service: Service, bearer: list[Any]) -> None:
    about: dict[str, Any] = {"responses": _ERRORS, "dependencies": bearer, "tags": ["users"]}
    most = service.limits.last
    Few = Annotated[int, fastapi.Query(ge=1, le=most)]
    some, more = min(20, most), min(50, most)

    @app.get("/v1/users", response_model=schemas.UsersAnswer, **about)
    async def users(prefix: str = "", limit: Few = some) -> fastapi.Response:
        """Returns ids of users that begin with a text, users of the run's log first."""
        return _json(await service.ask(answers.UsersQuestion(prefix, limit)))

    @app.get("/v1/history", response_model=schemas.HistoryAnswer, **about)
    async def history(user: str, limit: Few = more, mask: Literal["true", "false"] = "false") -> fastapi.Response:
        """Returns the last events of a user, and with mask=true the model's time-aware mask over them."""
        return _json(await service.ask(answers.HistoryQuestion(user, limit, mask == "true")))
