"""Files that appear whole or not at all, the leftovers of killed writers, and one writer at a time."""

import errno
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from tim4rec_jax import files
from tim4rec_jax.files import locked, replacing, replacing_folder, sync_folder, write_atomically

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Begins to write what it is told, says so, and waits to be killed.
_WRITER = """
import pathlib, sys
from tim4rec_jax import files
with getattr(files, sys.argv[1])(pathlib.Path(sys.argv[2])) as temporary:
    if temporary is not None and not temporary.is_dir():
        temporary.write_bytes(b"half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def _writer(kind: str, path: pathlib.Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, kind, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def _end(process: subprocess.Popen, number: int | None = signal.SIGKILL) -> None:
    if number is not None:
        process.send_signal(number)
    process.communicate()


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path):
    file = tmp_path / "a.txt"
    write_atomically(file, b"old")
    write_atomically(file, b"new")
    assert file.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_error_in_the_body_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.txt"
    write_atomically(file, b"old")
    with pytest.raises(ValueError, match="not this"), replacing(file) as temporary:
        temporary.write_bytes(b"half")
        raise ValueError("not this")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_refused_write_names_the_file(tmp_path):
    file = tmp_path / "a.txt"
    with pytest.raises(OSError, match="a.txt") as caught, replacing(file):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(FileNotFoundError, match="absent/a.txt"):
        write_atomically(tmp_path / "absent" / "a.txt", b"")


def test_pipes_and_devices_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(os.devnull)
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match=f"is no regular file.*{name}"):
            write_atomically(tmp_path / name, b"new")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a.txt", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "[0.1]", "a\\b", "a\nb", ".hidden"])
def test_any_name_of_the_file_system_can_be_written(tmp_path, name):
    with locked(tmp_path / name):
        write_atomically(tmp_path / name, b"new")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("kind", ["replacing", "replacing_folder"])
def test_what_killed_writers_left_goes_with_the_next_write_and_what_is_being_written_stays(tmp_path, kind):
    target = tmp_path / "a"
    for _ in range(3):
        _end(_writer(kind, target))
    assert len(os.listdir(tmp_path)) >= 1
    alive = _writer(kind, target)
    being_written = set(os.listdir(tmp_path))
    assert len(being_written) == 1, "the writer that began last removed what the killed ones left"
    if kind == "replacing":
        write_atomically(target, b"new")
    else:
        with replacing_folder(target) as folder:
            (folder / "inner").write_bytes(b"new")
    assert set(os.listdir(tmp_path)) == being_written | {"a"}
    _end(alive)


def test_names_of_temporary_files_cannot_be_foreseen_and_links_are_not_followed(tmp_path):
    names = set()
    for _ in range(3):
        with replacing(tmp_path / "a") as temporary:
            names.add(temporary.name)
    assert len(names) == 3
    assert all(str(os.getpid()) != name.split(".")[2] for name in names)


def test_a_file_of_another_name_is_no_leftover(tmp_path):
    others = [".a.tmp", ".a.0123456789abcdef.tmp.txt", ".ab.0123456789abcdef.tmp", "a.0123456789abcdef.tmp"]
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    write_atomically(tmp_path / "a", b"")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "a"])


def test_a_folder_appears_whole(tmp_path):
    with replacing_folder(tmp_path / "made") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_bytes(b"x")
        assert not (tmp_path / "made").exists()
    assert (tmp_path / "made" / "inner" / "file").read_bytes() == b"x"
    assert os.listdir(tmp_path) == ["made"]
    with pytest.raises(OSError, match="made"), replacing_folder(tmp_path / "made"):
        pass
    assert os.listdir(tmp_path) == ["made"]


def test_renames_are_synced(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    write_atomically(tmp_path / "a", b"x")
    assert synced[-1] == str(tmp_path)
    assert len(synced) == 2
    sync_folder(tmp_path)
    assert synced[2:] == [str(tmp_path)]


def test_a_second_writer_is_refused_in_one_line_that_names_the_first(tmp_path):
    holder = _writer("locked", tmp_path / "run")
    refused = rf"run is being written by another process \({holder.pid}\)"
    with pytest.raises(ValueError, match=refused) as caught, locked(tmp_path / "run"):
        pass
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
    _end(holder, None)
    with locked(tmp_path / "run"), pytest.raises(ValueError, match=str(os.getpid())), locked(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path) == []


def test_the_lock_of_a_killed_process_blocks_nobody(tmp_path):
    _end(_writer("locked", tmp_path / "run"))
    assert os.listdir(tmp_path) == ["run.lock"]
    with locked(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", [b"[[package]]\nname = 'theirs'\n", b"12345\n", None])
def test_what_others_keep_under_the_name_of_a_lock_is_not_lost(tmp_path, content):
    theirs = tmp_path / "run.lock"
    os.mkfifo(theirs) if content is None else theirs.write_bytes(content)
    with pytest.raises(ValueError, match="run.lock is no lock of this program.*move it away"), locked(tmp_path / "run"):
        pass
    assert theirs.is_fifo() if content is None else theirs.read_bytes() == content


def test_a_lock_that_cannot_be_made_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent/run.lock"), locked(tmp_path / "absent" / "run"):
        pass


@pytest.mark.parametrize("replace", [replacing, replacing_folder])
def test_what_another_writer_took_for_a_leftover_is_made_anew(tmp_path, monkeypatch, replace):
    flock, taken = files.fcntl.flock, []

    def after_a_removal(descriptor, how):
        if not taken:
            (temporary,) = tmp_path.iterdir()
            taken.append(temporary)
            files._remove(temporary)
        flock(descriptor, how)

    monkeypatch.setattr(files.fcntl, "flock", after_a_removal)
    with replace(tmp_path / "x") as temporary:
        assert temporary.exists() and [temporary] != taken
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
