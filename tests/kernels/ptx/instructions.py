"""Instructions: text -> a function of (warp, active lanes or None for all) that does what they say."""

import re

import numpy as np

from tests.kernels.ptx.arithmetic import DTYPES, OPERATIONS, UNSIGNED
from tests.kernels.ptx.memory import Fault
from tests.kernels.ptx.operands import Action, active_lanes, address_of, names_of, source_of
from tests.kernels.ptx.tensor_cores import tensor_core_action
from tests.kernels.ptx.warp import LANES, Warp, array_address


def _arithmetic(name: str, operands: list[str]) -> Action:
    _, types, function = OPERATIONS[name]
    if len(operands) != 1 + len(types):
        raise Fault(f"{name} takes {len(types)} operands")
    target = operands[0]
    # Only conversions take registers that are wider than their types.
    wider = name.startswith("cvt.")
    sources = [source_of(operand, DTYPES[t], low=wider) for operand, t in zip(operands[1:], types, strict=True)]

    def run(warp: Warp, active: np.ndarray | None) -> None:
        warp.write(target, function(*(source(warp) for source in sources)), active, widen=wider)

    return run


def _pack(operands: list[str]) -> Action:
    """mov of {low, high} into one register, or of one register into {low, high}."""
    targets, sources = names_of(operands[0]), names_of(operands[1])

    def run(warp: Warp, active: np.ndarray | None) -> None:
        # Compilers leave the half that nobody wants undefined.
        parts = [warp.bits(name, undefined=True) for name in sources]
        bits = np.stack(parts, axis=1)
        size = bits.dtype.itemsize * len(sources) // len(targets)
        values = bits.view(UNSIGNED[size])
        for column, target in enumerate(targets):
            warp.write(target, values[:, column].copy(), active)

    return run


def _memory(match: re.Match[str], operands: list[str]) -> Action:
    """ld and st of 1, 2 or 4 numbers in global or shared memory."""
    verb, space, count, dtype = match[1], match[2], int(match[3] or 1), DTYPES[match[4]]
    address, names = (address_of(operands[verb == "ld"]), names_of(operands[verb == "st"]))
    if len(names) != count:
        raise Fault(f"{len(names)} registers for {count} numbers")

    def load(warp: Warp, active: np.ndarray | None) -> None:
        lanes = active_lanes(active)
        loaded = warp.load(space, lanes, address(warp)[lanes], count * dtype.itemsize).view(dtype)
        for column, name in enumerate(names):
            value = np.zeros(32, dtype)
            value[lanes] = loaded[:, column]
            warp.write(name, value, active, widen=True)

    sources = [source_of(name, dtype, low=True) for name in names] if verb == "st" else []

    def store(warp: Warp, active: np.ndarray | None) -> None:
        lanes = active_lanes(active)
        values = np.stack([source(warp)[lanes] for source in sources], axis=1)
        warp.store(space, lanes, address(warp)[lanes], values.view(np.uint8))

    return load if verb == "ld" else store


def _copy(operands: list[str]) -> Action:
    """cp.async of some bytes from global to shared memory, with zeros in place of those after the given count."""
    if len(operands) not in (3, 4):
        raise Fault("cp.async takes 3 or 4 operands")
    target, source, size = address_of(operands[0]), address_of(operands[1]), int(operands[2], 0)
    count_of = source_of(operands[3] if len(operands) == 4 else str(size), DTYPES["u32"])

    def run(warp: Warp, active: np.ndarray | None) -> None:
        lanes = active_lanes(active)
        to, where, count = (a[lanes].astype(np.int64) for a in (target(warp), source(warp), count_of(warp)))
        if not np.isin(count, (0, size)).all():
            raise Fault("cp.async of a part of its bytes is unknown")

        def copy() -> None:
            values = np.zeros((len(lanes), size), np.uint8)
            values[count > 0] = warp.load("global", lanes[count > 0], where[count > 0], size)
            warp.store("shared", lanes, to, values)

        warp.copies.add(copy)

    return run


def _parameter(operands: list[str]) -> Action:
    match = re.fullmatch(r"\[\s*\w+_param_(\d+)\s*\]", operands[1])
    if match is None:
        raise Fault(f"parameter {operands[1]!r} is unknown")
    number = int(match[1])

    def run(warp: Warp, active: np.ndarray | None) -> None:
        address = array_address(number) if number < len(warp.launch.arrays) else 0
        warp.write(operands[0], np.full(32, address, np.uint64), active)

    return run


def _shuffle(mode: str, operands: list[str]) -> Action:
    target, value, by, limits, members = operands
    if members != "-1" or "|" in target:
        raise Fault("shfl of a part of the warp, or with a predicate, is unknown")
    u32 = DTYPES["u32"]
    bits, by_of, limits_of = source_of(value, u32), source_of(by, u32), source_of(limits, u32)

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


def _meet(warp: Warp, active: np.ndarray | None) -> None:
    warp.author.time = warp.launch.tick()


_MEMORY_FORM = re.compile(r"(ld|st)\.(global|shared)(?:::cta)?(?:\.v([248]))?\.([busf](?:8|16|32|64))")


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
    if match := re.fullmatch(r"shfl\.sync\.(up|down|bfly|idx)\.b32", name):
        return _shuffle(match[1], operands)
    if name in ("ld.param.b64", "ld.param.u64"):
        return _parameter(operands)
    if name == "bar.warp.sync" and operands == ["-1"]:
        return _meet
    if name in ("cp.async.ca.shared.global", "cp.async.cg.shared.global"):
        return _copy(operands)
    if name == "cp.async.commit_group":
        return lambda warp, active: warp.copies.commit()
    if name == "cp.async.wait_group":
        return lambda warp, active: warp.copies.wait(int(operands[0]))
    if action := tensor_core_action(name, operands):
        return action
    raise Fault("is unknown")
