"""Instructions: text -> a function of (warp, active lanes or None for all) that does what they say."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.kernels.ptx.arithmetic import DTYPES, OPERATIONS, UNSIGNED
from tests.kernels.ptx.memory import Fault
from tests.kernels.ptx.warp import LANES, SHARED_BASE, Warp, array_address

Action = Callable[[Warp, np.ndarray | None], None]


def _lanes(active: np.ndarray | None) -> np.ndarray:
    return LANES if active is None else np.flatnonzero(active)


def _names(operand: str) -> list[str]:
    """The registers of {a, b}, or the one that stands alone."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


def _immediate(text: str, dtype: np.dtype) -> np.ndarray:
    try:
        number = int(text[2:], 16) if text[:2] in ("0f", "0d") else int(text.rstrip("U"), 0)
    except ValueError:
        raise Fault(f"operand {text!r} is unknown") from None
    if dtype.kind == "b":
        return np.full(32, number != 0)
    size = dtype.itemsize
    return np.full(32, number % (1 << 8 * size), UNSIGNED[size]).view(dtype)


def _source(operand: str, dtype: np.dtype, *, low: bool = False) -> Callable[[Warp], np.ndarray]:
    if operand.startswith("%"):
        return lambda warp: warp.read(operand, dtype, low=low)
    if operand == "global_smem":
        operand = str(SHARED_BASE)
    value = _immediate(operand, dtype)
    return lambda warp: value


def _address_of(operand: str) -> Callable[[Warp], np.ndarray]:
    """[register], [register + number] or [symbol + number], as int64 [32]."""
    match = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
    if match is None:
        raise Fault(f"address {operand!r} is unknown")
    name, offset = match[1], int(match[2] or "0", 0)
    if not name.startswith("%"):
        base = _source(name, np.dtype(np.int64))
        return lambda warp: base(warp) + offset
    return lambda warp: warp.bits(name).astype(np.int64) + offset


def _arithmetic(name: str, operands: list[str]) -> Action:
    _, types, function = OPERATIONS[name]
    if len(operands) != 1 + len(types):
        raise Fault(f"{name} takes {len(types)} operands")
    target = operands[0]
    # Only conversions take registers that are wider than their types.
    wider = name.startswith("cvt.")
    sources = [_source(operand, DTYPES[t], low=wider) for operand, t in zip(operands[1:], types, strict=True)]

    def run(warp: Warp, active: np.ndarray | None) -> None:
        warp.write(target, function(*(source(warp) for source in sources)), active, widen=wider)

    return run


def _pack(operands: list[str]) -> Action:
    """mov of {low, high} into one register, or of one register into {low, high}."""
    targets, sources = _names(operands[0]), _names(operands[1])

    def run(warp: Warp, active: np.ndarray | None) -> None:
        parts = [warp.bits(name) for name in sources]
        bits = np.stack(parts, axis=1)
        size = bits.dtype.itemsize * len(sources) // len(targets)
        values = bits.view(UNSIGNED[size])
        for column, target in enumerate(targets):
            warp.write(target, values[:, column].copy(), active)

    return run


def _memory(match: re.Match[str], operands: list[str]) -> Action:
    """ld and st of 1, 2 or 4 numbers in global or shared memory."""
    verb, space, count, dtype = match[1], match[2], int(match[3] or 1), DTYPES[match[4]]
    address, names = (_address_of(operands[verb == "ld"]), _names(operands[verb == "st"]))
    if len(names) != count:
        raise Fault(f"{len(names)} registers for {count} numbers")

    def load(warp: Warp, active: np.ndarray | None) -> None:
        lanes = _lanes(active)
        loaded = warp.load(space, lanes, address(warp)[lanes], count * dtype.itemsize).view(dtype)
        for column, name in enumerate(names):
            value = np.zeros(32, dtype)
            value[lanes] = loaded[:, column]
            warp.write(name, value, active, widen=True)

    sources = [_source(name, dtype, low=True) for name in names] if verb == "st" else []

    def store(warp: Warp, active: np.ndarray | None) -> None:
        lanes = _lanes(active)
        values = np.stack([source(warp)[lanes] for source in sources], axis=1)
        warp.store(space, lanes, address(warp)[lanes], values.view(np.uint8))

    return load if verb == "ld" else store


def _parameter(operands: list[str]) -> Action:
    match = re.fullmatch(r"\[\s*\w+_param_(\d+)\s*\]", operands[1])
    if match is None:
        raise Fault(f"parameter {operands[1]!r} is unknown")
    number = int(match[1])

    def run(warp: Warp, active: np.ndarray | None) -> None:
        address = array_address(number) if number < len(warp.launch.arrays) else 0
        warp.write(operands[0], np.full(32, address, np.uint64), active)

    return run


def _matrices(match: re.Match[str], operands: list[str]) -> Action:
    """ldmatrix and stmatrix: lane 8 m + r holds the address of row r of matrix m, of 8 x 8 numbers of 16 bits."""
    verb, count, transposed = match[1], int(match[2]), bool(match[3])
    loads = verb == "ld"
    names, address = _names(operands[not loads]), _address_of(operands[loads])

    def places(rows: np.ndarray, matrix: int) -> list[np.ndarray]:
        """Where the halves of a lane's register lie, or both together."""
        if transposed:
            return [rows[8 * matrix + 2 * (LANES % 4) + half] + 2 * (LANES // 4) for half in (0, 1)]
        return [rows[8 * matrix + LANES // 4] + 4 * (LANES % 4)]

    def run(warp: Warp, active: np.ndarray | None) -> None:
        rows = address(warp)
        if (rows[: 8 * count] % 16).any():
            raise Fault("a row of 16 bytes is not aligned")
        for matrix, name in enumerate(names):
            halves = places(rows, matrix)
            size = 4 // len(halves)
            if loads:
                parts = [warp.load("shared", LANES, at, size) for at in halves]
                warp.write(name, np.concatenate(parts, axis=1).view(np.uint32)[:, 0], None)
                continue
            bits = warp.read(name, DTYPES["b32"])[:, None].view(np.uint8)
            for half, at in enumerate(halves):
                warp.store("shared", LANES, at, bits[:, half * size : (half + 1) * size])

    return run


def _shuffle(mode: str, operands: list[str]) -> Action:
    target, value, by, limits, members = operands
    if members != "-1" or "|" in target:
        raise Fault("shfl of a part of the warp, or with a predicate, is unknown")
    u32 = DTYPES["u32"]
    bits, by_of, limits_of = _source(value, u32), _source(by, u32), _source(limits, u32)

    def run(warp: Warp, active: np.ndarray | None) -> None:
        step, c = (source(warp).astype(np.int64) for source in (by_of, limits_of))
        step, clamp, segment = step & 31, c & 31, c >> 8 & 31
        last = LANES & segment | clamp & ~segment
        if mode == "up":
            source = LANES - step
            reached = source >= last
        else:
            by_mode = {"down": LANES + step, "bfly": LANES ^ step, "idx": LANES & segment | step & ~segment}
            source = by_mode[mode]
            reached = source <= last
        warp.write(target, bits(warp)[np.where(reached, source, LANES)], None)

    return run


def _fragments(k: int) -> tuple[list[Any], list[Any], list[Any]]:
    """Rows and columns of the numbers a lane holds of A [16, k], B [k, 8] and C [16, 8]."""
    group, place = LANES // 4, LANES % 4
    if k == 8:
        a = [(group + 8 * (i % 2), place + 4 * (i // 2)) for i in range(4)]
        b = [(place + 4 * i, group) for i in range(2)]
    else:
        a = [(group + 8 * (i // 2 % 2), 2 * place + i % 2 + 8 * (i // 4)) for i in range(8)]
        b = [(2 * place + i % 2 + 8 * (i // 2), group) for i in range(4)]
    return a, b, [(group + 8 * (i // 2), 2 * place + i % 2) for i in range(4)]


_MMA = {
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": (8, None),
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": (16, "bf16"),
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": (16, "f16"),
}


def _mma(name: str, operands: list[str]) -> Action:
    k, dtype = _MMA[name]
    targets, *factors, sums = (_names(operand) for operand in operands)
    at_a, at_b, at_c = _fragments(k)

    def numbers(warp: Warp, name: str) -> list[np.ndarray]:
        bits = warp.read(name, DTYPES["b32"])
        if dtype is None:
            return [(bits & np.uint32(0xFFFFE000)).view(np.float32)]
        halves = bits[:, None].view(DTYPES[dtype]).astype(np.float64)
        return [halves[:, 0], halves[:, 1]]

    def gather(shape: tuple[int, int], places: list[Any], values: list[np.ndarray]) -> np.ndarray:
        matrix = np.full(shape, np.nan)
        for place, value in zip(places, values, strict=True):
            matrix[place] = value
        return matrix

    def run(warp: Warp, active: np.ndarray | None) -> None:
        a, b = ([value for name in names for value in numbers(warp, name)] for names in factors)
        c = [warp.read(name, DTYPES["f32"]) for name in sums]
        result = gather((16, k), at_a, a) @ gather((k, 8), at_b, b) + gather((16, 8), at_c, c)
        result = result.astype(np.float32)
        for target, place in zip(targets, at_c, strict=True):
            warp.write(target, result[place], None)

    return run


def _meet(warp: Warp, active: np.ndarray | None) -> None:
    warp.author.time = warp.launch.tick()


_MEMORY_FORM = re.compile(r"(ld|st)\.(global|shared)(?:\.v([24]))?\.([busf](?:8|16|32|64))")
_MATRIX_FORM = re.compile(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16")


def action_of(name: str, operands: list[str]) -> Action:
    """What an instruction does.

    Raises:
      Fault: for one that is unknown.
    """
    if name.startswith("mov.b") and any(operand.startswith("{") for operand in operands):
        return _pack(operands)
    if name in OPERATIONS:
        return _arithmetic(name, operands)
    if match := _MEMORY_FORM.fullmatch(name):
        return _memory(match, operands)
    if match := _MATRIX_FORM.fullmatch(name):
        return _matrices(match, operands)
    if match := re.fullmatch(r"shfl\.sync\.(up|down|bfly|idx)\.b32", name):
        return _shuffle(match[1], operands)
    if name in _MMA:
        return _mma(name, operands)
    if name in ("ld.param.b64", "ld.param.u64"):
        return _parameter(operands)
    if name == "bar.warp.sync" and operands == ["-1"]:
        return _meet
    if name.startswith("wgmma"):
        raise Fault("wgmma multiplies in shared memory behind the program's back: compile for sm_80 to interpret")
    raise Fault("is unknown")
