"""The options of all programs are read alike, and a bad one is named in one line."""

import dataclasses
import pathlib

import pytest

from experiments import benchmark, convert, evaluate, export, recommend, record, stream, sweep, train
from experiments.benchmarks import catalogue, gpu, models, serving
from experiments.cli import parse_settings, run_program
from experiments.comparison.plan import parse as parse_comparison
from experiments.comparison.plan import parse_rows
from tests.serving.tiny_run import make_config, make_log
from tim4rec_jax.run_dir import create_run
from tim4rec_jax.serving.event_stream import StreamOptions

pytestmark = pytest.mark.quick

GRID = ("--grid", "train.epochs=1,2")
FILES = ("--checkpoint=a.pth", "--settings=a.yaml", "--output=out")


# Program, what reads its options, those it needs, a yes-or-no option, and where its value is found.
FLAGS = {
    "train": (train.parse, (), "--resume", lambda parsed: parsed[2]),
    "train, a setting": (train.parse, (), "--eval.exclude_seen", lambda parsed: parsed[0].eval.exclude_seen),
    "train, on by default": (train.parse, (), "--train.progress", lambda parsed: parsed[0].train.progress),
    "evaluate": (evaluate.parse, (), "--eval.exclude_seen", lambda parsed: parsed.eval.exclude_seen),
    "recommend": (
        lambda argv: parse_settings(recommend.Arguments, argv),
        ("--run=r",),
        "--exclude_seen",
        lambda parsed: parsed.exclude_seen,
    ),
    "recommend, histories": (
        lambda argv: parse_settings(recommend.Arguments, argv),
        ("--run=r",),
        "--full_history",
        lambda parsed: parsed.full_history,
    ),
    "stream": (lambda argv: parse_settings(StreamOptions, argv), ("--run=r",), "--warm", lambda parsed: parsed.warm),
    "stream, on by default": (
        lambda argv: parse_settings(StreamOptions, argv),
        ("--run=r",),
        "--keep_items",
        lambda parsed: parsed.keep_items,
    ),
    "stream, another log": (
        lambda argv: parse_settings(StreamOptions, argv),
        ("--run=r",),
        "--new_log",
        lambda parsed: parsed.new_log,
    ),
    "convert": (convert.parse, FILES, "--eval.exclude_seen", lambda parsed: parsed[0].eval.exclude_seen),
    "compare": (
        parse_comparison,
        ("--models=sasrec", "--data=ml-100k"),
        "--report_only",
        lambda parsed: parsed[0].report_only,
    ),
    "sweep": (sweep.parse, GRID, "--eval.exclude_seen", lambda parsed: parsed.base.eval.exclude_seen),
    "benchmark gpu": (gpu._parse, (), "--tiny", lambda parsed: parsed.tiny),
    "benchmark serving": (serving._parse, (), "--tiny", lambda parsed: parsed.tiny),
    "benchmark models": (models._parse, (), "--tiny", lambda parsed: parsed.tiny),
    "benchmark catalogue": (catalogue._parse, (), "--tiny", lambda parsed: parsed.tiny),
    "benchmark sampled": (catalogue._parse_sampled, (), "--tiny", lambda parsed: parsed.tiny),
}


@pytest.fixture
def a_run(tmp_path, monkeypatch):
    """The evaluate program reads the run's own settings first."""
    create_run(tmp_path / "run", make_config(), make_log())
    monkeypatch.chdir(tmp_path)
    return ("--run=run",)


@pytest.mark.parametrize("program", FLAGS)
def test_yes_or_no_is_read_alike(program, a_run):
    parse, needed, option, value_of = FLAGS[program]
    needed = [*needed, *(a_run if program == "evaluate" else ())]
    forms = {"": True, "=true": True, "=True": True, "=1": True, "=false": False, "=FALSE": False, "=0": False}
    for form, expected in forms.items():
        assert value_of(parse([*needed, f"{option}{form}"])) is expected, form
    for word, expected in {"true": True, "false": False}.items():
        assert value_of(parse([*needed, option, word])) is expected
    for bad in ("maybe", "", "2", "None"):
        with pytest.raises(ValueError, match="expected true or false") as raised:
            parse([*needed, f"{option}={bad}"])
        assert option in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("option", ["--exclude_seen", "--exclude-seen"])
def test_the_opposite_of_a_yes(option):
    def read(*argv):
        return parse_settings(recommend.Arguments, ["--run=r", *argv]).exclude_seen

    assert read(option) and not read(option, "--no-exclude-seen") and not read("--no_exclude_seen")
    assert read("--no-exclude-seen=false")
    assert not train.parse(["--train.no-progress"])[0].train.progress
    with pytest.raises(ValueError, match="unknown option --train.no-epochs; nearest: "):
        train.parse(["--train.no-epochs"])


@pytest.mark.parametrize(
    "given",
    [["--eval.top_k=5,10"], ["--eval.top_k", "5,10"], ["--eval.top_k", "5", "10"], ["--eval.top-k=5, 10"]],
)
def test_lists_have_commas_or_blanks(given):
    config, _, _ = train.parse([*given, "--eval.monitor=ndcg@5"])
    assert config.eval.top_k == (5, 10)


def test_lists_of_names_and_of_texts():
    assert train.parse(["--eval.baselines=popularity,time_off"])[0].eval.baselines == ("popularity", "time_off")
    assert train.parse(["--eval.baselines"])[0].eval.baselines == ()
    arguments = parse_settings(export.Arguments, ["--run=r", "--output=o", "--platforms=cpu,tpu"])
    assert arguments.platforms == ("cpu", "tpu") and arguments.output == pathlib.Path("o")
    grid = sweep.parse(["--grid", "train.learning_rate=1e-3,3e-3", "model.dropout=0.1,0.2"]).space
    grid = {path: values.choices for path, values in grid.items()}
    assert grid == {"train.learning_rate": (1e-3, 3e-3), "model.dropout": (0.1, 0.2)}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--train.learning_rate=abc", "--train.learning_rate=abc: expected a number"),
        ("--train.learning_rate=inf", "--train.learning_rate=inf: expected a number"),
        ("--train.epochs=1.5", "--train.epochs=1.5: expected a whole number"),
        ("--train.epochs=" + "9" * 5000, ": expected a whole number"),
        ("--train.clip_norm=", "--train.clip_norm=: expected a number or None"),
        ("--model.max_len=", "--model.max_len=: expected a whole number"),
        ("--model.max_len", "--model.max_len has no value: expected a whole number"),
        ("--data.format=nope", "--data.format=nope: expected one of auto, recbole, movielens, amazon, kuairand, csv"),
        ("--eval.top_k=5,x", "--eval.top_k=5,x: expected a whole number, or several with commas between them"),
        ("--eval.top_k=", "--eval.top_k=: expected a whole number, or several with commas between them"),
        ("--eval.top_k=5;10", "--eval.top_k=5;10: expected a whole number, or several with commas"),
        ("--eval.baselines=markov", "--eval.baselines=markov: expected one of popularity, time_off, or several"),
        ("--run_dir=", "--run_dir=: expected a path"),
        ("--config", "--config: expected one argument"),
        ("--epoch=3", "unknown option --epoch; nearest: --"),
        ("--" + "x" * 5000, "unknown option --xxx"),
        ("more", "'more' belongs to no option; options begin with --"),
        ("-x", "'-x' belongs to no option; options begin with --"),
        ("--", "'--' belongs to no option; options begin with --"),
        ("--train.epochs=0", "epochs=0 must be at least 1"),
    ],
)
def test_a_bad_option_is_named_in_one_line(option, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main([option]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err
    assert err.count("\n") == 1 and len(err) < 300 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("program", "argv", "message"),
    [
        (recommend, [], "give --run, as in --run=.."),
        (recommend, ["--run=r", "--k=ten"], "--k=ten: expected a whole number"),
        (evaluate, [], "give --run, as in --run=.."),
        (evaluate, ["--run"], "--run: expected one argument"),
        (stream, ["--run=r", "--save_every=often"], "--save_every=often: expected a whole number"),
        (export, ["--run=r"], "give --output, as in --output=.."),
        (export, ["--run=r", "--output=o", "--platforms=gpu"], "expected one of cpu, cuda, rocm, tpu"),
        (record, ["--run=r", "--outptu=o"], "unknown option --outptu; nearest: --output"),
        (convert, ["--modle=x"], "unknown option --modle; nearest: --model"),
        (benchmark, [], "the following arguments are required: what"),
        (benchmark, ["nothing"], "what: invalid choice: 'nothing'"),
        (benchmark, ["ops", "--repeats=abc"], "--repeats: invalid int value: 'abc'"),
        (benchmark, ["serving", "--tiny=maybe"], "--tiny: 'maybe': expected true or false"),
        (benchmark, ["serving", "--tyni"], "unrecognized arguments: --tyni"),
    ],
)
def test_every_program_names_a_bad_option(program, argv, message, capsys):
    assert program.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.startswith("error: ") and err.count("\n") == 1 and len(err) < 300


def test_the_last_of_two_values_counts_and_no_term_is_lost(capsys):
    config, _, _ = train.parse(["--eval.top_k=5", "--train.epochs=1", "--eval.top_k=10,20", "--train.epochs=2"])
    assert (config.eval.top_k, config.train.epochs) == ((10, 20), 2)
    assert run_program(sweep.parse, [*GRID, "--grid=model.dropout=0.1,0.2"]) == 2
    assert "--grid is there twice; give all its values at once" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--rows is there twice"):
        parse_rows(["--rows", "a=b", "--rows", "c=d"])


def test_help_shows_all_options(capsys):
    with pytest.raises(SystemExit) as stop:
        recommend.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in shown for field in dataclasses.fields(recommend.Arguments))


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("--model.use_time=false", "ssd4rec"),
        ("--model.no-use-time", "ssd4rec"),
        ("--model.time_mode=causal", "tim4rec_causal"),
    ],
)
def test_options_of_earlier_versions_name_what_does_as_they_did(option, instead, capsys):
    assert train.main(["--config=quickstart", option]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "is gone" in shown and f"--model.name={instead}" in shown
