"""PyTorch checkpoint files: read without executing anything in them, and written."""

import pathlib
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from tim4rec_jax.files import replacing

# Earlier releases could be made to execute code in a file although weights_only was asked for (CVE-2025-32434).
_FIRST_SAFE = (2, 6)
_GLOBAL = re.compile(r"GLOBAL (\S+)")
# Names that only one of the original programs has; the first that matches decides.
_SIGNATURES = (
    ("TiM4Rec", re.compile(r"ssd_layers\.\d+\.ssd\.conv1d4time_")),
    ("SSD4Rec", re.compile(r"ssd_layers\.\d+\.ssd\.")),
    ("EchoMamba4Rec", re.compile(r"mamba_layers\.\d+\.(filter_layer|mamba_forwards|mamba_backwards)\.")),
    ("Mamba4Rec", re.compile(r"mamba_layers\.\d+\.mamba\.")),
    ("TiSASRec", re.compile(r"time_matrix_[KV]_emb\.")),
    ("SASRec", re.compile(r"trm_encoder\.layer\.\d+\.multi_head_attention\.")),
)


def _torch() -> ModuleType:
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "checkpoints of PyTorch need PyTorch, which is not installed: pip install torch"
        ) from None
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _FIRST_SAFE:
        raise ValueError(
            f"PyTorch {torch.__version__} cannot be trusted to read a file without executing code in it; "
            "install 2.6 or later: pip install --upgrade torch"
        )
    return torch


def recognise(names: Iterable[str]) -> str | None:
    """Returns the original program that names its parameters like this ("TiM4Rec", "SASRec", ...), or None."""
    names = list(names)
    return next((model for model, pattern in _SIGNATURES if any(map(pattern.match, names))), None)


def read_state_dict(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the parameters of a checkpoint file by their PyTorch names.

    Reads a state dict, or a RecBole checkpoint (a dict with "state_dict" beside other things). Nothing in the file is
    executed: what is more than tensors, numbers, strings and their containers is refused. Numbers of 16 bits come as
    float32.

    Args:
      path: a file that `torch.save` wrote.

    Raises:
      ModuleNotFoundError: PyTorch is not installed.
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, holds code or objects, or holds no state dict of floating-point tensors.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    content = _load(_torch(), path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds {_kind(content)}, where a state dict or a dict with 'state_dict' is expected")
    return _arrays(_torch(), path, content)


def _kind(content: Any) -> str:
    return "an empty dict" if content == {} else f"a {type(content).__name__}"


def _load(torch: ModuleType, path: pathlib.Path) -> Any:
    if zipfile.is_zipfile(path):
        _require_whole(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # Of formats that are refused right after, or read.
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # The bytes are anyone's: whatever their reader raises means that they cannot be read.
        if refused := _refused_objects(torch, path, str(error)):
            raise ValueError(_refusal(path, refused)) from None
        raise ValueError(
            f"{path} is not a checkpoint that PyTorch reads, or is cut short: {_first_line(error)}; fetch it again, or "
            "check that torch.save wrote it"
        ) from None


def _require_whole(path: pathlib.Path) -> None:
    """Compares every part with its checksum, which PyTorch does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}; fetch it again") from None
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the bytes of {damaged} do not match their checksum; fetch it again")


def _refused_objects(torch: ModuleType, path: pathlib.Path, message: str) -> list[str]:
    """Names what the file asks to import, without importing it; empty where that is not why it was refused."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # Older formats are not searched; the message names the first object.
        found = []
    return sorted(set(found)) or sorted({name.rstrip(".") for name in _GLOBAL.findall(message)})


def _refusal(path: pathlib.Path, refused: list[str]) -> str:
    reason = (
        f"{path} is refused: reading it would import and could execute {', '.join(refused)}; nothing of it was "
        "executed. Only tensors, numbers, strings and their containers are read"
    )
    if not any(name.startswith("recbole.") for name in refused):
        return reason
    return (
        f"{reason}.\nA RecBole checkpoint holds its settings as such an object. Where you trust the file, save its "
        "parameters alone and convert those:\n"
        "  import torch\n"
        f"  torch.save(torch.load({path.name!r}, map_location='cpu', weights_only=False)['state_dict'], "
        "'state_dict.pth')"
    )


def _first_line(error: Exception) -> str:
    """The reader's own words, without its advice to switch the safety off."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and "weights_only" not in line]
    if not told or isinstance(error, KeyError):
        return "its bytes are in another format"
    return told[0].partition(". ")[0]


def _arrays(torch: ModuleType, path: pathlib.Path, state: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    arrays, problems = {}, []
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            problems.append(f"{name!r} is a {type(value).__name__}, not a tensor under a name")
        elif not value.is_floating_point() or value.layout != torch.strided:
            problems.append(f"{name} is {value.dtype} ({value.layout}), not dense floating-point numbers")
        elif not torch.isfinite(value).all():
            problems.append(f"{name} holds numbers that are not finite")
        else:
            narrow = value.dtype not in (torch.float32, torch.float64)
            arrays[name] = (value.float() if narrow else value).detach().numpy()
    if problems:
        raise ValueError(f"{path} holds no state dict of a model:\n  " + "\n  ".join(problems))
    return arrays


def write_state_dict(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict by `torch.save`, as the original programs load it.

    Args:
      path: a file that is not there yet.
      arrays: parameters by their PyTorch names, see `params_to_torch`.

    Raises:
      ModuleNotFoundError: PyTorch is not installed.
      FileExistsError: the file is there.
    """
    torch, path = _torch(), pathlib.Path(path)
    if path.exists():
        raise FileExistsError(f"{path} is there already; choose another --output, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, temporary)
