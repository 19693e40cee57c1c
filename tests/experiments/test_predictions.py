"""Predictions of the GPU kernels' cost, without a GPU."""

import pytest

from experiments.benchmarks import predictions
from experiments.benchmarks.gpu_cases import PAPER_CASES, Case


def test_bytes_of_norm_and_ssd_by_hand():
    """e 4 in two heads of 2, n 3, one kept state a 6 positions, numbers of 4 bytes."""
    counts = predictions.fused_norm_bytes(inner=4, state=3, heads=2, chunk=6, width=2)
    inputs, states = (4 + 2 * 3) * 4 + 4 * 2, 4 * 2 * 2 * 3 // 6
    assert counts["apart_forward"] == inputs + 16 + states + 3 * 16
    assert counts["apart_backward"] == 2 * inputs + 16 + states + 5 * 16
    # The gate is read more; y goes neither out nor in again.
    assert counts["fused_forward"] == counts["apart_forward"] - 2 * 16
    assert counts["fused_backward"] == counts["apart_backward"] - 3 * 16


def test_times_follow_from_bytes():
    cost = predictions.bytes_and_seconds(PAPER_CASES[0], "tfloat32")
    assert cost["predicted_both_microseconds"] == pytest.approx(
        1e6 * cost["moved_both"] / predictions.ASSUMED_BYTES_A_SECOND
    )
    # With chunks of 32 it would be .64: short ones keep registers few and store more states.
    assert cost["predicted_share_of_floor_both"] == pytest.approx(0.35, abs=0.005)


def test_kernels_of_a_case_are_compiled():
    case = Case("causal_conv1d", {"b": 64, "l": 20, "c": 16})
    rows = predictions.kernel_resources(case, "bfloat16", (90,))
    assert [row["kernel"] for row in rows] == ["causal_conv1d_forward", "causal_conv1d_backward"]
    assert all(0 < row["registers"] <= 255 and row["stack_bytes"] == 0 for row in rows)
