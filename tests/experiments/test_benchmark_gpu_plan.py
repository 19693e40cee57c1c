"""The plan of a GPU's benchmark: it goes on where it ended, however that was, and finds what it goes through."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import gpu, gpu_counters, gpu_plan, gpu_training, operator_kernels
from experiments.benchmarks.operators import TINY_CASES, Case
from experiments.benchmarks.timing import Budget, Part, Settings

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = Settings((), True, 1)


def part_of(record, saved=None):
    return Part(SETTINGS, np.random.default_rng(0), Budget(1000), record, (saved or [].append))


def test_a_part_goes_on_where_it_ended():
    record, did = {}, []

    def fail():
        raise RuntimeError("no such kernel")

    jobs = [("a", lambda: did.append("a")), ("b", fail), ("c", lambda: did.append("c"))]
    part_of(record).do_all(jobs)
    assert did == ["a", "c"] and record["skipped"] == {"b": "RuntimeError: no such kernel"}
    part_of(record).do_all([jobs[0], ("b", lambda: did.append("b")), jobs[2]])
    assert did == ["a", "c", "b"] and record["done"] == ["a", "c", "b"] and not record["skipped"]


def test_what_ended_the_process_twice_is_not_begun_again():
    record, labels = {}, []

    class Killed(BaseException):
        pass

    def die():
        raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            part_of(record).do_all([("bad", die), ("good", lambda: None)])
    part_of(record, labels.append).do_all([("bad", die), ("good", lambda: None)])
    assert record["done"] == ["good"] and "begun 2 times" in record["skipped"]["bad"]
    # The record is kept before a job, too: else nobody would know in which one a process ended.
    assert labels == ["begin good", "good"]


def test_records_of_others_are_refused(tmp_path, capsys):
    output = tmp_path / "gpu.json"
    now = {"device_kind": "this"}
    whole = {"benchmark": "gpu", "environment": now, "settings": {"implementations": [], "tiny": True}}
    for content, says in [
        ("{", "holds no record"),
        ('{"benchmark": "ops"}', "holds no record"),
        ('{"benchmark": "gpu", "settings": {"implementation": "a"}}', "an earlier version"),
        (json.dumps(whole | {"environment": {"device_kind": "that"}}), "measured on that, this is this"),
        (json.dumps(whole | {"settings": {"implementations": [], "tiny": False}}), "tiny=False"),
    ]:
        output.write_text(content)
        with pytest.raises(ValueError, match=says):
            gpu_plan.earlier(output, now, True)
    output.write_text("{")
    assert benchmark.main(["gpu", "--plan=ten-minutes", "--tiny", f"--output={output}"]) == 2
    assert "name another file" in capsys.readouterr().err and output.read_text() == "{"


def test_parts_get_the_options_of_the_plan_but_for_its_own(tmp_path, monkeypatch):
    output, calls = tmp_path / "gpu.json", []

    def run_part(part, seconds, output, options, budget):
        calls.append((part, seconds, options))
        found = json.loads(output.read_text()) if output.exists() else {"environment": {"command": []}}
        found |= {"benchmark": "gpu", "settings": {"implementations": []}}
        # The first part is cut off once, and has failed checks.
        again = any(name == part for name, *_ in calls[:-1])
        skipped = {} if part != "correctness" or again else {"x": "skipped: the 9 s for this part are over"}
        found[part] = {"ended": True, "skipped": skipped, "failed": ["x"]}
        output.write_text(json.dumps(found))

    monkeypatch.setattr(gpu_plan, "_run_part", run_part)
    given = ["--plan", "ten-minutes", "--tiny", "--only", "l1", "l2", "--parts=ops,correctness", "--budget_seconds=100"]
    assert benchmark.main(["gpu", *given, f"--output={output}"]) == 1
    assert [name for name, *_ in calls] == ["correctness", "ops", "correctness"]
    assert calls[0][1] == pytest.approx(60) and calls[1][1] == pytest.approx(40)
    assert calls[0][2] == ["--repeats=5", "--tiny", "--only", "l1", "l2"]
    calls.clear()
    assert benchmark.main(["gpu", *given, f"--output={output}"]) == 1 and calls == []


@dataclasses.dataclass(frozen=True)
class SomeConfig:
    maxnreg: int | None = 162
    pairs: int = 2
    persistent: bool = False
    warps: int = 4
    name: str = "x"

    def __post_init__(self):
        if self.warps > 4:
            raise ValueError(f"warps={self.warps} must be at most 4")


def test_configs_that_differ_in_one_field_are_found_by_themselves():
    tried = operator_kernels.configs(TINY_CASES[0], SomeConfig(), tiny=False)
    assert list(tried) == ["default", "maxnreg None", "maxnreg 128", "pairs 1", "pairs 4", "persistent True", "warps 2"]
    assert tried["maxnreg 128"] == SomeConfig(maxnreg=128) and tried["default"] == SomeConfig()
    case = Case("softmax_cross_entropy", {"t": 2048, "v": 12_102, "d": 64})
    loss = operator_kernels.configs(case, operator_kernels.default_config_of(case, "tfloat32", "pallas_triton"), False)
    assert {name: config.d_hidden.programs for name, config in loss.items()} == {
        f"programs {count}": count for count in (190, 256, 264)
    }


def test_full_sizes_come_in_the_order_of_their_worth():
    compared = list(operator_kernels.comparison_jobs(False))
    first = [(case.op, case.sizes["l"], case.sizes["p"], precision) for case, precision in compared[:4]]
    assert first == [("ssd", l, p, "tfloat32") for l, p in ((50, 32), (200, 32), (200, 128), (65_536, 32))]  # noqa: E741
    labels = [f"{case.label} {precision}" for case, precision in compared]
    assert len(labels) == len(set(labels))
    assert all(job in compared for job in operator_kernels.opponent_jobs(False))
    assert {case.op for case, _ in operator_kernels.cut_jobs(False)} == {"ssd", "softmax_cross_entropy"}


def test_what_trains_and_what_the_record_says_of_its_log(tmp_path):
    assert [one.name for one in gpu_training.trainings(False)][:2] == ["ml1m_tim4rec_causal", "ml1m_tim4rec"]
    path = tmp_path / "ml-1m-imputed.inter.gz"
    options, note = gpu_training.data_options("ml1m", path)
    assert options == ("--data.name=custom", f"--data.path={path}") and note == "MovieLens-1M with imputed timestamps"
    assert gpu_training.data_options("ml1m", tmp_path / "ml-1m.zip")[1] == "MovieLens-1M"
    for training in gpu_training.trainings(False):
        gpu_training.train.parse([*training.options, *gpu_training._QUIET, "--data.path=x"])


def test_without_a_log_the_others_are_trained(tmp_path):
    record = {}
    part = Part(Settings((), False, 1), np.random.default_rng(0), Budget(1000), record, lambda label: None)
    gpu_training.train_all(part, {"ml1m": None, "beauty": None}, tmp_path)
    assert set(record["skipped"]) == {one.name for one in gpu_training.trainings(False)}
    assert all("give --" in why for why in record["skipped"].values()) and not record["runs"]


NCU = """==PROF== Connected
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","ssd_forward","dram__bytes_read.sum","byte","1,234"
"0","ssd_forward","launch__registers_per_thread","register/thread","162"
"1","ssd_backward","dram__bytes_read.sum","byte","n/a"
"""


def test_counters_are_read_from_among_other_lines(tmp_path, monkeypatch):
    first, second = gpu_counters.read_counters(NCU)
    assert first["kernel"] == "ssd_forward" and first["metrics"]["dram__bytes_read.sum"] == 1234
    assert second["metrics"]["dram__bytes_read.sum"] == "n/a" and gpu_counters.read_counters("==ERROR==") == []
    fake = tmp_path / "ncu"
    fake.write_text(f"#!/bin/sh\ncat <<'END'\n{NCU}END\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    record = {}
    gpu_counters.count_all(part_of(record))
    assert record["launches"][0]["launches"] == [first, second] and not record["skipped"]
    fake.write_text("#!/bin/sh\necho no permission >&2; exit 1\n")
    record = {}
    gpu_counters.count_all(part_of(record))
    assert all("no permission" in why for why in record["skipped"].values()) and record["skipped"]


@pytest.mark.exhaustive
def test_nothing_measured_is_lost_when_the_plan_is_killed(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "experiments.benchmark", "gpu", "--plan=ten-minutes", "--tiny", "--repeats=1"]
    command += ["--parts=correctness,ops", "--only", "conv", "loss", "scan", "entropy", f"--output={output}"]
    command += ["--budget_seconds=100000"]

    def read():
        return json.loads(output.read_text()) if output.exists() else {}

    # Once in the middle of the second check, once as soon as the second part has begun.
    for reached in (
        lambda record: record.get("correctness", {}).get("begun") and record["correctness"]["done"],
        lambda record: "ops" in record,
    ):
        before = read()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not reached(read()):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(2.0)  # Its part ends by itself.
        after = read()
        assert not gpu_plan._is_done(after.get("ops", {}))
        checks = before.get("correctness", {}).get("checks", [])
        assert after["correctness"]["checks"][: len(checks)] == checks
    checks = read()["correctness"]["checks"]
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
    record = read()
    assert all(gpu_plan._is_done(record[part]) for part in ("correctness", "ops"))
    assert record["correctness"]["checks"] == checks and record["ops"]["comparisons"]
    labels = record["correctness"]["done"]
    assert len(labels) == len(set(labels)) == 3


def test_the_parts_are_those_that_the_plan_knows():
    assert set(gpu._RUN) | {"training"} == set(gpu_plan.SHARES)
    assert sum(gpu_plan.SHARES.values()) == 540
