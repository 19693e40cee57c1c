"""What goes in and out over HTTP, as OpenAPI describes it."""

from types import SimpleNamespace
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from experiments.serve.limits import Limits
from tim4rec_jax.serving.event_lines import LONGEST_USER
from tim4rec_jax.serving.user_table_file import LAST_SECOND

Id = Annotated[str, Field(max_length=LONGEST_USER, strict=True)] | Annotated[int, Field(strict=True)]
Second = Annotated[int, Field(strict=True, ge=0, le=LAST_SECOND, description="seconds since 1970")]
Unknown = Literal["refuse", "skip"]
UnknownUsers = Literal["refuse", "popularity"]
_UNKNOWN_ITEMS = "what becomes of ids that are no item of the run; as the service does where it is left out"
_UNKNOWN_USERS = "unknown users and empty histories: an error, or the most frequent items (source says so)"
_CONDITIONS = 16
_CONDITION_LENGTH = 1000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Error(_Strict):
    """Why a request was refused, in one line."""

    error: str


class Item(_Strict):
    """An item of a list."""

    item: str
    score: float = Field(description="the model's logit; a count where source is popularity; a cosine")
    title: str | None


class Recommended(_Strict):
    """The list of one user or history."""

    user: str | None = Field(description="as asked; null for a history without a name")
    source: Literal["model", "popularity"]
    items: list[Item] = Field(description="best first; fewer than k where no more are left")
    events: int = Field(description="of the history; the model reads its last max_len")
    skipped: int = Field(description="unknown items of the history that were left out")
    assumed_gap: int | None = Field(description="seconds put between events, because no times were given")


class RecommendAnswer(_Strict):
    """A list for each user, then for each history, in the order of the question."""

    results: list[Recommended]
    skipped: int = Field(description="unknown items of allow and deny that were left out")


class Score(_Strict):
    """The score of a pair."""

    user: str
    item: str
    score: float
    source: Literal["model", "popularity"]


class ScoreAnswer(_Strict):
    """Scores in the order of the pairs."""

    scores: list[Score]
    skipped: int = Field(description="pairs of unknown items that were left out")


class SimilarTo(_Strict):
    """Items most like one, by the cosine of their embeddings."""

    item: str
    items: list[Item]


class SimilarAnswer(_Strict):
    """A list for each known item."""

    results: list[SimilarTo]
    skipped: int = Field(description="unknown items that were left out")


class EventsAnswer(_Strict):
    """What was taken in; it is on the disk."""

    accepted: int
    skipped: int = Field(description="events of unknown items that were left out")


class PastEvent(_Strict):
    """An event of a user."""

    item: str
    title: str | None
    timestamp: int


class HistoryAnswer(_Strict):
    """The last events of a user, oldest first."""

    user: str
    count: int = Field(description="all events of the user")
    events: list[PastEvent]
    mask: list[list[list[float]]] | None = Field(
        default=None, description="per layer: the share of each event (column) that is left at each later one (row)"
    )
    about_mask: str | None = None


class UsersAnswer(_Strict):
    """Users whose ids begin with a text."""

    users: list[str]
    known: int = Field(description="all users")


class Health(_Strict):
    """How the service is."""

    status: Literal["alive", "ready", "warming up", "stopping"]


def requests(limits: Limits) -> SimpleNamespace:
    """Returns the classes of what may be asked within limits: Recommend, Pairs, Similar, Events."""

    class History(_Strict):
        """A history given by hand, oldest first."""

        items: list[Id] = Field(max_length=limits.history)
        times: list[Second] | None = Field(
            default=None, max_length=limits.history, description="one per item, never backwards; assumed if left out"
        )
        name: Id | None = Field(default=None, description="comes back as the user of its list")

    class Rules(_Strict):
        k: int = Field(default=min(10, limits.k), strict=True, ge=1, le=limits.k)
        allow: list[Id] | None = Field(default=None, max_length=limits.listed, description="the only items to rank")
        deny: list[Id] = Field(default=[], max_length=limits.listed, description="items that are not ranked")
        where: list[Annotated[str, Field(max_length=_CONDITION_LENGTH, strict=True)]] = Field(
            default=[], max_length=_CONDITIONS, description="conditions on the table of --items, as in genre=Drama"
        )
        unknown_items: Unknown | None = Field(default=None, description=_UNKNOWN_ITEMS)

    class Recommend(Rules):
        """Users, histories or both, and what may be recommended to them."""

        users: list[Id] = Field(default=[], max_length=limits.users)
        histories: list[History] = Field(default=[], max_length=limits.users)
        exclude_seen: bool | None = Field(default=None, strict=True, description="leave out the history's own items")
        unknown_users: UnknownUsers | None = Field(default=None, description=_UNKNOWN_USERS)

    class Pair(_Strict):
        """A user and an item."""

        user: Id
        item: Id

    class Pairs(_Strict):
        """Pairs to score."""

        pairs: list[Pair] = Field(min_length=1, max_length=limits.pairs)
        unknown_items: Unknown | None = Field(default=None, description=_UNKNOWN_ITEMS)
        unknown_users: UnknownUsers | None = Field(default=None, description=_UNKNOWN_USERS)

    class Similar(Rules):
        """Items to find similar ones of."""

        items: list[Id] = Field(min_length=1, max_length=limits.pairs)

    class Event(_Strict):
        """One thing a user did."""

        user: Id
        item: Id
        timestamp: Second

    class Events(_Strict):
        """Events, each user's oldest first; all are taken in, or none."""

        events: list[Event] = Field(min_length=1, max_length=limits.events)
        unknown_items: Unknown | None = Field(default=None, description=_UNKNOWN_ITEMS)

    return SimpleNamespace(Recommend=Recommend, Pairs=Pairs, Similar=Similar, Events=Events)
