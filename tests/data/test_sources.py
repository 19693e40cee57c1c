"""Archives and packed files that lie, are locked, climb or swell: one line, and nothing left behind."""

import gzip
import io
import os
import tarfile
import tracemalloc
import zipfile

import pytest
from rich.console import Console

from tests.data.test_odd_input import LOG, loaded, refused
from tests.data.test_readers import RECBOLE
from tim4rec_jax.data import sources
from tim4rec_jax.data.catalog import fetch
from tim4rec_jax.data.sources import Source, unpack


def pack(path, data):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("log.inter", data)


@pytest.mark.parametrize("name", ["log.inter.gz", "log.zip"])
def test_what_unpacks_to_too_much_is_refused_before_it_is_held(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sources, "_FREE", 2**22)
    path, size = tmp_path / name, 100_000_000
    pack(path, LOG.encode() + b"u\ta\t1\n" * (size // 6))
    tracemalloc.start()
    assert "GB; if that is right, set data.max_unpacked_gb" in refused(path)
    assert tracemalloc.get_traced_memory()[1] < 0.8 * size
    tracemalloc.stop()
    pack(path, LOG.encode() + b"u\ta\t1\n" * 300_000)
    with pytest.raises(ValueError, match="more than 0.001 GB"):
        loaded(path, max_unpacked_gb=0.001)
    assert loaded(path, max_unpacked_gb=0.01)[0].num_rows == 300_003


def test_an_archive_that_unpacks_to_too_much_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_FREE", 2**22)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("big")
        info.size = 10_000_000
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    pack(tmp_path / "a.zip", bytes(2_000_000))
    for name, limit in (("a.tar.gz", None), ("a.tar.gz", 0.005), ("a.zip", 0.001)):
        with pytest.raises(ValueError, match="if that is right, set data.max_unpacked_gb"):
            unpack(tmp_path / name, tmp_path / "out", limit)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz", "a.zip"]


def zip_bytes(*entries, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, text in entries:
            archive.writestr(name, text)
    return bytearray(buffer.getvalue())


def broken_zip(how):
    data = zip_bytes(("log.inter", LOG), method=zipfile.ZIP_LZMA if how == "lzma" else zipfile.ZIP_STORED)
    directory = data.rfind(b"PK\x01\x02")
    if how == "encrypted":
        data[6] |= 1
        data[directory + 8] |= 1
    elif how == "method":
        data[8] = data[directory + 10] = 99
    elif how == "shorter":
        data[directory + 24 : directory + 28] = (20).to_bytes(4, "little")
    elif how == "longer":
        data[directory + 20 : directory + 28] = 2 * (2**31 - 1).to_bytes(4, "little")
    elif how == "checksum":
        data[directory + 16] ^= 1
    elif how == "lzma":
        data[60:80] = bytes(20)
    elif how == "double":
        data = zip_bytes(("log.inter", LOG), ("log.inteR", LOG))
        data = data.replace(b"log.inteR", b"log.inter")
    elif how == "file and folder":
        data = zip_bytes(("log.inter", LOG), ("log.inter/log.inter", LOG))
    return bytes(data)


@pytest.mark.parametrize("how", ["encrypted", "method", "shorter", "longer", "checksum", "lzma", "double"])
def test_a_zip_that_lies_or_is_locked_is_refused(tmp_path, how):
    path = tmp_path / "log.zip"
    path.write_bytes(broken_zip(how))
    message = refused(path)
    assert ("twice" if how == "double" else "is damaged") in message and "log.zip" in message
    if how == "encrypted":
        assert "password" in message


@pytest.mark.parametrize(
    "how", ["encrypted", "method", "shorter", "longer", "checksum", "lzma", "double", "file and folder"]
)
def test_a_downloaded_zip_that_lies_or_is_locked_is_refused(tmp_path, how):
    archive = tmp_path / "downloads" / "Amazon_Beauty.zip"
    archive.parent.mkdir()
    archive.write_bytes(broken_zip(how))
    with pytest.raises(ValueError, match=r"Amazon_Beauty\.zip (is not a complete zip archive|holds entry .* twice)"):
        fetch("beauty", tmp_path, Console(file=io.StringIO()))
    assert list((tmp_path / "datasets").iterdir()) == []


def test_a_tar_with_a_device_or_a_broken_end_is_refused(tmp_path):
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        device = tarfile.TarInfo("null")
        device.type = tarfile.CHRTYPE
        archive.addfile(device)
    with pytest.raises(ValueError, match="entry 'null' is no plain file"):
        unpack(path, tmp_path / "out")
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("log.inter")
        info.size = 100_000
        archive.addfile(info, io.BytesIO(os.urandom(info.size)))
    whole = path.read_bytes()
    for data in (whole[:-8] + bytes(8), whole[:-2000], whole[:50_000] + b"x" * 9 + whole[50_009:], b"", b"<html>"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is not a complete tar archive"):
            unpack(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]


def test_two_processes_may_unpack_at_once(tmp_path):
    pack(tmp_path / "a.zip", b"x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "there").write_text("already")
    assert unpack(tmp_path / "a.zip", tmp_path / "out") == tmp_path / "out"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["there"]


def test_a_source_names_long_entries_short(tmp_path):
    name = "d/" * 500 + "log.inter"
    (tmp_path / "a.zip").write_bytes(bytes(zip_bytes((name, RECBOLE.split("\n")[0] + "\n"))))
    assert "holds no rows" in refused(tmp_path / "a.zip")
    assert len(str(Source(tmp_path / "a.zip", name))) < len(str(tmp_path)) + 110
