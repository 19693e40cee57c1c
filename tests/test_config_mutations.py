"""Settings under damage: 3,500 changed run folders and 500 command lines give settings, or one clear line."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import train
from experiments.configs import load_config
from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.run_dir import CONFIG, FORMAT_VERSION, read_config

RUNS, LINES = 3_500, 500
NAMES = ["quickstart", "ml1m_tim4rec", "beauty_tim4rec_causal", "ml100k_tisasrec", "beauty_bert4rec"]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["1e9", "nan", "float16", "../..", "ndcg@10"]),
    st.lists(st.integers(-1, 30), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
ALIKE = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
STORED = {name: load_config(name).to_dict() for name in NAMES}


def places(values, path=()):
    """Every key of nested settings, by its path."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def one_line(error):
    assert "\n" not in str(error) and str(error)


@pytest.mark.exhaustive
def test_changed_settings_of_a_run(tmp_path):
    seen, refused = [], []

    @settings(max_examples=RUNS, **ALIKE)
    @given(st.data())
    def check(data):
        stored = {"format_version": FORMAT_VERSION, **STORED[data.draw(st.sampled_from(NAMES))]}
        values = copy.deepcopy(stored)
        for _ in range(data.draw(st.integers(1, 3))):
            *outer, key = data.draw(st.sampled_from(sorted(places(values))))
            inner = values
            for name in outer:
                inner = inner[name]
            way = data.draw(st.sampled_from(["change", "drop", "rename"]))
            if way == "change":
                inner[key] = data.draw(VALUES)
            else:
                value = inner.pop(key)
                if way == "rename":
                    inner[data.draw(st.text(max_size=4))] = value
        text = json.dumps(values)
        cut = data.draw(st.integers(0, 40))
        (tmp_path / CONFIG).write_text(text[: len(text) - 40 + cut] if cut < 4 else text)
        seen.append(1)
        try:
            assert isinstance(read_config(tmp_path), ExperimentConfig)
        except ValueError as error:
            refused.append(1)
            one_line(error)
            assert CONFIG in str(error) or str(tmp_path) in str(error)

    check()
    assert len(seen) >= RUNS and RUNS / 10 < len(refused) < len(seen)


@pytest.mark.exhaustive
def test_changed_command_lines():
    seen, refused = [], []
    options = [
        "--model.max_len",
        "--model.dropout",
        "--model.log_time",
        "--train.epochs",
        "--train.loss",
        "--eval.top_k",
        "--data.k_core",
        "--train.max_steps",
        "--parallel.strategy",
        "--config",
        "--resume",
        "--run_dir",
        "--model.",
        "--",
        "-x",
        "--train.learning-rate",
        "--data.synthetic.num_users",
    ]
    words = st.one_of(
        st.text(max_size=6), st.integers().map(str), st.floats().map(str), st.sampled_from(["true", "None"])
    )

    @settings(max_examples=LINES, **ALIKE)
    @given(st.lists(st.tuples(st.sampled_from(options), st.sampled_from(["=", " ", ""]), words), max_size=3))
    def check(parts):
        seen.append(1)
        line = [
            piece for name, joint, word in parts for piece in ([name, word] if joint == " " else [name + joint + word])
        ]
        try:
            config, _, _ = train.parse(line)
            assert isinstance(config, ExperimentConfig)
        except ValueError as error:
            refused.append(1)
            one_line(error)

    check()
    assert len(seen) >= LINES and LINES / 10 < len(refused) < len(seen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_len": "50"}, r"model.max_len='50' must be int"),
        ({"log_time": 1}, r"model.log_time=1 must be bool"),
        ({"dropout": None}, r"model.dropout=None must be float"),
        ({"dtype": "float16"}, r"model.dtype='float16' must be one of \('float32', 'bfloat16', 'float64'\)"),
        ({"name": ["tim4rec"]}, r"model.name=\['tim4rec'\] must be str"),
    ],
)
def test_values_of_another_type_are_named(tmp_path, change, message):
    values = load_config("quickstart").to_dict()
    values["model"] |= change
    (tmp_path / CONFIG).write_text(json.dumps({"format_version": FORMAT_VERSION, **values}))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_whole_numbers_are_floats_where_these_are_declared(tmp_path):
    values = load_config("ml100k_tisasrec").to_dict()
    values["model"] |= {"attention_dropout": 0}
    values["train"] |= {"learning_rate": 1, "clip_norm": 2}
    (tmp_path / CONFIG).write_text(json.dumps({"format_version": FORMAT_VERSION, **values}))
    config = read_config(tmp_path)
    found = (config.model.attention_dropout, config.train.learning_rate, config.train.clip_norm)
    assert [(value, type(value)) for value in found] == [(0, float), (1, float), (2, float)]
    values["train"] |= {"learning_rate": 10**400}
    (tmp_path / CONFIG).write_text(json.dumps({"format_version": FORMAT_VERSION, **values}))
    with pytest.raises(ValueError, match="train.learning_rate=1000.* must be float"):
        read_config(tmp_path)
