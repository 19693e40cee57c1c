"""The interpreter of PTX: single instructions, and that it finds what it is there to find."""

import fractions
import operator

import ml_dtypes
import numpy as np
import pytest

from tests.kernels.ptx import program
from tests.kernels.ptx.memory import Fault, Memory

MODULE = """
.version 8.0
.target sm_80
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
  {parameters}
)
.reqntid {threads}
{{
  .reg .pred %p<9>;
  .reg .b16 %rs<99>;
  .reg .b32 %r<99>;
  .reg .b64 %rd<99>;
{body}
  ret;
}}
"""
# Each thread's place in arrays of words: 0 in %rd1, 1 in %rd2.
PLACES = """
  ld.param.b64 %rd1, [kernel_param_0];
  ld.param.b64 %rd2, [kernel_param_1];
  mov.u32 %r1, %tid.x;
  mad.wide.u32 %rd1, %r1, 4, %rd1;
  mad.wide.u32 %rd2, %r1, 4, %rd2;
  shl.b32 %r2, %r1, 2;
  mov.b32 %r3, global_smem;
  add.s32 %r2, %r2, %r3;
"""


def run(body, *inputs, out, threads=32, **options):
    """Runs a kernel of pointers to the inputs and to one output; returns that, of the dtype and size of `out`."""
    inputs = [np.asarray(a) for a in inputs]
    buffers = [Memory(f"input {i}", a) for i, a in enumerate(inputs)]
    buffers.append(Memory("output", out, written=False))
    parameters = ",\n".join(f"  .param .u64 .ptr .global kernel_param_{i}" for i in range(len(buffers)))
    program.run(MODULE.format(body=body, threads=threads, parameters=parameters), buffers, **options)
    return buffers[-1].bytes.view(out.dtype)


def without(text, line, nth=0):
    """Text with one occurrence of a line left out."""
    parts = text.split(line)
    return line.join(parts[: nth + 1]) + line.join(parts[nth + 1 :])


def words(count, dtype=np.int32):
    return np.zeros(count, dtype)


# Single instructions.

LETTERS = {1: "p", 2: "rs", 4: "r", 8: "rd"}


def apply(name, result, *operands):
    """What an instruction makes of arrays [n <= 32]; predicates go in and out as 0 and 1."""
    operands = [np.asarray(a) for a in operands]
    count = len(operands[0])
    lines = ["mov.u32 %r1, %tid.x;", f"setp.ge.u32 %p8, %r1, {count};", "@%p8 ret;"]

    def place(register, parameter, size):
        lines.append(f"ld.param.b64 %rd{register}, [kernel_param_{parameter}];")
        lines.append(f"mad.wide.u32 %rd{register}, %r1, {size}, %rd{register};")

    registers = []
    for number, a in enumerate(operands):
        place(90, number, a.dtype.itemsize)
        registers.append(f"%{LETTERS[a.dtype.itemsize]}{number + 2}")
        lines.append(f"ld.global.b{8 * a.dtype.itemsize} {registers[-1]}, [%rd90];")
    result = np.dtype(result)
    target = f"%{LETTERS[result.itemsize]}10"
    lines.append(f"{name} {', '.join([target, *registers])};")
    if result.kind == "b":
        lines.append("selp.b32 %r10, 1, 0, %p10;")
        target, result = "%r10", np.dtype(np.int32)
    place(91, len(operands), result.itemsize)
    lines.append(f"st.global.b{8 * result.itemsize} [%rd91], {target};")
    body = "\n".join(lines).replace("%p10", "%p7")
    return run(body, *operands, out=words(count, result))


def u16(*values):
    return np.array(values, np.uint16)


def u32(*values):
    return np.array(values, np.uint32)


def i32(*values):
    return np.array(values, np.int32)


def i64(*values):
    return np.array(values, np.int64)


def f32(*values):
    return np.array(values, np.float32)


def pairs(*values):
    return f32(*values).view(np.uint64)


TINY = 2.0**-140
NAN, INF = np.nan, np.inf
CASES = {
    "add.s32": (i32(2**31 - 1, -5), i32(1, 3), i32(-(2**31), -2)),
    "sub.s64": (i64(5, -(2**63)), i64(7, 1), i64(-2, 2**63 - 1)),
    "mul.lo.s32": (i32(65536, -3), i32(65537, 7), i32(65536, -21)),
    "mul.wide.s32": (i32(-3, 2**30), i32(5, 8), i64(-15, 2**33)),
    "mul.wide.u32": (u32(2**32 - 3), u32(5), np.array([5 * (2**32 - 3)], np.uint64)),
    "mul.hi.s32": (i32(-3, 2**30), i32(5, 8), i32(-1, 2)),
    "mad.lo.s32": (i32(2**16), i32(2**16), i32(9), i32(9)),
    "mad.wide.s32": (i32(-3), i32(5), i64(2**40), i64(2**40 - 15)),
    "min.s32": (i32(-1, 4), i32(1, 3), i32(-1, 3)),
    "max.u32": (u32(2**32 - 1, 4), u32(1, 3), u32(2**32 - 1, 4)),
    "shl.b32": (u32(1, 1, 1), u32(31, 32, 0), u32(2**31, 0, 1)),
    "shr.u32": (u32(2**31, 2**31), u32(31, 40), u32(1, 0)),
    "shr.s32": (i32(-8, -8), u32(1, 99), i32(-4, -1)),
    "bfe.u32": (u32(0b110100, 2**31, 7), u32(2, 31, 0), u32(3, 9, 0), u32(0b101, 1, 0)),
    "bfe.s32": (i32(0b110100, -(2**31), 8), u32(2, 31, 3), u32(3, 9, 1), i32(-3, -1, -1)),
    "and.b32": (u32(12), u32(10), u32(8)),
    "xor.b32": (u32(12), u32(10), u32(6)),
    "not.b32": (u32(0), u32(2**32 - 1)),
    "neg.s32": (i32(5, -7), i32(-5, 7)),
    # Bytes 3 to 0 of the first are 0 to 3, of the second 4 to 7; 8 stands for the sign of one.
    "prmt.b32": (u32(0x83020100, 0x83020100), u32(7 << 24, 0), u32(0x7310, 0xB3B0), u32(0x07830100, 0xFF83FF00)),
    "cvt.s64.s32": (i32(-2), i64(-2)),
    "cvt.u64.u32": (u32(2**32 - 2), i64(2**32 - 2)),
    "cvt.u32.u64": (i64(2**40 + 3), u32(3)),
    "cvt.u16.u32": (u32(2**16 + 3), u16(3)),
    "cvt.u32.u16": (u16(2**16 - 1), u32(2**16 - 1)),
    "cvt.s32.s8": (u16(0x01FE), i32(-2)),
    "cvt.rn.f32.s32": (i32(2**24 + 1, 2**24 + 3, -5), f32(2**24, 2**24 + 4, -5)),
    "setp.lt.s32": (i32(-1, 1), i32(1, -1), np.array([True, False])),
    "setp.lt.u32": (i32(-1, 1), i32(1, -1), np.array([False, True])),
    "setp.gt.s16": (u16(2**16 - 1), u16(0), np.array([False])),
    "setp.ne.f32": (f32(NAN, 1), f32(1, 2), np.array([False, True])),
    "setp.neu.f32": (f32(NAN, 1), f32(1, 1), np.array([True, False])),
    "setp.num.f32": (f32(NAN, 1), f32(1, 1), np.array([False, True])),
    "add.f32": (f32(1, TINY), f32(2**-24, TINY), f32(1, 2 * TINY)),
    "mul.ftz.f32": (f32(TINY, 2**-70, 3), f32(2**20, 2**-70, 5), f32(0, 0, 15)),
    "add.rz.ftz.f32": (f32(1, -1), f32(-(2**-30), 2**-30), f32(1 - 2**-24, -1 + 2**-24)),
    "neg.f32": (f32(0, 2), f32(-0.0, -2)),
    "abs.ftz.f32": (f32(-TINY, -2), f32(0, 2)),
    "max.f32": (f32(NAN, 1, 2), f32(3, NAN, 5), f32(3, 1, 5)),
    "max.NaN.f32": (f32(NAN, 1), f32(3, 2), f32(NAN, 2)),
    "div.full.f32": (f32(1, 7), f32(4, 2), f32(0.25, 3.5)),
    "ex2.approx.ftz.f32": (f32(3, -INF, -140, 0.5), f32(8, 0, 0, 2**0.5)),
    "lg2.approx.f32": (f32(8, 0), f32(3, -INF)),
    "rcp.approx.ftz.f32": (f32(4, INF), f32(0.25, 0)),
    "cvt.ftz.sat.f32.f32": (f32(-1, 0.5, 7, NAN), f32(0, 0.5, 1, 0)),
    "cvt.rmi.ftz.f32.f32": (f32(-1.5, 1.5), f32(-2, 1)),
    # The tie goes away from zero; less than it goes down.
    "cvt.rna.tf32.f32": (f32(1 + 2**-11, -1 - 2**-11, 1 + 2**-12), f32(1 + 2**-10, -1 - 2**-10, 1)),
    "cvt.rn.bf16x2.f32": (f32(1, -2), f32(3, 1 + 2**-8), u32(0x3F80_4040, 0xC000_3F80)),
    "add.f32x2": (pairs(1, 2, 3, 4), pairs(5, 6, 7, 8), pairs(6, 8, 10, 12)),
    "fma.rn.f32x2": (pairs(1, 2), pairs(5, 6), pairs(7, 8), pairs(12, 20)),
    # 7 * 37 / 256 lies halfway between two numbers but for 2**-40, which float32 on the way would lose.
    "fma.rn.bf16": (u16(0x40E0, 0x40E0), u16(0x3E14, 0x3E14), u16(0x2B80, 0xAB80), u16(0x3F82, 0x3F81)),
    "mul.bf16x2": (u32(0x3F80_4000), u32(0x4040_4040), u32(0x4040_40C0)),
    "cvt.f32.bf16": (u16(0x3F80, 0xC000), f32(1, -2)),
}


@pytest.mark.parametrize("name", CASES)
def test_instruction(name):
    *operands, expected = CASES[name]
    actual = apply(name, expected.dtype, *operands)
    np.testing.assert_array_equal(actual.astype(expected.dtype), expected)


@pytest.mark.parametrize(("mode", "past"), [("rn", None), ("rm", operator.le), ("rp", operator.ge)])
def test_fma_rounds_once(mode, past):
    """Against exact fractions; the first two lie halfway but for a bit that float64 loses."""
    rng = np.random.default_rng(0)
    a, b, c = ((rng.normal(size=32) * 2.0 ** rng.integers(-20, 20, 32)).astype(np.float32) for _ in range(3))
    a[:2], b[:2], c[:2] = 1 + 2**-12, 1 + 2**-12, f32(2**-60, -(2**-60))
    actual = apply(f"fma.{mode}.f32", np.float32, a, b, c)
    for got, *numbers in zip(actual, a, b, c, strict=True):
        x, y, z = (fractions.Fraction(float(number)) for number in numbers)
        exact = x * y + z
        nearby = [fractions.Fraction(float(n)) for n in (got, *np.nextafter(got, f32(INF, -INF)))]
        allowed = [number for number in nearby if past is None or past(number, exact)]
        assert nearby[0] == min(allowed, key=lambda number: abs(number - exact))


@pytest.mark.parametrize(
    ("form", "source"),
    [
        ("up.b32 %r4, %r4, 3, 0", lambda lane: lane - 3 if lane >= 3 else lane),
        ("down.b32 %r4, %r4, 3, 31", lambda lane: lane + 3 if lane + 3 < 32 else lane),
        ("bfly.b32 %r4, %r4, 5, 31", lambda lane: lane ^ 5),
        ("idx.b32 %r4, %r4, 7, 31", lambda lane: 7),
        # Segments of 8 lanes: the mask 24 in bits 8 to 12.
        ("idx.b32 %r4, %r4, 2, 6175", lambda lane: lane // 8 * 8 + 2),
        ("up.b32 %r4, %r4, 1, 6144", lambda lane: lane - 1 if lane % 8 else lane),
    ],
)
def test_shuffles(form, source):
    body = f"{PLACES} ld.global.b32 %r4, [%rd1]; shfl.sync.{form}, -1; st.global.b32 [%rd2], %r4;"
    values = np.arange(32, dtype=np.int32) * 10
    np.testing.assert_array_equal(run(body, values, out=words(32)), [10 * source(lane) for lane in range(32)])


def test_vectors_halves_and_sizes():
    """Halves of a word change places through a vector of two; a signed byte is extended, the others are not."""
    body = """
      ld.param.b64 %rd1, [kernel_param_0]; ld.param.b64 %rd2, [kernel_param_1];
      mov.u32 %r1, %tid.x; mul.wide.u32 %rd3, %r1, 8; add.s64 %rd1, %rd1, %rd3;
      mul.wide.u32 %rd3, %r1, 16; add.s64 %rd2, %rd2, %rd3;
      ld.global.v2.b32 {%r4, %r5}, [%rd1 + 0];
      mov.b32 {%rs1, %rs2}, %r4; mov.b32 %r6, {%rs2, %rs1}; mov.b32 {_, %rs3}, %r5;
      cvt.u32.u16 %r7, %rs3; ld.global.s8 %rs4, [%rd1+7]; cvt.s32.s16 %r8, %rs4;
      ld.global.b8 %rs5, [%rd1+7]; cvt.s32.s16 %r9, %rs5;
      st.global.v4.b32 [%rd2], {%r6, %r7, %r8, %r9};
    """
    values = np.tile(np.array([0x0001_0002, 0xFE00_0003], np.uint32), 32)
    result = run(body, values, out=words(128, np.uint32)).reshape(32, 4)
    np.testing.assert_array_equal(result, np.tile(u32(0x0002_0001, 0xFE00, 2**32 - 2, 0xFE), (32, 1)))


def test_matrices_multiply_what_matrix_loads_bring():
    """A [16, 16] by rows, B [16, 8] by rows and so transposed by its load, as bfloat16 in shared memory."""
    body = """
      ld.param.b64 %rd1, [kernel_param_0]; ld.param.b64 %rd2, [kernel_param_1]; ld.param.b64 %rd3, [kernel_param_2];
      mov.u32 %r1, %tid.x; mov.b32 %r3, global_smem; shl.b32 %r2, %r1, 4; add.s32 %r2, %r2, %r3;
      mul.wide.u32 %rd4, %r1, 16; add.s64 %rd1, %rd1, %rd4;
      ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd1]; st.shared.v4.b32 [%r2], {%r4, %r5, %r6, %r7};
      setp.ge.u32 %p1, %r1, 16;
      @%p1 bra $L_loaded;
      add.s64 %rd2, %rd2, %rd4;
      ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd2]; st.shared.v4.b32 [%r2+512], {%r4, %r5, %r6, %r7};
    $L_loaded:
      bar.warp.sync -1;
      and.b32 %r8, %r1, 15; shl.b32 %r9, %r8, 5; shr.u32 %r10, %r1, 4; shl.b32 %r11, %r10, 4;
      add.s32 %r9, %r9, %r11; add.s32 %r9, %r9, %r3;
      ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r12, %r13, %r14, %r15}, [%r9];
      shl.b32 %r16, %r8, 4; add.s32 %r16, %r16, %r3;
      ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r17, %r18}, [%r16+512];
      mov.b32 %r20, 0f3F800000; mov.b32 %r21, %r20; mov.b32 %r22, %r20; mov.b32 %r23, %r20;
      mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
    {%r20, %r21, %r22, %r23}, {%r12, %r13, %r14, %r15}, {%r17, %r18}, {%r20, %r21, %r22, %r23};
      mul.wide.u32 %rd5, %r1, 16; add.s64 %rd3, %rd3, %rd5;
      st.global.v4.b32 [%rd3], {%r20, %r21, %r22, %r23};
    """.replace("f32\n", "f32 ")
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(ml_dtypes.bfloat16) for shape in [(16, 16), (16, 8)])
    held = run(body, a.view(np.uint16), b.view(np.uint16), out=words(128, np.float32), shared_bytes=768)
    # Lane 4 i + j holds columns 2 j and 2 j + 1 of rows i and i + 8.
    actual = held.reshape(8, 4, 2, 2).transpose(2, 0, 1, 3).reshape(16, 8)
    expected = 1 + a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def tf32_product(a, b):
    """A [16, 8] times B [8, 8], from registers loaded as the instruction wants them."""
    loads = []
    for register, row, column in [(10, 0, 0), (11, 8, 0), (12, 0, 4), (13, 8, 4)]:
        loads.append(f"add.s32 %r7, %r5, {8 * row + column}; mad.wide.u32 %rd4, %r7, 4, %rd1;")
        loads.append(f"ld.global.b32 %r{register}, [%rd4];")
    for register, row in [(14, 0), (15, 4)]:
        loads.append(f"add.s32 %r7, %r6, {8 * row}; mad.wide.u32 %rd4, %r7, 4, %rd2;")
        loads.append(f"ld.global.b32 %r{register}, [%rd4];")
    body = (
        """
      ld.param.b64 %rd1, [kernel_param_0]; ld.param.b64 %rd2, [kernel_param_1]; ld.param.b64 %rd3, [kernel_param_2];
      mov.u32 %r1, %tid.x; shr.u32 %r2, %r1, 2; and.b32 %r3, %r1, 3;
      mad.lo.s32 %r5, %r2, 8, %r3; mad.lo.s32 %r6, %r3, 8, %r2;
      """
        + "\n".join(loads)
        + """
      mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;
      mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r20, %r21, %r22, %r23}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r20, %r21, %r22, %r23};
      mad.wide.u32 %rd3, %r1, 16, %rd3; st.global.v4.b32 [%rd3], {%r20, %r21, %r22, %r23};
    """  # noqa: E501
    )
    held = run(body, a, b, out=words(128, np.float32))
    return held.reshape(8, 4, 2, 2).transpose(2, 0, 1, 3).reshape(16, 8)


def test_tf32_products():
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 9, (16, 8)).astype(np.float32), rng.integers(-9, 9, (8, 8)).astype(np.float32)
    np.testing.assert_array_equal(tf32_product(a, b), a @ b)
    cut = np.full((16, 8), 1 + 2**-10 + 2**-11, np.float32)
    np.testing.assert_array_equal(tf32_product(cut, np.eye(8, dtype=np.float32)), np.float32(1 + 2**-10))


COPY = f"""{PLACES}
  setp.lt.u32 %p1, %r1, 20; selp.b32 %r4, 4, 0, %p1;
  cp.async.ca.shared.global [ %r2 + 0 ], [ %rd1 + 0 ], 0x4, %r4;
  cp.async.commit_group;
  cp.async.cg.shared.global [ %r2 + 128 ], [ %rd1 + 0 ], 0x4, %r4;
  cp.async.commit_group;
  cp.async.wait_group 1;
  ld.shared.b32 %r5, [%r2];
  cp.async.wait_group 0;
  st.global.b32 [%rd2], %r5;
"""


def test_copies_that_are_waited_for():
    numbers = np.arange(1, 21, dtype=np.int32)
    result = run(COPY, numbers, out=words(32), shared_bytes=256)
    np.testing.assert_array_equal(result, [*numbers, *[0] * 12])
    with pytest.raises(Fault, match="reads byte 0 of shared memory, which nobody wrote"):
        run(COPY.replace("wait_group 1", "wait_group 2"), numbers, out=words(32), shared_bytes=256)
    with pytest.raises(Fault, match="products of tensor cores or copies were never waited for"):
        run(without(COPY, "cp.async.wait_group 0;"), numbers, out=words(32), shared_bytes=256)
    with pytest.raises(Fault, match="reads 4 bytes at byte 80 of input 0, which has 80"):
        run(COPY.replace("4, 0, %p1", "4, 4, %p1"), numbers, out=words(32), shared_bytes=256)


def test_addresses_of_32_bits_have_no_carry():
    body = f"""{PLACES}
      ld.global.b32 %r4, [%rd1]; st.shared.b32 [%r2], %r4;
      sub.s32 %r5, %r2, 0x7fffff00; sub.s32 %r5, %r5, 0x7fffff00; ld.shared.b32 %r6, [%r5+0xfffffe00];
      st.global.b32 [%rd2], %r6;
    """
    numbers = np.arange(32, dtype=np.int32)
    np.testing.assert_array_equal(run(body, numbers, out=words(32), shared_bytes=128), numbers)
    with pytest.raises(Fault, match="of shared memory, which has 128"):
        run(body.replace("0xfffffe00", "0xfffffdfc"), numbers, out=words(32), shared_bytes=128)


def test_lanes_part_and_meet_again():
    """Each lane goes round as often as its number says, then all of them exchange what they have."""
    body = f"""{PLACES}
      mov.b32 %r4, 0; mov.b32 %r5, 0;
    $L_loop:
      setp.ge.u32 %p1, %r4, %r1;
      @%p1 bra $L_end;
      add.s32 %r4, %r4, 1; add.s32 %r5, %r5, 10;
      bra.uni $L_loop;
    $L_end:
      shfl.sync.bfly.b32 %r6, %r5, 1, 31, -1;
      st.global.b32 [%rd2], %r6;
    """
    expected = [10 * (lane ^ 1) for lane in range(32)]
    np.testing.assert_array_equal(run(body, words(32), out=words(32)), expected)


def test_the_grid_and_the_order_of_programs():
    body = f"""{PLACES}
      mov.u32 %r4, %ctaid.x; mov.u32 %r5, %ctaid.y; mov.u32 %r6, %nctaid.x;
      mad.lo.s32 %r7, %r5, %r6, %r4; mad.wide.u32 %rd2, %r7, 128, %rd2;
      st.global.b32 [%rd2], %r7;
    """
    for backwards in (False, True):
        result = run(body, words(32), out=words(6 * 32), grid=(3, 2, 1), backwards=backwards)
        np.testing.assert_array_equal(result, np.repeat(np.arange(6), 32))


# What it is there to find. Warps and lanes of a program of 64 threads turn their words around through shared memory.

TURN = f"""{PLACES}
  ld.global.b32 %r4, [%rd1];
  st.shared.b32 [%r2], %r4;
  bar.sync 0;
  sub.s32 %r5, 63, %r1; shl.b32 %r5, %r5, 2; add.s32 %r5, %r5, %r3;
  ld.shared.b32 %r6, [%r5];
  bar.sync 0;
  st.shared.b32 [%r2], %r6;
  st.global.b32 [%rd2], %r6;
"""
NUMBERS = np.arange(64, dtype=np.int32)


def turn(body=TURN, **options):
    return run(body, NUMBERS, out=words(64), threads=64, **{"shared_bytes": 256} | options)


@pytest.mark.parametrize("backwards", [False, True])
def test_barriers_let_warps_exchange(backwards):
    np.testing.assert_array_equal(turn(backwards=backwards), NUMBERS[::-1])


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("nth", [0, 1])
def test_a_missing_barrier(nth, backwards):
    """The first leaves a word unwritten for the warp that runs first, and a race for the other one."""
    with pytest.raises(Fault, match=r"race|nobody wrote"):
        turn(without(TURN, "bar.sync 0;", nth), backwards=backwards)
    filled = TURN.replace(
        "  ld.global.b32 %r4, [%rd1];", "  st.shared.b32 [%r2], 0; bar.sync 0; ld.global.b32 %r4, [%rd1];"
    )
    with pytest.raises(Fault, match="race: (reads|writes) byte .* of shared memory, which another thread (wrote|read)"):
        turn(without(filled, "bar.sync 0;", nth + 1), backwards=backwards)


def test_a_missing_barrier_of_one_warp():
    body = f"""{PLACES}
      ld.global.b32 %r4, [%rd1]; st.shared.b32 [%r2], %r4;
      bar.warp.sync -1;
      xor.b32 %r5, %r1, 1; shl.b32 %r5, %r5, 2; add.s32 %r5, %r5, %r3;
      ld.shared.b32 %r6, [%r5]; st.global.b32 [%rd2], %r6;
    """
    result = run(body, NUMBERS[:32], out=words(32), shared_bytes=128)
    np.testing.assert_array_equal(result, NUMBERS[:32] ^ 1)
    with pytest.raises(Fault, match="race: reads byte 4 of shared memory, which another thread wrote"):
        run(without(body, "bar.warp.sync -1;"), NUMBERS[:32], out=words(32), shared_bytes=128)
    # A warp's own barrier does not let others see anything.
    with pytest.raises(Fault, match=r"race|nobody wrote"):
        turn(TURN.replace("bar.sync 0;", "bar.warp.sync -1;"))


def test_two_threads_write_one_place():
    body = f"{PLACES} st.shared.b32 [%r3], {{}}; st.global.b32 [%rd2], %r1;"
    run(body.format("7"), NUMBERS, out=words(64), threads=64, shared_bytes=4)
    with pytest.raises(Fault, match="race: writes byte 0 of shared memory, which another thread writes at once"):
        run(body.format("%r1"), NUMBERS, out=words(64), threads=64, shared_bytes=4)


@pytest.mark.parametrize("backwards", [False, True])
def test_programs_race_in_global_memory(backwards):
    body = f"{PLACES} mov.u32 %r4, %ctaid.x; st.global.b32 [%rd2], %r4;"
    with pytest.raises(Fault, match=r"program \d, .* race: writes byte 0 of output, which another thread wrote"):
        run(body, NUMBERS, out=words(32), grid=(2, 1, 1), backwards=backwards)
    body = f"{PLACES} mov.u32 %r4, %ctaid.x; st.global.b32 [%rd1], %r4; ld.global.b32 %r5, [%rd1];"
    with pytest.raises(Fault, match="race: writes byte 0 of input 0, which another thread"):
        run(body, NUMBERS, out=words(32), grid=(2, 1, 1), backwards=backwards)


READ = f"{PLACES} setp.lt.u32 %p1, %r1, 20; mov.b32 %r4, 0; @%p1 ld.global.b32 %r4, [%rd1]; st.global.b32 [%rd2], %r4;"


def test_a_missing_mask():
    result = run(READ, NUMBERS[:20], out=words(32))
    np.testing.assert_array_equal(result, np.where(NUMBERS[:32] < 20, NUMBERS[:32], 0))
    message = (
        r"kernel, program 0, warp 0, line \d+: ld.global.b32 %r4, \[%rd1\]: "
        "reads 4 bytes at byte 80 of input 0, which has 80"
    )
    with pytest.raises(Fault, match=message):
        run(READ.replace("@%p1 ", ""), NUMBERS[:20], out=words(32))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r4, [%rd1 + -4]", "reads 4 bytes at byte -4 of input 0, which has 128"),
        ("st.global.b32 [%rd2 + 4], %r1", "writes 4 bytes at byte 128 of output, which has 128"),
        ("ld.global.b32 %r4, [%rd1 + 2]", "reads 4 bytes at byte 2 of input 0: not aligned"),
        ("ld.global.v2.b32 {%r4, %r5}, [%rd1]", "reads 8 bytes at byte 4 of input 0: not aligned"),
        ("mov.b64 %rd3, 64; ld.global.b32 %r4, [%rd3]", "address 0x40 belongs to no array"),
        ("ld.global.b32 %r4, [%rd2]", "reads byte 0 of output, which nobody wrote"),
        ("ld.shared.b32 %r4, [%r2]", "reads byte 0 of shared memory, which nobody wrote"),
        ("st.shared.b32 [%r2+4], %r1", "writes 4 bytes at byte 128 of shared memory, which has 128"),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r2]", "a row of 16 bytes is not aligned"),
        ("add.s32 %r4, %r5, 1", "reads %r5, which nobody wrote"),
        ("add.s32 %q4, %r1, 1", "register '%q4' is not declared"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 bra $L_end; bar.warp.sync -1; $L_end:", "some lanes never come here"),
        ("$L_loop: bra.uni $L_loop", "still runs after 1000 instructions"),
    ],
)
def test_what_a_kernel_may_not_do(body, message, monkeypatch):
    monkeypatch.setattr(program, "_MOST_STEPS", 1000)
    lines = body.replace("$L_end:", "\n$L_end:").replace("$L_loop:", "\n$L_loop:\n")
    with pytest.raises(Fault, match=message.replace("$", r"\$")):
        run(f"{PLACES} {lines};", NUMBERS[:32], out=words(32), shared_bytes=128)


def test_a_barrier_that_one_warp_leaves_out():
    body = f"{PLACES} setp.lt.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0;"
    with pytest.raises(Fault, match="program 0: 1 warps never come to a barrier"):
        run(body, NUMBERS, out=words(64), threads=64)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("sin.approx.f32 %r1, %r1", "is unknown"),
        ("add.sat.s32 %r1, %r1, %r1", "is unknown"),
        ("ld.global.nc.b32 %r1, [%rd1]", "is unknown"),
        ("ld.global.b32 %r1, [%rd1+%r1]", "address .* is unknown"),
        ("add.s32 %r1, %r1, there", "operand 'there' is unknown"),
        ("add.s32 %r1, %r1", "add.s32 takes 2 operands"),
        ("bar.sync 1", "is unknown"),
        ("bar.warp.sync 255", "is unknown"),
        ("@%p1 bar.sync 0", "an instruction of the whole warp has a predicate"),
        ("shfl.sync.idx.b32 %r1|%p1, %r1, 0, 31, -1", "shfl of a part of the warp, or with a predicate, is unknown"),
        (".shared .b8 more[4]", "is unknown"),
    ],
)
def test_what_is_unknown_is_named(instruction, message):
    with pytest.raises(Fault, match=rf"line \d+: .*: {message}"):
        run(f"\n{instruction};\n", out=words(1))
