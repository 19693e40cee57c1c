"""Checkpoints of a run: arrays written by Orbax in the background, sealed by a manifest, committed by one rename.

    checkpoints/latest/000007_step_400/arrays/        Orbax: one dict, path in the tree joined by "." -> array
    checkpoints/latest/000007_step_400/manifest.json  step, progress, id of the run, shapes and dtypes, size and
                                                      SHA-256 of every file
    checkpoints/best/...

Orbax restores an array chunk with flipped bits without a word (its checksums cover the index, not the values), so
every file is hashed when it is written and again before it is read. The leading number counts saves: the newest
checkpoint is the one with the highest number, even after training went back to an earlier step.
"""

import collections
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tim4rec_jax.files import sync_folder, write_atomically
from tim4rec_jax.json_files import read_sealed, sealed
from tim4rec_jax.models import STATISTICS
from tim4rec_jax.run_manifest import identity
from tim4rec_jax.training.array_files import as_text, describe, read_arrays, write_arrays

PyTree = Any
FORMAT_VERSION = 1
# Leaves that an error names.
SHOWN_DIFFERENCES = 3
KEEP = {"latest": 2, "best": 1}
_NAME = re.compile(r"(\d{6,})_step_(\d+)")
_UNFINISHED, _DELETED = ".unfinished-", ".deleted-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those present can be read."""


class _Damaged(Exception):
    """Says what is wrong with the files of one checkpoint."""


class Leaf(NamedTuple):
    """One array on the host; `key_impl` names the generator if it is the data of typed PRNG keys."""

    data: np.ndarray
    shape: tuple[int, ...]
    dtype: str
    key_impl: str | None


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves by their paths in the tree, joined by "."; of a tree that is one leaf, it is "value".

    Raises:
      ValueError: two paths give one name.
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "value"
        if name in named:
            raise ValueError(f"two leaves of the tree are both named {name!r}; rename one")
        named[name] = leaf
    return named


def leaves_on_host(tree: PyTree) -> dict[str, Leaf]:
    """Returns copies of the leaves in the host's memory, by name.

    Args:
      tree: arrays of any dtype, typed PRNG keys too, and Python numbers.

    Raises:
      ValueError: a leaf is neither an array nor a number.
    """
    named = named_leaves(tree)
    arrays = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in named.items()}
    leaves = {}
    for name, array in jax.device_get(jax.tree.map(_parts_together, arrays)).items():
        # A view of a CPU array would keep its buffer from being donated; a NumPy leaf may be overwritten in place.
        data = np.array(array, copy=True)
        if data.dtype.hasobject or data.dtype.kind in "USMm":
            raise ValueError(f"leaf {name} of type {type(named[name]).__name__} is neither an array nor a number")
        key_impl = str(jax.random.key_impl(named[name])) if _is_key(named[name]) else None
        leaves[name] = Leaf(data, *describe(named[name]), key_impl)
    return leaves


def _parts_together(array: Any) -> Any:
    """Returns an array whose parts lie on the devices of several processes, all of them also on this one's, whole."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return array
    host = np.empty(array.shape, array.dtype)
    for shard in {str(shard.index): shard for shard in array.addressable_shards}.values():
        host[shard.index] = shard.data
    return host


class Checkpointer:
    """Keeps the two newest training states and the best parameters of a run.

    Saves are copied to the host before the call returns and written by one background thread in the order of the
    calls. Call `save_best` before the `save_latest` whose progress speaks of that best: a kill between the two then
    never leaves a progress that promises a best checkpoint which is not there.

    Args:
      directory: folder of the checkpoints, in the folder of their run; made at the first save.
      report: receives a line for every checkpoint that had to be passed over.
      write: save; off in all but one of several processes that hold the same state.
    """

    def __init__(self, directory: pathlib.Path, *, report: Callable[[str], None] = print, write: bool = True) -> None:
        self._saves = write
        self._directory = pathlib.Path(directory).absolute()
        self._report = report
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: collections.deque[Future[None]] = collections.deque()
        self._failed = False
        self._damaged: set[pathlib.Path] = set()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, exc_type: type | None, *_: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if exc_type is None:
                raise
            self._report(str(error))  # raising here would hide the error that ended the run

    def save_latest(self, step: int, state: PyTree, progress: Mapping[str, Any]) -> None:
        """Saves the training state; the two newest are kept.

        Args:
          step: optimiser steps done.
          state: tree of arrays (any dtype, typed PRNG keys too) and Python numbers; may be donated right after.
          progress: where training stands, JSON values only.

        Raises:
          CheckpointError: an earlier save failed; this one was then not begun.
          ValueError: `progress` or a leaf cannot be stored.
        """
        self._save("latest", step, state, progress)

    def save_best(self, step: int, params: PyTree, info: Mapping[str, Any]) -> None:
        """Saves the best parameters; the best before goes once these are complete. See `save_latest`."""
        self._save("best", step, params, info)

    def wait(self) -> None:
        """Returns when every save is on disk; raises CheckpointError if one failed (those queued were not begun)."""
        self._settle(0)

    def settle_elsewhere(self) -> None:
        """Returns when the saves that were queued are on disk; may be called while another thread saves.

        Raises:
          CheckpointError: one of them failed.
        """
        self._writer.submit(lambda: None).result()
        for saved in list(self._pending):
            saved.result()

    def close(self) -> None:
        """Waits for every save and stops the background thread; raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def restore_latest(self, template: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Returns step, state and progress of the newest intact checkpoint, or None where none was ever finished.

        Args:
          template: tree of arrays, `jax.ShapeDtypeStruct`s or numbers; gives structure, shapes, dtypes and placement.
            What it has under `STATISTICS`, and a checkpoint of an earlier version has not, is returned as it is.

        Raises:
          ValueError: the checkpoint's tree does not fit, or it is another run's.
          CheckpointError: checkpoints are there but none is intact.
        """
        return self._restore("latest", template)

    def restore_best(self, template: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Returns step, parameters and info of the best checkpoint, or None. See `restore_latest`."""
        return self._restore("best", template)

    def _save(self, kind: str, step: int, tree: PyTree, info: Mapping[str, Any]) -> None:
        if not _survives_json(dict(info)):
            raise ValueError(
                f"checkpoint of step {step}: {dict(info)!r} does not survive JSON; use finite numbers, strings, lists, "
                "None and dicts with string keys"
            )
        if not self._saves:
            return
        self._settle(1)  # at most one save waits, so a slow disk cannot fill the memory with copies
        leaves = leaves_on_host(tree)
        self._pending.append(self._writer.submit(self._write, kind, int(step), leaves, dict(info)))

    def _settle(self, at_most: int) -> None:
        try:
            while len(self._pending) > at_most:
                self._pending[0].result()
                self._pending.popleft()
        except Exception:
            self._writer.submit(lambda: None).result()  # those queued behind the failed one have now passed
            self._pending.clear()
            self._failed = False
            raise

    def _write(self, kind: str, step: int, leaves: dict[str, Leaf], info: dict[str, Any]) -> None:
        if self._failed:
            return
        folder = self._directory / kind
        try:
            _write_checkpoint(folder, step, leaves, info)
            _prune(folder, KEEP[kind], self._damaged)
        except Exception as error:
            self._failed = True
            raise CheckpointError(_failure_message(folder, step, leaves, error)) from error

    def _restore(self, kind: str, template: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        self.wait()
        folder = self._directory / kind
        wanted = {name: as_text(*describe(leaf)) for name, leaf in named_leaves(template).items()}
        problems: dict[pathlib.Path, str] = {}
        # Listed anew each time: a run that is still training may replace checkpoints while we read.
        while path := next((path for path in _committed(folder) if path not in problems), None):
            try:
                manifest = _verified_manifest(path)
                _require_own(path, manifest.get("run"), identity(self._directory.parent))
                _require_fit(path, manifest["leaves"], wanted)
                tree = _read_tree(path, manifest, template)
            except Exception as error:
                if path.exists() and not isinstance(error, _Damaged):
                    raise
                problems[path] = str(error)
                continue
            self._report_passed_over(folder, path, problems)
            return manifest["step"], tree, manifest["info"]
        if damaged := {path: reason for path, reason in problems.items() if path.exists()}:
            reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
            raise CheckpointError(f"no checkpoint in {folder} is intact ({reasons}); remove the folder to start anew")
        self._report_passed_over(folder, None, {})
        return None

    def _report_passed_over(self, folder: pathlib.Path, used: pathlib.Path | None, problems: dict) -> None:
        instead = f"using {used} instead" if used else "there is no other"
        for path, reason in problems.items():
            if path.exists():  # else it was replaced while we read
                self._damaged.add(path)
                self._report(f"checkpoint {path} is damaged ({reason}); {instead}")
        for path in _entries(folder, _UNFINISHED):
            if used is None or _number(path) > _number(used):
                self._report(f"checkpoint {path} was never finished; {instead}")


def _survives_json(values: Any) -> bool:
    try:
        return json.loads(json.dumps(values, allow_nan=False)) == values
    except (TypeError, ValueError):
        return False


def _entries(folder: pathlib.Path, prefix: str = "") -> list[pathlib.Path]:
    found = folder.glob(f"{prefix}[0-9]*") if folder.is_dir() else ()
    return [path for path in found if _NAME.fullmatch(path.name.removeprefix(prefix))]


def _number(path: pathlib.Path) -> int:
    return int(re.findall(r"\d+", path.name)[0])


def _committed(folder: pathlib.Path) -> list[pathlib.Path]:
    """Checkpoints that were renamed into place, newest first."""
    return sorted(_entries(folder), key=_number, reverse=True)


def _write_checkpoint(folder: pathlib.Path, step: int, leaves: dict[str, Leaf], info: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + max(map(_number, _entries(folder) + _entries(folder, _UNFINISHED)), default=0)
    for leftover in (*folder.glob(f"{_UNFINISHED}*"), *folder.glob(f"{_DELETED}*")):
        _remove(leftover)
    path = folder / f"{number:06d}_step_{step}"
    unfinished = folder / f"{_UNFINISHED}{path.name}"
    if _bytes_of(leaves) > shutil.disk_usage(folder).free:
        raise OSError("not enough free space")
    unfinished.mkdir()
    try:
        # Orbax refuses empty arrays and an empty tree; the manifest says enough to make them again.
        if arrays := {name: leaf.data for name, leaf in leaves.items() if leaf.data.size}:
            write_arrays(unfinished, arrays)
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "run": identity(folder.parent.parent),
            "info": info,
            "leaves": {name: leaf._asdict() | {"data": leaf.data.shape} for name, leaf in leaves.items()},
            "files": {
                file.relative_to(unfinished).as_posix(): {"size": file.stat().st_size, "sha256": _flush_and_hash(file)}
                for file in sorted(unfinished.rglob("*"))
                if file.is_file()
            },
        }
        write_atomically(unfinished / "manifest.json", json.dumps(sealed(manifest), indent=1, allow_nan=False).encode())
        for inner in unfinished.rglob("*"):
            if inner.is_dir():
                sync_folder(inner)
        os.rename(unfinished, path)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _remove(leftover: pathlib.Path) -> None:
    if leftover.is_symlink():
        leftover.unlink()
    else:
        shutil.rmtree(leftover)


def _prune(folder: pathlib.Path, keep: int, damaged: set[pathlib.Path]) -> None:
    """Removes all but the newest `keep` checkpoints; a damaged one does not count as kept."""
    intact = [path for path in _committed(folder) if path not in damaged]
    for path in set(_committed(folder)) - set(intact[:keep]):
        trash = folder / f"{_DELETED}{path.name}"
        os.rename(path, trash)  # first out of sight: a kill in the middle of the removal leaves no torn checkpoint
        sync_folder(folder)
        _remove(trash)


def _bytes_of(leaves: dict[str, Leaf]) -> int:
    return sum(leaf.data.nbytes for leaf in leaves.values())


def _failure_message(folder: pathlib.Path, step: int, leaves: dict[str, Leaf], error: Exception) -> str:
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    kept = [f"The checkpoint before, {path.name}, is kept." for path in _committed(folder)[:1]]
    # The file within the folder says less than its name takes room.
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return (
        f"the checkpoint of step {step} could not be saved in {folder}: {reason}. It needs about "
        f"{_bytes_of(leaves) / 1e6:.1f} MB, {free / 1e6:.1f} MB are free there. "
        + (*kept, "There is no checkpoint before it.")[0]
    )


def _flush_and_hash(file: pathlib.Path) -> str:
    with file.open("r+b") as stream:
        os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _verified_manifest(path: pathlib.Path) -> dict[str, Any]:
    """Returns the manifest after every file was found to be as it was written."""
    try:
        manifest = read_sealed(path / "manifest.json")
    except (OSError, ValueError) as error:
        changed = "not as it was written"
        raise _Damaged(f"manifest.json is {changed if changed in str(error) else 'missing or not readable'}") from None
    if manifest["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {manifest['format_version']}, this program reads format {FORMAT_VERSION}; "
            "use the version of the program that wrote it"
        )
    for name, written in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise _Damaged(f"{name} is missing")
        if (size := file.stat().st_size) != written["size"]:
            raise _Damaged(f"{name} has {size} bytes instead of {written['size']}")
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != written["sha256"]:
                raise _Damaged(f"the bytes of {name} have changed")
    return manifest


def _require_own(path: pathlib.Path, saved_by: Any, run: dict[str, Any] | None) -> None:
    if saved_by != run:
        raise ValueError(
            f"checkpoint {path} belongs to another run than the files in the run folder; put back the checkpoints and "
            "files that were made together"
        )


def _require_fit(path: pathlib.Path, saved: dict[str, Any], wanted: dict[str, str]) -> None:
    stored = {name: as_text(leaf["shape"], leaf["dtype"]) for name, leaf in saved.items()}
    differences = [
        f"{name}: {stored.get(name, 'absent')} in the checkpoint, {wanted.get(name, 'absent')} in this program"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name) and not (name not in stored and name.startswith(f"{STATISTICS}."))
    ]
    if differences:
        raise ValueError(
            f"checkpoint {path} belongs to other settings; {len(differences)} of {len(stored.keys() | wanted.keys())} "
            f"leaves differ: {', '.join(differences[:SHOWN_DIFFERENCES])}"
        )


def _read_tree(path: pathlib.Path, manifest: dict[str, Any], template: PyTree) -> PyTree:
    # np.empty is not touched and so costs no memory; numpy leaves make Orbax return numpy arrays.
    saved = manifest["leaves"]
    dtypes = {name: "uint32" if leaf["key_impl"] else leaf["dtype"] for name, leaf in saved.items()}
    hosts = {name: np.empty(saved[name]["data"], dtype) for name, dtype in dtypes.items()}
    if wanted := {name: host for name, host in hosts.items() if host.size}:
        hosts |= read_arrays(path, wanted)
    leaves = [
        placed(hosts[name], leaf, saved[name]["key_impl"]) if name in saved else leaf
        for name, leaf in named_leaves(template).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def placed(host: np.ndarray, like: Any, key_impl: str | None) -> Any:
    """Puts a restored array where the template's leaf lies.

    Args:
      host: the array, or the data of typed PRNG keys.
      like: the leaf: a Python number, a NumPy or JAX array, or a `jax.ShapeDtypeStruct`.
      key_impl: name of the generator, if these are keys.
    """
    if isinstance(like, bool | int | float | complex) and not isinstance(like, np.generic):
        return host.item()
    if isinstance(like, np.ndarray | np.generic):
        return host[()] if isinstance(like, np.generic) else host
    # An array that was bound to no device must stay so, or the step is compiled a second time.
    sharding = like.sharding if getattr(like, "committed", True) else None
    if key_impl is None:
        return jax.device_put(host, sharding)
    return jax.device_put(jax.random.wrap_key_data(jax.device_put(host), impl=key_impl), sharding)
