"""experiments.benchmark service: a tiny service under load, and what is counted of it."""

import json

import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import service


@pytest.mark.exhaustive
def test_a_tiny_service(tmp_path):
    pytest.importorskip("fastapi", reason="the service needs the extra [serve]")
    output = tmp_path / "service.json"
    sizes = ["--items=200", "--users=100", "--rate=40", "--seconds=2", "--repeats=2", "--tiny"]
    assert benchmark.main(["service", *sizes, f"--output={output}"]) == 0
    record = json.loads(output.read_text())
    results = record["results"]
    assert record["failed"] is False and results["compiled_by_requests"] == 0 and len(results["first_ms"]) == 10
    for name in ("rate", "mixed"):
        found = results[name]
        assert found["requests"] == 160 and [one["requests"] for one in found["rounds"]] == [80, 80]
        assert 0 < found["p50_ms"] <= found["p90_ms"] <= found["p99_ms"] <= found["most_ms"]
    assert results["batches"]["users"] == 100 and min(results["batches"]["users_per_second"]) > 0


def test_the_summary_is_of_quantiles():
    found = service._summary(np.arange(1, 101) / 1000)
    assert found == {"requests": 100, "p50_ms": 50.5, "p90_ms": 90.1, "p99_ms": 99.01, "most_ms": 100.0}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--items=99", "--items=99 must be at least 100"),
        ("--rate=0", "--rate=0.0 must be at least 1"),
        ("--rate=1e9", "--rate=1000000000.0 must be 10000 at most"),
        ("--seconds=0", "--seconds=0.0 must be at least 1"),
    ],
)
def test_bad_options(capsys, option, message):
    assert benchmark.main(["service", option]) == 2
    assert message in capsys.readouterr().err
