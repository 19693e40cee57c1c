"""What instructions compute: name -> (type of the result, types of the operands, function of arrays [32])."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {f"{kind}{8 * size}": np.dtype(f"{code}{size}") for size in (1, 2, 4, 8) for kind, code in ("bu", "uu", "si")}
DTYPES |= {"pred": np.dtype(bool), "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}
DTYPES |= {"bf16": np.dtype(ml_dtypes.bfloat16)}
UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
_Operation = tuple[str, tuple[str, ...], Callable[..., np.ndarray]]
OPERATIONS: dict[str, _Operation] = {}


def _define(name: str, result: str, operands: str, function: Callable[..., np.ndarray]) -> None:
    OPERATIONS[name] = result, tuple(operands.split()), function


def _flushed(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _flush(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def flushing(*operands: np.ndarray) -> np.ndarray:
        result = function(*(_flushed(a) if a.dtype == np.float32 else a for a in operands))
        return _flushed(result) if result.dtype == np.float32 else result

    return flushing


def _sum_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, rounded so that rounding it again to float32 is as rounding the exact sum once."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    even = total.view(np.uint64) & 1 == 0
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where((error != 0) & np.isfinite(error) & even, np.nextafter(total, toward), total)


def _rounded(exact: np.ndarray, mode: str) -> np.ndarray:
    """float64 to float32: to the nearest (rn), down (rm), up (rp) or towards zero (rz)."""
    near = exact.astype(np.float32)
    if mode == "rn":
        return near
    if mode == "rz":
        return np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near)
    limit, past = (-np.inf, near > exact) if mode == "rm" else (np.inf, near < exact)
    return np.where(past, np.nextafter(near, np.float32(limit)), near)


def _wide(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A function of float64, of float32 operands, rounded to float32."""
    return lambda *operands: function(*(a.astype(np.float64) for a in operands)).astype(np.float32)


def _fma(mode: str) -> Callable[..., np.ndarray]:
    def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return _rounded(_sum_to_odd(a.astype(np.float64) * b, c.astype(np.float64)), mode)

    return fma


def _add(mode: str) -> Callable[..., np.ndarray]:
    return lambda a, b: _rounded(_sum_to_odd(a.astype(np.float64), b.astype(np.float64)), mode)


def _shift(a: np.ndarray, by: np.ndarray, *, left: bool) -> np.ndarray:
    """Shifts by the width or more leave zeros, or signs."""
    width = 8 * a.dtype.itemsize
    short = np.minimum(by, width - 1).astype(a.dtype)
    shifted = a << short if left else a >> short
    emptied = 0 if left or a.dtype.kind == "u" else a >> a.dtype.type(width - 1)
    return np.where(by < width, shifted, emptied).astype(a.dtype)


def _extract(a: np.ndarray, first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """`bfe`: a field of bits, extended by its sign if a is signed."""
    first, count = (b.astype(np.int64) & 255 for b in (first, count))
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    left = np.clip(64 - first - count, 0, 63).astype(wide)
    field_ = (a.astype(wide) << left) >> np.clip(64 - count, 0, 63).astype(wide)
    return np.where(count == 0, 0, field_).astype(a.dtype)


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    pool = np.stack([a, b], axis=1).view(np.uint8)
    nibbles = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
    chosen = np.take_along_axis(pool, (nibbles & 7).astype(np.int64), axis=1)
    signs = np.where(chosen & 128, 255, 0)
    return np.where(nibbles & 8, signs, chosen).astype(np.uint8).view(np.uint32)[:, 0]


def _to_tf32(a: np.ndarray) -> np.ndarray:
    """The nearest number with 10 bits of mantissa; ties go away from zero."""
    bits = a.view(np.uint32)
    return np.where(np.isfinite(a), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)


def _pair(dtype: str) -> Callable[..., np.ndarray]:
    def pack(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        high, low = (a.astype(DTYPES[dtype]).view(np.uint16).astype(np.uint32) for a in (high, low))
        return high << np.uint32(16) | low

    return pack


def _multiply_wide(wider: str) -> Callable[..., np.ndarray]:
    return lambda a, b: a.astype(DTYPES[wider]) * b.astype(DTYPES[wider])


def _add_product(wider: str) -> Callable[..., np.ndarray]:
    return lambda a, b, c: a.astype(DTYPES[wider]) * b.astype(DTYPES[wider]) + c


def _high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    return (a.astype(wide) * b.astype(wide) >> wide(32)).astype(a.dtype)


def _known(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return ~(np.isnan(a) | np.isnan(b))


_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _same(a: np.ndarray) -> np.ndarray:
    return a


def _define_integers(bits: int, kind: str) -> None:
    t, wider = f"{kind}{bits}", f"{kind}{2 * bits}"
    for name, function in [("add", np.add), ("sub", np.subtract), ("mul.lo", np.multiply)]:
        _define(f"{name}.{t}", t, f"{t} {t}", function)
    for name, function in [("min", np.minimum), ("max", np.maximum)]:
        _define(f"{name}.{t}", t, f"{t} {t}", function)
    for name, function in _COMPARISONS.items():
        _define(f"setp.{name}.{t}", "pred", f"{t} {t}", function)
    _define(f"mad.lo.{t}", t, f"{t} {t} {t}", lambda a, b, c: a * b + c)
    _define(f"shr.{t}", t, f"{t} u32", lambda a, b: _shift(a, b, left=False))
    if kind == "s":
        _define(f"neg.{t}", t, t, np.negative)
        _define(f"abs.{t}", t, t, np.abs)
    if bits < 64:
        _define(f"mul.wide.{t}", wider, f"{t} {t}", _multiply_wide(wider))
        _define(f"mad.wide.{t}", wider, f"{t} {t} {wider}", _add_product(wider))
    if bits == 32:
        _define(f"mul.hi.{t}", t, f"{t} {t}", _high)
        _define(f"bfe.{t}", t, f"{t} u32 u32", _extract)
    for source in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"):
        _define(f"cvt.{t}.{source}", t, source, lambda a: a.astype(DTYPES[t]))
    _define(f"cvt.rn.f32.{t}", "f32", t, lambda a: a.astype(np.float32))


def _define_bits(t: str) -> None:
    for name, function in [("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)]:
        _define(f"{name}.{t}", t, f"{t} {t}", function)
    _define(f"not.{t}", t, t, np.invert)
    if t != "pred":
        for name in ("eq", "ne"):
            _define(f"setp.{name}.{t}", "pred", f"{t} {t}", _COMPARISONS[name])
        _define(f"shl.{t}", t, f"{t} u32", lambda a, b: _shift(a, b, left=True))


def _define_floats(ftz: str, kept: Callable[[Any], Any]) -> None:
    """In float32; `kept` is what becomes of subnormal numbers."""

    def define(operands: int, functions: dict[str, Callable[..., np.ndarray]], result: str = "f32") -> None:
        for name, function in functions.items():
            _define(name.replace("*", ftz), result, " ".join(["f32"] * operands), kept(function))

    for mode in ("", ".rn"):
        define(2, {f"add{mode}*.f32": np.add, f"sub{mode}*.f32": np.subtract, f"mul{mode}*.f32": np.multiply})
    define(2, {f"add.{mode}*.f32": _add(mode) for mode in ("rm", "rp", "rz")})
    define(3, {f"fma.{mode}*.f32": _fma(mode) for mode in ("rn", "rm", "rp", "rz")})
    define(2, {"max*.f32": np.fmax, "min*.f32": np.fmin, "max*.NaN.f32": np.maximum, "min*.NaN.f32": np.minimum})
    define(2, {f"div.{mode}*.f32": np.divide for mode in ("full", "approx", "rn")})
    define(1, {"neg*.f32": np.negative, "abs*.f32": np.abs})
    define(1, {"cvt*.sat.f32.f32": lambda a: np.clip(np.where(np.isnan(a), np.float32(0), a), 0, 1)})
    for mode, function in [("rmi", np.floor), ("rpi", np.ceil), ("rzi", np.trunc), ("rni", np.rint)]:
        define(1, {f"cvt.{mode}*.f32.f32": function})
    wide = {"ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a)}
    define(1, {f"{name}.approx*.f32": _wide(function) for name, function in wide.items()})
    for name, function in _COMPARISONS.items():
        define(2, {f"setp.{name}*.f32": lambda a, b, f=function: f(a, b) & _known(a, b)}, "pred")
        define(2, {f"setp.{name}u*.f32": lambda a, b, f=function: f(a, b) | ~_known(a, b)}, "pred")
    define(2, {"setp.num*.f32": _known, "setp.nan*.f32": lambda a, b: ~_known(a, b)}, "pred")


def _paired(function: Callable[..., np.ndarray], t: str) -> Callable[..., np.ndarray]:
    """A function of numbers, of two of them in each register."""

    def both(*operands: np.ndarray) -> np.ndarray:
        result = function(*(a.view(DTYPES[t]) for a in operands))
        return result.view(operands[0].dtype)

    return both


def _to_bf16(exact: np.ndarray) -> np.ndarray:
    """Rounds float64 once: float32 on the way is cut and marked as inexact by its last bit."""
    cut = _rounded(exact, "rz")
    return (cut.view(np.uint32) | (cut != exact)).view(np.float32).astype(DTYPES["bf16"])


def _define_pairs() -> None:
    for mode in ("", ".rn", ".ftz", ".rn.ftz"):
        for name, count in [("add", 2), ("sub", 2), ("mul", 2), ("fma", 3)]:
            if f"{name}{mode}.f32" in OPERATIONS:
                function = _paired(OPERATIONS[f"{name}{mode}.f32"][2], "f32")
                _define(f"{name}{mode}.f32x2", "b64", " ".join(["b64"] * count), function)
    bf16: dict[str, Callable[..., np.ndarray]] = {
        "add": lambda a, b: _to_bf16(_sum_to_odd(a.astype(np.float64), b.astype(np.float64))),
        "sub": lambda a, b: _to_bf16(_sum_to_odd(a.astype(np.float64), -b.astype(np.float64))),
        "mul": lambda a, b: _to_bf16(a.astype(np.float64) * b.astype(np.float64)),
        "fma.rn": lambda a, b, c: _to_bf16(
            _sum_to_odd(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))
        ),
    }
    for name, function in bf16.items():
        count = 3 if name == "fma.rn" else 2
        _define(f"{name}.bf16", "bf16", " ".join(["bf16"] * count), function)
        _define(f"{name}.bf16x2", "b32", " ".join(["b32"] * count), _paired(function, "bf16"))


def _define_small_floats(t: str) -> None:
    _define(f"cvt.f32.{t}", "f32", t, lambda a: a.astype(np.float32))
    _define(f"cvt.rn.{t}.f32", t, "f32", lambda a: a.astype(DTYPES[t]))
    _define(f"cvt.rn.{t}x2.f32", "b32", "f32 f32", _pair(t))


def _define_all() -> None:
    for bits in (16, 32, 64):
        for kind in "us":
            _define_integers(bits, kind)
    for t in ("pred", "b16", "b32", "b64"):
        _define_bits(t)
    for t in ("pred", "b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"):
        _define(f"mov.{t}", t, t, _same)
        if t != "pred":
            _define(f"selp.{t}", t, f"{t} {t} pred", lambda a, b, which: np.where(which, a, b))
    _define_floats("", _same)
    _define_floats(".ftz", _flush)
    _define_pairs()
    _define_small_floats("bf16")
    _define_small_floats("f16")
    _define("prmt.b32", "b32", "b32 b32 b32", _permute)
    _define("cvt.rna.tf32.f32", "b32", "f32", _to_tf32)
    _define("tanh.approx.f32", "f32", "f32", _wide(np.tanh))


_define_all()
