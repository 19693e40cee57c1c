"""Serves a trained run over HTTP: recommendations, scores, similar items, and events that are kept.

    python -m experiments.serve --run=runs/ml1m --state=users.state
    python -m experiments.serve --run=runs/ml1m --state=users.state --token_file=tokens.txt --host=0.0.0.0 --port=8000
    python -m experiments.serve --run=runs/ml1m --items=movies.csv --deny_file=sold_out.txt --exclude_seen
    python -m experiments.serve --run=runs/ml1m_causal --state=users.state --full_history

Endpoints are POST /v1/recommend, /v1/score, /v1/similar (GET too) and /v1/events, GET /v1/users and /v1/history,
/health, /ready, /metrics (Prometheus) and /openapi.json, which describes them all; a page at / shows a user's history,
list and time mask. Every program is compiled before /ready answers 200: no request compiles. Requests are answered
together by one thread. A user alone in a batch gets the bits of experiments.recommend; several together may differ from
it in last digits (--max_batch=1 answers one by one).

An event counts once it is in the journal beside --state and synced; the answer comes after that, and a kill at any
moment loses no acknowledged event. One that was not acknowledged may be there as well: /v1/history says how many events
a user has. SIGTERM and Ctrl-C end the service in order: what was taken in is answered, new requests get 503, events are
saved, and the exit code is 0. Rules are those of experiments.recommend; requests restrict them further.
"""

import contextlib
import pathlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.cli import note, parse_settings, program
from experiments.serve.limits import Limits
from tim4rec_jax.checks import require
from tim4rec_jax.run_dir import require_no_run_file
from tim4rec_jax.serving.answers import Answering
from tim4rec_jax.serving.event_stream import journal_of
from tim4rec_jax.serving.prepared import PreparedRecommender
from tim4rec_jax.serving.recommender import Recommender
from tim4rec_jax.serving.row_files import read_table
from tim4rec_jax.serving.rules import RuleOptions, rules_from_options
from tim4rec_jax.serving.streaming import load_streamable
from tim4rec_jax.serving.user_histories import opened
from tim4rec_jax.serving.user_table_file import LAST_SECOND

SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class ServeOptions(RuleOptions):
    """Serves a run over HTTP.

    Attributes:
      run: the run folder.
      state: file of the events that come; a journal stands beside it. Without it no events are taken in.
      host: address to listen at.
      port: port to listen at; 0 takes a free one, and says which.
      token_file: file of tokens, one per line, of which every request must bring one but /health, /ready and the page.
      max_batch: most rows that are computed together, a power of two.
      batch_ms: milliseconds that a request waits at most for others, while several come at a time.
      full_history: read whole histories instead of their last max_len events; for causal models, which go on from the
        state of a user that was asked for before.
      state_megabytes: of these states, those of the users asked for last; others are computed again.
      latest_time: events after this second since 1970 are refused; one far ahead makes all true ones late.
      save_every: events that only the journal holds before all are saved into the state; requests wait meanwhile.
      drain_seconds: how long at least new requests are answered 503 before the service ends.
      limits: of one request.
    """

    run: pathlib.Path
    state: pathlib.Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    token_file: pathlib.Path | None = None
    max_batch: int = 32
    batch_ms: float = 1.0
    full_history: bool = False
    state_megabytes: int = 1024
    latest_time: int = LAST_SECOND
    save_every: int = 1_000_000
    drain_seconds: float = 0.5
    limits: Limits = field(default_factory=Limits)


def check(options: ServeOptions) -> ServeOptions:
    """Refuses options that do not go together; returns them with the file that a link leads to.

    Raises:
      ValueError: for a number out of range, or a state inside a run folder.
    """
    batch = options.max_batch
    require(1 <= batch <= 1024 and batch & (batch - 1) == 0, f"--max_batch={batch} must be a power of two up to 1024")
    require(0 <= options.batch_ms <= 1000, f"--batch_ms={options.batch_ms} must lie in 0 to 1000")
    require(0 <= options.port < 2**16, f"--port={options.port} must lie in 0 to {2**16 - 1}")
    require(
        0 <= options.latest_time <= LAST_SECOND, f"--latest_time={options.latest_time} must lie in 0 to {LAST_SECOND}"
    )
    require(options.save_every >= 1, f"--save_every={options.save_every} must be at least 1")
    require(0 <= options.drain_seconds <= 600, f"--drain_seconds={options.drain_seconds} must lie in 0 to 600")
    require(options.items is not None or not options.where, "--where needs --items, a table of items")
    require(
        1 <= options.state_megabytes <= 2**20, f"--state_megabytes={options.state_megabytes} must lie in 1 to {2**20}"
    )
    options.limits.check()
    if options.state is None:
        return options
    for path in (options.state, journal_of(options.state)):
        require_no_run_file(path)
    return replace(options, state=options.state.resolve())


def read_tokens(path: pathlib.Path | None) -> list[str]:
    """Returns the tokens of a file, one per line.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds none, or one that is short or has other than printable ASCII characters.
    """
    if path is None:
        return []
    try:
        tokens = path.read_text(encoding="ascii").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: tokens are ASCII, one per line") from None
    tokens = [token.strip() for token in tokens if token.strip()]
    require(bool(tokens), f"{path} holds no token; write one per line")
    for number, token in enumerate(tokens, 1):
        require(token.isprintable() and " " not in token, f"{path}: token {number} has blanks or control characters")
        require(len(token) >= SHORTEST_TOKEN, f"{path}: token {number} has under {SHORTEST_TOKEN} characters")
    return tokens


def require_extra() -> None:
    """Raises ModuleNotFoundError, with what to install, where the packages of the service are missing."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} is missing: pip install 'tim4rec_jax[serve]'") from None


@contextlib.contextmanager
def service_of(options: ServeOptions) -> Iterator[Any]:
    """Yields the service of a run with its histories, not yet started; they are saved when the body ends.

    Raises:
      FileNotFoundError, ValueError, CheckpointError: the run, the state, or what the rules name cannot be read.
    """
    from experiments.serve.app import Service

    recommender = (load_streamable if options.full_history else Recommender.from_run)(options.run, report=note)
    named = options if options.where else replace(options, items=None)
    rules = rules_from_options(named, recommender.index_of_item, report=note)
    state_bytes = options.state_megabytes * 2**20 if options.full_history else None
    prepared = PreparedRecommender(recommender, rows=options.max_batch, k=options.limits.k, state_bytes=state_bytes)
    with opened(recommender, options.state) as durable:
        answering = Answering(
            prepared,
            durable,
            rules=rules,
            items=None if options.items is None else read_table(options.items),
            item_column=options.item_column,
            latest_time=options.latest_time,
            save_every=options.save_every,
        )
        service = Service(answering, options.limits, batch_seconds=options.batch_ms / 1000)
        try:
            yield service
        finally:
            service.stop()


def run(options: ServeOptions) -> int:
    """Serves as asked; returns the exit code.

    Raises:
      FileNotFoundError, ValueError, CheckpointError: the run, the state or another file cannot be used.
      OSError: the address is taken, or a file cannot be written.
    """
    require_extra()
    from experiments.serve.app import make_app
    from experiments.serve.server import listening_at, serve
    from tim4rec_jax import __version__

    options, tokens = check(options), read_tokens(options.token_file)
    with service_of(options) as service:
        guard = make_app(service, tokens, __version__)
        with listening_at(options.host, options.port) as listening:
            host, port = listening.getsockname()[:2]
            note(f"listening at http://{f'[{host}]' if ':' in host else host}:{port}; warming up")
            received = serve(guard, service, listening, options.drain_seconds)
    note(f"stopped by {signal.Signals(received).name}")
    return 0


@program
def main(argv: list[str]) -> int:
    """Serves as asked."""
    return run(parse_settings(ServeOptions, argv, prog="experiments.serve"))


if __name__ == "__main__":
    sys.exit(main())
