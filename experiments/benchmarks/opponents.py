"""What ours is measured against: PyTorch, mamba_ssm and causal_conv1d, and mamba2-jax, each imported when it runs.

On a GPU the PyTorch forms of operators are also replayed as CUDA graphs.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import pathlib
import sys
import tarfile
import types
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.timing import Form, reason, require_finite, step_form, time_limit
from tim4rec_jax.config import ExperimentConfig

Apply = Callable[..., Any]
Arrays = Mapping[str, np.ndarray]
# Tuning of other people's kernels in a training step.
_TUNING_SECONDS = 90.0
# Positions that mamba_ssm handles densely at once.
_MAMBA_CHUNKS = (64, 256)


def require_torch() -> None:
    """Asks for PyTorch before anything is measured.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    if not importlib.util.find_spec("torch"):
        raise ModuleNotFoundError("PyTorch is the opponent of this benchmark and is not installed: pip install torch")


def torch_device(tiny: bool) -> tuple[str | None, str]:
    """Returns where PyTorch runs, or None and why not; tiny sizes run on the CPU as well."""
    if not importlib.util.find_spec("torch"):
        return None, "skipped: PyTorch is not installed"
    import torch

    if torch.cuda.is_available():
        return "cuda", ""
    return ("cpu", "") if tiny else (None, "skipped: PyTorch has no CUDA device here")


def import_from(package: str, module: str, name: str) -> Any:
    """Imports one function of a package, also where the package as a whole lacks a compiled extension of its own.

    Raises:
      ImportError: the module cannot be imported by itself either.
    """
    path = f"{package}.{module}" if module else package
    try:
        return getattr(importlib.import_module(path), name)
    except ImportError:
        found = importlib.util.find_spec(package)
        if found is None or not module:
            raise
        # A package made of Triton kernels and a CUDA extension that nobody has built: leave its __init__ out.
        bare = types.ModuleType(package)
        bare.__spec__ = found
        bare.__path__ = list(found.submodule_search_locations or [])
        sys.modules[package] = bare
        return getattr(importlib.import_module(path), name)


def offer_mamba_ssm(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Makes mamba_ssm importable from its source distribution or an unpacked folder; its CUDA extension is not needed.

    Args:
      path: the .tar.gz, or a folder that holds the folder mamba_ssm.
      folder: where a .tar.gz is unpacked.

    Raises:
      FileNotFoundError: there is no mamba_ssm in it.
    """
    if path.is_file():
        with tarfile.open(path) as packed:
            packed.extractall(folder, filter="data")
        path = folder
    found = next((place.parent.parent for place in sorted(path.rglob("mamba_ssm/__init__.py"))), None)
    if found is None:
        raise FileNotFoundError(f"{path} holds no folder mamba_ssm with Python files: give the package's source")
    sys.path.insert(0, str(found))


def _compile_candidates(tuner: Any, configs: list[Any], options: dict[str, Any]) -> None:
    """Compiles the candidates of a Triton kernel side by side; only a head start, so failures are left to the tuner."""
    import triton

    options = {name: value for name, value in options.items() if name != "warmup"}
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            for config in configs:
                tuner.fn.warmup(*tuner.nargs.values(), **options, **config.all_kwargs())
    except TimeoutError:
        raise
    except Exception as error:
        print(f"candidates of a Triton kernel are compiled one by one: {reason(error)}", file=sys.stderr)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def tuning_in_threads() -> Iterator[None]:
    """Lets Triton compile all candidates of a kernel before it times them; one by one that takes minutes."""
    if not importlib.util.find_spec("triton"):
        yield
        return
    from triton.runtime.autotuner import Autotuner

    choose = Autotuner.prune_configs

    def choose_and_compile(self: Any, options: dict[str, Any]) -> list[Any]:
        configs = choose(self, options)
        if len(configs) > 1:
            _compile_candidates(self, configs, options)
        return configs

    Autotuner.prune_configs = choose_and_compile
    try:
        yield
    finally:
        Autotuner.prune_configs = choose


def mamba2_jax_ssd(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any, *, chunk_size: int) -> jax.Array:
    """The package mamba2-jax, which has maps of its own for each head."""
    from mamba2_jax.modeling import ssd_forward

    B, C = (jnp.repeat(maps[:, :, None], x.shape[2], axis=2) for maps in (B, C))
    return ssd_forward(x, dt, A, B, C, chunk_size, D, dt_bias, 0.0, float("inf"))[0]


def torch_ssd(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any, *, chunk_size: int = 64) -> Any:
    """State space duality in chunked PyTorch."""
    import torch

    from experiments.benchmarks.torch_models.ssd import ssd_chunked

    delta = torch.nn.functional.softplus(dt + dt_bias)
    return ssd_chunked(x, delta, A, B[:, :, None], C[:, :, None], D=D, chunk_size=chunk_size)[0]


def torch_scan(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any) -> Any:
    """The selective scan, a PyTorch step per position."""
    import torch

    from experiments.benchmarks.torch_models.selective_scan import selective_scan_sequential

    delta = torch.nn.functional.softplus(dt + dt_bias)
    return selective_scan_sequential(x, delta, A, B, C, D=D)[0]


def _plain_loss(hidden: Any, embedding: Any, targets: Any) -> Any:
    import torch

    return torch.nn.functional.cross_entropy(hidden @ embedding.T, targets.long(), ignore_index=-1, reduction="none")


def _plain_conv(x: Any, weight: Any, bias: Any) -> Any:
    import torch

    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y = torch.nn.functional.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[1])
    return torch.nn.functional.silu(y[..., : x.shape[2]])


def _mamba_ssd(
    scan: Apply, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, *, chunk: int | None = None, **options: Any
) -> Any:
    """mamba_ssm's state space duality; chunks of 256 as usual, or less for shorter rows, unless told otherwise."""
    chunk = chunk or min(256, max(64, 1 << (x.shape[1] - 1).bit_length()))
    return scan(x, dt, A, B[:, :, None], C[:, :, None], chunk, D=D, **options)


def _mamba_scan(scan: Apply, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any) -> Any:
    return scan(x, dt, A, B, C, D=D, delta_bias=dt_bias, delta_softplus=True)


def _swap(a: Any) -> Any:
    return a.transpose(1, 2).contiguous()


def _candidates(op: str, precision: str) -> dict[str, Callable[[], tuple[Apply, tuple[str, ...]]]]:
    """Returns builders of functions of the inputs, with the names of those inputs that they take channels first."""
    if op == "ssd":

        def mamba(chunk: int) -> tuple[Apply, tuple[str, ...]]:
            if precision == "float32":
                raise ValueError("its kernels round float32 factors to TF32")
            scan = import_from("mamba_ssm", "ops.triton.ssd_combined", "mamba_chunk_scan_combined")
            return functools.partial(_mamba_ssd, scan, chunk=chunk, dt_softplus=True), ()

        def plain() -> tuple[Apply, tuple[str, ...]]:
            if precision == "bfloat16":
                raise ValueError("the plain form takes one dtype for all its arrays")
            return torch_ssd, ()

        chunks = {f"mamba_ssm, chunk {chunk}": functools.partial(mamba, chunk) for chunk in _MAMBA_CHUNKS}
        return chunks | {"PyTorch": plain}
    if op == "selective_scan":

        def scan_form() -> tuple[Apply, tuple[str, ...]]:
            scan = import_from("mamba_ssm", "ops.selective_scan_interface", "selective_scan_fn")
            return functools.partial(_mamba_scan, scan), ("x", "dt", "B", "C")

        return {"mamba_ssm": scan_form}
    if op == "causal_conv1d":

        def conv() -> tuple[Apply, tuple[str, ...]]:
            apply = import_from("causal_conv1d", "", "causal_conv1d_fn")
            return functools.partial(apply, activation="silu"), ("x", "weight")

        return {"causal_conv1d": conv, "PyTorch": lambda: (_plain_conv, ("x", "weight"))}
    return {"PyTorch": lambda: (_plain_loss, ())} if op == "softmax_cross_entropy" else {}


def _leaves(
    inputs: Arrays,
    fixed: Arrays,
    dy: np.ndarray,
    device: str,
    narrow: tuple[str, ...] = (),
    turned: tuple[str, ...] = (),
) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Returns inputs, fixed arrays and dy in the dtypes and the order of axes that the form takes."""
    import torch

    def tensor(name: str, a: np.ndarray) -> Any:
        result = torch.from_numpy(np.ascontiguousarray(a)).to(device)
        if name in narrow:
            result = result.to(torch.bfloat16)
        if name in turned:
            # x [b, l, c] to [b, c, l], and weights [K, c] to [c, K].
            result = result.transpose(-1, -2).contiguous()
        return result

    leaves = {name: tensor(name, a).requires_grad_() for name, a in inputs.items()}
    return leaves, {name: tensor(name, a) for name, a in fixed.items()}, tensor("x", dy)


def _passes(apply: Apply, inputs: Mapping[str, Any], fixed: Mapping[str, Any], dy: Any) -> dict[str, Apply]:
    import torch

    leaves = list(inputs.values())

    def forward() -> Any:
        with torch.no_grad():
            return apply(**inputs, **fixed)

    def both() -> Any:
        y = apply(**inputs, **fixed)
        return y, dict(zip(inputs, torch.autograd.grad(y, leaves, dy.to(y.dtype)), strict=True))

    return {"forward": forward, "forward_backward": both}


def torch_form(apply: Apply, inputs: Arrays, dy: np.ndarray) -> Form:
    """Returns a PyTorch function of float32 inputs, forward and backward on all cores of the CPU, as a form."""
    leaves, _, dy = _leaves(inputs, {}, dy, "cpu")
    return Form(_passes(apply, leaves, {}, dy)["forward_backward"], lambda _: None)


def _graph(launch: Callable[[], Any]) -> Callable[[], Any]:
    """Captures a launch as a CUDA graph and returns its replay, so that Python's own time is not measured."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            launch()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        kept = launch()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def _wait(device: str, _: Any) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def torch_forms(
    op: str,
    inputs: Arrays,
    fixed: Arrays,
    dy: np.ndarray,
    *,
    narrow: tuple[str, ...],
    precision: str,
    tiny: bool,
    limit: float,
) -> tuple[dict[str, dict[str, Form]], dict[str, np.ndarray], dict[str, str]]:
    """Builds all PyTorch forms of an operator.

    Args:
      op: its name.
      inputs, fixed, dy: float32 arrays that have gradients, integer arrays, and the gradient of the output.
      narrow: inputs that are bfloat16 where storage is.
      precision: float32 products as in the JAX forms, or bfloat16 storage.
      tiny: the CPU will do.
      limit: seconds for the first calls of a form, tuning of its kernels included.

    Returns:
      By name and pass the forms; by name y in our order of axes; and why others are missing.
    """
    device, refusal = torch_device(tiny)
    candidates = _candidates(op, precision)
    if device is None:
        return {}, {}, dict.fromkeys(candidates, refusal)
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "float32"
    forms, outputs, missing = {}, {}, {}
    for name, candidate in candidates.items():
        try:
            apply, turned = candidate()
            stored = narrow if precision == "bfloat16" else ()
            passes = _passes(apply, *_leaves(inputs, fixed, dy, device, stored, turned))
            with time_limit(limit), tuning_in_threads():
                y = passes["forward"]()
                passes["forward_backward"]()
            outputs[name] = (_swap(y) if "x" in turned else y).float().cpu().numpy()
        except Exception as error:  # Other people's kernels fail in their own ways; ours are timed all the same.
            missing[name] = reason(error)
            continue
        wait = functools.partial(_wait, device)
        forms[name] = {of: Form(launch, wait) for of, launch in passes.items()}
        if device == "cuda":
            try:
                forms[f"{name}, graph"] = {of: Form(_graph(launch), wait) for of, launch in passes.items()}
            except Exception as error:
                missing[f"{name}, graph"] = reason(error)
    return forms, outputs, missing


def torch_step(
    config: ExperimentConfig, device: str, *, precision: str = "float32", scan: Apply | None = None
) -> tuple[Callable[[tuple[Any, ...]], None], Callable[[Any], tuple[Any, ...]]]:
    """Builds the training step of the PyTorch model, with Adam.

    Args:
      config: whose model and learning rate.
      device: "cpu" or "cuda".
      precision: float32 products as in the JAX forms, or bfloat16 by autocasting.
      scan: mamba_ssm's state space duality, to take the place of the model's own.

    Returns:
      A function that makes one update and waits for its loss, and one that turns a batch into what it takes.
    """
    import torch

    from experiments.benchmarks.torch_models.tim4rec import TiM4Rec

    torch.manual_seed(config.train.seed)
    model = TiM4Rec(config.model).to(device).train()
    if scan is not None:
        for layer in model.ssd_layers:
            layer.ssd.scan.forward = functools.partial(_mamba_ssd, scan)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.train.learning_rate, fused=device == "cuda")
    narrow = torch.autocast(device, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()

    def tensors(batch: Any) -> tuple[Any, ...]:
        integers = (batch.items, batch.lengths, batch.targets)
        items, lengths, targets = (torch.from_numpy(np.asarray(a, np.int64)).to(device) for a in integers)
        return items, lengths, targets, torch.from_numpy(np.array(batch.timestamps)).to(device)

    def update(batch: tuple[Any, ...]) -> None:
        optimizer.zero_grad()
        with narrow:
            loss = model.loss(*batch)
        loss.backward()
        optimizer.step()
        require_finite(loss.item())

    return update, tensors


def torch_step_forms(
    config: ExperimentConfig, precision: str, batches: list[Any], tiny: bool
) -> tuple[dict[str, Form], dict[str, str]]:
    """Returns the PyTorch steps, plain and on mamba_ssm's kernels, and why one is missing."""
    names = ("PyTorch", "PyTorch on mamba_ssm")
    device, refusal = torch_device(tiny)
    if device is None:
        return {}, dict.fromkeys(names, refusal)
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "float32"
    forms, missing = {}, {}
    for name in names:
        try:
            scan = None
            if name.endswith("mamba_ssm"):
                scan = import_from("mamba_ssm", "ops.triton.ssd_combined", "mamba_chunk_scan_combined")
            update, tensors = torch_step(config, device, precision=precision, scan=scan)
            form = step_form(update, [tensors(batch) for batch in batches])
            with time_limit(_TUNING_SECONDS), tuning_in_threads():
                form.launch()
            forms[name] = form
        except Exception as error:  # Other people's kernels fail in their own ways; ours are timed all the same.
            missing[name] = reason(error)
    return forms, missing
