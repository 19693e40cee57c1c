"""PyTorch checkpoint files: read without PyTorch and without executing anything in them, and written."""

import io
import math
import os
import pathlib
import re
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tim4rec_jax.checks import listed, require, shortened, shown
from tim4rec_jax.files import replacing
from tim4rec_jax.interop.torch_pickle import Call, CodeRefusedError, Name, Names, Persistent, read_pickle, read_pickles

# Under this name a state dict's metadata say which items its rows stand for; PyTorch passes over what it does not know.
_OURS = "tim4rec_jax"
# Names that only one of the original programs has; the first that matches decides.
_SIGNATURES = (
    ("TiM4Rec", re.compile(r"ssd_layers\.\d+\.ssd\.conv1d4time_")),
    ("SSD4Rec", re.compile(r"ssd_layers\.\d+\.ssd\.")),
    ("EchoMamba4Rec", re.compile(r"mamba_layers\.\d+\.(filter_layer|mamba_forwards|mamba_backwards)\.")),
    ("Mamba4Rec", re.compile(r"mamba_layers\.\d+\.mamba\.")),
    ("TiSASRec", re.compile(r"time_matrix_[KV]_emb\.")),
    ("SASRec", re.compile(r"trm_encoder\.layer\.\d+\.multi_head_attention\.")),
)
# Where programs keep the state dict in what they save.
_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "net", "module")
# What wrappers put before every name: DataParallel, Lightning and the like, torch.compile.
_PREFIXES = ("module.", "model.", "_orig_mod.", "net.")
_DTYPES = {
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(jnp.bfloat16),
}
# How files of torch.save before release 1.6 begin: a pickle of a number that nothing else begins with.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_MOST_PICKLED = 64 * 2**20
_MOST_DIMENSIONS = 8
_LARGEST = float(np.finfo(np.float32).max)


class StateDict(NamedTuple):
    """What a checkpoint file holds of a model.

    Attributes:
      arrays: float32 and float64 parameters by their PyTorch names, wrappers' prefixes taken off.
      notes: lines on what was taken off or passed over.
      items_digest: `item_ids.digest` of the raw ids of the item table's rows; None where the file does not say.
    """

    arrays: dict[str, np.ndarray]
    notes: list[str]
    items_digest: str | None


def recognise(names: Iterable[str]) -> str | None:
    """Returns the original program that names its parameters like this ("TiM4Rec", "SASRec", ...), or None."""
    names = list(names)
    return next((model for model, pattern in _SIGNATURES if any(map(pattern.match, names))), None)


def require_file(path: pathlib.Path, kind: str) -> None:
    """Refuses what is not a file of bytes, such as a folder, a pipe or a device, without opening it.

    Raises:
      FileNotFoundError: there is nothing.
      ValueError: there is something else.
    """
    name = shortened(str(path), 120)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({getattr(error, 'strerror', None) or error})"
        raise FileNotFoundError(f"there is no {kind} {name}{reason}") from None
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"))
        what = next((words for test, words in kinds if test(mode)), "no file on a disk")
        raise ValueError(f"{name} is {what}, where a {kind} is expected")


def read_state_dict(path: pathlib.Path) -> StateDict:
    """Returns the parameters of a checkpoint file.

    Reads a state dict, or a dict that has one under a usual name ("state_dict", "model_state_dict", "model", ...)
    beside other things, in the formats of torch.save since release 0.4. Nothing in the file is executed or imported,
    and no more memory is taken than a few times its size. Numbers of 16 bits come as float32.

    Args:
      path: a file that `torch.save` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, names code or objects, or holds no state dict of finite floating-point tensors.
    """
    path = pathlib.Path(path)
    require_file(path, "checkpoint file")
    name = shortened(str(path), 100)
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            content, storage = (_open_zip if zipfile.is_zipfile(stream) else _open_legacy)(stream, size)
            state = _find_state(content)
            return _state_dict(state, storage, size)
    except CodeRefusedError as error:
        raise ValueError(_refusal(path, str(error))) from None
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name}: {shortened(str(error), 180)}") from None


def _refusal(path: pathlib.Path, refused: str) -> str:
    name = shortened(path.name, 30)
    code = shown(refused, 60)[1:-1]
    reason = f"reading {name} would import and could execute {code}; nothing of it was executed"
    if not refused.startswith("recbole."):
        return f"{reason}. Only tensors, numbers, strings and their containers are read"
    file = shortened(path.name, 30)
    return (
        f"{reason}. If you trust it: python -c \"import torch; torch.save(torch.load({file!r}, 'cpu', "
        "weights_only=False)['state_dict'], 'state_dict.pth')\""
    )


# Gives so many bytes of the storage of a key.
_Storage = Callable[[str, int], bytes]


def _open_zip(stream: Any, size: int) -> tuple[Any, _Storage]:
    stream.seek(0)
    try:
        archive = zipfile.ZipFile(stream)
    except Exception as error:  # The bytes are anyone's: whatever their reader raises means that they cannot be read.
        raise ValueError(f"is damaged: {error}; fetch it again") from None
    entries = {entry.filename: entry for entry in archive.infolist()}
    found = [entry for entry in entries if entry.endswith("/data.pkl")]
    prefix = found[0].removesuffix("data.pkl") if found else ""
    if len(found) != 1 or prefix + "constants.pkl" in entries or any("/code/" in entry for entry in entries):
        raise ValueError("is no checkpoint of torch.save (TorchScript, or another zip file); save model.state_dict()")
    packed = [entry for entry in entries.values() if entry.compress_type != zipfile.ZIP_STORED]
    total = sum(entry.file_size for entry in archive.infolist())
    require(
        not packed and total <= size and len(entries) == len(archive.infolist()),
        f"its {len(archive.infolist())} parts would unpack to {total:,} bytes, the file has {size:,} (torch.save never "
        "compresses): damaged or made to harm; save it again",
    )
    require(entries[found[0]].file_size <= _MOST_PICKLED, f"data.pkl has more than {_MOST_PICKLED:,} bytes")

    def part(name: str) -> bytes:
        require(name in entries, f"is damaged: {shown(name)} is missing; fetch it again")
        try:
            return archive.read(name)  # Checks the checksum, which PyTorch does not.
        except Exception as error:
            raise ValueError(f"is damaged: {error}; the bytes do not match their checksum: fetch it again") from None

    order = prefix + "byteorder"
    require(order not in entries or part(order) == b"little", "was written on a big-endian machine; save it on another")

    def storage(key: str, length: int) -> bytes:
        content = part(f"{prefix}data/{key}")
        require(length <= len(content), f"is damaged: part data/{shown(key, 20)} is cut short")
        return content

    return read_pickle(io.BytesIO(part(found[0]))), storage


def _open_legacy(stream: Any, size: int) -> tuple[Any, _Storage]:
    stream.seek(0)
    content = stream.read(_MOST_PICKLED)
    if content[257:262] == b"ustar":
        raise ValueError("is of a PyTorch before 0.2 (tar); load it there and save it with a later one")
    if not content.startswith(_LEGACY):
        raise ValueError(
            "is not a checkpoint that PyTorch reads, or is cut short (its bytes are in another format); fetch it "
            "again, or check that torch.save wrote it"
        )
    (_, version, system, described, keys), end = read_pickles(content, 5)
    require(version == 1001, f"is of the checkpoint format {shown(version)}, where 1001 is read")
    little = system.get("little_endian") if isinstance(system, dict) else None
    require(little is True, "was written on a big-endian machine; save it on another")
    require(isinstance(keys, list) and all(isinstance(key, str) for key in keys), "is damaged: its list of storages")
    # Storages follow each other; how long one is in bytes, only a tensor that uses it tells.
    widths = _widths(described)
    places = {}
    for key in keys:
        stream.seek(end)
        count = int.from_bytes(stream.read(8), "little", signed=True)
        require(key in widths and 0 <= count * widths[key] <= size - end - 8, "is cut short, or damaged")
        places[key] = (end + 8, count * widths[key])
        end += 8 + count * widths[key]

    def storage(key: str, length: int) -> bytes:
        require(key in places and length <= places[key][1], "is damaged: a tensor's numbers are missing")
        stream.seek(places[key][0])
        return stream.read(length)

    return described, storage


# Bytes of one number in the storages of PyTorch.
_WIDTHS = {
    "Double": 8,
    "Float": 4,
    "Half": 2,
    "BFloat16": 2,
    "Long": 8,
    "Int": 4,
    "Short": 2,
    "Char": 1,
    "Byte": 1,
    "Bool": 1,
    "ComplexFloat": 8,
    "ComplexDouble": 16,
    "QInt8": 1,
    "QUInt8": 1,
    "QInt32": 4,
    "Untyped": 1,
}


def _widths(described: Any) -> dict[str, int]:
    """Bytes of one number of every storage that anything in the pickle refers to."""
    widths, seen, waiting = {}, set(), [described]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Persistent):
            kind, key, _ = _reference(value)
            widths[key] = _WIDTHS.get(kind.rpartition(".")[2].removesuffix("Storage"), 1)
        elif isinstance(value, Call):
            waiting += [value.function, value.arguments]
        elif isinstance(value, Names):
            waiting += [*value.values(), value.attributes]
        elif isinstance(value, list | tuple):
            waiting += value
    return widths


def _reference(storage: Any) -> tuple[str, str, int]:
    """Storage class, key and number of elements that a tensor refers to."""
    key = storage.key if isinstance(storage, Persistent) else None
    if not (
        isinstance(key, tuple)
        and len(key) in (5, 6)
        and key[0] == "storage"
        and isinstance(key[1], Name)
        and isinstance(key[2], str)
        and _count(key[4])
        and (len(key) == 5 or key[5] is None)
    ):
        raise ValueError("is damaged, or of a PyTorch before 0.4: a tensor without a storage")
    return key[1].path, key[2], key[4]


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(member, Call) for member in value.values())


def _find_state(content: Any) -> dict[Any, Any]:
    """The state dict in what was saved: itself, or under one of the usual names."""
    state = content
    for _ in range(4):
        inner = [state[key] for key in _KEYS if isinstance(state, dict) and isinstance(state.get(key), dict)]
        if not inner:
            break
        state = next(filter(_holds_tensors, inner), inner[0])
    if isinstance(state, dict) and state:
        return state
    kind = (
        "an empty dict"
        if state == {}
        else "a " + {Names: "dict", Call: "tensor or another object"}.get(type(state), type(state).__name__)
    )
    raise ValueError(f"holds {kind}, where a state dict or a dict with 'state_dict' is expected")


def _state_dict(state: dict[Any, Any], storage: _Storage, size: int) -> StateDict:
    arrays, problems, total = {}, [], 0
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Call):
            kind = "dict" if isinstance(value, dict) else type(value).__name__.lower()
            known = isinstance(name, str | int | bytes) or name is None
            problems.append(f"{shown(name) if known else 'an object'} is a {kind}, not a tensor under a name")
            continue
        try:
            array = _array(value, storage)
        except _NoNumbersError as error:
            problems.append(f"{shown(name)[1:-1]} {error}")
            continue
        # A file could name the same numbers over and over.
        total += array.nbytes
        require(total <= 8 * size, f"its tensors would take more than {total:,} bytes, the file has {size:,}")
        if not (np.abs(array) <= _LARGEST).all():
            problems.append(f"{shown(name)[1:-1]} holds numbers that are not finite as float32")
        arrays[name] = array
    if problems:
        raise ValueError(f"holds no state dict of a model: {listed(problems, 130)}")
    notes, metadata = [], getattr(state, "attributes", None)
    for _ in range(3):
        if prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in arrays)), None):
            arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
            notes.append(f"taken off all names: {prefix}")
    return StateDict(arrays, notes, _items_digest(metadata))


def _items_digest(attributes: Any) -> str | None:
    metadata = attributes.get("_metadata") if isinstance(attributes, dict) else None
    ours = metadata.get(_OURS) if isinstance(metadata, dict) else None
    if ours is None:
        return None
    digest = ours.get("item_ids_sha256") if isinstance(ours, dict) else None
    require(isinstance(digest, str), "is damaged: what it says of its item ids")
    return digest


class _NoNumbersError(ValueError):
    """Something of a state dict that is no tensor of real numbers."""


def _array(value: Any, storage: _Storage) -> np.ndarray:
    """Returns a tensor's numbers, after its extent was compared with what is stored."""
    path, arguments = "", ()
    for _ in range(3):  # Parameters and subclasses wrap the call that makes the tensor.
        path = value.function.path if isinstance(value, Call) and isinstance(value.function, Name) else ""
        arguments = value.arguments if path and isinstance(value.arguments, tuple) else ()
        if path.startswith("torch._utils._rebuild_parameter") and arguments:
            value = arguments[0]
        elif path == "torch._tensor._rebuild_from_type_v2" and len(arguments) == 4:
            value = Call(arguments[0], arguments[2])
        else:
            break
    if path == "torch._utils._rebuild_tensor_v3" and len(arguments) > 6 and isinstance(arguments[6], Name):
        raise _NoNumbersError(f"is of {arguments[6].path}, where float32, float64, float16 and bfloat16 are read")
    if path not in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2") or len(arguments) < 4:
        raise _NoNumbersError(f"is no dense tensor ({path.rpartition('.')[2] or 'another object'})")
    if len(arguments) > 6 and arguments[6]:
        raise _NoNumbersError("is a view that negates or conjugates; save a clone of it")
    kind, key, held = _reference(arguments[0])
    if kind not in _DTYPES:
        raise _NoNumbersError(f"is of {kind}, where float32, float64, float16 and bfloat16 are read")
    offset, shape, strides = arguments[1:4]
    sizes = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= _MOST_DIMENSIONS
    if not sizes or not all(map(_count, (offset, *shape, *strides))):
        raise _NoNumbersError("has a shape that no tensor has")
    count, last = math.prod(shape), offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if not 0 < count <= held or last >= held:
        raise _NoNumbersError(f"has {shown(shape, 40)} numbers, of which {shown(held)} are stored")
    dtype = _DTYPES[kind]
    stored = storage(key, held * dtype.itemsize)
    steps = tuple(step * dtype.itemsize for step in strides)
    array = np.ndarray(shape, dtype, stored, offset * dtype.itemsize, steps)
    return np.array(array, np.float64 if dtype.itemsize == 8 else np.float32)


def write_state_dict(path: pathlib.Path, arrays: Mapping[str, np.ndarray], items_digest: str) -> None:
    """Writes a state dict by `torch.save`, as the original programs load it.

    Args:
      path: the file; takes the place of one that is there.
      arrays: parameters by their PyTorch names, see `params_to_torch`.
      items_digest: kept in the state dict's metadata, see `StateDict`.

    Raises:
      ModuleNotFoundError: PyTorch is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "writing a checkpoint of PyTorch needs PyTorch, which is not installed: pip install torch"
        ) from None
    state: Any = OrderedDict((name, torch.from_numpy(np.array(array))) for name, array in arrays.items())
    state._metadata = OrderedDict({"": {"version": 1}, _OURS: {"item_ids_sha256": items_digest}})
    # A stream has no name that PyTorch would write into the file: the same parameters give the same bytes.
    with replacing(path) as temporary, temporary.open("wb") as stream:
        torch.save(state, stream)
