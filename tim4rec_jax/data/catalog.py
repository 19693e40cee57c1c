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
      checksum: "md5:..." or "sha256:..." as published; None where the publisher gives none.
      licence: terms in one line.
      format: format of the log inside.
      log_file: name of the log inside the archive.
      expected: users, items and rows after 5-core; None where no published count is known.
    """

    name: str
    title: str
    address: str
    checksum: str | None
    licence: str
    format: LogFormat
    log_file: str
    expected: tuple[int, int, int] | None

    @property
    def file_name(self) -> str:
        """Name of the archive in the downloads folder."""
        return self.address.rpartition("/")[2]


_AMAZON_LICENCE = "no explicit licence; research use, cite McAuley et al. 2015 (https://jmcauley.ucsd.edu/data/amazon)"


def _movielens(name: str, title: str, md5: str, log_file: str, expected: tuple[int, int, int]) -> CatalogEntry:
    licence = (
        "research use; no redistribution and no commercial use without permission; acknowledge GroupLens "
        "(https://grouplens.org/datasets/movielens/)"
    )
    address = f"https://files.grouplens.org/datasets/movielens/{name}.zip"
    return CatalogEntry(name, title, address, f"md5:{md5}", licence, "movielens", log_file, expected)


def _recbole(name: str, title: str, path: str, licence: str, expected: tuple[int, int, int] | None) -> CatalogEntry:
    address = f"https://recbole.s3-accelerate.amazonaws.com/ProcessedDatasets/{path}"
    return CatalogEntry(
        name, f"{title}, as a RecBole atomic file", address, None, licence, "recbole", "*.inter", expected
    )


CATALOG: dict[str, CatalogEntry] = {
    entry.name: entry
    for entry in (
        _movielens("ml-1m", "MovieLens 1M", "c4d9eecfca2ab87c1945afe126590906", "ratings.dat", (6_040, 3_416, 999_611)),
        _movielens("ml-100k", "MovieLens 100K", "0e33842e24a9c977be4e0107933c0723", "u.data", (943, 1_349, 99_287)),
        _recbole(
            "beauty",
            "Amazon Beauty 2014, ratings",
            "Amazon_ratings/Amazon_Beauty.zip",
            _AMAZON_LICENCE,
            (22_363, 12_101, 198_502),
        ),
        _recbole(
            "videogames",
            "Amazon Video Games 2014, ratings",
            "Amazon_ratings/Amazon_Video_Games.zip",
            _AMAZON_LICENCE,
            (24_303, 10_672, 231_780),
        ),
        CatalogEntry(
            name="kuairand",
            title="KuaiRand-Pure, standard log of 8 to 21 April 2022",
            address="https://zenodo.org/records/10439422/files/KuaiRand-Pure.tar.gz",
            checksum="md5:0820331067a3784d9691136f772b35a7",
            licence="CC BY-SA 4.0; cite Gao et al. 2022 (https://kuairand.com)",
            format="kuairand",
            log_file="log_standard_4_08_to_4_21_pure.csv",
            expected=(23_951, 7_111, 1_134_420),
        ),
        _recbole(
            "steam",
            "Steam reviews, duplicates kept",
            "Steam/not-merged/steam.zip",
            "no explicit licence; research use, cite Kang & McAuley 2018 (https://cseweb.ucsd.edu/~jmcauley)",
            None,
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
        _download(entry, archive, console)
    else:
        _verify(archive, entry, console)
    return unpack(archive, folder, max_unpacked_gb)


def _download(entry: CatalogEntry, archive: pathlib.Path, console: Console) -> None:
    """Downloads an archive with a progress bar; `archive` appears only when it is complete and verified."""
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
