"""The benchmark of a GPU, tried out on the CPU: every part on tiny sizes, failures that show; and its opponents."""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments import benchmark
from experiments.benchmarks import operator_speed, operators, opponents
from experiments.benchmarks.operators import Case

TINY = ["gpu", "--tiny", "--implementation=pallas_triton", "--repeats=1", "--seed=7"]
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


@pytest.mark.exhaustive
def test_every_operator_is_checked_in_value_and_all_gradients(record):
    checks = record["correctness"]["checks"]
    assert {c["op"] for c in checks} == set(operators.OPERATORS)
    assert all(c["ok"] and c["same_bits"] for c in checks) and not record["failed"]
    [ssd] = [c for c in checks if c["op"] == "ssd"]
    assert set(ssd["errors"]) == {"y", *(f"d {name}" for name in ("x", "dt", "A", "B", "C", "D", "dt_bias"))}
    assert ssd["errors"]["d A"]["norm"] < 1e-4


@pytest.mark.exhaustive
def test_operators_are_timed_in_all_forms_there_are(record):
    ops = record["ops"]
    assert ops["ceilings"]["bytes_a_second"] > 0 and set(ops["ceilings"]["flops_a_second"]) == set(operators.PRECISIONS)
    ssd, conv = ops["comparisons"]
    for result in (ssd, conv):
        for name in ("pallas_triton", "xla"):
            for of in operator_speed.PASSES:
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


@pytest.mark.exhaustive
def test_the_training_step_is_timed_with_kernels_on_and_off(record):
    [result] = record["train_step"]["comparisons"]
    assert set(result["forms"]) == {"kernels off", "kernels on", "PyTorch"}
    assert result["ratios"]["PyTorch over kernels on"] > 0
    [swept] = record["train_step"]["sweep"]
    assert swept["best"] in swept["groups"] and not swept["missing"]


@pytest.mark.exhaustive
def test_the_record_says_how_it_came_about(record):
    assert record["benchmark"] == "gpu" and record["settings"]["seed"] == 7 and record["versions"]["torch"]
    assert record["environment"]["backend"] == "cpu"


@pytest.fixture
def one_case(monkeypatch):
    """Only a convolution, which compiles soonest."""
    for module in (operators, operator_speed):
        monkeypatch.setattr(module, "TINY_CASES", (CONV,))


def test_a_wrong_result_makes_the_exit_code_1_and_timing_goes_on(one_case, monkeypatch, tmp_path, capsys):
    def wrong(x, *args, implementation, **options):
        y = operators.causal_conv1d(x, *args, implementation=implementation, **options)
        return y if implementation == "reference" else y * 1.1

    operator = operators.OPERATORS["causal_conv1d"]
    monkeypatch.setitem(operators.OPERATORS, "causal_conv1d", dataclasses.replace(operator, function=wrong))
    monkeypatch.setattr(operator_speed, "jobs", lambda tiny: iter([("comparisons", CONV, "bfloat16")]))
    output = tmp_path / "gpu.json"
    assert benchmark.main([*TINY, AMPLE, "--parts=ops,correctness", f"--output={output}"]) == 1
    written = json.loads(output.read_text())
    assert written["failed"] and len(written["correctness"]["failed"]) == 1
    assert written["ops"]["comparisons"][0]["forms"] and "train_step" not in written
    assert "FAILED" in capsys.readouterr().out


def test_what_there_is_no_time_for_says_so(tmp_path):
    output = tmp_path / "gpu.json"
    assert benchmark.main([*TINY, "--budget_seconds=1e-9", "--parts=correctness,train_step", f"--output={output}"]) == 0
    written = json.loads(output.read_text())
    for part, count in (("correctness", len(operators.TINY_CASES)), ("train_step", 2)):
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


def test_mamba2_jax_gets_maps_of_every_head(monkeypatch):
    def ssd_forward(x, dt, A, B, C, chunk_size, D, dt_bias, dt_min, dt_max):
        return (B, C, chunk_size, dt_min, dt_max), "the final state"

    module = types.SimpleNamespace(ssd_forward=ssd_forward)
    monkeypatch.setitem(sys.modules, "mamba2_jax", types.SimpleNamespace(modeling=module))
    monkeypatch.setitem(sys.modules, "mamba2_jax.modeling", module)
    case = Case("ssd", {"b": 2, "l": 3, "h": 4, "p": 5, "n": 6})
    inputs = operators.draw(case, np.random.default_rng(0)).inputs
    B, C, *rest = opponents.mamba2_jax_ssd(**inputs, chunk_size=16)
    for maps, name in ((B, "B"), (C, "C")):
        assert maps.shape == (2, 3, 4, 6)
        np.testing.assert_array_equal(maps[:, :, 3], inputs[name])
    assert rest == [16, 0.0, float("inf")]


def test_a_package_without_its_extension_gives_its_modules(tmp_path, monkeypatch):
    package = tmp_path / "lame_package"
    package.mkdir()
    (package / "__init__.py").write_text("import an_extension_that_nobody_built\n")
    (package / "sound.py").write_text("def answer():\n    return 42\n")
    (package / "lame.py").write_text("import an_extension_that_nobody_built\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert opponents.import_from("lame_package", "sound", "answer")() == 42
    for arguments in (("lame_package", "lame", "answer"), ("no_such_package", "sound", "answer")):
        with pytest.raises(ImportError):
            opponents.import_from(*arguments)
    for name in [name for name in sys.modules if name.startswith("lame_package")]:
        del sys.modules[name]


def test_candidates_of_triton_kernels_are_compiled_before_they_are_tried(capsys):
    from triton.runtime.autotuner import Autotuner

    asked = []
    configs = [types.SimpleNamespace(all_kwargs=lambda size=size: {"SIZE": size}) for size in (1, 2)]
    tuner = types.SimpleNamespace(
        configs=configs,
        early_config_prune=None,
        perf_model=None,
        nargs={"x": "an array"},
        fn=types.SimpleNamespace(warmup=lambda *args, **options: asked.append((args, options))),
    )
    with opponents.tuning_in_threads():
        assert Autotuner.prune_configs(tuner, {"grid": (3,), "warmup": False}) == configs
    assert asked == [(("an array",), {"grid": (3,), "SIZE": size}) for size in (1, 2)]
    assert Autotuner.prune_configs(tuner, {}) == configs and len(asked) == 2
    assert not capsys.readouterr().err
