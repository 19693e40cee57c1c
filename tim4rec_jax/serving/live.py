"""Recommendations event by event in Python: `tim4rec_jax.Stream`."""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import polars as pl

from tim4rec_jax.checks import require
from tim4rec_jax.notebook import html_table
from tim4rec_jax.serving.recommender import Recommender
from tim4rec_jax.serving.rules import allowed_by_lists, raw_ids
from tim4rec_jax.serving.streaming import load_streamable
from tim4rec_jax.serving.user_table import Event, UserTable


class Stream:
    """Users with a state each, which their events change at a constant cost; of a causal model.

    Args:
      run: run folder, what `fit` returned, or a `Recommender`.
      warm: users of the run's log start with their histories; else all start empty.

    Attributes:
      table: the states, see `UserTable`, which saves and loads them.

    Raises:
      FileNotFoundError: the folder is no run.
      ValueError: the model cannot go on from a state.
    """

    def __init__(self, run: Any, *, warm: bool = True) -> None:
        if isinstance(run, Recommender):
            recommender = run
        else:
            recommender = load_streamable(pathlib.Path(getattr(run, "run_dir", run)))
        self.table = UserTable(recommender)
        if warm:
            self.table.add_histories(recommender.stored_histories())

    def add(self, events: Iterable[tuple[Any, Any, int]] | pl.DataFrame) -> None:
        """Takes in events, each user's oldest first: all of them, or none where one is refused.

        Args:
          events: raw user id, raw item id and seconds since 1970 of each; or a data frame with the columns user, item
            and timestamp.

        Raises:
          ValueError: for an unknown item (the nearest are shown), a time that is no second or lies before the user's
            last, or a frame without these columns.
        """
        if isinstance(events, pl.DataFrame):
            names = ("user", "item", "timestamp")
            lacking = [name for name in names if name not in events.columns]
            require(not lacking, f"events without the columns {', '.join(lacking)}; there are {events.columns}")
            events = events.select(names).iter_rows()
        self.table.add([Event(str(user), str(item), seconds) for user, item, seconds in events])

    def recommend(
        self,
        users: Sequence[Any],
        k: int = 10,
        *,
        exclude_seen: bool = False,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] = (),
        items: pl.DataFrame | pathlib.Path | None = None,
        where: Sequence[str] = (),
    ) -> pl.DataFrame:
        """Returns the k items that come next most likely for users with events; fewer where rules leave fewer.

        Args:
          users: raw user ids.
          k: items per user.
          exclude_seen: leave out what a user has had already.
          allow: raw item ids, the only ones to recommend; None for all.
          deny: raw item ids, never to recommend.
          items: table of items with a column item_id and others that `where` names.
          where: conditions on it, such as "genre=Drama", all of which must hold.

        Returns:
          Columns user_id, rank (from 1), item_id, title (where titles are known) and score; users in the order given.

        Raises:
          ValueError: for a user without events, an unknown item, rules that leave nothing, or a k over the catalogue.
        """
        known, names = self.table.recommender, raw_ids(users)
        allowed = allowed_by_lists(known.index_of_item, allow, deny, items, where)
        listed = known.named(*self.table.top_k(names, k, exclude_seen=exclude_seen, allowed=allowed))
        rows = [
            (user, rank, item.item_id, item.title, item.score)
            for user, one in zip(names, listed, strict=True)
            for rank, item in enumerate(one, start=1)
        ]
        schema = {"user_id": pl.String, "rank": pl.Int32, "item_id": pl.String, "title": pl.String, "score": pl.Float32}
        found = pl.DataFrame(rows, schema=schema, orient="row")
        return found if known.titles is not None else found.drop("title")

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        known = self.table.recommender
        return f"Stream: {known.config.model.name}, {len(self):,} users with events, {known.num_items:,} items"

    def _repr_html_(self) -> str:
        known, state = self.table.recommender, self.table.streamer.state_bytes()
        facts = {
            "model": known.config.model.name,
            "users with events": f"{len(self):,}",
            "bytes per user": f"{state:,}",
        }
        return html_table("Stream", (), list(facts.items()))
