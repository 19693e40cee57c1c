"""The benchmark of a GPU, tried out on the CPU: byte counts by hand, every part on tiny sizes, failures that show."""

import dataclasses
import json
import sys
import time
import types

import numpy as np
import pytest
import torch

from experiments import benchmark
from experiments.benchmarks import (
    gpu_cases,
    gpu_clock,
    gpu_correctness,
    gpu_operators,
    gpu_torch,
    gpu_training,
    gpu_work,
)
from experiments.benchmarks.gpu_cases import Case
from kernels.causal_conv1d.config import CausalConv1dConfig
from kernels.selective_scan.config import SelectiveScanConfig
from kernels.softmax_cross_entropy import TritonConfig, Walk
from kernels.ssd import SsdConfig

TINY = ["gpu", "--tiny", "--implementation=pallas_triton_interpreted", "--repeats=1", "--seed=7"]
# However busy the machine is.
AMPLE = "--budget_seconds=100000"
CONV = Case("causal_conv1d", {"b": 2, "l": 5, "c": 16})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors do not wait for other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What a run of all parts leaves behind."""
    output = tmp_path_factory.mktemp("gpu") / "gpu.json"
    assert benchmark.main([*TINY, AMPLE, f"--output={output}"]) == 0
    return json.loads(output.read_text())


def test_every_operator_is_checked_in_value_and_all_gradients(record):
    checks = record["correctness"]["checks"]
    assert {c["op"] for c in checks} == set(gpu_cases.OPERATORS)
    assert all(c["ok"] and c["same_bits"] for c in checks) and not record["failed"]
    [ssd] = [c for c in checks if c["op"] == "ssd"]
    assert set(ssd["errors"]) == {"y", *(f"d {name}" for name in ("x", "dt", "A", "B", "C", "D", "dt_bias"))}
    assert ssd["errors"]["d A"]["norm"] < 1e-4


def test_operators_are_timed_in_all_forms_there_are(record):
    ops = record["ops"]
    assert ops["ceilings"]["bytes_a_second"] > 0 and set(ops["ceilings"]["flops_a_second"]) == set(gpu_cases.PRECISIONS)
    ssd, conv = ops["comparisons"]
    for result in (ssd, conv):
        for name in ("pallas_triton_interpreted", "xla"):
            for of in gpu_operators.PASSES:
                form = result["forms"][f"{name}: {of}"]
                assert form["median_seconds"] > 0
                expected = result["floor_seconds"][of] / form["median_seconds"]
                assert form["fraction_of_floor"] == pytest.approx(expected)
    assert "PyTorch: forward_backward" in conv["forms"]
    assert set(conv["y_differs"]["over_largest"]) == {"xla", "PyTorch"}
    assert all(difference < 0.05 for difference in conv["y_differs"]["over_largest"].values())
    assert "mamba_ssm" in ssd["missing"] and "causal_conv1d" in conv["missing"]
    [swept] = ops["sweep"]
    assert swept["best"]["forward_backward"] in swept["median_seconds"] and not swept["missing"]


def test_the_training_step_is_timed_with_kernels_on_and_off(record):
    [result] = record["train_step"]["comparisons"]
    assert set(result["forms"]) == {"kernels off", "kernels on", "PyTorch"}
    assert result["ratios"]["PyTorch over kernels on"] > 0
    [swept] = record["train_step"]["sweep"]
    assert swept["best"] in swept["groups"] and not swept["missing"]


def test_the_record_says_how_it_came_about(record):
    assert record["benchmark"] == "gpu" and record["settings"]["seed"] == 7 and record["versions"]["torch"]
    assert record["environment"]["backend"] == "cpu"


@pytest.fixture
def one_case(monkeypatch):
    """Only a convolution, which compiles soonest."""
    for module in (gpu_correctness, gpu_operators):
        monkeypatch.setattr(module, "TINY_CASES", (CONV,))


def test_a_wrong_result_makes_the_exit_code_1_and_timing_goes_on(one_case, monkeypatch, tmp_path, capsys):
    def wrong(x, *args, implementation, **options):
        y = gpu_cases.causal_conv1d(x, *args, implementation=implementation, **options)
        return y if implementation == "reference" else y * 1.1

    operator = gpu_cases.OPERATORS["causal_conv1d"]
    monkeypatch.setitem(gpu_cases.OPERATORS, "causal_conv1d", dataclasses.replace(operator, function=wrong))
    monkeypatch.setattr(gpu_operators, "jobs", lambda tiny: iter([("comparisons", CONV, "bfloat16")]))
    output = tmp_path / "gpu.json"
    assert benchmark.main([*TINY, AMPLE, "--parts=ops,correctness", f"--output={output}"]) == 1
    written = json.loads(output.read_text())
    assert written["failed"] and len(written["correctness"]["failed"]) == 1
    assert written["ops"]["comparisons"][0]["forms"] and "train_step" not in written
    assert "FAILED" in capsys.readouterr().out


def test_nan_and_other_bits_do_not_pass():
    y = np.ones((2, 3), np.float32)
    good = gpu_correctness.judge((y, {"x": y}), (y, {"x": y}, {}), "float32")
    bad = gpu_correctness.judge((y, {"x": y * np.nan}), (y, {"x": y}, {}), "float32")
    assert good["ok"] and not bad["ok"] and bad["errors"]["d x"]["norm"] == "nan"
    assert gpu_correctness._same_bits([y], [y.copy()]) and not gpu_correctness._same_bits([y], [y + 1e-7])


def test_what_there_is_no_time_for_says_so(tmp_path):
    output = tmp_path / "gpu.json"
    assert benchmark.main([*TINY, "--budget_seconds=1e-9", "--parts=correctness,train_step", f"--output={output}"]) == 0
    written = json.loads(output.read_text())
    for part, count in (("correctness", len(gpu_cases.TINY_CASES)), ("train_step", 2)):
        assert len(written[part]["skipped"]) == count
        assert all("are over" in why for why in written[part]["skipped"].values())


def test_only_what_is_asked_for(tmp_path):
    output = tmp_path / "gpu.json"
    asked = ["--budget_seconds=1e-9", "--parts=correctness,train_step", "--only", "scan", "beauty"]
    assert benchmark.main([*TINY, *asked, f"--output={output}"]) == 0
    written = json.loads(output.read_text())
    [label] = written["correctness"]["skipped"]
    assert label.startswith("check of selective_scan") and written["settings"]["only"] == ["scan", "beauty"]
    assert written["train_step"]["skipped"] == {}


@pytest.mark.parametrize("option", ["--parts=ops,speed", "--budget_seconds=0"])
def test_bad_options_are_refused(option, capsys):
    assert benchmark.main([*TINY, option]) == 2
    assert option.partition("=")[0] in capsys.readouterr().err


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
        # The width of the projection is no part of a state.
        ({"b": 640, "l": 200, "d": 64}, 20),
    ],
)
def test_rows_of_a_block_divide_the_batch_and_leave_blocks_enough(sizes, rows):
    assert gpu_correctness.rows_of_a_block(Case("ssd", sizes | {"h": 4, "p": 128, "n": 64})) == rows


def test_a_sum_that_is_small_by_chance_is_measured_by_its_addends():
    y = np.ones(3, np.float32)
    total, addends = np.float32([1e-3, -1e-3]), np.float32([1.0, 1.0])
    rounded = total + np.float32(5e-5)
    for spreads, ok in (({"D": addends}, True), ({}, False)):
        result = gpu_correctness.judge((y, {"D": rounded}), (y, {"D": total}, spreads), "float32")
        assert result["ok"] is ok
    wrong = total + np.float32(5e-4)
    assert not gpu_correctness.judge((y, {"D": wrong}), (y, {"D": total}, {"D": addends}), "float32")["ok"]


def test_bytes_of_ssd_by_hand():
    sizes = {"b": 2, "l": 20, "h": 2, "p": 8, "n": 4}
    one = SsdConfig(chunk_size=16, segments=1, heads_per_program=2, width_splits=1, forward_warps=1, backward_warps=1)
    # x 2*20*2*8*4, dt 2*20*2*4, B and C 2*20*4*4 each, three numbers a head; two chunks, states of 2*2*8*4*4 bytes.
    x, dt, maps, parameters, state = 2560, 320, 640, 24, 512
    inputs = x + dt + 2 * maps + parameters
    counts = gpu_work.ssd_work(sizes, 4, one)
    assert (counts.needed, counts.needed_both) == (inputs + x, 2 * (inputs + x)) == (6744, 13488)
    assert counts.moved == inputs + x
    # Backward: inputs, dy, the state between the two chunks; dx, ddt, dB, dC; ddt again for dt_bias.
    backward = inputs + x + state + x + dt + 2 * maps + dt
    assert counts.moved_both == counts.moved + state + backward

    # A program a head: both write gradients of the maps, which are read and added up.
    parts = gpu_work.ssd_work(sizes, 4, dataclasses.replace(one, heads_per_program=1))
    assert parts.moved_both == counts.moved_both - 2 * maps + 2 * 2 * maps + 2 * (2 * maps + maps)

    # Two segments: two passes more over a tensor, the steps and a map, and ten times states between segments.
    cut = gpu_work.ssd_work(sizes, 4, dataclasses.replace(one, segments=2))
    segment_pass = x + dt + maps + 5 * 2 * state
    assert cut.moved == inputs + x + segment_pass + 2 * state
    # Both chunks' states are kept, and the states after both segments are read.
    assert cut.moved_both == cut.moved + 2 * state + (backward + state) + segment_pass + 2 * state


def test_bytes_of_the_convolution_by_hand():
    config = CausalConv1dConfig(16, 1, 2, 4, 3, 1, 1)
    counts = gpu_work.conv_work({"b": 2, "l": 10, "c": 16}, 2, config)
    x, parameters, shared = 2 * 10 * 16 * 2, 5 * 16 * 4, 2 * 3 * 16 * 2
    assert (counts.needed, counts.needed_both) == (2 * x + parameters, 4 * x + 2 * parameters)
    assert counts.moved == 2 * x + parameters + shared
    # Four strips write sums of five parameters a channel, which are read again.
    assert counts.moved_both == counts.moved + 3 * x + 3 * shared + 2 * parameters + 2 * 4 * parameters


def test_bytes_of_the_scan_by_hand():
    config = SelectiveScanConfig(chunk=6, group=3, forward_channels=8, backward_channels=4)
    counts = gpu_work.scan_work({"b": 2, "l": 7, "e": 8, "n": 4}, 4, config)
    x, maps, parameters = 2 * 7 * 8 * 4, 2 * 7 * 4 * 4, (8 * 4 + 16) * 4
    inputs = 2 * x + 2 * maps + parameters
    assert (counts.needed, counts.needed_both, counts.moved) == (inputs + x, 2 * (inputs + x), inputs + x)
    states, row_states, parts = 2 * 2 * 8 * 4 * 4, 2 * 8 * 4 * 4, 2 * 2 * maps
    kept = x + states
    backward = 2 * x + 2 * maps + parameters + kept + 2 * x + parts + 2 * row_states
    assert counts.moved_both == counts.moved + kept + backward + parts + 2 * maps + row_states + parameters


def test_bytes_and_products_of_the_loss_by_hand():
    walk = Walk(own=16, walked=16, columns=16, num_warps=1, num_stages=1, programs=2)
    counts = gpu_work.loss_work({"t": 16, "v": 32, "d": 8}, 4, TritonConfig(walk, walk, walk))
    numbers, vector = 48 * 8 * 4, 64
    assert (counts.flops, counts.flops_both) == (2 * 16 * 32 * 8, 3 * 2 * 16 * 32 * 8)
    assert (counts.needed, counts.needed_both) == (numbers + 2 * vector, 2 * numbers + 3 * vector)
    # One block of targets, so that two programs share its walk over the catalogue; two blocks of the catalogue do not.
    assert counts.moved == numbers + 2 * vector + 6 * vector
    d_hidden = numbers + 3 * vector + 16 * 8 * (2 * 2 * 4 + 4)
    d_embedding = numbers + 3 * vector + 32 * 8 * 4
    assert counts.moved_both == counts.moved + 2 * vector + d_hidden + d_embedding


def test_the_floor_is_the_longer_of_bytes_and_products():
    assert gpu_work.floor_seconds(100, 0, 50.0, 10.0) == 2.0
    assert gpu_work.floor_seconds(100, 40, 50.0, 10.0) == 4.0


@pytest.mark.parametrize(("mean", "longest"), [(118.0, 200), (8.4, 50)])
def test_lengths_have_the_mean_of_the_data(mean, longest):
    lengths = gpu_training.draw_lengths(np.random.default_rng(0), mean, longest, 200_000)
    assert lengths.min() == 1 and lengths.max() == longest
    assert lengths.mean() == pytest.approx(mean, rel=0.01)


def test_kernels_are_switched_one_by_one():
    config = gpu_training.shapes(True)[0].config
    on = gpu_training.with_kernels(config, ("ssd", "loss"), "pallas_triton")
    assert (on.model.ssd_implementation, on.model.conv_implementation) == ("pallas_triton", "xla")
    assert on.train.loss_implementation == "pallas_triton"
    assert gpu_training.with_kernels(on, (), "pallas_triton").train.loss_implementation is None


def test_a_package_without_its_extension_gives_its_modules(tmp_path, monkeypatch):
    package = tmp_path / "lame_package"
    package.mkdir()
    (package / "__init__.py").write_text("import an_extension_that_nobody_built\n")
    (package / "sound.py").write_text("def answer():\n    return 42\n")
    (package / "lame.py").write_text("import an_extension_that_nobody_built\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert gpu_torch.import_from("lame_package", "sound", "answer")() == 42
    for arguments in (("lame_package", "lame", "answer"), ("no_such_package", "sound", "answer")):
        with pytest.raises(ImportError):
            gpu_torch.import_from(*arguments)
    for name in [name for name in sys.modules if name.startswith("lame_package")]:
        del sys.modules[name]


def test_candidates_of_triton_kernels_are_compiled_before_they_are_tried(capsys):
    from triton.runtime.autotuner import Autotuner

    asked = []
    configs = [types.SimpleNamespace(all_kwargs=lambda size=size: {"SIZE": size}) for size in (1, 2)]
    tuner = types.SimpleNamespace(
        configs=configs, early_config_prune=None, perf_model=None, nargs={"x": "an array"},
        fn=types.SimpleNamespace(warmup=lambda *args, **options: asked.append((args, options))),
    )  # fmt: skip
    with gpu_torch.tuning_in_threads():
        assert Autotuner.prune_configs(tuner, {"grid": (3,), "warmup": False}) == configs
    assert asked == [(("an array",), {"grid": (3,), "SIZE": size}) for size in (1, 2)]
    assert Autotuner.prune_configs(tuner, {}) == configs and len(asked) == 2
    assert not capsys.readouterr().err


def test_slow_forms_are_stopped_and_quick_ones_are_repeated():
    def form(seconds):
        return gpu_clock.Form(lambda: time.sleep(seconds), lambda _: None)

    times, failed = gpu_clock.time_in_turns(
        {"quick": form(1e-4), "stuck": form(30)}, repeats=3, least_seconds=5e-3, limit=2
    )
    assert "TimeoutError" in failed["stuck"] and set(times) == {"quick"}
    assert len(times["quick"]["seconds"]) == 3 and times["quick"]["launches_a_reading"] > 1


def test_one_program_that_does_not_build_costs_no_other():
    def broken():
        raise RuntimeError("too many registers\nand more")

    built, failed = gpu_clock.build_all({"good": lambda: 1, "bad": broken})
    assert built == {"good": 1} and failed == {"bad": "RuntimeError: too many registers"}
