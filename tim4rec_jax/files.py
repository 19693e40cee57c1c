"""Files and folders that appear whole or not at all, outlive a kill and a power cut, and have one writer at a time."""

import contextlib
import errno
import fcntl
import os
import pathlib
import re
import secrets
import shutil
import stat
from collections.abc import Iterator

import polars as pl

# What Linux and macOS allow a name to have, in bytes.
_LONGEST_NAME = 255


@contextlib.contextmanager
def named_in_errors(path: pathlib.Path) -> Iterator[None]:
    """Raises what the operating system refuses in the body with the name of the file or folder."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # Not the operating system's: its message is all there is.
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def replacing(file: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty temporary file beside `file` that takes its place at the end, or is removed if the body raises.

    What processes that were killed left behind for the same file goes first.

    Raises:
      OSError: what could not be written is named; also where Polars says it in its own way, and where a device, a
        pipe or a socket has that name, which stays.
    """
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise OSError(errno.EINVAL, "is no regular file; choose another place", str(file))
    with temporary_beside(file, folder=False) as temporary:
        try:
            yield temporary
        except pl.exceptions.ComputeError as error:
            if (number := re.search(r"os error (\d+)", str(error))) is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
        with temporary.open("r+b") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, file)


@contextlib.contextmanager
def replacing_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty temporary folder beside `folder` that gets its name at the end; see `replacing`.

    Raises:
      OSError: what could not be written is named; also where `folder` is there by then and is not empty.
    """
    with temporary_beside(folder, folder=True) as temporary:
        yield temporary
        for written in sorted(temporary.rglob("*")):
            if written.is_dir():
                sync_folder(written)
            else:
                with written.open("r+b") as stream:
                    os.fsync(stream.fileno())
        sync_folder(temporary)
        os.rename(temporary, folder)


def write_atomically(file: pathlib.Path, content: bytes) -> None:
    """Writes a file such that readers, a kill and a power cut at any moment see the old content or the new."""
    with replacing(file) as temporary:
        temporary.write_bytes(content)


def sync_folder(folder: pathlib.Path) -> None:
    """Makes renames in a folder outlive a power cut, where the file system knows how."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # Network file systems may not offer it.
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _stem(name: str) -> str:
    """What the temporary names of a file begin with, short enough for any file system."""
    return "." + name.encode()[: _LONGEST_NAME - 32].decode(errors="ignore") + "."


@contextlib.contextmanager
def temporary_beside(path: pathlib.Path, *, folder: bool) -> Iterator[pathlib.Path]:
    """Yields a new file or folder beside `path`, removed at the end; see `replacing`."""
    stem = _stem(path.name)
    with contextlib.ExitStack() as stack, named_in_errors(path):
        remove_leftovers(path)
        temporary, descriptor = _locked_temporary(path, stem, folder=folder)
        stack.callback(os.close, descriptor)
        stack.callback(_remove, temporary)
        yield temporary
        sync_folder(path.parent)


def _locked_temporary(path: pathlib.Path, stem: str, *, folder: bool) -> tuple[pathlib.Path, int]:
    """Makes a temporary file or folder and its lock, held while this process lives, which tells it from a leftover."""
    while True:
        # A name that nobody can foresee, and O_EXCL: no link that lies there already is followed.
        temporary = path.with_name(f"{stem}{secrets.token_hex(8)}.tmp")
        if folder:
            temporary.mkdir()
        with contextlib.suppress(*[FileNotFoundError] if folder else []):
            flags = os.O_RDONLY | os.O_DIRECTORY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL
            descriptor = os.open(temporary, flags | os.O_CLOEXEC, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(temporary)):
                    return temporary, descriptor
            os.close(descriptor)  # Another writer took it for a leftover before it was locked.


def remove_leftovers(path: pathlib.Path) -> None:
    """Removes the temporary files and folders that killed writers of `path` left beside it."""
    stem = _stem(path.name)
    for name in os.listdir(path.parent):
        if not (name.startswith(stem) and re.fullmatch(r"[0-9a-f]{16}\.tmp", name[len(stem) :])):
            continue
        leftover = path.with_name(name)
        # Of another user, or gone by now: not ours to remove.
        with contextlib.suppress(OSError), _held(leftover) as free:
            if free:
                _remove(leftover)


@contextlib.contextmanager
def _held(path: pathlib.Path) -> Iterator[bool]:
    """Takes the lock of a file or folder for the body; yields whether nobody else has it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _remove(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError):  # On a read-only disk there is nothing to remove.
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Holds the only right to write a file or folder, which need not be there yet, until the body ends.

    The lock is the file `<path>.lock`, which names its holder and is removed at the end. It ends with the process that
    holds it, however that ends; one left behind by a kill blocks nobody.

    Raises:
      ValueError: another process has it, or another place in this one; the message names the process. Also where a
        file of that name is no lock: it stays as it is.
      OSError: the lock cannot be made.
    """
    path = pathlib.Path(path).absolute()
    short = path.name.encode()[: _LONGEST_NAME - len(".lock")].decode(errors="ignore")
    file = path.with_name(f"{short}.lock")
    with named_in_errors(file):
        descriptor = _locked_file(path, file)
    try:
        with named_in_errors(file):
            _require_lock(path, file, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    try:
        with named_in_errors(file):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()  # Before it is let go: whoever opened it by then sees that it is no longer the file.
        os.close(descriptor)


def _require_lock(path: pathlib.Path, file: pathlib.Path, descriptor: int) -> None:
    """Refuses what somebody else keeps under the lock's name, which would be lost."""
    ours = stat.S_ISREG(os.fstat(descriptor).st_mode)
    if not ours or re.fullmatch(rb"[0-9]{0,20}", os.pread(descriptor, 21, 0)) is None:
        raise ValueError(
            f"{file} is no lock of this program, which would write it beside {path.name}; move it away, "
            "or choose another place"
        )


def _locked_file(path: pathlib.Path, file: pathlib.Path) -> int:
    """Returns a descriptor that holds the lock of the file that `file` names at that moment."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise ValueError(
                f"{path} is being written by another process ({holder}); wait until it ends, stop it, or choose "
                "another place"
            ) from None
        except FileNotFoundError:
            pass  # The holder before ended in between and took the file with it.
        os.close(descriptor)
