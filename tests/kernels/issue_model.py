"""Times compiled kernels without a GPU, by a model of one quarter of an H100's multiprocessors.

It reads machine code for compute capability 9.0 (a cubin), follows the program's path once (loops by given trip
counts), and

1. counts instructions by kind, and the cycles that each pipe needs for them;
2. replays the path on the resident warps with the stall counts and scoreboard barriers that the compiler wrote into
   the code: in order within a warp, one issue per cycle, with the pipes' throughput and the memory's latency;
3. takes the largest of both and of the time of the bytes moved.

What comes out is a prediction: it ranks cuts and finds regressions. It does not know spills that leave the first cache,
bank conflicts, that warps of different quarters wait for each other, that loads of warps and those of `wgmma` share the
banks of shared memory, and what programs share. Where constants have no other
source, they are from public microbenchmarks of Hopper; those marked "calibrated" were set so that kernels timed on an
H100 come out near their times.
"""

import itertools
import pathlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

# NVIDIA's tables for the H100 SXM and compute capability 9.0.
MULTIPROCESSORS, QUARTERS = 132, 4
CLOCK = 1.755e9
REGISTERS, SHARED_BYTES, MAX_WARPS, MAX_PROGRAMS = 65536, 227 * 1024, 64, 32
# What an addition of two large arrays reached on one H100 ("add" in experiments/results/gpu_h100_ops.json).
BYTES_PER_SECOND = 2.96e12

# Cycles for which an instruction of a warp occupies its pipe: 32 lanes over the lanes that the pipe has in a quarter.
_COST = {
    "fma": 1.0,
    "imad": 2.0,
    "alu": 2.0,
    "mufu": 8.0,
    "memory": 4.0,
    "uniform": 2.0,
    "control": 1.0,
    "barrier": 1.0,
    "fp64": 64.0,
    "tensor": 6.4,
}
# Other shapes of tensor-core instructions; those of 16 x 8 x 8 TF32 numbers are above.
_TENSOR_COST = {
    "HMMA.1684.F32.TF32": 3.2,
    "HMMA.1688.F32.BF16": 3.2,
    "HMMA.1688.F32": 3.2,
    "WARPGROUP": 1.0,
}
_WARPGROUP_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x")
# Kind of an instruction: its pipe, and the cycles from issue until its result's barrier clears.
_KINDS = {
    "mma": ("tensor", 18.0),
    "wgmma": ("tensor", 64.0),
    "fma": ("fma", 0.0),
    "imad": ("imad", 0.0),
    "alu": ("alu", 0.0),
    "fp64": ("fp64", 0.0),
    "mufu": ("mufu", 20.0),
    "conversion": ("mufu", 20.0),
    "shared_load": ("memory", 29.0),
    "shared_store": ("memory", 14.0),
    "shuffle": ("memory", 23.0),
    # To the second cache or the device's memory, under load; calibrated.
    "global_load": ("memory", 650.0),
    "global_store": ("memory", 14.0),
    "spill_load": ("memory", 38.0),
    "spill_store": ("memory", 14.0),
    "constant_load": ("memory", 30.0),
    "atomic": ("memory", 700.0),
    "special": ("uniform", 30.0),
    "uniform": ("uniform", 0.0),
    "barrier": ("barrier", 22.0),
    "control": ("control", 0.0),
}
_LOAD_AGAIN = 40.0  # Of a global load that the first cache holds.
_MEMORY_QUEUE = 12  # Memory instructions that may wait before issue stalls; calibrated.
_NEXT_PROGRAM = 200.0  # Cycles until a new program takes the place of one that ended; calibrated.
_TAKEN_BRANCH = 12
_OPCODES = {
    opcode: kind
    for kind, opcodes in {
        "mma": "HMMA IMMA",
        "wgmma": "HGMMA WARPGROUP WARPGROUPSET",
        "fma": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 HFMA2 HADD2 HMUL2 FSWZADD",
        "imad": "IMAD IMUL IDP",
        "alu": "LOP3 PLOP3 LOP IADD3 IADD ISETP FSETP SEL FSEL SHF SHL SHR FMNMX IMNMX VIMNMX PRMT LEA BMSK FLO POPC "
        "R2P P2R VOTE MOV CS2R I2I VABSDIFF FCHK FMNMX3 IABS SGXT BREV VIADD VIADDMNMX F2FP I2FP HSETP2 HMNMX2 VOTEU",
        "fp64": "DADD DMUL DFMA DSETP",
        "mufu": "MUFU",
        "conversion": "F2F F2I I2F FRND F2IP",
        "shared_load": "LDS LDSM",
        "shared_store": "STS STSM",
        "shuffle": "SHFL REDUX",
        "global_load": "LDG LD LDGSTS",
        "global_store": "STG ST RED",
        "spill_load": "LDL",
        "spill_store": "STL",
        "constant_load": "LDC",
        "atomic": "ATOMG ATOM ATOMS",
        "special": "S2R S2UR R2UR",
        "barrier": "BAR",
        "control": "BRA EXIT NOP CALL RET BRX YIELD WARPSYNC DEPBAR LDGDEPBAR ERRBAR MEMBAR FENCE BSYNC BSSY NANOSLEEP "
        "SYNCS BREAK",
    }.items()
    for opcode in opcodes.split()
}
_NO_RESULT = {"global_store", "shared_store", "spill_store", "control", "barrier"}


@dataclass(frozen=True)
class Instruction:
    """One instruction of a warp.

    Attributes:
      address: in bytes.
      opcode: with its modifiers.
      operands: the text after it.
      predicated: some lanes may leave it out.
      target: address of a branch.
      stall: cycles that the warp waits after it.
      write_barrier, read_barrier: scoreboard barriers 0 to 5 that its result and its operands set, or 7 for none.
      waits: barriers that it waits for.
      kind, pipe, cost, latency: as the tables above have them.
    """

    address: int
    opcode: str
    operands: str
    predicated: bool
    target: int | None
    stall: int
    write_barrier: int
    read_barrier: int
    waits: tuple[int, ...]
    kind: str
    pipe: str
    cost: float
    latency: float


@dataclass(frozen=True)
class Code:
    """A compiled kernel.

    Attributes:
      instructions: in the order of their addresses.
      registers, stack_bytes: of a thread.
      shared_bytes, num_warps: of a program.
    """

    instructions: tuple[Instruction, ...]
    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int

    @cached_property
    def index(self) -> dict[int, int]:
        """Where each address stands."""
        return {one.address: n for n, one in enumerate(self.instructions)}

    @cached_property
    def loops(self) -> tuple[tuple[int, int], ...]:
        """First and last instruction of each loop; a jump to itself behind the end is none."""
        jumps = ((self.index[one.target], n) for n, one in enumerate(self.instructions) if one.target in self.index)
        return tuple(sorted({(start, end) for start, end in jumps if start < end}))

    @property
    def programs_per_sm(self) -> int:
        """Programs that a multiprocessor holds at once."""
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = REGISTERS // QUARTERS // per_warp * QUARTERS // self.num_warps
        by_shared = SHARED_BYTES // (self.shared_bytes + 1024)
        return max(1, min(by_registers, by_shared, MAX_PROGRAMS, MAX_WARPS // self.num_warps))


def _classify(opcode: str, operands: str) -> tuple[str, str, float, float]:
    """Returns kind, pipe, cost and latency.

    Raises:
      ValueError: for an opcode that the tables lack.
    """
    base, *modifiers = opcode.split(".")
    kind = _OPCODES.get(base) or ("uniform" if base.startswith("U") else None)
    if kind is None:
        raise ValueError(f"unknown opcode {opcode!r}: add it to the tables of tests/kernels/issue_model.py")
    if kind == "imad" and "MOV" in modifiers:
        kind = "fma"
    pipe, latency = _KINDS[kind]
    cost = _COST[pipe]
    if pipe == "tensor":
        cost = _TENSOR_COST.get(opcode, _TENSOR_COST.get(base, cost))
        if match := _WARPGROUP_PRODUCT.match(opcode):
            # Half a cycle per column of sums. Rows of 32 bytes of both factors come from shared memory at 128 bytes per
            # cycle, unless registers have the first one.
            columns, first_rows = int(match[1]), 64 if operands.split(", ")[1].startswith("gdesc") else 0
            cost = max(columns / 2, (first_rows + columns) * 32 / 128)
    elif base in ("LDSM", "STSM"):
        cost *= 4 if "4" in modifiers else 2 if "2" in modifiers else 1
    elif pipe == "memory" and kind != "constant_load":
        cost *= 4 if "128" in modifiers else 2 if "64" in modifiers else 1
    return kind, pipe, cost, latency


_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/")
_HIGH = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"^(\.L_\w+):")


def parse(sass: str, *, registers: int, stack_bytes: int, shared_bytes: int, num_warps: int) -> Code:
    """Reads what `nvdisasm -c -hex` prints; each instruction takes two lines, its second word holds the stall counts.

    Raises:
      ValueError: for an unknown opcode, or a text without instructions.
    """
    labels: dict[str, int] = {}
    pending: list[str] = []
    raw: list[tuple[int, str, int]] = []
    for line in sass.splitlines():
        if match := _LABEL.match(line):
            pending.append(match[1])
        elif match := _LINE.match(line):
            address = int(match[1], 16)
            labels.update(dict.fromkeys(pending, address))
            pending = []
            raw.append((address, match[2], 0))
        elif (match := _HIGH.match(line)) and raw:
            raw[-1] = (*raw[-1][:2], int(match[1], 16))
    if not raw:
        raise ValueError("no instruction found: this is not the output of nvdisasm -c -hex")
    instructions = tuple(_instruction(*one, labels) for one in raw)
    return Code(instructions, registers, stack_bytes, shared_bytes, num_warps)


def _instruction(address: int, text: str, high: int, labels: dict[str, int]) -> Instruction:
    predicated = text.startswith("@")
    opcode, _, operands = (text.split(None, 1)[1] if predicated else text).partition(" ")
    found = re.search(r"\((\.L_\w+)\)", operands) if opcode.startswith("BRA") else None
    control = high >> 41
    return Instruction(
        address,
        opcode,
        operands.strip(),
        predicated,
        labels.get(found[1]) if found else None,
        control & 15,
        control >> 5 & 7,
        control >> 8 & 7,
        tuple(barrier for barrier in range(6) if control >> 11 >> barrier & 1),
        *_classify(opcode, operands),
    )


def read_cubin(cubin: bytes, *, shared_bytes: int, num_warps: int) -> Code:
    """Reads a cubin by the tools that come with Triton.

    Args:
      cubin: for compute capability 9.0.
      shared_bytes: that a launch asks for.
      num_warps: of a program.
    """
    import triton

    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder) / "kernel.cubin"
        place.write_bytes(cubin)
        usage, sass = (
            subprocess.run([tools / tool, *options, place], check=True, capture_output=True, text=True).stdout
            for tool, *options in [("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c", "-hex")]
        )
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise ValueError(f"no resource usage in {usage!r}")
    numbers = {"registers": int(match[1]), "stack_bytes": int(match[2]), "shared_bytes": shared_bytes}
    return parse(sass, **numbers, num_warps=num_warps)


# Turns of the loops at each depth: a count for all of them; or for each loop there, in the order of their addresses,
# its turns each time that it is entered.
Trips = Sequence[int | Sequence[Sequence[int]]]


def _loop_turns(code: Code, trips: Trips) -> dict[int, tuple[int, Iterator[int]]]:
    """Returns for each first instruction of a loop its last one, and its turns each time that it is entered.

    Raises:
      ValueError: a loop lies deeper than there are trip counts, or has none of its own.
    """
    turns: dict[int, tuple[int, Iterator[int]]] = {}
    siblings: Counter[int] = Counter()
    for start, end in code.loops:
        depth = sum(a <= start and end <= b and (a, b) != (start, end) for a, b in code.loops)
        if depth >= len(trips):
            raise ValueError(f"a loop lies inside {depth} others, but trips={tuple(trips)} has {len(trips)} counts")
        count = trips[depth]
        if not isinstance(count, int):
            if siblings[depth] >= len(count):
                raise ValueError(f"more loops inside {depth} others than the {len(count)} of trips={tuple(trips)}")
            turns[start] = end, iter(count[siblings[depth]])
        else:
            turns[start] = end, itertools.repeat(count)
        siblings[depth] += 1
    return turns


def path(code: Code, trips: Trips) -> list[int]:
    """Follows the program: loops take their turns, other jumps are taken unless predicated.

    Returns:
      Indices of instructions in the order of their execution.

    Raises:
      ValueError: a loop lies deeper than there are trip counts, or the counts are of other loops.
    """
    turns = _loop_turns(code, trips)
    ends = {end: start for start, (end, _) in turns.items()}
    left: dict[int, int] = {}
    here, taken = 0, []
    while here < len(code.instructions):
        if here in turns and here not in left:
            end, entries = turns[here]
            count = next(entries, None)
            if count is None:
                raise ValueError(f"a loop is entered more often than trips={tuple(trips)} has counts for it")
            if count == 0:
                here = end + 1
                continue
            left[here] = count
        one = code.instructions[here]
        taken.append(here)
        if one.opcode.startswith("EXIT") and not one.predicated:
            break
        if here in ends:
            start = ends[here]
            left[start] -= 1
            if left[start] > 0:
                here = start
                continue
            del left[start]
        elif one.target is not None and not one.predicated and one.target > one.address:
            here = code.index[one.target]
            continue
        here += 1
    return taken


_ADDRESS = re.compile(r"\[([^\]]*)\]")
_DESTINATION = re.compile(r"^(U?R)(\d+)")


def read_before(code: Code, taken: Sequence[int]) -> list[bool]:
    """Tells which global accesses of a path go where the same values of the same registers led before."""
    version: Counter[str] = Counter()
    seen: set[tuple[str, ...]] = set()
    again = []
    for at in taken:
        one = code.instructions[at]
        again.append(False)
        if one.kind in ("global_load", "global_store"):
            where = (_ADDRESS.findall(one.operands) or [one.operands])[-1]
            key = (where, *(str(version[register]) for register in re.findall(r"U?R\d+", where)))
            # Evicting what was read first is how a kernel marks its second read.
            again[-1] = (key in seen or ".EF" in one.opcode) and ".BYPASS" not in one.opcode
            seen.add(key)
        match = _DESTINATION.match(one.operands)
        if match and one.kind not in _NO_RESULT:
            wide = 4 if ".128" in one.opcode else 2 if ".64" in one.opcode or ".WIDE" in one.opcode else 1
            for number in range(int(match[2]), int(match[2]) + wide):
                version[f"{match[1]}{number}"] += 1
    return again


# All groups of asynchronous copies but the latest few have arrived.
_WAIT_FOR_COPIES = re.compile(r"SB\d, 0x([0-9a-f]+)")
# Likewise of products of warpgroups.
_WAIT_FOR_PRODUCTS = re.compile(r"gsb\d, 0x([0-9a-f]+)")


class _Quarter:
    """A quarter of a multiprocessor with some warps that all run one path."""

    def __init__(self, code: Code, taken: Sequence[int], again: Sequence[bool], warps: int):
        self.path = [code.instructions[at] for at in taken]
        self.latency = [
            _LOAD_AGAIN if found and one.kind == "global_load" else one.latency
            for one, found in zip(self.path, again, strict=True)
        ]
        self.stall = [max(1, one.stall) for one in self.path]
        for k, one in enumerate(self.path):
            if one.kind == "barrier":
                self.stall[k] = max(self.stall[k], int(one.latency))
            elif one.opcode.startswith("BRA") and k + 1 < len(taken) and taken[k + 1] != taken[k] + 1:
                self.stall[k] = max(self.stall[k], _TAKEN_BRANCH)
        # Warps of a program begin together and meet at its barriers.
        self.together = max(1, min(code.num_warps // QUARTERS, warps))
        # Programs start apart, as they do in a grid that has run for a while.
        firsts = [warp // self.together * self.together for warp in range(warps)]
        self.ready = [first * 1.3 * len(self.path) / warps for first in firsts]
        self.met: dict[int, list[int]] = {}
        self.place = [0] * warps
        self.barriers = [[0.0] * 6 for _ in range(warps)]
        # Asynchronous copies: when the latest arrives, and when each group of them does.
        self.copied = [0.0] * warps
        self.groups: list[list[float]] = [[] for _ in range(warps)]
        # Likewise products of warpgroups.
        self.products: list[list[float]] = [[] for _ in range(warps)]
        self.free = dict.fromkeys(_COST, 0.0)
        self.free["control"] = self.free["barrier"] = float("-inf")

    def _earliest(self, warp: int) -> float:
        one, barriers = self.path[self.place[warp]], self.barriers[warp]
        time = self.ready[warp]
        for barrier in one.waits:
            time = max(time, barriers[barrier])
        if match := _WAIT_FOR_COPIES.match(one.operands) if one.opcode == "DEPBAR.LE" else None:
            groups = self.groups[warp]
            time = max(time, *groups[: len(groups) - int(match[1], 16)], time)
        if match := _WAIT_FOR_PRODUCTS.match(one.operands) if one.opcode == "WARPGROUP.DEPBAR.LE" else None:
            groups = self.products[warp]
            time = max(time, *groups[: len(groups) - int(match[1], 16)], time)
        if one.pipe == "memory":
            return max(time, self.free["memory"] - _MEMORY_QUEUE * _COST["memory"])
        if one.pipe == "imad":
            time = max(time, self.free["fma"])
        return max(time, self.free[one.pipe])

    def _issue(self, warp: int, time: float) -> None:
        k = self.place[warp]
        one, barriers = self.path[k], self.barriers[warp]
        finish = time
        if one.pipe == "memory":
            finish = self.free["memory"] = max(self.free["memory"], time) + one.cost
        elif one.pipe not in ("control", "barrier"):
            self.free[one.pipe] = time + one.cost
            if one.pipe == "imad":
                self.free["fma"] = max(self.free["fma"], time + 1)
            if one.pipe == "mufu":
                finish += one.cost
        if one.opcode.startswith("LDGSTS"):
            self.copied[warp] = max(self.copied[warp], finish + self.latency[k])
        elif one.opcode == "LDGDEPBAR":
            self.groups[warp].append(self.copied[warp])
        elif one.kind == "wgmma" and "gsb0" in one.operands and one.opcode.startswith("HGMMA"):
            self.products[warp].append(finish + one.cost + self.latency[k])
        elif one.write_barrier < 6:
            barriers[one.write_barrier] = max(barriers[one.write_barrier], finish + self.latency[k])
        if one.read_barrier < 6:
            barriers[one.read_barrier] = max(barriers[one.read_barrier], finish + 10.0)
        self.ready[warp] = time + self.stall[k]
        self.place[warp] += 1
        if one.kind == "barrier" and self.together > 1:
            program = warp // self.together
            met = self.met.setdefault(program, [])
            met.append(warp)
            last = len(met) == min(self.together, len(self.ready) - program * self.together)
            for other in met:
                self.ready[other] = self.ready[warp] if last else float("inf")
            if last:
                met.clear()

    def run(self, rounds: int) -> float:
        """Returns the cycles in which each warp runs the path so often."""
        clock = end = 0.0
        left = dict.fromkeys(range(len(self.ready)), rounds)
        while left:
            time, warp = min((self._earliest(warp), warp) for warp in left)
            time = max(time, clock)
            clock = time + 1.0
            self._issue(warp, time)
            if self.place[warp] == len(self.path):
                end = max(end, *self.barriers[warp], time)
                self.place[warp], self.barriers[warp] = 0, [0.0] * 6
                self.copied[warp], self.groups[warp], self.products[warp] = 0.0, [], []
                self.ready[warp] = time + _NEXT_PROGRAM
                left[warp] -= 1
                if not left[warp]:
                    del left[warp]
        return end


@dataclass(frozen=True)
class Launch:
    """A kernel, and how it is launched.

    Attributes:
      name: of the kernel.
      code: what `read_cubin` gives.
      grid: programs.
      trips: turns of the loops, the outermost first (`path`); the path of each program is the same.
      units: what instructions are counted per, as tokens times heads, over the whole grid.
      bytes_moved: from and to the device's memory.
    """

    name: str
    code: Code
    grid: int
    trips: Trips
    units: float
    bytes_moved: float


@dataclass(frozen=True)
class Estimate:
    """What the model says of a launch.

    Attributes:
      launch: which one.
      counts: instructions of a warp, by kind.
      cycles: of a quarter that a warp takes from each pipe; "issue" is one per instruction.
      pipe_seconds, replay_seconds, byte_seconds: the three bounds.
    """

    launch: Launch
    counts: dict[str, int]
    cycles: dict[str, float]
    pipe_seconds: float
    replay_seconds: float
    byte_seconds: float

    @property
    def seconds(self) -> float:
        """Predicted."""
        return max(self.pipe_seconds, self.replay_seconds, self.byte_seconds)

    @property
    def _warps_per_unit(self) -> float:
        return self.launch.grid * self.launch.code.num_warps / self.launch.units

    @property
    def instructions_per_unit(self) -> float:
        """Instructions of warps, per token and head or what else is counted."""
        return self.cycles["issue"] * self._warps_per_unit

    @property
    def memory_cycles_per_unit(self) -> float:
        """Cycles of the memory pipe of a quarter, per token and head or what else is counted."""
        return self.cycles["memory"] * self._warps_per_unit

    def per_unit(self, *kinds: str) -> float:
        """Instructions of some kinds, counted likewise."""
        return sum(self.counts.get(kind, 0) for kind in kinds) * self._warps_per_unit


def estimate(launch: Launch, *, replay: bool = True) -> Estimate:
    """Predicts the time of a launch.

    Args:
      launch: what runs.
      replay: do the second of the model's parts, which takes seconds; without it `replay_seconds` is 0.
    """
    code = launch.code
    taken = path(code, launch.trips)
    cycles: Counter[str] = Counter(dict.fromkeys(_COST, 0.0))
    for at in taken:
        cycles[code.instructions[at].pipe] += code.instructions[at].cost
    cycles["fma"] += cycles.pop("imad")
    cycles["issue"] = len(taken)
    # Warps of each quarter, over the whole launch and at once.
    warps = launch.grid * code.num_warps / (MULTIPROCESSORS * QUARTERS)
    resident = min(code.programs_per_sm * code.num_warps / QUARTERS, warps)
    replay_seconds = 0.0
    if replay:
        again = read_before(code, taken)

        def rate(count: int) -> float:
            rounds = 1 if len(taken) * count > 100_000 else 2
            return count * rounds / _Quarter(code, taken, again, count).run(rounds)

        # Fractions (9 programs of one warp on 4 quarters) lie between the whole numbers.
        low = max(1, int(resident))
        per_cycle = rate(low)
        if resident > low + 0.01:
            per_cycle += (rate(low + 1) - per_cycle) * (resident - low)
        replay_seconds = max(warps, 1.0) / per_cycle / CLOCK
        # Where there are few waves of programs, the last takes as long as a full one.
        waves = launch.grid / (MULTIPROCESSORS * code.programs_per_sm)
        if waves > 1:
            replay_seconds *= -(-launch.grid // (MULTIPROCESSORS * code.programs_per_sm)) / waves
    counts = Counter(code.instructions[at].kind for at in taken)
    pipe_seconds = max(cycles.values()) * warps / CLOCK
    return Estimate(
        launch, dict(counts), dict(cycles), pipe_seconds, replay_seconds, launch.bytes_moved / BYTES_PER_SECOND
    )
