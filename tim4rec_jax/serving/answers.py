"""Questions of a service and their answers: whom it is for, what may be recommended, what came since."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from tim4rec_jax.checks import listed, require, shown
from tim4rec_jax.serving.prepared import PreparedRecommender, Ranked, Row
from tim4rec_jax.serving.recommender import History
from tim4rec_jax.serving.rules import NO_RULES, Rules, allowed_items
from tim4rec_jax.serving.user_histories import DurableHistories
from tim4rec_jax.serving.user_table import Event
from tim4rec_jax.serving.user_table_file import LAST_SECOND

CONDITIONS_KEPT = 64


class NotKept(Exception):
    """The service was started without a place where events are kept."""


class DiskFull(Exception):
    """Events could not be written; nothing of them was taken in."""


@dataclass(frozen=True)
class GivenHistory:
    """A history that a question brings: raw item ids, oldest first, seconds if known, and a name if it has one."""

    items: Sequence[str]
    times: Sequence[int] | None = None
    name: str | None = None


@dataclass(frozen=True)
class RecommendQuestion:
    """What to recommend to users of the service and after given histories.

    Attributes:
      users: raw ids.
      histories: given by hand.
      k: items of a list.
      allow: raw ids, the only ones to recommend; None for all.
      deny: raw ids, never to recommend.
      where: conditions on the service's table of items.
      exclude_seen: leave the items of a history out; None as the service does, as the next two.
      skip_items: leave unknown items out and count them.
      popular_users: popular items for unknown users and after empty histories.
    """

    users: Sequence[str] = ()
    histories: Sequence[GivenHistory] = ()
    k: int = 10
    allow: Sequence[str] | None = None
    deny: Sequence[str] = ()
    where: Sequence[str] = ()
    exclude_seen: bool | None = None
    skip_items: bool | None = None
    popular_users: bool | None = None


@dataclass(frozen=True)
class ScoreQuestion:
    """Scores of pairs of a user and an item."""

    pairs: Sequence[tuple[str, str]]
    skip_items: bool | None = None
    popular_users: bool | None = None


@dataclass(frozen=True)
class SimilarQuestion:
    """The items most like others; see `RecommendQuestion`."""

    items: Sequence[str]
    k: int = 10
    allow: Sequence[str] | None = None
    deny: Sequence[str] = ()
    where: Sequence[str] = ()
    skip_items: bool | None = None


@dataclass(frozen=True)
class HistoryQuestion:
    """The last events of a user, and the model's time mask over them where it is asked for."""

    user: str
    last: int = 50
    mask: bool = False


@dataclass(frozen=True)
class UsersQuestion:
    """Users whose ids begin with a text."""

    prefix: str = ""
    most: int = 20


@dataclass(frozen=True)
class NewEvents:
    """Events to take in, all or none; each user's oldest first."""

    events: Sequence[Event]
    skip_items: bool | None = None


@dataclass(frozen=True)
class _Plan:
    """A question under way: its rows, and what becomes of what they are answered."""

    rows: list[Row]
    finish: Callable[[list[Ranked]], dict[str, Any]]


class Answering:
    """Answers many questions together. Not for several threads at a time."""

    def __init__(
        self,
        prepared: PreparedRecommender,
        durable: DurableHistories,
        *,
        rules: Rules = NO_RULES,
        items: pl.DataFrame | None = None,
        item_column: str | None = None,
        latest_time: int = LAST_SECOND,
        save_every: int = 1_000_000,
    ) -> None:
        """Takes the model, the histories and the rules.

        Args:
          prepared: ranks.
          durable: the histories.
          rules: of every question; its own restrict further.
          items: table whose columns the conditions of questions name.
          item_column: its column of raw ids; None is the first of `rules.ID_COLUMNS` there.
          latest_time: events after this second are refused.
          save_every: events that only the journal holds before all are saved into the file.
        """
        self.prepared, self.durable, self.rules = prepared, durable, rules
        self.known = prepared.recommender
        self._latest_time, self._items, self._item_column, self._save_every = (
            latest_time,
            items,
            item_column,
            save_every,
        )
        self._meeting = functools.lru_cache(CONDITIONS_KEPT)(self._meeting_all)

    @functools.cached_property
    def _popular(self) -> np.ndarray:
        """Item indices by how often they occur in the training part, equal ones in order of index."""
        return 1 + np.argsort(-self.known.training_counts[1:].astype(np.float32), kind="stable")

    def warming(self) -> Iterator[None]:
        """Compiles every program, in steps of one, and reads what the first answers need."""
        yield from self.prepared.warming()
        self.durable.histories.history("")
        _ = self._popular, self.known.typical_gap, self.known.newest_time

    def answer(self, questions: Sequence[Any]) -> list[Any]:
        """Returns an answer, or the exception that refuses it, for each question.

        New events are taken in first, in their order and with one write; all else is then answered, the rows of all
        questions together.
        """
        answers: list[Any] = [None] * len(questions)
        news = [i for i, question in enumerate(questions) if isinstance(question, NewEvents)]
        for i, found in zip(news, self._take([questions[i] for i in news]), strict=True):
            answers[i] = found
        plans: dict[int, _Plan] = {}
        for i, question in enumerate(questions):
            if i in news:
                continue
            try:
                if isinstance(question, RecommendQuestion):
                    plans[i] = self._recommend(question)
                elif isinstance(question, ScoreQuestion):
                    plans[i] = self._score(question)
                else:
                    answers[i] = self._directly(question)
            except (ValueError, FloatingPointError) as error:
                answers[i] = error
        for i, answer in zip(plans, self._finished(list(plans.values())), strict=True):
            answers[i] = answer
        return answers

    def _finished(self, plans: list[_Plan]) -> list[Any]:
        """Ranks the rows of all plans together; where that fails, plan by plan, so that one fails no other."""
        try:
            ranked = self.prepared.rank([row for plan in plans for row in plan.rows]) if plans else []
        except Exception as error:
            return [error] if len(plans) == 1 else [answer for plan in plans for answer in self._finished([plan])]
        answers = []
        for plan in plans:
            own, ranked = ranked[: len(plan.rows)], ranked[len(plan.rows) :]
            bad = [row.history.label for row, found in zip(plan.rows, own, strict=True) if not found.finite]
            answers.append(
                FloatingPointError(f"the scores for {bad[0]} are not finite; the run's parameters hold NaN or infinity")
                if bad
                else plan.finish(own)
            )
        return answers

    def _directly(self, question: Any) -> Any:
        if isinstance(question, SimilarQuestion):
            return self._similar(question)
        if isinstance(question, HistoryQuestion):
            return self._history(question)
        assert isinstance(question, UsersQuestion)
        histories = self.durable.histories
        return {"users": histories.users(question.prefix, question.most), "known": len(histories)}

    # Events

    def _take(self, news: Sequence[NewEvents]) -> list[Any]:
        """Takes in the events of all, written together; each is taken in whole or not at all."""
        answers: list[Any] = []
        taken: list[Event] = []
        after: dict[str, int] = {}
        for new in news:
            try:
                if self.durable.path is None:
                    raise NotKept("events are not kept: start the service with --state=FILE")
                events, skipped = list(new.events), 0
                if self._skips(new.skip_items):
                    events = [event for event in events if event.item in self.known.index_of_item]
                    skipped = len(new.events) - len(events)
                after = self.durable.histories.check(events, after, self._latest_time)
                taken += events
                answers.append({"accepted": len(events), "skipped": skipped})
            except (ValueError, NotKept) as error:
                answers.append(error)
        if taken:
            try:
                self.durable.append(taken)
                if self.durable.unsaved >= self._save_every:
                    # What cannot be saved stays in the journal.
                    with contextlib.suppress(OSError):
                        self.durable.save()
            except OSError as error:
                full = DiskFull(f"nothing was taken in: {error.strerror or error}; make room and send them again")
                answers = [full if isinstance(answer, dict) else answer for answer in answers]
        return answers

    # Rules

    def _skips(self, own: bool | None) -> bool:
        return self.rules.skip_items if own is None else own

    def _meeting_all(self, where: tuple[str, ...]) -> np.ndarray:
        if self._items is None:
            raise ValueError("where: the service has no table of items; start it with --items=FILE")
        try:
            found = allowed_items(
                self.known.index_of_item,
                items=self._items,
                where=where,
                item_column=self._item_column,
                report=lambda line: None,
            )
        except ValueError as error:
            raise ValueError(str(error).removeprefix("--")) from None
        assert found is not None
        return found

    def _indices(self, name: str, ids: Sequence[str], skip: bool) -> list[int]:
        unknown = [item for item in ids if item not in self.known.index_of_item]
        if unknown and not skip:
            raise ValueError(
                f"{name}: {len(unknown)} of {len(ids)} items are not the run's: "
                f"{listed([shown(item, 40) for item in unknown], 80, ', ')}; take them out, or give "
                '"unknown_items": "skip"'
            )
        return [self.known.index_of_item[item] for item in ids if item in self.known.index_of_item]

    def _allowed(self, question: RecommendQuestion | SimilarQuestion) -> tuple[np.ndarray | None, int]:
        """Returns the items that all rules leave, and how many unknown ones of the question's lists were skipped."""
        allowed, skipped, skip = self.rules.allowed, 0, self._skips(question.skip_items)
        if question.where:
            meeting = self._meeting(tuple(question.where))
            allowed = meeting if allowed is None else allowed & meeting
        if question.allow is not None or question.deny:
            own = np.full(self.known.num_items + 1, question.allow is None)
            own[0] = False
            for name, ids, value in (("allow", question.allow or (), True), ("deny", question.deny, False)):
                found = self._indices(name, ids, skip)
                own[found] = value
                skipped += len(ids) - len(found)
            allowed = own if allowed is None else allowed & own
        if question.where or question.allow is not None or question.deny:
            assert allowed is not None
            require(bool(allowed[1:].any()), "the rules leave no item; loosen one of them")
        return allowed, skipped

    # Histories

    def _of_user(self, user: str, popular: bool) -> History:
        history = self.durable.histories.history(user)
        if not len(history.items) and not popular:
            raise ValueError(
                f'unknown user {shown(user, 60)}; give a history, its events, or "unknown_users": "popularity"'
            )
        return replace(history, label=f"user {shown(user, 60)}")

    def _given(self, given: GivenHistory, place: int, skip: bool, popular: bool) -> History:
        label = f"histories[{place}]"
        self._indices(label, given.items, skip)
        late = [time for time in given.times or () if time > LAST_SECOND]
        require(not late, f"{label}: time {late[:1]} is beyond {LAST_SECOND}; give seconds since 1970")
        return self.known.history_from_ids(
            given.items, given.times, label=label, skip_unknown=skip, may_be_empty=popular
        )

    def _recommend(self, question: RecommendQuestion) -> _Plan:
        most = self.prepared.k
        require(1 <= question.k <= most, f"k={question.k} must lie in 1 to {most}")
        popular = self.rules.popular_users if question.popular_users is None else question.popular_users
        skip = self._skips(question.skip_items)
        seen = self.rules.exclude_seen if question.exclude_seen is None else question.exclude_seen
        allowed, skipped = self._allowed(question)
        histories = [(user, self._of_user(user, popular)) for user in question.users]
        histories += [(h.name, self._given(h, i, skip, popular)) for i, h in enumerate(question.histories)]
        users = [*question.users, *[None] * len(question.histories)]
        rows = [
            Row(history, self._unseen(history, allowed) if seen else allowed, user=user)
            for user, (_, history) in zip(users, histories, strict=True)
            if len(history.items)
        ]

        def finish(ranked: list[Ranked]) -> dict[str, Any]:
            answers = iter(ranked)
            results = []
            for name, history in histories:
                if len(history.items):
                    found = next(answers)
                    items, scores, source = found.indices[: question.k], found.scores[: question.k], "model"
                else:
                    items = self._most_popular(allowed, question.k)
                    scores, source = self.known.training_counts[items], "popularity"
                results.append(
                    {"user": name, "source": source, "items": self._named(items, scores)}
                    | {"events": len(history.items), "skipped": history.skipped, "assumed_gap": history.assumed_gap}
                )
            return {"results": results, "skipped": skipped}

        return _Plan(rows, finish)

    def _unseen(self, history: History, allowed: np.ndarray | None) -> np.ndarray:
        left = np.ones(self.known.num_items + 1, bool) if allowed is None else allowed.copy()
        left[history.items] = False
        return left

    def _most_popular(self, allowed: np.ndarray | None, k: int) -> np.ndarray:
        return self._popular[:k] if allowed is None else self._popular[allowed[self._popular]][:k]

    def _named(self, items: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
        ids, titles = self.known.item_ids, self.known.titles
        return [
            {"item": ids[i - 1], "score": score, "title": None if titles is None else titles[i - 1]}
            for i, score in zip(items.tolist(), scores.astype(float).tolist(), strict=True)
        ]

    def _score(self, question: ScoreQuestion) -> _Plan:
        popular = self.rules.popular_users if question.popular_users is None else question.popular_users
        skip = self._skips(question.skip_items)
        self._indices("pairs", [item for _, item in question.pairs], skip)
        places: dict[str, list[int]] = {}
        for place, (user, item) in enumerate(question.pairs):
            if item in self.known.index_of_item:
                places.setdefault(user, []).append(place)
        scores, sources = np.zeros(len(question.pairs)), [""] * len(question.pairs)
        rows: list[Row] = []
        parts: list[list[int]] = []
        for user, own in places.items():
            history = self._of_user(user, popular)
            items = np.array([self.known.index_of_item[question.pairs[i][1]] for i in own], np.int32)
            for i in own:
                sources[i] = "model" if len(history.items) else "popularity"
            if not len(history.items):
                scores[own] = self.known.training_counts[items]
                continue
            for first in range(0, len(own), self.prepared.scored):
                part = slice(first, first + self.prepared.scored)
                rows.append(Row(history, scored=items[part], user=user))
                parts.append(own[part])

        def finish(ranked: list[Ranked]) -> dict[str, Any]:
            for part, found in zip(parts, ranked, strict=True):
                scores[part] = found.scored
            pairs = zip(question.pairs, scores.tolist(), sources, strict=True)
            found = [
                {"user": user, "item": item, "score": score, "source": source}
                for (user, item), score, source in pairs
                if source
            ]
            return {"scores": found, "skipped": len(question.pairs) - len(found)}

        return _Plan(rows, finish)

    def _similar(self, question: SimilarQuestion) -> dict[str, Any]:
        most = self.prepared.k
        require(1 <= question.k <= most, f"k={question.k} must lie in 1 to {most}")
        allowed, skipped = self._allowed(question)
        items = self._indices("items", question.items, self._skips(question.skip_items))
        found = self.prepared.similar(items, allowed)
        results = [
            {"item": self.known.item_ids[item - 1], "items": self._named(*(part[: question.k] for part in lists))}
            for item, lists in zip(items, found, strict=True)
        ]
        return {"results": results, "skipped": skipped + len(question.items) - len(items)}

    def _history(self, question: HistoryQuestion) -> dict[str, Any]:
        history = self._of_user(question.user, popular=False)
        items, times = history.items[-question.last :], history.timestamps[-question.last :]
        named = self._named(items, np.zeros(len(items)))
        events = [
            {"item": item["item"], "title": item["title"], "timestamp": at}
            for item, at in zip(named, times.tolist(), strict=True)
        ]
        answer: dict[str, Any] = {"user": question.user, "count": len(history.items), "events": events}
        if question.mask:
            masks = self.prepared.mask.of(history, min(question.last, self.known.max_len))
            name = self.known.config.model.name
            answer["mask"] = [np.round(mask.astype(float), 4).tolist() for mask in masks] or None
            answer["about_mask"] = (
                "how much of an event (column) is left at a later one (row), the mean over heads; one picture per layer"
                if masks
                else f"the model {name!r} has no time-aware mask"
            )
        return answer
