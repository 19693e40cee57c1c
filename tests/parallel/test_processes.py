"""Two processes of four fake devices each against one process: the program, its run folder, interruptions, losses."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest

from experiments import sweep, train
from experiments.comparison import plan
from tests.parallel.fake_devices import ROOT, environment
from tim4rec_jax.run_dir import read_config, read_environment, read_results
from tim4rec_jax.training.logging import read_metrics

# A batch of 29 on 8 devices is filled with 3 rows; the step is compiled for one length only.
SMALL = [
    "--config=quickstart_sasrec",
    "--data.synthetic.num_users=60",
    "--data.synthetic.num_items=20",
    "--model.max_len=6",
    "--model.d_model=8",
    "--model.inner_size=8",
    "--model.num_layers=1",
    "--train.batch_size=29",
    "--train.epochs=100",
    "--train.length_groups=1",
    "--train.log_every=1",
    "--train.progress=false",
    "--train.tensorboard=false",
    "--model.vocab_multiple=2",
    "--eval.baselines",
    "popularity",
]
HALF, WHOLE = 8, 16


def losses(folder):
    return [line["loss"] for line in read_metrics(folder) if line["kind"] == "train"]


def options(tmp_path, *others):
    return [*SMALL, f"--data.cache_dir={tmp_path / 'cache'}", *others]


@contextlib.contextmanager
def two_processes(folder, *arguments):
    """Starts the training program twice; yields both and their output files."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = [f"--parallel.coordinator=127.0.0.1:{port}", "--parallel.num_processes=2"]
    outputs = [folder.with_name(f"{folder.name}.{number}.log") for number in range(2)]
    started = []
    for number, output in enumerate(outputs):
        own = [*arguments, f"--run_dir={folder}", *together, f"--parallel.process_id={number}"]
        with output.open("wb") as stream:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "experiments.train", *own],
                    cwd=ROOT,
                    env=environment(4),
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        yield started, outputs
    finally:
        for process in started:
            process.kill()
            process.wait()


def wait_for_step(folder, step, processes, outputs):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if len(losses(folder)) >= step:
                return
        if any(process.poll() is not None for process in processes):
            break
        time.sleep(0.05)
    raise AssertionError("did not get there:\n" + "\n".join(output.read_text()[-3000:] for output in outputs))


@pytest.fixture(scope="module")
def halfway(tmp_path_factory) -> pathlib.Path:
    """A run of one process on one device that was trained for HALF steps."""
    base = tmp_path_factory.mktemp("halfway")
    arguments = options(base, "--parallel.strategy=single", f"--train.max_steps={HALF}")
    assert train.main([*arguments, f"--run_dir={base / 'run'}"]) == 0
    return base / "run"


@pytest.mark.parametrize("shards", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_two_processes_go_on_with_the_run_of_one(tmp_path, halfway, shards):
    """They resume what one device began, train, validate, save and test as one device does."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        shutil.copytree(halfway, folder)
    more = options(tmp_path, f"--train.max_steps={WHOLE}", "--resume")
    assert train.main([*more, "--parallel.strategy=single", f"--run_dir={alone}"]) == 0
    with two_processes(together, *more, f"--parallel.catalogue_shards={shards}") as (processes, outputs):
        codes = [process.wait(timeout=300) for process in processes]
    texts = [output.read_text() for output in outputs]
    assert codes == [0, 0], texts

    assert len(losses(together)) == WHOLE
    np.testing.assert_allclose(losses(together), losses(alone), rtol=0, atol=1e-6)
    assert read_results(together)["test"] == read_results(alone)["test"]
    ranks = [pl.read_parquet(folder / "test_ranks.parquet") for folder in (alone, together)]
    assert ranks[0].equals(ranks[1])
    assert read_config(together).parallel.num_processes == 2
    assert "resuming at step 8" in texts[0] and f"run folder: {together}" in texts[0]
    # The collectives of the CPU announce themselves, sometimes on two lines; the second process itself says nothing.
    own = [line for line in texts[1].splitlines() if line and "[Gloo]" not in line and "peer ranks" not in line]
    assert own == []


@pytest.mark.exhaustive
def test_ctrl_c_in_one_process_stops_both_after_the_same_step(tmp_path):
    folder = tmp_path / "run"
    with two_processes(folder, *options(tmp_path)) as (processes, outputs):
        wait_for_step(folder, 3, processes, outputs)
        processes[1].send_signal(signal.SIGINT)
        codes = [process.wait(timeout=300) for process in processes]
    assert codes == [0, 130], [output.read_text() for output in outputs]
    steps = len(losses(folder))
    assert f"stopped at step {steps}; the state is saved" in outputs[0].read_text()
    assert read_environment(folder)["device_count"] == 8 and read_environment(folder)["process_count"] == 2
    assert not (folder / "results.json").exists()

    on_all = options(tmp_path, f"--train.max_steps={steps + 4}", f"--run_dir={folder}", "--resume")
    assert train.main(on_all) == 0
    alone = tmp_path / "alone"
    on_one = options(tmp_path, f"--train.max_steps={steps + 4}", f"--run_dir={alone}", "--parallel.strategy=single")
    assert train.main(on_one) == 0
    np.testing.assert_allclose(losses(folder), losses(alone), rtol=0, atol=1e-6)


@pytest.mark.exhaustive
def test_a_lost_process_ends_the_other_with_an_error(tmp_path):
    folder = tmp_path / "run"
    arguments = options(tmp_path, "--parallel.heartbeat_seconds=15", "--train.checkpoint_every=2")
    with two_processes(folder, *arguments) as (processes, outputs):
        wait_for_step(folder, 5, processes, outputs)
        processes[1].kill()
        killed = time.monotonic()
        assert processes[0].wait(timeout=120) != 0
        assert time.monotonic() - killed < 60
    text = outputs[0].read_text()
    assert "another task died" in text or "start all of them again with --resume" in text
    assert list((folder / "checkpoints" / "latest").glob("0*_step_*"))


def as_slurm_does(number: int, port: int) -> dict[str, str]:
    """The environment of a task of SLURM, from whose job number JAX takes the port."""
    variables = {
        "JOB_ID": port - 61440,
        "STEP_NODELIST": "localhost",
        "NTASKS": 2,
        "PROCID": number,
        "LOCALID": number,
        "STEP_NUM_NODES": 1,
    }
    return environment(1) | {f"SLURM_{name}": str(value) for name, value in variables.items()}


@pytest.mark.exhaustive
def test_tasks_of_slurm_that_were_started_differently_refuse(tmp_path):
    folder, port = tmp_path / "run", 61440 + os.getpid() % 4096
    arguments = options(tmp_path, "--parallel.distributed=auto", f"--run_dir={folder}")
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "experiments.train", *arguments, f"--train.seed={number}"],
            cwd=ROOT,
            env=as_slurm_does(number, port),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], errors
    assert all("the processes do not have the same settings (digest by process: 0: " in error for error in errors)
    assert not folder.exists()


@pytest.mark.parametrize("parse", [plan.parse, sweep.parse])
def test_many_runs_are_not_spread_over_machines(parse):
    name = ["--grid", "train.seed=1"] if parse is sweep.parse else ["--data=quickstart", "--models=sasrec"]
    with pytest.raises(ValueError, match="--parallel.coordinator and --parallel.distributed are for experiments.train"):
        parse([*name, "--parallel.distributed=auto"])


def test_a_cluster_that_is_not_there_is_one_clear_line(tmp_path, capsys, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_"))]:
        monkeypatch.delenv(name)
    code = "import sys; from experiments import train; sys.exit(train.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--parallel.distributed=auto", f"--run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "parallel.distributed='auto' found no processes to join" in done.stderr
    assert "Traceback" not in done.stderr and json.dumps(done.stdout) == '""'
