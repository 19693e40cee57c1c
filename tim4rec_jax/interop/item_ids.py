"""Which raw item id each row of a checkpoint's item table stands for: files that say it, and the items of a log."""

import csv
import hashlib
import io
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl

from tim4rec_jax.checks import listed, require, shortened, shown
from tim4rec_jax.interop.torch_checkpoint_file import require_file

# Bytes of a file per id, on top of a million: more is no list of ids.
_MOST_BYTES = 4096
_UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException)


def beside(checkpoint: pathlib.Path) -> pathlib.Path:
    """Returns where the ids of a checkpoint's items lie: m.item_ids.csv beside m.pth."""
    return checkpoint.with_suffix(".item_ids.csv")


def digest(ids: Sequence[str]) -> str:
    """Returns the sha256 hex digest of a list of ids in its order."""
    total = hashlib.sha256()
    for item in ids:
        encoded = item.encode()
        total.update(len(encoded).to_bytes(8, "little"))
        total.update(encoded)
    return total.hexdigest()


def as_csv(ids: Sequence[str]) -> bytes:
    """Returns a CSV file of index (from 1) and item_id (quoted), by index."""
    text = io.StringIO()
    rows = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    rows.writerow(["index", "item_id"])
    rows.writerows(enumerate(ids, 1))
    return text.getvalue().encode()


def read_item_ids(path: pathlib.Path, count: int) -> list[str]:
    """Returns the raw ids of the items 1, 2, ... of a model.

    Args:
      path: Parquet (.parquet) or CSV (.csv; .tsv with tabs) with the column item_id and, if the rows are not in order,
        index; any other file has an id per line.
      count: items of the model.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not such a file, has another number of ids, or one of them twice.
    """
    require_file(path, "file of item ids")
    name, size = shortened(str(path), 100), os.stat(path).st_size
    require(size <= 2**20 + _MOST_BYTES * count, f"{name} has {size:,} bytes, too many for {count:,} item ids")
    reader = {".parquet": _parquet, ".csv": _table, ".tsv": _table}.get(path.suffix.lower(), _lines)
    try:
        pairs = list(reader(path, count + 2))
    except (ValueError, csv.Error, *_UNREADABLE) as error:
        raise ValueError(f"{name} is not readable as item ids: {shortened(str(error), 130)}") from None
    if len(pairs) != count:
        found = f"{len(pairs):,}" if len(pairs) < count + 2 else "more"
        hint = "; leave out the row of padding" if len(pairs) == count + 1 else ""
        raise ValueError(f"{name} has {found} item ids, the checkpoint {count:,} items{hint}")
    wrong = next((index for index, _ in pairs if not 1 <= index <= count), None)
    require(wrong is None, f"{name}: index {wrong} does not lie between 1 and {count:,}")
    places = dict(pairs)
    require(len(places) == count, f"{name}: index must be 1 to {count:,}, each once; one stands twice")
    ids = [places[index] for index in range(1, count + 1)]
    first: dict[str, int] = {}
    twice = [
        f"{shown(item, 40)} (items {first[item]} and {index})"
        for index, item in enumerate(ids, 1)
        if first.setdefault(item, index) != index
    ]
    require("" not in first, f"{name}: the id of item {first.get('')} is empty")
    require(not twice, f"{name} has ids twice: {listed(twice, 100) if twice else ''}")
    return ids


def find_item_ids(
    checkpoint: pathlib.Path, given: pathlib.Path | None, count: int, claimed: str | None
) -> tuple[pathlib.Path, list[str]] | None:
    """Returns the raw ids of the checkpoint's items and the file they stand in; None where nothing says what they are.

    Args:
      checkpoint: beside which the ids may lie.
      given: the file that the user named, if any.
      count: items of the checkpoint.
      claimed: digest of the ids that the checkpoint was written with, if it says so.

    Raises:
      FileNotFoundError, ValueError: the ids are missing, not readable, or not those of this checkpoint.
    """
    file, name = beside(checkpoint), shortened(checkpoint.name, 60)
    if given is not None:
        file = given
    elif claimed is None and os.path.lexists(file):
        raise ValueError(
            f"{shortened(file.name, 60)} lies beside {name}, which does not say that these are its items; if they are, "
            "name the file by --item_ids, else move it away"
        )
    elif claimed is None:
        return None
    elif not os.path.lexists(file):
        raise FileNotFoundError(
            f"{name} was written with the ids of its items in {shortened(file.name, 60)}, which is missing; put it "
            "back beside the checkpoint, or name it by --item_ids"
        )
    ids = read_item_ids(file, count)
    if claimed not in (None, digest(ids)):
        raise ValueError(
            f"the ids in {shortened(str(file), 120)} are not those that {name} was written with: altered, or of "
            "another checkpoint; fetch the two together"
        )
    return file, ids


def rows_of_log(ids: list[str], item_ids: pl.Series) -> np.ndarray:
    """Returns which row of a checkpoint's item table each item of a log has.

    Args:
      ids: raw ids of the rows 1, 2, ...
      item_ids: raw ids of the items 1, 2, ... of the cleaned log.

    Returns:
      int64 [items], from 1, in the order of the log's items.

    Raises:
      ValueError: either has items that the other lacks.
    """
    ours = pl.DataFrame({"id": item_ids.cast(pl.String)})
    theirs = pl.DataFrame({"id": pl.Series(ids, dtype=pl.String), "row": np.arange(1, len(ids) + 1)})
    both = ours.join(theirs, on="id", how="left", maintain_order="left")
    unknown = both.filter(pl.col("row").is_null())["id"]
    absent = theirs.join(ours, on="id", how="anti")["id"]
    if len(unknown) or len(absent):
        parts = [
            f"{len(found):,} items of {whose} are not in {other} (such as {shown(found[0], 40)})"
            for found, whose, other in ((unknown, "the log", "the checkpoint"), (absent, "the checkpoint", "the log"))
            if len(found)
        ]
        raise ValueError(
            f"{' and '.join(parts)}; give the log the model was trained on, cleaned as there (data.k_core)"
        )
    return both["row"].to_numpy()


def _lines(path: pathlib.Path, most: int) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8-sig", newline="\n") as stream:
        for index, line in zip(range(1, most + 1), stream, strict=False):
            yield index, line.removesuffix("\n").removesuffix("\r")


def _table(path: pathlib.Path, most: int) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.reader(stream, strict=True, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        header = next(rows, [])
        require("item_id" in header, f"no column item_id; its columns are {shown(header)}")
        for place, row in zip(range(1, most + 1), rows, strict=False):
            require(len(row) == len(header), f"line {rows.line_num} has {len(row)} fields, the header {len(header)}")
            yield _index(row[header.index("index")]) if "index" in header else place, row[header.index("item_id")]


def _index(value: Any) -> int:
    text = str(value)
    require(text.isascii() and text.isdigit() and len(text) < 12, f"index {shown(value)} is no whole number from 1")
    return int(text)


def _parquet(path: pathlib.Path, most: int) -> Iterator[tuple[int, str]]:
    scan = pl.scan_parquet(path, glob=False)
    schema = scan.collect_schema()
    require("item_id" in schema, f"no column item_id; its columns are {shown(schema.names())}")
    kind = schema["item_id"]
    require(kind == pl.String or kind.is_integer(), f"item_id is {shortened(str(kind), 40)}; text is expected")
    columns = ["item_id"] + ["index"] * ("index" in schema)
    rows = scan.select(columns).head(most).collect()
    require(not sum(rows.null_count().row(0)), "a row without an id")
    indices = map(_index, rows["index"]) if "index" in columns else range(1, rows.height + 1)
    yield from zip(indices, rows["item_id"].cast(pl.String), strict=True)
