"""The benchmark of a GPU, tried out on the CPU: the whole plan on tiny sizes, failures that show; and its opponents."""

import dataclasses
import json
import shutil
import sys
import tarfile
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments import benchmark
from experiments.benchmarks import gpu_plan, operator_kernels, operators, opponents
from experiments.benchmarks.operators import Case

TINY = ["gpu", "--tiny", "--repeats=1", "--seed=7"]
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
    """What the whole plan leaves behind."""
    output = tmp_path_factory.mktemp("gpu") / "gpu.json"
    assert benchmark.main([*TINY, AMPLE, "--plan=ten-minutes", f"--output={output}"]) == 0
    return json.loads(output.read_text())


@pytest.mark.exhaustive
def test_every_operator_is_checked_in_value_and_all_gradients(record):
    checks = record["correctness"]["checks"]
    assert {c["op"] for c in checks} == set(operators.OPERATORS)
    checks = [c for c in checks if "refused" not in c]
    assert all(c["ok"] and c["same_bits"] for c in checks) and not record["failed"]
    for op in operators.OPERATORS:
        assert {c["implementation"] for c in checks if c["op"] == op} >= {"pallas_triton", "xla"}
    [ssd] = [c for c in checks if c["op"] == "ssd" and c["implementation"] == "pallas_triton"]
    assert set(ssd["errors"]) == {"y", *(f"d {name}" for name in ("x", "dt", "A", "B", "C", "D", "dt_bias"))}
    assert ssd["errors"]["d A"]["norm"] < 1e-4


@pytest.mark.exhaustive
def test_operators_are_timed_in_all_forms_there_are(record):
    ops = record["ops"]
    assert ops["ceilings"]["bytes_a_second"] > 0 and set(ops["ceilings"]["flops_a_second"]) == set(operators.PRECISIONS)
    ssd, conv = ops["comparisons"]
    for result in (ssd, conv):
        for name in ("pallas_triton", "xla"):
            for of in operator_kernels.PASSES:
                form = result["forms"][f"{name}: {of}"]
                assert form["median_seconds"] > 0 and form["compile_seconds"] > 0
                expected = result["floor_seconds"][of] / form["median_seconds"]
                assert form["fraction_of_floor"] == pytest.approx(expected)
    assert "PyTorch: forward_backward" in conv["forms"]
    assert "xla" in conv["y_differs"]["over_largest"] and set(conv["opponents_y_differ"]["over_largest"]) == {"PyTorch"}
    for differences in (conv["y_differs"], conv["opponents_y_differ"]):
        assert all(difference < 0.05 for difference in differences["over_largest"].values())
    assert {"mamba_ssm, chunk 64", "mamba_ssm, chunk 256"} <= set(ssd["missing"]) and "causal_conv1d" in conv["missing"]
    swept = record["cuts"]["sweep"][0]
    assert swept["best"]["forward_backward"] in swept["median_seconds"] and not swept["missing"]


@pytest.mark.exhaustive
def test_the_training_step_is_timed_with_kernels_on_and_off(record):
    for part in ("train_step", "captured_step"):
        [result] = record[part]["comparisons"]
        assert set(result["forms"]) == {"kernels off", "kernels on", "kernels on, 8 steps per dispatch", "PyTorch"}
        assert result["ratios"]["PyTorch over kernels on"] > 0
        [swept] = record[part]["sweep"]
        assert swept["best"] in swept["groups"] and not swept["missing"]
    flags = [record[part]["calls"][0]["xla_flags"] for part in ("train_step", "captured_step")]
    assert flags[0].endswith("command_buffer=") and flags[1].endswith("command_buffer=+CUSTOM_CALL")


@pytest.mark.exhaustive
def test_trainings_end_with_a_test_and_absent_tools_are_named(record):
    run = record["training"]["runs"]["quickstart"]
    assert run["results"]["test"]["ndcg@10"] > 0 and len(run["epochs"]) == 2 and run["seconds_an_epoch"] > 0
    assert shutil.which("ncu") or "ncu" in record["counters"]["absent"]
    assert all(record[part]["ended"] and not record[part]["skipped"] for part in gpu_plan.SHARES if part != "counters")


@pytest.mark.exhaustive
def test_the_record_says_how_it_came_about(record):
    assert record["benchmark"] == "gpu" and record["settings"]["seed"] == 7 and record["versions"]["torch"]
    assert record["environment"]["backend"] == "cpu" and record["settings"]["plan"] == "ten-minutes"


@pytest.fixture
def one_case(monkeypatch):
    """Only a convolution, which compiles soonest."""
    for module in (operators, operator_kernels):
        monkeypatch.setattr(module, "TINY_CASES", (CONV,))


def test_a_wrong_result_makes_the_exit_code_1_and_timing_goes_on(one_case, monkeypatch, tmp_path, capsys):
    def wrong(x, *args, implementation, **options):
        y = operators.causal_conv1d(x, *args, implementation=implementation, **options)
        return y if implementation == "reference" else y * 1.1

    operator = operators.OPERATORS["causal_conv1d"]
    monkeypatch.setitem(operators.OPERATORS, "causal_conv1d", dataclasses.replace(operator, function=wrong))
    monkeypatch.setattr(operator_kernels, "comparison_jobs", lambda tiny: iter([(CONV, "bfloat16")]))
    output = tmp_path / "gpu.json"
    assert benchmark.main([*TINY, AMPLE, "--parts=ops,correctness", f"--output={output}"]) == 1
    written = json.loads(output.read_text())
    names = {label.rpartition(" ")[2] for label in written["correctness"]["failed"]}
    assert written["failed"] and {"pallas_triton", "xla"} <= names
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


@pytest.mark.parametrize(
    "option", ["--parts=ops,speed", "--budget_seconds=0", "--ml1m=no_such_log.inter", "--plan=ten-minutes"]
)
def test_bad_options_are_refused(option, capsys):
    assert benchmark.main([*TINY, option]) == 2
    said = capsys.readouterr().err
    assert option.partition("=")[0] in said and said.count("\n") == 1


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


def test_source_of_mamba_ssm_is_importable_without_its_extension(tmp_path, monkeypatch):
    source = tmp_path / "mamba_ssm-9" / "mamba_ssm"
    (source / "ops").mkdir(parents=True)
    (source / "__init__.py").write_text("import an_extension_that_nobody_built\n")
    (source / "ops" / "sound.py").write_text("def answer():\n    return 42\n")
    packed = tmp_path / "mamba_ssm-9.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(source.parent, "mamba_ssm-9")
    monkeypatch.setattr(sys, "path", list(sys.path))
    opponents.offer_mamba_ssm(packed, tmp_path / "unpacked")
    assert sys.path[0] == str(tmp_path / "unpacked" / "mamba_ssm-9")
    assert opponents.import_from("mamba_ssm", "ops.sound", "answer")() == 42
    for name in [name for name in sys.modules if name.startswith("mamba_ssm")]:
        del sys.modules[name]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no folder mamba_ssm"):
        opponents.offer_mamba_ssm(tmp_path / "empty", tmp_path)


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
