"""Item titles: RecBole `.item` files, MovieLens `movies.dat` and `u.item`, CSV and Parquet tables."""

import io
import pathlib

import polars as pl

from tim4rec_jax.data.readers import UNREADABLE
from tim4rec_jax.data.sources import Source, list_sources

_ID_COLUMNS = ("item_id", "id", "product_id", "item")
_TITLE_COLUMNS = ("movie_title", "title", "name", "app_name")


def find_titles(log: Source, item_path: str | None) -> Source | None:
    """Finds the file with item titles that belongs to a log.

    Args:
      log: the log's (first) file.
      item_path: file named by the user; None looks beside the log for `<stem>.item`, `movies.dat` and `u.item`.

    Returns:
      The file, or None where no path is named and none lies beside the log.

    Raises:
      FileNotFoundError: if `item_path` is named and is no file.
    """
    if item_path is not None:
        path = pathlib.Path(item_path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no item file at {path}; check data.item_path")
        return Source(path)
    names = (f"{log.stem}.item", f"{log.stem}.item.gz")
    if log.name in ("ratings.dat", "u.data"):
        names += ("movies.dat", "u.item")
    if log.entry is None:
        beside = (log.path.parent / name for name in names)
        return next((Source(path) for path in beside if path.is_file()), None)
    return next((s for s in list_sources(log.path) if s.folder == log.folder and s.name in names), None)


def read_titles(source: Source) -> pl.DataFrame:
    """Reads item titles.

    Args:
      source: `.item`, `movies.dat`, `u.item`, CSV or Parquet file.

    Returns:
      item (String) and title (String), one row an item; where an item is listed twice its first row counts.

    Raises:
      ValueError: if the file cannot be read, or has no column of item ids or none of titles.
    """
    if source.name in ("movies.dat", "u.item"):
        # MovieLens writes its titles in Latin-1.
        delimiter = "::" if source.name == "movies.dat" else "|"
        lines = source.read().decode("latin-1").splitlines()
        rows = [line.split(delimiter)[:2] for line in lines if delimiter in line]
        table = pl.DataFrame(rows, schema={"item": pl.String, "title": pl.String}, orient="row")
    else:
        try:
            table = _read_columns(source)
        except UNREADABLE as error:
            raise ValueError(f"{source} cannot be read as a table of titles ({error}); write it again") from error
    return table.drop_nulls("item").unique("item", keep="first", maintain_order=True)


def _read_columns(source: Source) -> pl.DataFrame:
    data = source.read()
    if source.name.endswith((".parquet", ".pq")):
        table = pl.read_parquet(io.BytesIO(data))
    else:
        recbole = b":token" in data.split(b"\n", 1)[0]
        table = pl.read_csv(
            data,
            separator="\t" if recbole else ",",
            infer_schema=False,
            quote_char=None if recbole else '"',
            # Titles are for display alone: a stray separator must not stop a training run.
            truncate_ragged_lines=True,
        )
        table.columns = [name.split(":", 1)[0] for name in table.columns]
    item = next((name for name in _ID_COLUMNS if name in table.columns), None)
    title = next((name for name in _TITLE_COLUMNS if name in table.columns), None)
    if item is None or title is None:
        raise ValueError(
            f"{source} needs a column of item ids ({', '.join(_ID_COLUMNS)}) and one of titles "
            f"({', '.join(_TITLE_COLUMNS)}); its columns are {', '.join(table.columns)}"
        )
    return table.select(item=pl.col(item).cast(pl.String), title=pl.col(title).cast(pl.String))
