"""Operators: judged against their definitions, bytes and products counted by hand, and `ops` at tiny sizes."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import operator_speed, operator_work, operators
from experiments.benchmarks.operators import Case
from experiments.benchmarks.timing import Form
from kernels.causal_conv1d.config import CausalConv1dConfig
from kernels.selective_scan.config import SelectiveScanConfig
from kernels.softmax_cross_entropy import LoopConfig, TritonConfig
from kernels.ssd import SsdConfig


@pytest.fixture
def tiny_ops(monkeypatch):
    """`ops` at sizes that compile soon."""
    sizes = {"TOKENS": 16, "LENGTHS": (8,), "SCAN_LENGTHS": (4,), "LINEAR_LENGTHS": (8,), "CHUNKS": (4, 8)}
    sizes |= {"HEADS": 2, "WIDTH": 4, "STATE": 3, "CHANNELS": 5, "CHUNK_OF_LONG_ROWS": 4}
    for name, value in sizes.items():
        monkeypatch.setattr(operator_speed, name, value)


def test_operators_against_other_programs(tiny_ops, tmp_path, capsys):
    output, figure = tmp_path / "ops.json", tmp_path / "ops.png"
    assert benchmark.main(["ops", "--repeats=2", f"--output={output}", f"--figure={figure}"]) == 0
    record = json.loads(output.read_text())
    ssd, scan = record["comparisons"]
    assert (ssd["op"], ssd["batch"], ssd["length"]) == ("ssd", 2, 8)
    assert (scan["op"], scan["batch"], scan["length"]) == ("selective_scan", 4, 4)
    theirs = ["mamba2-jax"] if importlib.util.find_spec("mamba2_jax") else []
    programs = ["kernels.ssd", *theirs, "PyTorch, chunked"]
    assert list(ssd["seconds"]) == [f"{name} / {chunk}" for name in programs for chunk in (4, 8)]
    assert list(scan["median_seconds"]) == ["kernels.selective_scan", "lax.scan", "PyTorch, loop"]
    for result in (ssd, scan):
        assert all(len(seconds) == 2 for seconds in result["seconds"].values())
        assert 0 < result["largest_difference"] < 1e-3
        ours, *others = result["median_seconds"].values()
        assert list(result["over_ours"].values()) == pytest.approx([1.0, *(other / ours for other in others)])
    # Of each program the best chunk.
    assert ssd["median_seconds"]["kernels.ssd"] == min(
        sum(ssd["seconds"][f"kernels.ssd / {chunk}"]) / 2 for chunk in (4, 8)
    )
    [row] = record["linear"]
    assert row["length"] == 8 and row["microseconds_a_position"] == pytest.approx(1e6 * row["median_seconds"] / 8)
    assert record["shape"]["chunks"] == [4, 8] and figure.read_bytes().startswith(b"\x89PNG")
    assert "selective_scan" in capsys.readouterr().out


def test_forms_that_differ_are_found():
    def form(y, gradient):
        return Form(lambda: (np.array(y), {"x": np.array(gradient)}))

    ours = form([1.0, -2.0], [4.0])
    assert operator_speed.largest_difference({"a": ours, "b": form([1.0, -2.0], [3.0])}) == 0.25
    assert operator_speed.largest_difference({"a": ours, "b": form([1.5, -2.0], [4.0])}) == 0.25
    assert np.isnan(operator_speed.largest_difference({"a": ours, "b": ours, "c": form([1.0, np.nan], [4.0])}))


def test_programs_that_differ_are_not_timed(tiny_ops, monkeypatch, capsys):
    monkeypatch.setattr(operator_speed, "largest_difference", lambda forms: float("nan"))
    assert benchmark.main(["ops"]) == 2
    assert "ssd at length 8: the forms" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["ops"], ["train_step", "--config=quickstart"]])
def test_without_pytorch(argv, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    assert benchmark.main(argv) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: PyTorch is the opponent of this benchmark and is not installed: pip install torch"
    ]


def test_nan_and_other_bits_do_not_pass():
    y = np.ones((2, 3), np.float32)
    good = operators.judge((y, {"x": y}), (y, {"x": y}, {}), "float32")
    bad = operators.judge((y, {"x": y * np.nan}), (y, {"x": y}, {}), "float32")
    assert good["ok"] and not bad["ok"] and bad["errors"]["d x"]["norm"] == "nan"
    assert operators._same_bits([y], [y.copy()]) and not operators._same_bits([y], [y + 1e-7])


@pytest.mark.parametrize(
    "sizes, rows",
    [
        # 52 MB a row: twenty fit.
        ({"b": 640, "l": 200}, 20),
        ({"b": 640, "l": 2000}, 2),
        ({"b": 640, "l": 10_000}, 1),
        # Sixteen blocks at least, if there are as many rows.
        ({"b": 48, "l": 200}, 3),
        ({"b": 6, "l": 200}, 1),
    ],
)
def test_rows_of_a_block_divide_the_batch_and_leave_blocks_enough(sizes, rows):
    assert operators.rows_of_a_block(Case("ssd", sizes | {"h": 4, "p": 128, "n": 64})) == rows


def test_a_sum_that_is_small_by_chance_is_measured_by_its_addends():
    y = np.ones(3, np.float32)
    total, addends = np.float32([1e-3, -1e-3]), np.float32([1.0, 1.0])
    rounded = total + np.float32(5e-5)
    for spreads, ok in (({"D": addends}, True), ({}, False)):
        result = operators.judge((y, {"D": rounded}), (y, {"D": total}, spreads), "float32")
        assert result["ok"] is ok
    wrong = total + np.float32(5e-4)
    assert not operators.judge((y, {"D": wrong}), (y, {"D": total}, {"D": addends}), "float32")["ok"]


def test_bytes_of_ssd_by_hand():
    sizes = {"b": 2, "l": 20, "h": 2, "p": 8, "n": 4}
    one = SsdConfig(chunk_size=16, segments=1, heads_per_program=2, width_splits=1, forward_warps=1, backward_warps=1)
    # x 2*20*2*8*4, dt 2*20*2*4, B and C 2*20*4*4 each, three numbers a head; two chunks, states of 2*2*8*4*4 bytes.
    x, dt, maps, parameters, state = 2560, 320, 640, 24, 512
    inputs = x + dt + 2 * maps + parameters
    counts = operator_work.ssd_work(sizes, 4, one)
    assert (counts.needed, counts.needed_both) == (inputs + x, 2 * (inputs + x)) == (6744, 13488)
    assert counts.moved == inputs + x
    # Backward: inputs, dy, the state between the two chunks; dx, ddt, dB, dC; ddt again for dt_bias.
    backward = inputs + x + state + x + dt + 2 * maps + dt
    assert counts.moved_both == counts.moved + state + backward

    # A program a head: both write gradients of the maps, which are read and added up.
    parts = operator_work.ssd_work(sizes, 4, dataclasses.replace(one, heads_per_program=1))
    assert parts.moved_both == counts.moved_both - 2 * maps + 2 * 2 * maps + 2 * (2 * maps + maps)

    # Two segments: two passes more over a tensor, the steps and a map, and ten times states between segments.
    cut = operator_work.ssd_work(sizes, 4, dataclasses.replace(one, segments=2))
    segment_pass = x + dt + maps + 5 * 2 * state
    assert cut.moved == inputs + x + segment_pass + 2 * state
    # Both chunks' states are kept, and the states after both segments are read.
    assert cut.moved_both == cut.moved + 2 * state + (backward + state) + segment_pass + 2 * state


def test_bytes_of_the_convolution_by_hand():
    config = CausalConv1dConfig(16, 1, 2, 4, 3, 1, 1)
    counts = operator_work.conv_work({"b": 2, "l": 10, "c": 16}, 2, config)
    x, parameters, shared = 2 * 10 * 16 * 2, 5 * 16 * 4, 2 * 3 * 16 * 2
    assert (counts.needed, counts.needed_both) == (2 * x + parameters, 4 * x + 2 * parameters)
    assert counts.moved == 2 * x + parameters + shared
    # Four strips write sums of five parameters a channel, which are read again.
    assert counts.moved_both == counts.moved + 3 * x + 3 * shared + 2 * parameters + 2 * 4 * parameters


def test_bytes_of_the_scan_by_hand():
    config = SelectiveScanConfig(chunk=6, group=3, forward_channels=8, backward_channels=4)
    counts = operator_work.scan_work({"b": 2, "l": 7, "e": 8, "n": 4}, 4, config)
    x, maps, parameters = 2 * 7 * 8 * 4, 2 * 7 * 4 * 4, (8 * 4 + 16) * 4
    inputs = 2 * x + 2 * maps + parameters
    assert (counts.needed, counts.needed_both, counts.moved) == (inputs + x, 2 * (inputs + x), inputs + x)
    states, row_states, parts = 2 * 2 * 8 * 4 * 4, 2 * 8 * 4 * 4, 2 * 2 * maps
    kept = x + states
    backward = 2 * x + 2 * maps + parameters + kept + 2 * x + parts + 2 * row_states
    assert counts.moved_both == counts.moved + kept + backward + parts + 2 * maps + row_states + parameters


def test_bytes_and_products_of_the_loss_by_hand():
    loop = LoopConfig(own=16, other=16, columns=16, num_warps=1, num_stages=1, programs=2)
    counts = operator_work.loss_work({"t": 16, "v": 32, "d": 8}, 4, TritonConfig(loop, loop, loop))
    numbers, vector = 48 * 8 * 4, 64
    assert (counts.flops, counts.flops_both) == (2 * 16 * 32 * 8, 3 * 2 * 16 * 32 * 8)
    assert (counts.needed, counts.needed_both) == (numbers + 2 * vector, 2 * numbers + 3 * vector)
    # One block of targets, so that two programs share its loop over the catalogue; two blocks of the catalogue do not.
    assert counts.moved == numbers + 2 * vector + 6 * vector
    d_hidden = numbers + 3 * vector + 16 * 8 * (2 * 2 * 4 + 4)
    d_embedding = numbers + 3 * vector + 32 * 8 * 4
    assert counts.moved_both == counts.moved + 2 * vector + d_hidden + d_embedding


def test_the_floor_is_the_longer_of_bytes_and_products():
    assert operator_work.floor_seconds(100, 0, 50.0, 10.0) == 2.0
    assert operator_work.floor_seconds(100, 40, 50.0, 10.0) == 4.0
