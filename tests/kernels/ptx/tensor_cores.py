"""Instructions of the tensor cores: products of matrices spread over a warp, and how these come from shared memory."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.kernels.ptx.arithmetic import DTYPES
from tests.kernels.ptx.memory import Fault
from tests.kernels.ptx.operands import Action, address_of, names_of, source_of
from tests.kernels.ptx.warp import LANES, Warp

_Places = list[tuple[np.ndarray, np.ndarray]]
_GROUP, _PLACE = LANES // 4, LANES % 4
_MMA_FORM = re.compile(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(tf32|bf16|f16)\.\2\.f32")
_WGMMA_FORM = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(tf32|bf16|f16)\.\3")
_MATRIX_FORM = re.compile(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16")


def _matrices(match: re.Match[str], operands: list[str]) -> Action:
    """ldmatrix and stmatrix: lane 8 m + r holds the address of row r of matrix m, of 8 x 8 numbers of 16 bits."""
    verb, count, transposed = match[1], int(match[2]), bool(match[3])
    loads = verb == "ld"
    names, address = names_of(operands[not loads]), address_of(operands[loads])

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


# Which rows and columns the numbers in a lane's registers are of.


def _places_of_a(k: int) -> _Places:
    """A [16, k]"""
    if k == 8:
        return [(_GROUP + 8 * (i % 2), _PLACE + 4 * (i // 2)) for i in range(4)]
    return [(_GROUP + 8 * (i // 2 % 2), 2 * _PLACE + i % 2 + 8 * (i // 4)) for i in range(8)]


def _places_of_b(k: int) -> _Places:
    """B [k, 8]"""
    if k == 8:
        return [(_PLACE + 4 * i, _GROUP) for i in range(2)]
    return [(2 * _PLACE + i % 2 + 8 * (i // 2), _GROUP) for i in range(4)]


def _places_of_c(n: int) -> _Places:
    """C [16, n]"""
    return [(_GROUP + 8 * (i // 2 % 2), 2 * _PLACE + i % 2 + 8 * (i // 4)) for i in range(n // 2)]


def _factors(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Words [..] as the numbers [.., 1 or 2] that are multiplied: TF32 loses what is under its mantissa."""
    if dtype == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)[..., None]
    return bits[..., None].view(DTYPES[dtype]).astype(np.float64)


def _from_registers(warp: Warp, names: list[str], dtype: str, places: _Places, shape: tuple[int, int]) -> np.ndarray:
    words = [_factors(warp.read(name, DTYPES["b32"]), dtype) for name in names]
    matrix = np.full(shape, np.nan)
    for place, value in zip(places, (v for word in words for v in word.T), strict=True):
        matrix[place] = value
    return matrix


def _add_product(warp: Warp, names: list[str], targets: list[str], product: np.ndarray) -> None:
    """targets = names + product [16, n], or the product alone if there are no names."""
    places = _places_of_c(product.shape[1])
    for number, (target, place) in enumerate(zip(targets, places, strict=True)):
        before = warp.read(names[number], DTYPES["f32"]).astype(np.float64) if names else 0
        warp.write(target, (before + product[place]).astype(np.float32), None)


def _mma(match: re.Match[str], operands: list[str]) -> Action:
    k, dtype = int(match[1]), match[2]
    if k != (8 if dtype == "tf32" else 16):
        raise Fault("is unknown")
    targets, a_names, b_names, sums = (names_of(operand) for operand in operands)

    def run(warp: Warp, active: np.ndarray | None) -> None:
        a = _from_registers(warp, a_names, dtype, _places_of_a(k), (16, k))
        b = _from_registers(warp, b_names, dtype, _places_of_b(k), (k, 8))
        _add_product(warp, sums, targets, a @ b)

    return run


# Products of four warps. They may happen at any time until they are waited for, and so are done at the last moment.


def _from_shared(warp: Warp, descriptor: int, dtype: str, rows: np.ndarray, *, transposed: bool) -> np.ndarray:
    """Rows of a matrix [rows, k], 32 bytes each, as a descriptor says.

    The k of a row lie side by side, and 8 rows make a block; or the rows of a k do, and 8 k make a block.
    """
    width = {1: 128, 2: 64, 3: 32}.get(descriptor >> 62)
    if width is None or descriptor >> 49 & 7:
        raise Fault(f"a matrix in shared memory laid out as {descriptor:#x} is unknown")
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    size = 4 if dtype == "tf32" else 2
    row, k = rows[:, None], np.arange(32 // size)
    if transposed:
        at = start + row % (width // size) * size + row // (width // size) * leading + k % 8 * width + k // 8 * stride
    else:
        at = start + row % 8 * width + row // 8 * stride + k * size
    # Of the bits that count 16 bytes, as many as the width has are mixed with those that count 128 bytes.
    at ^= (at >> 3) & (width - 16)
    numbers = warp.load_asynchronously(at.reshape(-1), size)
    numbers = _factors(numbers.view(np.uint32), dtype) if size == 4 else numbers.view(DTYPES[dtype])
    return numbers.astype(np.float64).reshape(at.shape)


def _wgmma(match: re.Match[str], operands: list[str]) -> Action:
    n, k, dtype = int(match[1]), int(match[2]), match[3]
    targets, a_operand, b_operand, adds, *rest = operands
    if rest[:2] != ["1", "1"] or k != (8 if dtype == "tf32" else 16):
        raise Fault("wgmma of negated matrices is unknown")
    *a_turned, b_turned = (number == "1" for number in rest[2:] or ["0"])
    targets, a_names = names_of(targets), names_of(a_operand)
    u64 = DTYPES["u64"]
    b_of, adds_of = source_of(b_operand, u64), source_of(adds, DTYPES["pred"])

    def run(warp: Warp, active: np.ndarray | None) -> None:
        b_at, adding = int(b_of(warp)[0]), bool(adds_of(warp)[0])
        a_at = int(warp.read(a_names[0], u64)[0]) if len(a_names) == 1 else None

        def multiply() -> None:
            if a_at is None:
                a = _from_registers(warp, a_names, dtype, _places_of_a(k), (16, k))
            else:
                rows = 16 * (warp.author.warp % 4) + np.arange(16)
                a = _from_shared(warp, a_at, dtype, rows, transposed=any(a_turned))
            b = _from_shared(warp, b_at, dtype, np.arange(n), transposed=b_turned)
            _add_product(warp, targets if adding else [], targets, a @ b.T)

        warp.products.add(multiply)

    return run


def _show(warp: Warp, active: np.ndarray | None) -> None:
    warp.shared.show(warp.author)


def _nothing(warp: Warp, active: np.ndarray | None) -> None:
    """Orders registers, which a warp here changes in order anyway."""


_PLAIN: dict[tuple[str, ...], Callable[[Warp, Any], None]] = {
    ("wgmma.fence.sync.aligned",): _nothing,
    ("wgmma.commit_group.sync.aligned",): lambda warp, active: warp.products.commit(),
    ("fence.proxy.async.shared::cta",): _show,
}


def tensor_core_action(name: str, operands: list[str]) -> Action | None:
    """What an instruction does, or None for one that has nothing to do with tensor cores."""
    if match := _MATRIX_FORM.fullmatch(name):
        return _matrices(match, operands)
    if match := _MMA_FORM.fullmatch(name):
        return _mma(match, operands)
    if match := _WGMMA_FORM.fullmatch(name):
        return _wgmma(match, operands)
    if name == "wgmma.wait_group.sync.aligned":
        return lambda warp, active: warp.products.wait(int(operands[0]))
    return _PLAIN.get((name, *operands))
