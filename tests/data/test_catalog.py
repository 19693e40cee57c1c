"""Downloads over a local server and from files: verified, atomic, unpacked safely; helpful when offline."""

import dataclasses
import functools
import hashlib
import http.server
import io
import tarfile
import threading
import zipfile

import pytest
from rich.console import Console

from tim4rec_jax.config import DataConfig
from tim4rec_jax.data import catalog
from tim4rec_jax.data.catalog import CATALOG, fetch, find_entry
from tim4rec_jax.data.interactions import load_log
from tim4rec_jax.data.sources import unpack

RATINGS = "".join(f"{user}::{item}::5::{1000 + item}\n" for user in range(5) for item in range(6))


def make_zip(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in entries.items():
            archive.writestr(name, text)
    return path


def md5(path):
    return "md5:" + hashlib.md5(path.read_bytes()).hexdigest()


def notes():
    return Console(file=io.StringIO(), width=1000)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Puts a tiny archive behind the name ml-1m and returns a function that changes its entry."""
    folder = tmp_path / "server"
    folder.mkdir()
    archive = make_zip(folder / "ml-1m.zip", {"ml-1m/ratings.dat": RATINGS, "ml-1m/movies.dat": "3::Three::X\n"})

    def change(**changes):
        monkeypatch.setitem(CATALOG, "ml-1m", dataclasses.replace(CATALOG["ml-1m"], **changes))
        return archive

    change(address=archive.as_uri(), checksum=md5(archive), expected=(5, 6, 30))
    return change


def test_the_catalog_is_complete():
    assert set(CATALOG) >= {"ml-1m", "ml-100k", "beauty", "videogames", "kuairand", "steam"}
    for name, entry in CATALOG.items():
        assert entry.name == name
        assert entry.address.startswith("https://") and entry.address.endswith(entry.file_name)
        assert entry.licence and entry.log_file
        algorithm, _, digest = (entry.checksum or "md5:" + 32 * "0").partition(":")
        assert len(digest) == hashlib.new(algorithm, usedforsecurity=False).digest_size * 2


def test_an_unknown_name_shows_the_nearest():
    with pytest.raises(ValueError) as error:
        find_entry("movielens-1m")
    assert "unknown data set 'movielens-1m'" in str(error.value) and "ml-1m" in str(error.value)
    with pytest.raises(ValueError, match="unknown data set 'beuty'; did you mean beauty"):
        find_entry("beuty")


def test_a_download_over_http_is_verified_unpacked_and_cleaned(tmp_path, published):
    archive = published()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=archive.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            published(address=f"http://127.0.0.1:{server.server_port}/ml-1m.zip")
            console = notes()
            log = load_log(DataConfig(name="ml-1m", cache_dir=str(tmp_path / "cache")), console)
        finally:
            server.shutdown()
            thread.join()
    assert (log.num_users, log.num_items, log.num_rows) == (5, 6, 30)
    assert log.titles.to_list() == [None, None, None, "Three", None, None]
    assert "MovieLens 1M: research use" in console.file.getvalue()
    assert "warning" not in console.file.getvalue()
    assert [p.name for p in (tmp_path / "cache" / "downloads").iterdir()] == ["ml-1m.zip"]
    published(address="http://127.0.0.1:9/gone")  # neither the server nor the archive is needed again
    (tmp_path / "cache" / "downloads" / "ml-1m.zip").unlink()
    assert fetch("ml-1m", tmp_path / "cache", console) == tmp_path / "cache" / "datasets" / "ml-1m"


def test_a_wrong_checksum_keeps_nothing(tmp_path, published):
    published(checksum="md5:" + 32 * "0")
    with pytest.raises(ValueError, match=r"wrong checksum of ml-1m\.zip: md5 [0-9a-f]{32} instead of 0{32}"):
        fetch("ml-1m", tmp_path / "cache", notes())
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []


def test_a_file_put_by_hand_is_verified_too(tmp_path, published):
    archive = published(address="http://127.0.0.1:9/ml-1m.zip")
    by_hand = tmp_path / "cache" / "downloads" / "ml-1m.zip"
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"wrong checksum of ml-1m\.zip.*Remove .*downloads/ml-1m\.zip"):
        fetch("ml-1m", tmp_path / "cache", notes())
    by_hand.write_bytes(archive.read_bytes())
    assert (fetch("ml-1m", tmp_path / "cache", notes()) / "ml-1m" / "ratings.dat").read_text() == RATINGS


def test_offline_says_which_file_to_put_where(tmp_path, published):
    published(address="http://127.0.0.1:9/ml-1m.zip")
    with pytest.raises(ConnectionError) as error:
        fetch("ml-1m", tmp_path, notes())
    message = str(error.value)
    assert "http://127.0.0.1:9/ml-1m.zip could not be downloaded" in message
    assert f"put the file at {tmp_path / 'downloads' / 'ml-1m.zip'}" in message
    assert "set data.path to the log (ratings.dat) or its folder" in message
    assert list((tmp_path / "downloads").iterdir()) == []


def test_an_interrupted_transfer_keeps_nothing(tmp_path, published):
    archive = published()

    class Short(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(archive.stat().st_size))
            self.end_headers()
            self.wfile.write(archive.read_bytes()[:100])

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Short) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        published(address=f"http://127.0.0.1:{server.server_port}/ml-1m.zip")
        with pytest.raises(ConnectionError, match="could not be downloaded"):
            fetch("ml-1m", tmp_path, notes())
        thread.join()
    assert list((tmp_path / "downloads").iterdir()) == []


def test_without_a_published_checksum_the_one_seen_is_reported(tmp_path, published):
    archive = published(checksum=None)
    console = notes()
    fetch("ml-1m", tmp_path, console)
    seen = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert f"ml-1m.zip: sha256 {seen}; no published checksum is known" in console.file.getvalue()


def test_the_kuairand_log_of_the_published_numbers_is_the_one_read(tmp_path, monkeypatch):
    header = "user_id,video_id,date,hourmin,time_ms,is_click\n"
    rows = "".join(f"{u},{v},20220408,400,{1_650_000_000_000 + v},{v % 2}\n" for u in range(5) for v in range(5))
    archive = tmp_path / "KuaiRand-Pure.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in (
            ("log_standard_4_08_to_4_21_pure.csv", header + rows),
            ("log_standard_4_22_to_5_08_pure.csv", header + "9,9,1,1,1,1\n"),
            ("log_random_4_22_to_5_08_pure.csv", header + "8,8,1,1,1,1\n"),
        ):
            info = tarfile.TarInfo(f"KuaiRand-Pure/data/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    entry = dataclasses.replace(CATALOG["kuairand"], address=archive.as_uri(), checksum=md5(archive))
    monkeypatch.setitem(CATALOG, "kuairand", entry)
    console = notes()
    log = load_log(DataConfig(name="kuairand", cache_dir=str(tmp_path / "cache")), console)
    assert (log.num_users, log.num_items, log.num_rows, log.statistics.rows_read) == (5, 5, 25, 25)
    assert set(log.timestamps.tolist()) == {1_650_000_000}
    assert "warning: kuairand has 5 / 5 / 25" in console.file.getvalue()
    folder = tmp_path / "cache" / "datasets" / "kuairand"
    by_path = load_log(DataConfig(name="kuairand", path=str(folder), cache_dir=str(tmp_path / "cache")), console)
    assert by_path.fingerprint == log.fingerprint
    custom = DataConfig(name="custom", path=str(folder), cache_dir=str(tmp_path / "cache"))
    assert load_log(custom, console).statistics.rows_read == 27


def test_a_download_without_its_log_is_refused(tmp_path, published):
    published(log_file="u.data")
    with pytest.raises(
        FileNotFoundError, match=r"holds 0 files u\.data where one is expected; delete the folder to unpack"
    ):
        load_log(DataConfig(name="ml-1m", cache_dir=str(tmp_path)), notes())


@pytest.mark.parametrize("name", ["../outside", "/absolute", "a/../../outside", "C:\\x", "..\\outside"])
def test_an_entry_that_climbs_out_is_refused(tmp_path, name):
    make_zip(tmp_path / "bad.zip", {"fine.txt": "x", name: "evil"})
    with pytest.raises(ValueError, match="would leave the folder it is unpacked into; nothing was unpacked"):
        unpack(tmp_path / "bad.zip", tmp_path / "out" / "data")
    assert list((tmp_path / "out").iterdir()) == []
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("fine.txt"))
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(ValueError, match="would leave the folder"):
        unpack(tmp_path / "bad.tar.gz", tmp_path / "out" / "data")
    assert list((tmp_path / "out").iterdir()) == []


def test_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / "link.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("data")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
    with pytest.raises(ValueError, match="entry 'data' is no plain file; links are not unpacked"):
        unpack(tmp_path / "link.tar.gz", tmp_path / "out")
    link = zipfile.ZipInfo("data")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    make_zip(tmp_path / "link.zip", {link: "/etc"})
    with pytest.raises(ValueError, match="entry 'data' is no plain file; links"):
        unpack(tmp_path / "link.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_archive_is_refused(tmp_path):
    whole = make_zip(tmp_path / "a.zip", {"x": "1" * 1000}).read_bytes()
    (tmp_path / "a.zip").write_bytes(whole[:200])
    with pytest.raises(ValueError, match="is not a complete zip archive"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(catalog.__file__, "catalog.py")
    (tmp_path / "a.tar.gz").write_bytes((tmp_path / "a.tar.gz").read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a complete tar archive"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    assert not (tmp_path / "out").exists()
