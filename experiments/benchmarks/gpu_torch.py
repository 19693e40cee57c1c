"""The same operators in PyTorch: plain, by the kernels of mamba_ssm and causal_conv1d, and replayed as CUDA graphs."""

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from experiments.benchmarks.gpu_cases import OPERATORS, Case, Values
from experiments.benchmarks.gpu_clock import Form, reason, time_limit

Apply = Callable[..., Any]


def device(tiny: bool) -> tuple[str | None, str]:
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


def _plain_loss(hidden: Any, embedding: Any, targets: Any) -> Any:
    import torch

    return torch.nn.functional.cross_entropy(hidden @ embedding.T, targets.long(), ignore_index=-1, reduction="none")


def _plain_conv(x: Any, weight: Any, bias: Any) -> Any:
    import torch

    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y = torch.nn.functional.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[1])
    return torch.nn.functional.silu(y[..., : x.shape[2]])


def _mamba_ssd(scan: Apply, chunk: int, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any) -> Any:
    return scan(x, dt, A, B[:, :, None], C[:, :, None], chunk, D=D, dt_bias=dt_bias, dt_softplus=True)


def _mamba_scan(scan: Apply, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any) -> Any:
    return scan(x, dt, A, B, C, D=D, delta_bias=dt_bias, delta_softplus=True)


def _swap(a: Any) -> Any:
    return a.transpose(1, 2).contiguous()


def _candidates(case: Case, precision: str) -> dict[str, Callable[[], tuple[Apply, tuple[str, ...]]]]:
    """Returns builders of functions of the inputs, with the names of those inputs that they take channels first."""
    if case.op == "ssd":
        from experiments.benchmarks.ops import torch_ssd

        def mamba() -> tuple[Apply, tuple[str, ...]]:
            if precision == "float32":
                raise ValueError("its kernels round float32 factors to TF32")
            scan = import_from("mamba_ssm", "ops.triton.ssd_combined", "mamba_chunk_scan_combined")
            # Its usual chunk, or less for shorter rows.
            chunk = min(256, max(64, 1 << (case.sizes["l"] - 1).bit_length()))
            return functools.partial(_mamba_ssd, scan, chunk), ()

        def plain() -> tuple[Apply, tuple[str, ...]]:
            if precision == "bfloat16":
                raise ValueError("the plain form takes one dtype for all its arrays")
            return torch_ssd, ()

        return {"mamba_ssm": mamba, "PyTorch": plain}
    if case.op == "selective_scan":

        def scan_form() -> tuple[Apply, tuple[str, ...]]:
            scan = import_from("mamba_ssm", "ops.selective_scan_interface", "selective_scan_fn")
            return functools.partial(_mamba_scan, scan), ("x", "dt", "B", "C")

        return {"mamba_ssm": scan_form}
    if case.op == "causal_conv1d":

        def conv() -> tuple[Apply, tuple[str, ...]]:
            apply = import_from("causal_conv1d", "", "causal_conv1d_fn")
            return functools.partial(apply, activation="silu"), ("x", "weight")

        return {"causal_conv1d": conv, "PyTorch": lambda: (_plain_conv, ("x", "weight"))}
    return {"PyTorch": lambda: (_plain_loss, ())} if case.op == "softmax_cross_entropy" else {}


def _leaves(case: Case, values: Values, precision: str, place: str, turned: tuple[str, ...]) -> tuple[Any, ...]:
    """Returns inputs, fixed arrays and dy in the dtypes and the order of axes that the form takes."""
    import torch

    operator = OPERATORS[case.op]
    narrow = operator.stored if precision == "bfloat16" else ()

    def tensor(name: str, a: np.ndarray) -> Any:
        result = torch.from_numpy(np.ascontiguousarray(a)).to(place)
        if name in narrow:
            result = result.to(torch.bfloat16)
        if name in turned:
            # x [b, l, c] to [b, c, l], and weights [K, c] to [c, K].
            result = result.transpose(-1, -2).contiguous()
        return result

    inputs = {name: tensor(name, a).requires_grad_() for name, a in values.inputs.items()}
    fixed = {name: tensor(name, a) for name, a in values.fixed.items()}
    return inputs, fixed, tensor("x", values.dy)


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


def _wait(place: str, _: Any) -> None:
    import torch

    if place == "cuda":
        torch.cuda.synchronize()


def _passes(apply: Apply, inputs: Any, fixed: Any, dy: Any) -> dict[str, Callable[[], Any]]:
    import torch

    leaves = list(inputs.values())

    def forward() -> Any:
        with torch.no_grad():
            return apply(**inputs, **fixed)

    def both() -> Any:
        y = apply(**inputs, **fixed)
        return y, torch.autograd.grad(y, leaves, dy.to(y.dtype))

    return {"forward": forward, "forward_backward": both}


def torch_forms(
    case: Case, values: Values, precision: str, *, tiny: bool, limit: float
) -> tuple[dict[str, dict[str, Form]], dict[str, np.ndarray], dict[str, str]]:
    """Builds all PyTorch forms of a case.

    Args:
      case: which operator.
      values: drawn float32 arrays.
      precision: float32 products as in the JAX forms, or bfloat16 storage.
      tiny: the CPU will do.
      limit: seconds for the first calls of a form, tuning of its kernels included.

    Returns:
      By name and pass the forms; by name y in our order of axes; and why others are missing.
    """
    place, refusal = device(tiny)
    candidates = _candidates(case, precision)
    if place is None:
        return {}, {}, dict.fromkeys(candidates, refusal)
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "float32"
    forms, outputs, missing = {}, {}, {}
    for name, candidate in candidates.items():
        try:
            apply, turned = candidate()
            inputs, fixed, dy = _leaves(case, values, precision, place, turned)
            passes = _passes(apply, inputs, fixed, dy)
            with time_limit(limit), tuning_in_threads():
                y = passes["forward"]()
                passes["forward_backward"]()
            outputs[name] = (_swap(y) if "x" in turned else y).float().cpu().numpy()
        except Exception as error:  # Other people's kernels fail in their own ways; ours are timed all the same.
            missing[name] = reason(error)
            continue
        wait = functools.partial(_wait, place)
        forms[name] = {of: Form(launch, wait) for of, launch in passes.items()}
        if place == "cuda":
            try:
                forms[f"{name}, graph"] = {of: Form(_graph(launch), wait) for of, launch in passes.items()}
            except Exception as error:
                missing[f"{name}, graph"] = reason(error)
    return forms, outputs, missing
