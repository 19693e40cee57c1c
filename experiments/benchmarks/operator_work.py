"""What an operator has to move and compute at least, what our kernels move, and the floor that follows.

Bytes are those of device memory. Needed: each input read once and each output written once; forward and backward
together read the inputs and dy and write y and all gradients. Moved: every pass of our Pallas kernels over an array,
where programs that run side by side and share a tile (the heads and width splits of a row, blocks of targets that loop
over the same catalogue) read it once; arrays with one number per row, head or segment are left out, and so is the
writing of zeros.
"""

from dataclasses import dataclass
from typing import Any

from experiments.benchmarks.operators import TAPS, Case, Sizes
from kernels.causal_conv1d import pallas_triton as conv_kernels
from kernels.causal_conv1d.config import CausalConv1dConfig
from kernels.causal_conv1d.config import default_config as conv_config
from kernels.selective_scan.config import SelectiveScanConfig
from kernels.selective_scan.config import default_config as scan_config
from kernels.softmax_cross_entropy import TritonConfig
from kernels.softmax_cross_entropy.config import triton_config
from kernels.ssd import SsdConfig
from kernels.ssd import default_config as ssd_config
from kernels.ssd.tiles import KernelParams

FLOAT = 4


@dataclass(frozen=True)
class Work:
    """Bytes and floating-point operations of one call.

    Attributes:
      needed, needed_both: bytes at least, forward, and forward and backward.
      moved, moved_both: bytes of our kernels; forward alone keeps nothing for a gradient.
      flops, flops_both: of matrix products at least, or 0 where the bytes take longer by far on any GPU.
    """

    needed: int
    needed_both: int
    moved: int
    moved_both: int
    flops: int = 0
    flops_both: int = 0


def ssd_work(sizes: Sizes, itemsize: int, config: SsdConfig) -> Work:
    """Counts for `kernels.ssd.ssd` with B and C shared by the heads, steps in float32, and all of A, D and dt_bias.

    Args:
      sizes: b, l, h, p, n.
      itemsize: bytes of a number in x, B, C and y.
      config: of our kernels.
    """
    b, l, h, p, n = (sizes[axis] for axis in "blhpn")  # noqa: E741
    plan = KernelParams(b, l, h, 1, p, n, config, "tfloat32", False, False)
    x, dt, maps = b * l * h * p * itemsize, b * l * h * FLOAT, b * l * n * itemsize
    inputs = x + dt + 2 * maps + 3 * h * FLOAT
    needed, needed_both = inputs + x, 2 * (inputs + x)

    one_state = b * h * p * n * FLOAT
    segment_states = plan.segments * one_state
    moved = needed
    if plan.segments > 1:
        # A pass over x, dt and B (later dy, dt and C) finds what segments add to states: written once, then read and
        # written to bring them into line and again to multiply them.
        segment_pass = x + dt + maps + 5 * segment_states
        moved += segment_pass + segment_states
    # The state before a row's first chunk is zero; between segments it is kept like the others.
    chunk_states = (plan.all_chunks - (plan.segments == 1)) * one_state
    splits = config.width_splits
    parts = h // config.heads_per_program * splits
    wide = parts * b * l * n * (itemsize if parts == config.heads_per_program == 1 else FLOAT)
    # Reads inputs, dy and states; writes dx, and parts of the gradients of dt, B and C.
    backward = inputs + x + chunk_states + x + splits * dt + 2 * wide
    if plan.segments > 1:
        backward += segment_pass + segment_states
    # The parts are added up, or only rounded.
    if parts > 1 or wide != maps:
        backward += 2 * (wide + maps)
    backward += (splits + 1) * dt * (splits > 1) + dt
    return Work(needed, needed_both, moved, moved + chunk_states + backward)


def conv_work(sizes: Sizes, itemsize: int, config: CausalConv1dConfig) -> Work:
    """Counts for `kernels.causal_conv1d.causal_conv1d` with float32 weights and bias.

    Args:
      sizes: b, l, c.
      itemsize: bytes of a number in x and y.
      config: of our kernels.
    """
    b, l, c = (sizes[axis] for axis in "blc")  # noqa: E741
    plan = conv_kernels.KernelParams(b, l, c, TAPS, "silu", config, False)
    x, parameters = b * l * c * itemsize, (TAPS + 1) * c * FLOAT
    needed, needed_both = 2 * x + parameters, 4 * x + 2 * parameters
    # Neighbouring segments both read the K - 1 positions between them, of three arrays in the backward pass: x on both
    # sides, dy behind.
    shared = b * (plan.segments - 1) * (TAPS - 1) * c * itemsize
    moved = needed + shared
    sums = plan.strip_blocks * parameters
    return Work(needed, needed_both, moved, moved + 3 * x + 3 * shared + 2 * parameters + 2 * sums)


def scan_work(sizes: Sizes, itemsize: int, config: SelectiveScanConfig) -> Work:
    """Counts for `kernels.selective_scan.selective_scan` with all of A, D and dt_bias in float32.

    Args:
      sizes: b, l, e, n.
      itemsize: bytes of a number in x, dt, B, C and y.
      config: of our kernels.
    """
    b, l, e, n = (sizes[axis] for axis in "blen")  # noqa: E741
    x, maps, parameters = b * l * e * itemsize, b * l * n * itemsize, (e * n + 2 * e) * FLOAT
    inputs = 2 * x + 2 * maps + parameters
    needed, needed_both = inputs + x, 2 * (inputs + x)
    delta, one_state = b * l * e * FLOAT, b * e * n * FLOAT
    states = -(-l // config.chunk) * one_state
    parts = 2 * -(-e // config.backward_channels) * b * l * n * FLOAT
    kept = delta + states
    # Reads x, delta, B, C, dy and states; writes dx, ddt, parts of dB and dC, and a row's dA and initial gradient.
    backward = 2 * x + 2 * maps + parameters + kept + 2 * x + parts + 2 * one_state
    # Adds up the parts, and A's gradient over rows.
    backward += parts + 2 * maps + one_state + parameters
    return Work(needed, needed_both, needed, needed + kept + backward)


def loss_work(sizes: Sizes, itemsize: int, config: TritonConfig) -> Work:
    """Counts for `kernels.softmax_cross_entropy.softmax_cross_entropy`; its kernels compute the scores three times.

    Args:
      sizes: t, v, d.
      itemsize: bytes of a number in hidden and embedding.
      config: of our kernels.
    """
    t, v, d = (sizes[axis] for axis in "tvd")
    numbers, vector, product = (t + v) * d * itemsize, t * FLOAT, 2 * t * v * d
    # Targets in, loss out; its gradient too.
    needed, needed_both = numbers + 2 * vector, 2 * numbers + 3 * vector
    parts, _ = config.forward.split(t, v)
    # Log-sum-exps of parts are merged; scores at targets are written and read.
    moved = needed + (2 * parts + 2) * vector
    backward = 0
    for loop, own, other in ((config.d_hidden, t, v), (config.d_embedding, v, t)):
        parts, _ = loop.split(own, other)
        # Reads both sides, targets, log-sum-exps and weights.
        backward += numbers + 3 * vector
        backward += own * d * itemsize if parts == 1 else own * d * (2 * parts * FLOAT + itemsize)
    return Work(needed, needed_both, moved, moved + 2 * vector + backward, product, 3 * product)


def default_kernel_config(case: Case, precision: str) -> Any:
    """Returns how our kernels cut a case up where nobody says otherwise."""
    sizes, itemsize = case.sizes, 2 if precision == "bfloat16" else 4
    if case.op == "ssd":
        return ssd_config(
            batch=sizes["b"],
            length=sizes["l"],
            heads=sizes["h"],
            groups=1,
            width=sizes["p"],
            state_width=sizes["n"],
            chunk_size=64,
            exact_products=precision == "float32",
            itemsize=itemsize,
        )
    if case.op == "causal_conv1d":
        return conv_config(batch=sizes["b"], length=sizes["l"], channels=sizes["c"])
    if case.op == "selective_scan":
        return scan_config(sizes["n"])
    return triton_config(sizes["d"], itemsize, "float32" if precision == "float32" else "tfloat32")


_WORK = {
    "ssd": ssd_work,
    "causal_conv1d": conv_work,
    "selective_scan": scan_work,
    "softmax_cross_entropy": loss_work,
}


def work(case: Case, precision: str) -> Work:
    """Returns the counts of a case in our kernels' default cut."""
    itemsize = 2 if precision == "bfloat16" else 4
    return _WORK[case.op](case.sizes, itemsize, default_kernel_config(case, precision))


def floor_seconds(needed: int, flops: int, bytes_a_second: float, flops_a_second: float) -> float:
    """Returns the time under which no version can run: bytes or products, whichever takes longer."""
    return max(needed / bytes_a_second, flops / flops_a_second)
