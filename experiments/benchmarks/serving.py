"""Serving a causal model from its state against reading histories again, at a configuration's shapes.

step        one event of every user: the state goes on (`Streamer.step`, checks of the input included)
window      the last max_len events are read again (`last_hidden`, at the static length the recommender takes)
whole       the whole history is read again, up to --longest events
table       one event of every user through the table of states by raw id (`UserTable.add` and `flush`)
answer      ranking the catalogue for every user (`Streamer.top_k`, 10 items)
list        reading stored histories and ranking what is new to each user (`Recommender.top_k`, 10 items)

First one user, whose history grows (--histories): microseconds per event by step, window and whole. Then many users
with histories of max_len (--users): events per second by step, table and window, answers and lists per second.
Parameters, items and gaps are random, which costs what trained ones cost.
"""

import argparse
import dataclasses
import functools
import itertools
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import polars as pl
from rich.table import Table

from experiments.benchmarks.timing import Form, time_in_turns
from experiments.cli import OptionParser
from experiments.configs import load_config
from experiments.family import exact_order
from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.figures import new_figure
from tim4rec_jax.models import build_model, init_params, last_hidden
from tim4rec_jax.run_dir import environment
from tim4rec_jax.serving.ranking import next_power_of_two
from tim4rec_jax.serving.recommender import SHORTEST_LENGTH, Recommender
from tim4rec_jax.serving.streaming import Streamer, require_streamable
from tim4rec_jax.serving.user_table import Event, UserTable

_TINY = {"max_len": 8, "d_model": 16, "num_layers": 1, "d_state": 4, "head_dim": 16}
_PIECE = 1000
START = 978_300_000
LISTED = 10
# Positions of one call that reads histories again.
WINDOW_TOKENS = 2**15


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _parse(rest: list[str]) -> argparse.Namespace:
    """Reads the options of this benchmark.

    Raises:
      ValueError: for lengths or numbers of users under 1.
    """
    parser = OptionParser(prog="experiments.benchmark serving")
    parser.add_argument("--config", default="ml1m_tim4rec_causal", help="whose model, a causal one")
    parser.add_argument("--items", type=int, default=3416, help="items of the catalogue")
    parser.add_argument("--histories", type=_numbers, default="10,100,1000,10000,100000", help="events of one user")
    parser.add_argument("--longest", type=int, default=10_000, help="longest history that is read again as a whole")
    parser.add_argument("--users", type=_numbers, default="1,64,4096", help="users of a call")
    parser.add_argument("--seconds", type=float, default=0.3, help="least time of a reading")
    parser.add_argument("--seed", type=int, default=0, help="of items, gaps and parameters")
    parser.add_argument("--figure", type=pathlib.Path, help="PNG of microseconds per event over the history")
    parser.add_flag("--tiny", "sizes at which the program can be tried out")
    options = parser.parse_args(rest)
    for name in ("histories", "users"):
        if min(getattr(options, name)) < 1:
            raise ValueError(f"--{name}={','.join(map(str, getattr(options, name)))}: expected numbers of at least 1")
    if options.items < LISTED:
        raise ValueError(f"--items={options.items} must be at least {LISTED}, the length of a list")
    return options


def settings_of(options: argparse.Namespace) -> ExperimentConfig:
    """Returns the configuration with the catalogue's size.

    Raises:
      ValueError: for an unknown configuration, or one whose model cannot go on from a state.
    """
    config = exact_order(load_config(options.config))
    sizes = {"vocab_size": options.items + 1, **(_TINY if options.tiny else {})}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **sizes))
    require_streamable(build_model(config.model))
    return config


def draw(rng: np.random.Generator, users: int, length: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws histories: items [users, length] and seconds that never go backwards and stay before 2038."""
    gaps = np.exp(rng.uniform(0, np.log(5_000), (users, length))).astype(np.int64)
    return rng.integers(1, items + 1, (users, length)), START + np.cumsum(gaps, axis=1)


class Served:
    """A model with random parameters, and what is measured of it."""

    def __init__(self, config: ExperimentConfig, seed: int) -> None:
        """Draws the parameters."""
        self.config, self.model = config, build_model(config.model)
        self.params = jax.jit(functools.partial(init_params, self.model))(jax.random.key(seed))
        self.streamer = Streamer(self.model, self.params)
        self.rng = np.random.default_rng(seed)
        self._encode = jax.jit(lambda params, *a: last_hidden(self.model, {"params": params}, *a))

    def state_after(self, items: np.ndarray, times: np.ndarray) -> Any:
        """Returns the state after histories [users, length]."""
        state = self.streamer.init_state(len(items))
        for first in range(0, items.shape[1], _PIECE):
            columns = slice(first, first + _PIECE)
            lengths = np.full(len(items), items[:, columns].shape[1], np.int32)
            state, _ = self.streamer.extend(state, items[:, columns], lengths, times[:, columns])
        return state

    def stepping(self, items: np.ndarray, times: np.ndarray) -> Form:
        """Makes a form that goes on by one event for every history."""
        held, last, event = [self.state_after(items, times)], times[:, -1].copy(), items[:, 0]

        def step() -> jax.Array:
            held[0], hidden = self.streamer.step(held[0], event, last)
            return hidden

        return Form(step)

    def reading(self, items: np.ndarray, times: np.ndarray, longest: int) -> Form:
        """Makes a form that reads the last `longest` events of every history again, some rows after the other."""
        size = min(items.shape[1], longest)
        length = min(max(next_power_of_two(size), SHORTEST_LENGTH), max(longest, size))
        padded = [np.zeros((len(items), length), np.int32) for _ in range(2)]
        padded[0][:, :size], padded[1][:, :size] = items[:, -size:], times[:, -size:]
        lengths = np.full(len(items), size, np.int32)
        rows = max(1, min(len(items), WINDOW_TOKENS // length))

        def read() -> list[jax.Array]:
            parts = [slice(first, first + rows) for first in range(0, len(items), rows)]
            return [self._encode(self.params, padded[0][part], lengths[part], padded[1][part]) for part in parts]

        return Form(read)

    def tabling(self, items: np.ndarray, times: np.ndarray) -> Form:
        """Makes a form that gives one event of every user to a table of states."""
        recommender = self._recommender(pl.DataFrame({"user_id": [], "items": [], "timestamps": []}))
        table = UserTable(recommender, keep_items=self.config.model.seen_bias)
        events = [
            Event(f"user {i}", str(item), int(t))
            for i, (item, t) in enumerate(zip(items[:, 0], times[:, 0], strict=True))
        ]

        def add() -> jax.Array:
            table.add(events)
            table.flush()
            return table.hidden

        return Form(add)

    def _recommender(self, histories: pl.DataFrame) -> Recommender:
        ids = [str(i) for i in range(1, self.streamer.num_items + 1)]
        return Recommender(self.model, self.params, self.config, item_ids=ids, titles=None, histories=histories)

    def listing(self, items: np.ndarray, times: np.ndarray) -> Form:
        """Makes a form that gives every user of a log a list of new items."""
        users = [str(user) for user in range(len(items))]
        columns = {"user_id": users, "items": items.tolist(), "timestamps": times.tolist()}
        recommender = self._recommender(pl.DataFrame(columns))

        def rank() -> np.ndarray:
            histories = [recommender.history_of_user(user) for user in users]
            return recommender.top_k(histories, LISTED, exclude_seen=True)[0]

        return Form(rank)

    def answering(self, items: np.ndarray, times: np.ndarray) -> Form:
        """Makes a form that ranks the catalogue for every history."""
        first = slice(0, 1)
        lengths = np.ones(len(items), np.int32)
        _, hidden = self.streamer.extend(
            self.streamer.init_state(len(items)), items[:, first], lengths, times[:, first]
        )
        return Form(lambda: self.streamer.top_k(hidden, LISTED, seen=list(items)))


def grow(served: Served, options: argparse.Namespace, repeats: int) -> list[dict[str, Any]]:
    """Measures one user with histories of several lengths."""
    results = []
    for length in options.histories:
        print(f"a history of {length:,} events", file=sys.stderr, flush=True)
        items, times = draw(served.rng, 1, length, options.items)
        forms = {"step": served.stepping(items, times)}
        forms["window"] = served.reading(items, times, served.config.model.max_len)
        if length <= options.longest:
            forms["whole"] = served.reading(items, times, length)
        for name, found in time_in_turns(forms, repeats=repeats, least_seconds=options.seconds).items():
            times = {"seconds": found.seconds, "microseconds_an_event": 1e6 * found.median}
            results.append({"history": length, "form": name, **times})
    return results


def widen(served: Served, options: argparse.Namespace, repeats: int) -> list[dict[str, Any]]:
    """Measures several users in a call."""
    results = []
    for users in options.users:
        print(f"{users:,} users", file=sys.stderr, flush=True)
        drawn = draw(served.rng, users, served.config.model.max_len, options.items)
        forms = {
            "step": served.stepping(*drawn),
            "table": served.tabling(*drawn),
            "answer": served.answering(*drawn),
            "list": served.listing(*drawn),
            "window": served.reading(*drawn, served.config.model.max_len),
        }
        for name, found in time_in_turns(forms, repeats=repeats, least_seconds=options.seconds).items():
            times = {"seconds": found.seconds, "users_a_second": users / found.median}
            results.append({"users": users, "form": name, **times})
    return results


def report(growing: list[dict[str, Any]], wide: list[dict[str, Any]], state_bytes: int, title: str) -> Table:
    """Both measurements in one table."""
    names = ("step", "window", "whole", "table", "answer", "list")
    table = Table(title=f"{title}: {state_bytes:,} bytes of state per user", title_justify="left")
    for column in ("", *names):
        table.add_column(column, justify="right")
    for heading, results, key, value in (
        ("events of one user: microseconds per event", growing, "history", "microseconds_an_event"),
        ("users in a call: users per second", wide, "users", "users_a_second"),
    ):
        table.add_section()
        table.add_row(heading, style="bold")
        for size, block in itertools.groupby(results, key=lambda one, key=key: one[key]):
            found = {one["form"]: one[value] for one in block}
            table.add_row(f"{size:,}", *(f"{found[name]:,.0f}" if name in found else "–" for name in names))
    return table


def draw_figure(growing: list[dict[str, Any]], title: str, path: pathlib.Path) -> None:
    """Draws microseconds per event over the length of the history."""
    figure = new_figure(6.4, 4, "constrained")
    axes = figure.subplots()
    labels = {"step": "the state goes on", "window": "last max_len events again", "whole": "whole history again"}
    for name, label in labels.items():
        chosen = [one for one in growing if one["form"] == name]
        axes.plot(
            [one["history"] for one in chosen], [one["microseconds_an_event"] for one in chosen], "o-", label=label
        )
    axes.set(
        xscale="log", yscale="log", xlabel="events of the user so far", ylabel="microseconds per event", title=title
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Measures what `rest` asks for; returns the record and its table."""
    chosen = _parse(rest)
    config = settings_of(chosen)
    served = Served(config, chosen.seed)
    growing = grow(served, chosen, options.repeats)
    wide = widen(served, chosen, options.repeats)
    if chosen.figure:
        draw_figure(growing, chosen.config, chosen.figure)
    settings = {name: value for name, value in vars(chosen).items() if name != "figure"} | {"repeats": options.repeats}
    record = {
        "environment": environment(),
        "settings": settings,
        "model": dataclasses.asdict(config.model),
        "state_bytes": served.streamer.state_bytes(),
        "history": growing,
        "users": wide,
    }
    return record, report(growing, wide, record["state_bytes"], chosen.config)
