"""Item titles: RecBole `.item` files, MovieLens `movies.dat` and `u.item`, tables of text and Parquet."""

import io
import re
from collections.abc import Callable, Sequence

import polars as pl

from tim4rec_jax.data.columns import column_names, id_text
from tim4rec_jax.data.sources import Source, expanded, list_sources
from tim4rec_jax.data.text_fields import DELIMITERS, UNREADABLE, header_fields

# A column is known by its name's letters and digits alone: movieId, movie_id and "Movie ID" are one.
_THINGS = (
    "item",
    "product",
    "movie",
    "book",
    "track",
    "song",
    "game",
    "app",
    "video",
    "course",
    "business",
    "article",
    "news",
    "recipe",
    "anime",
    "venue",
    "poi",
)
_ID_COLUMNS = ("itemid", "id", "productid", "item", *(f"{thing}id" for thing in _THINGS), "parentasin", "asin", "isbn")
_TITLE_COLUMNS = (
    "movietitle",
    "title",
    "name",
    "appname",
    *(f"{thing}title" for thing in _THINGS),
    *(f"{thing}name" for thing in _THINGS),
)
_MOVIELENS = {"movies.dat": "::", "u.item": "|"}


def find_titles(log: Source) -> Source | None:
    """Finds what lies beside a log's (first) file: `<stem>.item`, or MovieLens's movies."""
    names = (f"{log.stem}.item", f"{log.stem}.item.gz")
    if log.name in ("ratings.dat", "u.data", "ratings.csv"):
        names += ("movies.dat", "u.item", "movies.csv")
    if log.entry is None:
        beside = (log.path.parent / name for name in names)
        return next((Source(path, None, log.max_unpacked_gb) for path in beside if path.is_file()), None)
    sources = list_sources(log.path, log.max_unpacked_gb)
    return next((s for s in sources if s.folder == log.folder and s.name in names), None)


def titles_for(
    log: Source | None, item_path: str | None, ids: pl.Series, note: Callable[[str], None]
) -> pl.DataFrame | None:
    """Reads the titles that belong to a log, as far as there are any: a file that nobody named stops nothing.

    Args:
      log: its (first) file; None for a data frame.
      item_path: file named by the user; None looks beside the log.
      ids: the log's item ids (String).
      note: takes a sentence about titles that are left out or belong to no item.

    Returns:
      See `read_titles`; None where there are no titles.

    Raises:
      FileNotFoundError, OSError, ValueError: if the file at `item_path` is not there, or cannot be read.
    """
    if item_path is not None:
        path = expanded(item_path)
        if not path.is_file():
            raise FileNotFoundError(f"no item file at {path}; check data.item_path")
        titles = read_titles(source := Source(path, None, log and log.max_unpacked_gb), ids)
    else:
        try:
            source = log and find_titles(log)
            titles = source and read_titles(source, ids)
        except (ValueError, OSError, MemoryError) as error:
            note(f"the item file beside the log is not used, titles are left out: {error}")
            return None
    if titles is not None and not titles["item"].is_in(ids.implode()).any():
        note(f"{source}: 0 of the log's {len(ids):,} items have a title there; are its ids those of the log?")
        return titles if item_path is not None else None
    return titles


def read_titles(source: Source, ids: pl.Series | None = None) -> pl.DataFrame:
    """Reads item titles.

    Args:
      source: `.item`, `movies.dat`, `u.item`, Parquet file, or a table separated by commas, tabs, semicolons or bars.
      ids: item ids (String) of a log; of several columns of ids the one counts that has most of them.

    Returns:
      item (String) and title (String), one row per item; where an item is listed twice its first row counts.

    Raises:
      ValueError: if the file cannot be read, or has no column of item ids or none of titles.
    """
    try:
        plain = _MOVIELENS.get(source.name.removesuffix(".gz"))
        table = _read_columns(source, ids) if plain is None else _read_plain(source, plain)
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0][:80]
        raise ValueError(f"{source} cannot be read as a table of titles ({reason}); write it again") from error
    return table.drop_nulls("item").unique("item", keep="first", maintain_order=True)


def _read_plain(source: Source, delimiter: str) -> pl.DataFrame:
    data = source.read()
    try:
        text = data.decode()
    except UnicodeDecodeError:  # MovieLens wrote its first titles in Latin-1.
        text = data.decode("latin-1")
    rows = [line.rstrip("\r").split(delimiter)[:2] for line in text.split("\n") if delimiter in line]
    return pl.DataFrame(rows, schema={"item": pl.String, "title": pl.String}, orient="row")


def _read_columns(source: Source, ids: pl.Series | None) -> pl.DataFrame:
    data = source.read()
    if source.name.endswith((".parquet", ".pq")):
        schema = pl.scan_parquet(io.BytesIO(data)).collect_schema().names()
        id_columns, title_column = _known_columns(source, schema)
        table = pl.read_parquet(io.BytesIO(data), columns=[*id_columns, title_column])
    else:
        table, names = _read_text(source, data)
        id_columns, title_column = _known_columns(source, names)
        # Of columns with one name the first counts, as in a table read by hand.
        table = table.select(table.to_series(names.index(name)).alias(name) for name in (*id_columns, title_column))
    candidates = [id_text(table[name]).alias("item") for name in id_columns]
    if ids is not None and len(candidates) > 1:
        candidates.sort(key=lambda column: -int(column.is_in(ids.implode()).sum()))
    return pl.DataFrame([candidates[0], table[title_column].cast(pl.String).alias("title")])


def _read_text(source: Source, data: bytes) -> tuple[pl.DataFrame, list[str]]:
    recbole = b":token" in data[: data.find(b"\n") + 1]
    headers = {delimiter: header_fields(data, delimiter) for delimiter in ("\t", *DELIMITERS)}
    delimiter = max(headers, key=lambda d: (_knows(headers[d]), len(headers[d])))
    if recbole:
        delimiter = "\t"
    table = pl.read_csv(
        data,
        separator=delimiter,
        infer_schema=False,
        quote_char=None if recbole else '"',
        # Titles are for display alone: a stray separator must not stop a training run.
        truncate_ragged_lines=True,
    )
    names = [name.split(":", 1)[0] if recbole else name for name in headers[delimiter]]
    return table, names


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _known(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names that are known, in the order of `known`."""
    rank = {name: i for i, name in enumerate(known)}
    return sorted((n for n in dict.fromkeys(names) if _letters(n) in rank), key=lambda name: rank[_letters(name)])


def _knows(names: Sequence[str]) -> int:
    return bool(_known(names, _ID_COLUMNS)) + bool(_known(names, _TITLE_COLUMNS))


def _known_columns(source: Source, names: list[str]) -> tuple[list[str], str]:
    ids, titles = _known(names, _ID_COLUMNS), _known(names, _TITLE_COLUMNS)
    if not ids or not titles:
        raise ValueError(
            f"{source} needs a column of item ids (item_id, id, movieId, asin ..) and one of titles (title, name, "
            f"item_name ..); its columns are {column_names(names)}"
        )
    return ids, titles[0]
