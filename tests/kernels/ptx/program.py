"""An interpreter of PTX in NumPy: runs compiled kernels without a GPU and finds what a GPU hides.

A warp is 32 lanes; a register is an array [32] of bits, and every instruction works on the lanes that are at it. The
warps of a program run one after another up to the next barrier. Faults are errors that name the instruction:

- access outside an array or shared memory, or off its alignment;
- reading bytes that nobody wrote (outputs and shared memory begin that way), or a register that nobody wrote;
- a race: bytes that one thread wrote and another reads or writes with no barrier between them. `bar.sync` parts the
  accesses of warps, `bar.warp.sync` those of one warp's lanes, and nothing those of two programs;
- tensor cores that read shared memory by themselves before a fence has shown them what was written;
- an instruction of a whole warp that some lanes never reach; a barrier that some warps never reach;
- an instruction that is not in the tables here.

Copies and products that go on by themselves are done at the last moment, where the kernel waits for them: who reads too
early finds nothing, and who changes what they read is caught.

Sums and products are correctly rounded, as on the hardware. Tensor cores cut TF32 operands to 10 bits of mantissa;
their sums are exact here and rounded once, and the `approx` functions are rounded from float64: the hardware's last
bits of both are not documented. Whether `wgmma.fence` stands where registers change is not checked.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.kernels.ptx.arithmetic import DTYPES
from tests.kernels.ptx.instructions import Action, action_of
from tests.kernels.ptx.memory import Author, Fault, Memory
from tests.kernels.ptx.warp import Launch, Warp

_MOST_STEPS = 5_000_000


@dataclass
class Instruction:
    """One instruction.

    Attributes:
      text: as written.
      line: its number.
      name: with all suffixes.
      guard, guard_not: the predicate that lets lanes do it, if any, and whether it lets them by being false.
      target: the label it branches to.
      action: what it does, if it does not steer.
      whole_warp: all lanes of a warp do it together.
    """

    text: str
    line: int
    name: str
    guard: str | None = None
    guard_not: bool = False
    target: str | None = None
    action: Action | None = None
    whole_warp: bool = False


@dataclass
class Kernel:
    """A parsed entry function.

    Attributes:
      name: of the function.
      threads: of a program.
      parameters: number of pointers.
      instructions: in order.
      labels: index of the instruction after each.
      widths: dtype of registers by the letters of their names.
    """

    name: str
    threads: int
    parameters: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: dict[str, np.dtype] = field(default_factory=dict)


def _split(operands: str) -> list[str]:
    """At the commas outside braces."""
    return [part.strip() for part in re.split(r",(?![^{]*\})", operands)] if operands else []


def parse(text: str) -> Kernel:
    """Reads the entry function of a PTX module.

    Raises:
      Fault: for anything unknown.
    """
    lines = [re.sub(r"//.*", "", line) for line in text.splitlines()]
    entries = [number for number, line in enumerate(lines) if ".entry" in line]
    if len(entries) != 1:
        raise Fault(f"{len(entries)} entry functions, expected one")
    first = next(number for number in range(entries[0], len(lines)) if lines[number].strip() == "{")
    header = " ".join(lines[entries[0] : first])
    name, threads = re.search(r"\.entry\s+(\w+)", header), re.search(r"\.(?:req|max)ntid\s+(\d+)", header)
    if name is None or threads is None:
        raise Fault("the entry function has no name or no .reqntid")
    kernel = Kernel(name[1], int(threads[1]), header.count(".param"))
    for number in range(first + 1, len(lines)):
        line = lines[number].strip()
        if line == "}":
            return kernel
        try:
            _parse_line(kernel, line, number + 1)
        except Fault as fault:
            raise Fault(f"line {number + 1}: {line}: {fault}") from None
    raise Fault("the entry function does not end")


def _parse_line(kernel: Kernel, line: str, number: int) -> None:
    if match := re.match(r"([\w$]+):\s*", line):
        kernel.labels[match[1]] = len(kernel.instructions)
        line = line[match.end() :]
    for statement in filter(None, (part.strip() for part in line.split(";"))):
        if statement.startswith((".loc", ".pragma")):
            continue
        if match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(%\w+)<\d+>", statement):
            kernel.widths[match[2]] = DTYPES[match[1]]
            continue
        kernel.instructions.append(_parse_instruction(statement, number))


def _parse_instruction(statement: str, number: int) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement)
    if match is None:
        raise Fault("is unknown")
    instruction = Instruction(statement, number, match[3], match[2], match[1] == "!", whole_warp=".sync" in match[3])
    if instruction.guard and instruction.whole_warp:
        raise Fault("an instruction of the whole warp has a predicate")
    operands = _split(match[4])
    if match[3] in ("bra", "bra.uni"):
        instruction.target = operands[0]
    elif not (match[3] == "ret" and not operands) and not (match[3] == "bar.sync" and operands == ["0"]):
        instruction.action = action_of(match[3], operands)
    return instruction


# Running.


def _run_warp(kernel: Kernel, warp: Warp) -> Iterator[None]:
    """Runs a warp, and pauses at each `bar.sync`.

    Of the lanes that can go on, those that are furthest behind go first; lanes wait for the whole warp where it is
    wanted.
    """
    code, end = kernel.instructions, len(kernel.instructions)
    at = np.zeros(32, np.int64)
    waiting = np.zeros(32, bool)
    steps = 0
    while (at < end).any():
        ready = (at < end) & ~waiting
        if not ready.any():
            instruction = code[at[waiting][0]]
            raise _fault(kernel, warp, instruction, "some lanes never come here")
        here = int(at[ready].min())
        active = at == here
        elsewhere = at[~active]
        stop = int(elsewhere[elsewhere > here].min(initial=end))
        whole = bool(active.all())
        while True:
            instruction = code[here]
            steps += 1
            if steps > _MOST_STEPS:
                raise _fault(kernel, warp, instruction, f"still runs after {_MOST_STEPS} instructions")
            if instruction.whole_warp:
                if not whole:
                    waiting |= active
                    at[active] = here
                    break
                waiting[:] = False
            try:
                doing = _do(instruction, warp, active, whole)
            except Fault as fault:
                raise _fault(kernel, warp, instruction, str(fault)) from None
            if instruction.target is not None:
                at[active] = here + 1
                at[doing] = kernel.labels[instruction.target]
                break
            if instruction.name == "ret":
                at[active] = here + 1
                at[doing] = end
                break
            if instruction.name == "bar.sync":
                yield
            here += 1
            if here == stop:
                at[active] = here
                break
    if warp.products.is_left() or warp.copies.is_left():
        raise _fault(kernel, warp, code[-1], "products of tensor cores or copies were never waited for")


def _do(instruction: Instruction, warp: Warp, active: np.ndarray, whole: bool) -> np.ndarray:
    """Does an instruction in the active lanes that its predicate lets; returns which these are."""
    doing = active
    if instruction.guard is not None:
        doing = active & (warp.read(instruction.guard, DTYPES["pred"]) ^ instruction.guard_not)
        whole = bool(doing.all())
    if instruction.action is not None and (whole or doing.any()):
        instruction.action(warp, None if whole else doing)
    return doing


def _fault(kernel: Kernel, warp: Warp, instruction: Instruction, message: str) -> Fault:
    place = f"program {warp.author.program}, warp {warp.author.warp}, line {instruction.line}"
    return Fault(f"{kernel.name}, {place}: {instruction.text}: {message}")


def run(
    text: str,
    buffers: Sequence[Memory],
    *,
    grid: tuple[int, int, int] = (1, 1, 1),
    shared_bytes: int = 0,
    backwards: bool = False,
) -> None:
    """Runs a kernel over its grid; what it writes is in the buffers afterwards.

    Args:
      text: PTX with one entry function whose parameters are pointers.
      buffers: what they point to; parameters after the last one are null.
      grid: number of programs.
      shared_bytes: size of a program's shared memory.
      backwards: take programs and warps in the opposite order.

    Raises:
      Fault: for what a kernel may not do, and what the interpreter does not know.
    """
    kernel = parse(text)
    if kernel.parameters < len(buffers):
        raise Fault(f"{kernel.name} has {kernel.parameters} parameters, fewer than the {len(buffers)} buffers")
    launch = Launch(buffers, grid)
    order = slice(None, None, -1 if backwards else 1)
    with np.errstate(all="ignore"):
        for program in range(int(np.prod(grid)))[order]:
            shared = Memory("shared memory", np.zeros(shared_bytes, np.uint8), written=False)
            authors = [Author(program, index) for index in range(kernel.threads // 32)]
            warps = [Warp(launch, shared, kernel.widths, author, kernel.threads) for author in authors]
            _run_program(kernel, launch, warps[order])


def _run_program(kernel: Kernel, launch: Launch, warps: list[Warp]) -> None:
    running = [_run_warp(kernel, warp) for warp in warps]
    paused = [True]
    while any(paused):
        epoch = launch.tick()
        for warp in warps:
            warp.author.epoch, warp.author.time = epoch, launch.tick()
        paused = [next(steps, "ended") is None for steps in running]
        if any(paused) and not all(paused):
            where = f"{kernel.name}, program {warps[0].author.program}"
            raise Fault(f"{where}: {paused.count(False)} warps never come to a barrier")
