"""experiments.convert: checkpoints of the original programs become run folders, and run folders checkpoints."""

import hashlib
import json
import os
import re
import sys
import types

import jax
import numpy as np
import polars as pl
import pytest

torch = pytest.importorskip("torch")
import yaml

from experiments import convert, evaluate, recommend
from experiments.benchmarks.torch_models import echomamba4rec, mamba4rec, sasrec, tim4rec, tisasrec
from tests.edited_runs import reseal
from tests.evaluation.logs import random_log
from tests.models.settings import sibling
from tim4rec_jax.data.splits import gather_windows
from tim4rec_jax.interop import params_from_torch
from tim4rec_jax.interop.settings import upstream_from_config
from tim4rec_jax.models import TiM4RecConfig, last_hidden
from tim4rec_jax.run_dir import read_config, read_environment
from tim4rec_jax.training.logging import read_metrics
from tim4rec_jax.training.loop import train
from tim4rec_jax.training.stored_run import load_log, load_model

ITEMS = 12
SMALL = TiM4RecConfig(vocab_size=ITEMS + 1, max_len=10, d_model=16, num_layers=1, d_state=4, head_dim=16)
TWINS = {
    "TiM4Rec": (tim4rec.TiM4Rec, SMALL),
    "SSD4Rec": (tim4rec.TiM4Rec, sibling(SMALL, "ssd4rec")),
    "Mamba4Rec": (mamba4rec.Mamba4Rec, sibling(SMALL, "mamba4rec", kaiming_init=False)),
    "EchoMamba4Rec": (
        echomamba4rec.EchoMamba4Rec,
        sibling(SMALL, "echomamba4rec", kaiming_init=False),
    ),
    "SASRec": (sasrec.SASRec, sibling(SMALL, "sasrec", inner_size=32)),
    "TiSASRec": (tisasrec.TiSASRec, sibling(SMALL, "tisasrec", inner_size=32)),
}
DATA = ["--data.k_core=0", "--eval.top_k", "3", "5", "--eval.monitor=ndcg@5", "--train.progress=false"]
# As the original programs' files have them, beside the model.
BESIDE = {"dataset": "ml-1m", "loss_type": "CE", "topk": [10, 20], "load_col": {"inter": ["user_id", "item_id"]}}


@pytest.fixture(scope="module")
def log_file(tmp_path_factory):
    log = random_log(num_users=30, num_items=ITEMS, min_events=4, max_events=16, seed=3)
    users = np.repeat(np.arange(log.num_users), np.diff(log.offsets))
    file = tmp_path_factory.mktemp("log") / "log.csv"
    pl.DataFrame({"user": users, "item": log.items, "timestamp": log.timestamps}).write_csv(file)
    return file


def _model(name):
    """The PyTorch model with parameters of which no two are alike, and its settings."""
    twin, config = TWINS[name]
    torch.manual_seed(5)
    model = twin(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape) + parameter)
    return model, config


def _write(folder, name, *, wrap=False, settings=(), state=None):
    """The two files of a checkpoint; returns the options that name them."""
    model, config = _model(name)
    state = model.state_dict() if state is None else state
    torch.save({"epoch": 7, "state_dict": state, "optimizer": {"state": {}}} if wrap else state, folder / "model.pth")
    upstream = {key: value for key, value in upstream_from_config(config)[1].items() if key != "n_items"}
    (folder / "config.yaml").write_text(yaml.safe_dump(upstream | BESIDE | dict(settings)))
    return [f"--checkpoint={folder / 'model.pth'}", f"--settings={folder / 'config.yaml'}"]


def _main(capsys, *argv):
    code = convert.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _scores(stored, *inputs):
    def score(params, *inputs):
        hidden = last_hidden(stored.model, {"params": params}, *inputs)
        return stored.model.apply({"params": params}, hidden, method="score")

    return np.asarray(jax.jit(score)(stored.params, *inputs))


@pytest.mark.parametrize("name", TWINS)
def test_a_checkpoint_becomes_a_run_that_evaluates_and_recommends(tmp_path, log_file, capsys, name):
    options, output = _write(tmp_path, name, wrap=name == "SASRec"), tmp_path / "runs" / "theirs"
    code, out, err = _main(capsys, *options, f"--output={output}", f"--data.path={log_file}", *DATA)
    assert code == 0, err
    model, config = _model(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{name}, {count:,} parameters in {len(model.state_dict())} tensors, {ITEMS} items" in out
    assert "not about the model, ignored: dataset, load_col, loss_type, topk" in out

    stored, log = load_model(output), load_log(output)
    expected = params_from_torch(config, model.state_dict())
    jax.tree.map(np.testing.assert_array_equal, stored.params, expected)
    assert upstream_from_config(stored.config.model) == upstream_from_config(config)
    windows = gather_windows(
        log.items, log.timestamps, log.offsets, np.arange(6), np.diff(log.offsets)[:6] - 1, config.max_len, xp=np
    )
    scores = _scores(stored, windows.items, windows.lengths, windows.timestamps.astype(np.float32))
    items, lengths = (torch.from_numpy(a.astype(np.int64)) for a in (windows.items, windows.lengths))
    with torch.no_grad():
        theirs = model.logits(model(items, lengths, torch.from_numpy(windows.timestamps.astype(np.float32)))).numpy()
    assert np.abs(theirs).max() > 0.5
    np.testing.assert_allclose(scores, theirs, rtol=1e-4, atol=1e-4)

    assert evaluate.main([f"--run={output}"]) == 0 and "ndcg@5" in capsys.readouterr().out
    assert recommend.main([f"--run={output}", "--user=4", "--k=3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 3


def test_environment_names_the_origin_and_nothing_else_is_left(tmp_path, log_file, capsys):
    options, output = _write(tmp_path, "SASRec"), tmp_path / "theirs"
    assert _main(capsys, *options, f"--output={output}", f"--data.path={log_file}", *DATA)[0] == 0
    digest = hashlib.sha256((tmp_path / "model.pth").read_bytes()).hexdigest()
    origin = {"checkpoint": "model.pth", "sha256": digest, "settings": "config.yaml"}
    assert read_environment(output)["converted_from"] == origin
    assert read_config(output).name == "theirs" and read_config(output).data.name == "custom"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "model.pth", "theirs"]
    code, _, err = _main(capsys, *options, f"--output={output}", f"--data.path={log_file}", *DATA)
    assert code == 2 and f"{output} is there already; choose another --output" in err


def test_training_goes_on_from_the_checkpoint(tmp_path, log_file, capsys):
    output = tmp_path / "theirs"
    more = [
        "--train.epochs=1",
        "--train.batch_size=64",
        "--train.learning_rate=1e-9",
        "--train.length_groups=1",
        "--train.tensorboard=false",
    ]
    options = [*_write(tmp_path, "SASRec"), f"--output={output}", "--config=ml100k_sasrec", f"--data.path={log_file}"]
    assert _main(capsys, *options, "--data.name=custom", *DATA, *more)[0] == 0
    config = read_config(output)
    before = load_model(output).params
    train(config, load_log(output), output, resume=True)
    assert [line["epoch"] for line in read_metrics(output) if line["kind"] == "valid"] == [1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), load_model(output).params, before)


@pytest.mark.parametrize("name", TWINS)
def test_there_and_back_is_exact(tmp_path, log_file, capsys, name):
    options, output, back = _write(tmp_path, name), tmp_path / "theirs", tmp_path / "back" / "model.pth"
    assert _main(capsys, *options, f"--output={output}", f"--data.path={log_file}", *DATA)[0] == 0
    code, out, err = _main(capsys, f"--run={output}", f"--output={back}")
    assert code == 0 and "warning" not in out, err
    model, _ = _model(name)
    state = torch.load(back, weights_only=True)
    assert set(state) == set(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key
    model.load_state_dict(state)
    again = [f"--checkpoint={back}", f"--settings={back.with_suffix('.yaml')}", f"--output={tmp_path / 'again'}"]
    assert _main(capsys, *again, f"--data.path={log_file}", *DATA)[0] == 0
    assert read_config(tmp_path / "again").model == read_config(output).model
    code, _, err = _main(capsys, f"--run={output}", f"--output={back}")
    assert code == 2 and "is there already" in err


def test_what_the_original_cannot_express_is_said(tmp_path, log_file, capsys):
    output = tmp_path / "theirs"
    assert _main(capsys, *_write(tmp_path, "TiM4Rec"), f"--output={output}", f"--data.path={log_file}", *DATA)[0] == 0
    settings = json.loads((output / "config.json").read_text())
    settings["model"]["log_time"] = True
    (output / "config.json").write_text(json.dumps(settings))
    reseal(output)
    code, out, _ = _main(capsys, f"--run={output}", f"--output={tmp_path / 'back.pth'}")
    assert code == 0 and "warning: TiM4Rec has no setting for log_time=True; its scores will differ" in out


class _Touch:
    """A pickle that makes a file where it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_checkpoint_is_refused_and_does_nothing(tmp_path, log_file, capsys, legacy):
    options, marker = _write(tmp_path, "SASRec"), tmp_path / "touched"
    content = {"state_dict": _model("SASRec")[0].state_dict(), "config": _Touch(marker)}
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=not legacy)
    code, out, err = _main(capsys, *options, f"--output={tmp_path / 'theirs'}", f"--data.path={log_file}", *DATA)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "model.pth would import and could execute posix.system; nothing of it was executed" in err
    assert not marker.exists() and not (tmp_path / "theirs").exists()
    torch.load(tmp_path / "model.pth", weights_only=False)
    assert marker.exists(), "the file is not malicious: the test shows nothing"


def test_a_recbole_checkpoint_with_its_settings_object_says_how_to_go_on(tmp_path, log_file, capsys, monkeypatch):
    options = _write(tmp_path, "SASRec")
    modules = {name: types.ModuleType(name) for name in ("recbole", "recbole.config", "recbole.config.configurator")}
    config = type("Config", (), {"__module__": "recbole.config.configurator"})
    modules["recbole.config.configurator"].Config = config
    with monkeypatch.context() as patched:
        for name, module in modules.items():
            patched.setitem(sys.modules, name, module)
        torch.save({"config": config(), "state_dict": _model("SASRec")[0].state_dict()}, tmp_path / "model.pth")
        patched.chdir(tmp_path)
        code, _, err = _main(capsys, *options, f"--output={tmp_path / 'theirs'}", f"--data.path={log_file}", *DATA)
        assert code == 2 and "could execute recbole.config.configurator.Config; nothing of it was executed" in err
        assert err.count("\n") == 1 and "If you trust it" in err
        exec(re.search('python -c "(.*)"$', err.strip())[1], {})
    options[0] = f"--checkpoint={tmp_path / 'state_dict.pth'}"
    assert _main(capsys, *options, f"--output={tmp_path / 'theirs'}", f"--data.path={log_file}", *DATA)[0] == 0


def _flip(content):
    place = content.find(np.float32(_model("SASRec")[0].LayerNorm.weight[0].item()).tobytes())
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[: len(content) // 2], "is not a checkpoint that PyTorch reads, or is cut short"),
        (lambda content: b"", "is not a checkpoint that PyTorch reads, or is cut short"),
        (lambda content: b"hello world\n", "its bytes are in another format"),
        (_flip, "do not match their checksum"),
    ],
)
def test_damaged_checkpoints(tmp_path, log_file, capsys, change, message):
    options, file = _write(tmp_path, "SASRec"), tmp_path / "model.pth"
    file.write_bytes(change(file.read_bytes()))
    code, out, err = _main(capsys, *options, f"--output={tmp_path / 'theirs'}", f"--data.path={log_file}", *DATA)
    assert (code, out) == (2, "") and str(file) in err and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([1, 2], "holds a list, where a state dict or a dict with 'state_dict' is expected"),
        ({}, "holds an empty dict"),
        ({"a": 1, 2: torch.ones(2)}, "'a' is a int, not a tensor under a name; 2 is a call, not a tensor under"),
        ({"a": torch.ones(2, dtype=torch.int64)}, "a is of torch.LongStorage, where float32, float64"),
        ({"a": torch.tensor([1.0, float("nan")])}, "a holds numbers that are not finite"),
        ({"conv.weight": torch.ones(2)}, "looks like none of TiM4Rec, SSD4Rec"),
        (
            {"item_emb.weight": torch.ones(2, 2), "attention_layernorms.0.weight": torch.ones(2)},
            "looks like the SASRec of pmixer/SASRec.pytorch",
        ),
    ],
)
def test_files_that_hold_no_model_of_the_family(tmp_path, log_file, capsys, state, message):
    options = _write(tmp_path, "SASRec", state=state)
    code, _, err = _main(capsys, *options, f"--output={tmp_path / 'theirs'}", f"--data.path={log_file}", *DATA)
    assert code == 2 and message in err


@pytest.mark.parametrize(
    ("checkpoint", "settings", "more", "message"),
    [
        ("SASRec", "TiM4Rec", [], "looks like SASRec, but the settings of .* are those of TiM4Rec or SSD4Rec or Mamba"),
        ("SASRec", "TiM4Rec", ["--model=TiM4Rec"], "looks like SASRec, not TiM4Rec; give the settings that belong"),
        ("SSD4Rec", "TiM4Rec", [], "looks like SSD4Rec, not TiM4Rec; "),
        ("TiSASRec", "SASRec", ["--model=SASRec"], "looks like TiSASRec, not SASRec; "),
        ("Mamba4Rec", "TiM4Rec", [], "the settings are not all those of a Mamba4Rec: chunk_size: a setting of TiM4"),
        ("EchoMamba4Rec", "Mamba4Rec", ["--model=Mamba4Rec"], "looks like EchoMamba4Rec, not Mamba4Rec; "),
        ("SASRec", "SASRec", ["--model=SASReq"], "model_name='SASReq' is unknown; nearest: sasrec"),
        ("SASRec", "SASRec", ["--config=ml100k_tim4rec"], "is an experiment with tim4rec, the checkpoint is a sasrec"),
    ],
)
def test_a_checkpoint_of_another_model(tmp_path, log_file, capsys, checkpoint, settings, more, message):
    options = _write(tmp_path, settings, state=_model(checkpoint)[0].state_dict())
    code, _, err = _main(capsys, *options, f"--output={tmp_path / 'theirs'}", f"--data.path={log_file}", *DATA, *more)
    assert code == 2 and re.search(message, err, re.DOTALL), err


def test_the_authors_program_with_time_off_is_ssd4rec(tmp_path, log_file, capsys):
    timed = upstream_from_config(SMALL)[1]
    extra = {name: timed[name] for name in ("p2p_residual", "time_drop_out")} | {"is_time": False}
    options = _write(tmp_path, "SSD4Rec", settings=extra)
    output = tmp_path / "theirs"
    assert _main(capsys, *options, f"--output={output}", f"--data.path={log_file}", *DATA)[0] == 0
    assert read_config(output).model.name == "ssd4rec"
    options = _write(tmp_path, "SSD4Rec", settings=extra | {"is_time": True})
    more = [f"--output={tmp_path / 'other'}", f"--data.path={log_file}", *DATA, "--model=SSD4Rec"]
    code, _, err = _main(capsys, *options, *more)
    assert code == 2 and "is_time=True: SSD4Rec has no time branch" in err


def test_every_unknown_setting_is_listed(tmp_path, log_file, capsys):
    settings = {"hiden_size": 3, "wobble": 1, "d_state": 4}
    options = _write(tmp_path, "SASRec", settings=settings)
    code, _, err = _main(capsys, *options, f"--output={tmp_path / 'theirs'}", f"--data.path={log_file}", *DATA)
    assert code == 2
    assert "hiden_size: unknown (hidden_size?); wobble: unknown\n" in err
    assert "d_state: a setting of TiM4Rec, SSD4Rec, Mamba4Rec, EchoMamba4Rec" in err


def test_every_wrong_type_and_every_misfit_is_listed(tmp_path, log_file, capsys):
    options = _write(tmp_path, "SASRec", settings={"hidden_size": "wide", "n_layers": 1.5})
    code, _, err = _main(capsys, *options, f"--output={tmp_path / 'theirs'}", f"--data.path={log_file}", *DATA)
    assert code == 2
    assert "hidden_size='wide' is not a whole number" in err and "n_layers=1.5 is not a whole number" in err
    state = _model("SASRec")[0].state_dict()
    state["extra"] = state.pop("LayerNorm.bias")
    options = _write(tmp_path, "SASRec", settings={"inner_size": 64}, state=state)
    code, _, err = _main(capsys, *options, f"--output={tmp_path / 'theirs'}", f"--data.path={log_file}", *DATA)
    assert code == 2
    for line in ("missing: LayerNorm.bias", "unexpected: extra", "dense_1.weight: (32, 16), expected (64, 16)"):
        assert line in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hidden_size: [", "is not readable as YAML"),
        ("a: !!python/object/apply:os.system ['false']", "could not determine a constructor"),
        ("- 1", "holds a list where names and values are expected"),
        ("", "holds a NoneType where names"),
    ],
)
def test_settings_that_are_no_yaml_mapping(tmp_path, log_file, capsys, text, message):
    options = _write(tmp_path, "SASRec")
    (tmp_path / "config.yaml").write_text(text)
    code, _, err = _main(capsys, *options, f"--output={tmp_path / 'theirs'}", f"--data.path={log_file}", *DATA)
    assert code == 2 and message in err and "Traceback" not in err


def test_a_log_with_other_items(tmp_path, capsys):
    log = random_log(num_users=30, num_items=ITEMS + 2, min_events=4, max_events=16, seed=3)
    users = np.repeat(np.arange(log.num_users), np.diff(log.offsets))
    file = tmp_path / "log.csv"
    pl.DataFrame({"user": users, "item": log.items, "timestamp": log.timestamps}).write_csv(file)
    options = _write(tmp_path, "SASRec")
    code, _, err = _main(capsys, *options, f"--output={tmp_path / 'theirs'}", f"--data.path={file}", *DATA)
    assert code == 2 and "vocab_size=13 (12 items and padding)" in err and "14 items, so vocab_size=15" in err
    assert not (tmp_path / "theirs").exists()


def test_unused_tensors_of_the_original_echomamba4rec_are_passed_over(tmp_path, log_file, capsys):
    state = dict(_model("EchoMamba4Rec")[0].state_dict())
    state["mamba_layers.0.multi_query_transformer_block.fc.weight"] = torch.ones(4, 5)
    options = _write(tmp_path, "EchoMamba4Rec", state=state)
    code, out, _ = _main(capsys, *options, f"--output={tmp_path / 'theirs'}", f"--data.path={log_file}", *DATA)
    assert code == 0 and "passed over: 20 parameters in 1 tensors that EchoMamba4Rec stores and never uses" in out


def test_other_precisions_are_said(tmp_path, log_file, capsys):
    state = {name: value.double() / 3 for name, value in _model("SASRec")[0].state_dict().items()}
    state["LayerNorm.bias"] = state["LayerNorm.bias"].bfloat16()
    options, output = _write(tmp_path, "SASRec", state=state), tmp_path / "theirs"
    code, out, _ = _main(capsys, *options, f"--output={output}", f"--data.path={log_file}", *DATA)
    assert code == 0 and f"rounded to float32: {len(state) - 1} tensors stored as float64" in out
    params = load_model(output).params["encoder"]["norm"]
    np.testing.assert_array_equal(params["scale"], state["LayerNorm.weight"].float().numpy())
    np.testing.assert_array_equal(params["bias"], state["LayerNorm.bias"].float().numpy())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give --output and --checkpoint and --settings"),
        (["--run=x"], "give --output:"),
        (
            ["--run=x", "--output=y", "--checkpoint=z"],
            "--run writes a checkpoint and --checkpoint describe one to read",
        ),
        (["--chekpoint=x"], "unknown option --chekpoint; nearest: --checkpoint"),
        (["--checkpoint=no.pth", "--settings=no.yaml", "--output=o"], "there is no settings file no.yaml"),
        (["--run=nowhere", "--output=o.pth"], "there is no run folder nowhere"),
    ],
)
def test_options_that_do_not_go_together(capsys, argv, message):
    code, _, err = _main(capsys, *argv)
    assert code == 2 and message in err


def test_reading_needs_no_pytorch_and_writing_says_that_it_does(tmp_path, log_file, capsys, monkeypatch):
    options, output = _write(tmp_path, "SASRec"), tmp_path / "theirs"
    monkeypatch.setitem(sys.modules, "torch", None)
    assert _main(capsys, *options, f"--output={output}", f"--data.path={log_file}", *DATA)[0] == 0
    code, _, err = _main(capsys, f"--run={output}", f"--output={tmp_path / 'back.pth'}")
    assert code == 2 and "pip install torch" in err and not (tmp_path / "back.pth").exists()
