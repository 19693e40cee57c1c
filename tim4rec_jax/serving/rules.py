"""Rules of what may be recommended, the same wherever this library answers.

Lists of ids and attributes of items become one mask over the catalogue, which restricts it before anything is ranked.
"""

import operator
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from tim4rec_jax.checks import listed, require, shortened, shown
from tim4rec_jax.serving.row_files import TABLES, read_table

ID_COLUMNS = ("item_id", "item", "id")
# Of two that begin alike the longer one stands first.
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
    "~": lambda values, word: values.str.contains(word, literal=True),
}
_CONDITION = re.compile(r"(.+?)\s*(!=|<=|>=|=|<|>|~)\s*(.*)", re.DOTALL)
_ORDERS = ("<", "<=", ">", ">=")


@dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """What may be recommended, and what is done about users and items that the run does not know.

    Attributes:
      exclude_seen: leave the items of the history out; lists are shorter where fewer than k are left.
      allow: raw item ids with commas between them, the only ones to recommend.
      allow_file: file of such ids: one per line, or a table (.csv, .tsv, .parquet, .jsonl) with a column of them.
      deny: raw item ids with commas between them, never to recommend.
      deny_file: file of such ids.
      items: table of items (.csv, .tsv, .parquet, .jsonl) with the attributes that --where names.
      where: conditions such as genre=Drama, price<20, genres~Drama (holds the text), all of which must hold; of the
        table's items alone.
      item_column: column of raw item ids in these tables; None is item_id, item or id.
      unknown_items: "skip" counts and leaves out ids that the run does not know, in lists and in histories.
      unknown_users: unknown users and empty histories get the "popularity" of the training part (source says so).
    """

    exclude_seen: bool = False
    allow: str | None = None
    allow_file: pathlib.Path | None = None
    deny: str | None = None
    deny_file: pathlib.Path | None = None
    items: pathlib.Path | None = None
    where: tuple[str, ...] = ()
    item_column: str | None = None
    unknown_items: Literal["refuse", "skip"] = "refuse"
    unknown_users: Literal["refuse", "popularity"] = "refuse"


@dataclass(frozen=True)
class Rules:
    """Rules of a catalogue.

    Attributes:
      allowed: bool [v], v = items + 1, the items that may be recommended; None for all.
      exclude_seen: leave the items of a history out.
      skip_items: leave unknown items of a history out and count them, where others refuse them.
      popular_users: recommend what is popular to unknown users and after empty histories, where others refuse them.
    """

    allowed: np.ndarray | None = None
    exclude_seen: bool = False
    skip_items: bool = False
    popular_users: bool = False


NO_RULES = Rules()


def comma_separated(option: str, text: str) -> list[str]:
    """Returns the ids of a text with commas between them.

    Raises:
      ValueError: nothing stands between two commas.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if "" in parts:
        place = parts.index("") + 1
        raise ValueError(f"{option}: nothing stands at position {place} of {shown(text)}; remove the comma")
    return parts


def rules_from_options(
    options: RuleOptions, indices: Mapping[str, int], *, report: Callable[[str], None] = print
) -> Rules:
    """Reads the lists and tables that options name.

    Args:
      options: what was asked for.
      indices: index from 1 of every raw item id of the catalogue.
      report: receives a line for every list of which something was left out.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: options do not go together, a file or a condition cannot be read, ids are unknown, or no item is left.
    """
    lists: dict[str, list[Iterable[str] | pathlib.Path]] = {}
    for name in ("allow", "deny"):
        text, file = getattr(options, name), getattr(options, f"{name}_file")
        lists[name] = [] if text is None else [comma_separated(f"--{name}", text)]
        lists[name] += [] if file is None else [file]
    allowed = allowed_items(
        indices,
        allow=lists["allow"] or None,
        deny=lists["deny"],
        items=options.items,
        where=options.where,
        item_column=options.item_column,
        skip_unknown=options.unknown_items == "skip",
        report=report,
    )
    skip, popular = options.unknown_items == "skip", options.unknown_users == "popularity"
    return Rules(allowed, options.exclude_seen, skip, popular)


def raw_ids(users: Sequence[Any]) -> list[str]:
    """Returns users as texts.

    Raises:
      ValueError: it is one text, and no list of them.
    """
    if isinstance(users, str):
        raise ValueError(f"users={users!r} must be a list of raw user ids; give [{users!r}]")
    return [str(user) for user in users]


def allowed_by_lists(
    indices: Mapping[str, int],
    allow: Iterable[Any] | None,
    deny: Iterable[Any],
    items: pl.DataFrame | pathlib.Path | None,
    where: Sequence[str],
) -> np.ndarray | None:
    """Does what `allowed_items` does with one list each of ids, which may be numbers."""
    lists = None if allow is None else [map(str, allow)]
    return allowed_items(indices, allow=lists, deny=[map(str, deny)], items=items, where=where)


def allowed_items(
    indices: Mapping[str, int],
    *,
    allow: Sequence[Iterable[str] | pathlib.Path] | None = None,
    deny: Sequence[Iterable[str] | pathlib.Path] = (),
    items: pl.DataFrame | pathlib.Path | None = None,
    where: Sequence[str] = (),
    item_column: str | None = None,
    skip_unknown: bool = False,
    report: Callable[[str], None] = print,
) -> np.ndarray | None:
    """Returns which items all rules leave, bool [v] with v = items + 1, padding never; None where there is no rule.

    Args:
      indices: index from 1 of every raw item id of the catalogue.
      allow: lists of raw ids or files of them, together the only items left; None for all.
      deny: lists of raw ids or files of them, none of which is left.
      items: table of items; those that are not in it, and of a row those without a value, meet no condition. An item
        with several rows meets them if one of its rows does.
      where: conditions on columns of the table, all of which must hold.
      item_column: column of raw ids in tables; None is the first of `ID_COLUMNS` there.
      skip_unknown: count ids that the catalogue lacks and leave them out, where others refuse them.
      report: receives a line for what was left out.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file or a condition cannot be read, ids are unknown, or no item is left.
    """
    if (items is None) != (not where):
        raise ValueError("--items and --where belong together: a table of items, and conditions on its columns")
    if allow is None and not deny and items is None:
        return None
    allowed = np.full(len(indices) + 1, allow is None)
    for option, lists, value in (("--allow", allow or (), True), ("--deny", deny, False)):
        for ids in lists:
            name = f"{option}_file={shortened(str(ids), 80)}" if isinstance(ids, pathlib.Path) else option
            found = _read_ids(ids, item_column) if isinstance(ids, pathlib.Path) else list(map(str, ids))
            allowed[_known(found, indices, name, skip_unknown, report)] = value
    if items is not None:
        allowed &= _meeting(items, where, item_column, indices, report)
    allowed[0] = False
    require(bool(allowed.any()), f"the rules leave none of the {len(indices):,} items; loosen one of them")
    return allowed


def _known(
    ids: Sequence[str], indices: Mapping[str, int], name: str, skip: bool, report: Callable[[str], None]
) -> list[int]:
    unknown = [item for item in ids if item not in indices]
    if unknown and not skip:
        raise ValueError(
            f"{name}: {len(unknown):,} of {len(ids):,} ids are no item of the run: "
            f"{listed([shown(item, 40) for item in unknown], 80, ', ')}; take them out, or give --unknown_items=skip"
        )
    if unknown:
        report(f"{name}: {len(unknown):,} of {len(ids):,} ids are no item of the run and were skipped")
    return [indices[item] for item in ids if item in indices]


def _read_ids(path: pathlib.Path, item_column: str | None) -> list[str]:
    if path.suffix.lower() in TABLES:
        table = read_table(path)
        ids = table[_id_column(table, item_column, str(path))]
        require(ids.null_count() == 0, f"{path}: an id is empty in {ids.null_count()} rows")
        return ids.cast(pl.String).to_list()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 (byte {error.start + 1}); give an id per line") from None
    return [line.strip() for line in lines if line.strip()]


def _id_column(table: pl.DataFrame, item_column: str | None, name: str) -> str:
    wanted = ID_COLUMNS if item_column is None else (item_column,)
    found = next((column for column in wanted if column in table.columns), None)
    if found is None:
        raise ValueError(
            f"{shortened(name, 100)} has no column {' or '.join(wanted)}; its columns are "
            f"{listed(table.columns, 80, ', ')} (--item_column names the one of ids)"
        )
    if table[found].dtype.is_nested() or table[found].dtype.is_float():
        raise ValueError(
            f"{shortened(name, 100)}: column {found} holds {table[found].dtype}, no ids; give text or whole numbers"
        )
    return found


def _meeting(
    items: pl.DataFrame | pathlib.Path,
    where: Sequence[str],
    item_column: str | None,
    indices: Mapping[str, int],
    report: Callable[[str], None],
) -> np.ndarray:
    """Returns which items meet all conditions, bool [v]."""
    name = str(items) if isinstance(items, pathlib.Path) else "the table of items"
    table = items if isinstance(items, pl.DataFrame) else read_table(items)
    column = _id_column(table, item_column, name)
    meets = np.ones(len(table), bool)
    for condition in where:
        meets &= _condition(table, condition, name)
    rows = np.array([indices.get(item, 0) for item in table[column].cast(pl.String).to_list()], np.int64)
    absent = len(indices) - len(np.setdiff1d(rows, [0]))
    if absent:
        report(f"{name}: {absent:,} of {len(indices):,} items of the run are not in it and are not recommended")
    found = np.zeros(len(indices) + 1, bool)
    found[rows[meets]] = True
    return found


def _condition(table: pl.DataFrame, text: str, name: str) -> np.ndarray:
    """Returns of each row whether it meets a condition; a missing value meets none."""
    parts = _CONDITION.fullmatch(text.strip())
    if parts is None:
        raise ValueError(
            f"--where: {shown(text)} is no condition; write one as in genre=Drama, price<20 or genres~Drama"
        )
    column, sign, word = parts.groups()
    if column not in table.columns:
        known = listed(table.columns, 80, ", ")
        raise ValueError(f"--where: {shortened(name, 80)} has no column {shown(column, 40)}; its columns are {known}")
    values = table[column]
    if values.dtype == pl.List or values.dtype == pl.Array:
        if sign not in ("=", "!="):
            raise ValueError(f"--where: {shown(text)}: {column} holds lists; ask with = or !=")
        members = values.cast(pl.List(pl.String)).list.contains(word)
        met = members if sign == "=" else ~members
    elif sign == "~":
        met = _COMPARISONS[sign](values.cast(pl.String), word)
    elif values.dtype.is_numeric():
        try:
            number: Any = int(word) if re.fullmatch(r"[+-]?\d+", word) else float(word)
        except ValueError:
            raise ValueError(f"--where: {shown(text)}: {column} holds numbers, and {shown(word, 40)} is none") from None
        met = _COMPARISONS[sign](values, number)
    elif values.dtype == pl.Boolean:
        require(sign in ("=", "!=") and word in ("true", "false"), f"--where: {shown(text)}: {column} is true or false")
        met = _COMPARISONS[sign](values, word == "true")
    else:
        met = _compare_texts(values.cast(pl.String), sign, word, text)
    return met.fill_null(False).to_numpy()


def _compare_texts(values: pl.Series, sign: str, word: str, text: str) -> pl.Series:
    if sign in _ORDERS and re.fullmatch(r"[+-]?\d+(\.\d*)?", word):
        other = next((value for value in values.drop_nulls() if not re.fullmatch(r"[+-]?\d+(\.\d*)?", value)), "")
        raise ValueError(
            f"--where: {shown(text)}: the column holds text such as {shown(other, 40)}, which has no order beside a "
            "number; make it a column of numbers"
        )
    return _COMPARISONS[sign](values, word)
