"""A model from a file of the user: trained, and its run folder opened by other programs in processes of their own."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tim4rec_jax.run_dir import read_items

ROOT = pathlib.Path(__file__).resolve().parents[2]
OPTIONS = [
    "--config=quickstart",
    "--model.module=my_models:RNN4Rec",
    "--data.synthetic.num_users=60",
    "--data.synthetic.num_items=30",
    "--model.max_len=8",
    "--model.d_model=8",
    "--train.batch_size=128",
    "--train.epochs=1",
    "--eval.baselines=popularity",
    "--train.progress=false",
    "--train.tensorboard=false",
    "--parallel.strategy=single",
]


def start(program: str, *options: str, path: pathlib.Path | None) -> subprocess.CompletedProcess:
    folders = [str(folder) for folder in (ROOT, path) if folder is not None]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, "-m", f"experiments.{program}", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run folder, and the folder of the file."""
    folder = tmp_path_factory.mktemp("outside")
    shutil.copy(ROOT / "tests" / "models" / "rnn4rec.py", folder / "my_models.py")
    done = start("train", *OPTIONS, f"--run_dir={folder / 'run'}", path=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run", folder


def test_other_programs_open_the_folder(run):
    folder, modules = run
    measured = start("evaluate", f"--run={folder}", path=modules)
    assert measured.returncode == 0 and "hit@10" in measured.stdout, measured.stderr
    # The items, and with them their ids, can be read without the model.
    item = read_items(folder)["item_id"][0]
    answer = start("recommend", f"--run={folder}", f"--history={item}", "--k=3", path=modules)
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr


def test_a_module_that_is_not_there_is_one_line(run):
    done = start("evaluate", f"--run={run[0]}", path=None)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "model.module=my_models cannot be imported" in done.stderr and "PYTHONPATH" in done.stderr


def test_it_stands_in_a_comparison(run, tmp_path):
    options = [option for option in OPTIONS[2:] if "baselines" not in option]
    where = ["--data=quickstart", f"--runs={tmp_path / 'runs'}", f"--output={tmp_path / 'table'}", "--seeds=1"]
    models = "--models=ssd4rec,my_models:RNN4Rec"
    done = start("compare", models, "--model.d_state=4", "--model.head_dim=4", *where, *options, path=run[1])
    assert done.returncode == 0, done.stderr
    assert "rnn4rec" in (tmp_path / "table.md").read_text()
