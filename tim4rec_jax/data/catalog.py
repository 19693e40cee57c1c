"""Known data sets: where they are published, their checksum, licence and expected size, and their download."""

import difflib
import hashlib
import http.client
import pathlib
import urllib.error
import urllib.request
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from tim4rec_jax.checks import require
from tim4rec_jax.data.sources import expanded, unpack
from tim4rec_jax.data_config import LogFormat
from tim4rec_jax.files import replacing

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class CatalogEntry:
    """A published data set.

    Attributes:
      name: what `data.name` calls it.
      title: full name.
      address: URL of the archive.
      file_name: name of the archive in the downloads folder.
      checksum: "md5:..." or "sha256:..." as published; None where the publisher gives none.
      licence: terms in one line.
      format: format of the log inside.
      log_file: name of the log inside the archive.
      expected: users, items and rows after 5-core; None where no published count is known.
    """

    name: str
    title: str
    address: str
    file_name: str
    checksum: str | None
    licence: str
    format: LogFormat
    log_file: str
    expected: tuple[int, int, int] | None


_MOVIELENS_LICENCE = (
    "research use; no redistribution and no commercial use without permission; acknowledge GroupLens "
    "(https://grouplens.org/datasets/movielens/)"
)
_AMAZON_LICENCE = "no explicit licence; research use, cite McAuley et al. 2015 (https://jmcauley.ucsd.edu/data/amazon)"
_RECBOLE = "https://recbole.s3-accelerate.amazonaws.com/ProcessedDatasets"

CATALOG: dict[str, CatalogEntry] = {
    entry.name: entry
    for entry in (
        CatalogEntry(
            name="ml-1m",
            title="MovieLens 1M",
            address="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
            file_name="ml-1m.zip",
            checksum="md5:c4d9eecfca2ab87c1945afe126590906",
            licence=_MOVIELENS_LICENCE,
            format="movielens",
            log_file="ratings.dat",
            expected=(6_040, 3_416, 999_611),
        ),
        CatalogEntry(
            name="ml-100k",
            title="MovieLens 100K",
            address="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
            file_name="ml-100k.zip",
            checksum="md5:0e33842e24a9c977be4e0107933c0723",
            licence=_MOVIELENS_LICENCE,
            format="movielens",
            log_file="u.data",
            expected=(943, 1_349, 99_287),
        ),
        CatalogEntry(
            name="beauty",
            title="Amazon Beauty 2014, ratings, as a RecBole atomic file",
            address=f"{_RECBOLE}/Amazon_ratings/Amazon_Beauty.zip",
            file_name="Amazon_Beauty.zip",
            checksum=None,
            licence=_AMAZON_LICENCE,
            format="recbole",
            log_file="*.inter",
            expected=(22_363, 12_101, 198_502),
        ),
        CatalogEntry(
            name="videogames",
            title="Amazon Video Games 2014, ratings, as a RecBole atomic file",
            address=f"{_RECBOLE}/Amazon_ratings/Amazon_Video_Games.zip",
            file_name="Amazon_Video_Games.zip",
            checksum=None,
            licence=_AMAZON_LICENCE,
            format="recbole",
            log_file="*.inter",
            expected=(24_303, 10_672, 231_780),
        ),
        CatalogEntry(
            name="kuairand",
            title="KuaiRand-Pure, standard log of 8 to 21 April 2022",
            address="https://zenodo.org/records/10439422/files/KuaiRand-Pure.tar.gz",
            file_name="KuaiRand-Pure.tar.gz",
            checksum="md5:0820331067a3784d9691136f772b35a7",
            licence="CC BY-SA 4.0; cite Gao et al. 2022 (https://kuairand.com)",
            format="kuairand",
            log_file="log_standard_4_08_to_4_21_pure.csv",
            expected=(23_951, 7_111, 1_134_420),
        ),
        CatalogEntry(
            name="steam",
            title="Steam reviews, duplicates kept, as a RecBole atomic file",
            address=f"{_RECBOLE}/Steam/not-merged/steam.zip",
            file_name="steam.zip",
            checksum=None,
            licence="no explicit licence; research use, cite Kang & McAuley 2018 (https://cseweb.ucsd.edu/~jmcauley)",
            format="recbole",
            log_file="*.inter",
            expected=None,
        ),
    )
}


def find_entry(name: str) -> CatalogEntry:
    """Looks a data set up.

    Raises:
      ValueError: for an unknown name; the message shows the nearest known ones.
    """
    if name in CATALOG:
        return CATALOG[name]
    known = [*CATALOG, "synthetic", "custom"]
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    raise ValueError(
        f"unknown data set {name!r}; {hint}known: {', '.join(known)} (for a file of your own set data.name=custom and "
        "data.path)"
    )


def expected_mismatch(name: str, users: int, items: int, rows: int) -> str | None:
    """Compares a log cleaned by 5-core with its published size.

    Returns:
      A sentence saying what differs; None where it agrees or no published size is known.
    """
    entry = CATALOG.get(name)
    if entry is None or entry.expected in (None, (users, items, rows)):
        return None
    published = " / ".join(f"{count:,}" for count in entry.expected)
    return (
        f"{name} has {users:,} / {items:,} / {rows:,} users / items / rows after 5-core; published are {published}: "
        "results on it do not compare with published ones"
    )


def fetch(
    name: str, cache_dir: str | pathlib.Path, console: Console | None = None, max_unpacked_gb: float | None = None
) -> pathlib.Path:
    """Returns the folder of a data set, downloading, verifying and unpacking it if need be.

    Args:
      name: data set of the catalog.
      cache_dir: keeps `downloads/<archive>` and `datasets/<name>/`.
      console: where progress and notes go; standard error by default.
      max_unpacked_gb: see `DataConfig`.

    Returns:
      The folder `cache_dir/datasets/<name>`.

    Raises:
      ValueError: for an unknown name, a wrong checksum, an unsafe archive, or a home folder that is not known.
      ConnectionError: if the download fails; the message says which file to put where.
    """
    entry = find_entry(name)
    console = console or Console(stderr=True)
    cache_dir = expanded(cache_dir)
    require(
        not str(cache_dir).startswith("~"),
        f"data.cache_dir={cache_dir}: no home folder is known (HOME is not set); set data.cache_dir to another folder",
    )
    folder = cache_dir / "datasets" / name
    if folder.is_dir():
        return folder
    archive = cache_dir / "downloads" / entry.file_name
    if not archive.is_file():
        note(console, f"{entry.title}: {entry.licence}")
        download(entry, archive, console)
    else:
        _verify(archive, entry, console)
    return unpack(archive, folder, max_unpacked_gb)


def download(entry: CatalogEntry, archive: pathlib.Path, console: Console) -> None:
    """Downloads an archive with a progress bar; `archive` appears only when it is complete and verified.

    Args:
      entry: what to download.
      archive: target file.
      console: where the progress bar goes.

    Raises:
      ValueError: for a wrong checksum.
      ConnectionError: if the server cannot be reached or the transfer stops early.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    try:
        with replacing(archive) as partial:
            with (
                partial.open("wb") as file,
                urllib.request.urlopen(entry.address, timeout=_TIMEOUT_SECONDS) as response,
                Progress(*columns, TimeRemainingColumn(), console=console) as progress,
            ):
                size = int(response.headers.get("Content-Length") or 0)
                task = progress.add_task(entry.file_name, total=size or None)
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    progress.advance(task, len(chunk))
                if size and file.tell() != size:
                    raise ConnectionError(f"the transfer stopped after {file.tell():,} of {size:,} bytes")
            _verify(partial, entry, console)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise ConnectionError(
            f"{entry.address} could not be downloaded ({error}); offline, put the file at {archive} and run again, or "
            f"set data.path to the log ({entry.log_file}) or its folder"
        ) from error


def _verify(archive: pathlib.Path, entry: CatalogEntry, console: Console) -> None:
    algorithm, _, wanted = (entry.checksum or "sha256:").partition(":")
    with archive.open("rb") as file:
        seen = hashlib.file_digest(file, algorithm).hexdigest()
    if not wanted:
        note(console, f"{entry.file_name}: sha256 {seen}; no published checksum is known, so it could not be verified")
    elif seen != wanted:
        raise ValueError(
            f"wrong checksum of {entry.file_name}: {algorithm} {seen} instead of {wanted}; it is not the published "
            f"{entry.title}. Remove {archive.parent / entry.file_name} if it is there and get it again from "
            f"{entry.address}"
        )


def note(console: Console, text: str) -> None:
    """Prints a sentence as it stands."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
