"""The models of the family on the same data: `--config=<data>_<model>`.

A data set's own settings (length, widths, training, evaluation) are said once, in its TiM4Rec experiment; a model's own
settings are said once, here.

Mamba4Rec: arXiv 2403.03900 (two layers, the stronger form of its authors' rerun). EchoMamba4Rec: arXiv 2406.02638.
SASRec: arXiv 1808.09781 in RecBole's form with two heads. TiSASRec: Li et al. 2020 with four heads, batches of 256 and
a time span of 256 seconds, as in the comparison of TiM4Rec (arXiv 2409.16182). SSD4Rec: TiM4Rec with time off. The
causal TiM4Rec is not from a paper. GRU4Rec: arXiv 1511.06939 in RecBole's form, one layer. LRURec: arXiv 2310.02367.
Caser: arXiv 1809.07426 without its user embedding. These four train on every position of packed rows, so that every
target is used once per epoch and a few epochs suffice, and the rate falls to 0 over them. BERT4Rec: arXiv 1904.06690,
which masks .2 of the events on MovieLens and .6 on Amazon Beauty (here also on Video Games, of which it says nothing);
its rows, rate and epochs are not the paper's, and nothing was searched.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.data_config import DATA_ALIASES
from tim4rec_jax.model_config import AttentionConfig, ModelConfig, SSDConfig
from tim4rec_jax.models import MODELS, model_class

# Data set -> the experiment that holds its settings.
_BASES = {
    "quickstart": "quickstart",
    "ml-100k": "ml100k_tim4rec",
    "ml-1m": "ml1m_tim4rec",
    "beauty": "beauty_tim4rec",
    "videogames": "videogames_tim4rec",
}
DATA_NAMES: tuple[str, ...] = tuple(_BASES)
MODEL_NAMES: tuple[str, ...] = tuple(MODELS)

_SHAPE = ("vocab_size", "vocab_multiple", "max_len", "d_model", "num_layers", "d_state", "dropout", "dtype", "kernels")
# Training on every position, by data set: batches count rows.
_EVERY_POSITION = {"positions": "all", "schedule": "cosine", "warmup_steps": 40, "learning_rate": 1e-3}
_PACKED: dict[str, dict[str, Any]] = {
    "quickstart": _EVERY_POSITION | {"batch_size": 32},
    "ml-100k": _EVERY_POSITION | {"max_len": 200, "batch_size": 8, "epochs": 20},
    "ml-1m": _EVERY_POSITION | {"batch_size": 32, "epochs": 10},
    "beauty": _EVERY_POSITION | {"batch_size": 32, "epochs": 10},
    "videogames": _EVERY_POSITION | {"batch_size": 32, "epochs": 10},
}
_ECHO = {"patience": 10, "dropout": 0.2}
# What the papers give for a model on published logs. On ml-100k, which has no published setting, EchoMamba4Rec has one
# block, and with it two Mamba mixers like Mamba4Rec's two layers; n blocks would have 2 n^2.
# Validation chose the rate of the causal TiM4Rec: on MovieLens-100K of 1e-3, 2e-3 and 4e-3 the first
# (experiments/results/sweep_ml100k_tim4rec_causal), on Amazon Beauty of 2e-3, 4e-3, 8e-3 and 1.6e-2 the second, with
# the paper's dropout (sweep_beauty_tim4rec_causal_5_epochs and candidates_beauty), on MovieLens-1M 8e-3 over 2e-3
# (quality_ml1m). Of 1e-3, 4e-3 and 1e-2 for GRU4Rec on MovieLens-100K it chose the last (sweep_ml100k_gru4rec): no norm
# comes before the units, whose inputs begin small.
# Caser has none either, and got 1e-2 of the same three; LRURec got 4e-3 of 1e-3, 2e-3 and 4e-3
# (sweep_ml100k_caser_all_positions, sweep_ml100k_lrurec_all_positions). Elsewhere nothing was searched.
_OWN: dict[str, dict[str, dict[str, Any]]] = {
    "tim4rec_causal": {name: recipe | {"seen_bias": True} for name, recipe in _PACKED.items()}
    | {
        name: _PACKED[name] | {"seen_bias": True, "learning_rate": rate}
        for name, rate in (("beauty", 4e-3), ("ml-1m", 8e-3))
    },
    "gru4rec": {name: recipe | {"num_layers": 1, "learning_rate": 1e-2} for name, recipe in _PACKED.items()},
    "lrurec": {name: recipe | {"learning_rate": 4e-3} for name, recipe in _PACKED.items()},
    "caser": {name: recipe | {"learning_rate": 1e-2} for name, recipe in _PACKED.items()},
    "echomamba4rec": {
        "ml-100k": {"num_layers": 1},
        "ml-1m": {"patience": 10},
        "beauty": _ECHO,
        "videogames": _ECHO,
    },
    "tisasrec": {name: {"batch_size": 256} for name in ("ml-1m", "beauty", "videogames")},
    "bert4rec": {
        name: _PACKED[name] | {"positions": "masked", "mask_rate": rate, "epochs": epochs}
        for name, rate, epochs in (
            ("quickstart", 0.2, 60),
            ("ml-100k", 0.2, 100),
            ("ml-1m", 0.2, 150),
            ("beauty", 0.6, 100),
            ("videogames", 0.6, 100),
        )
    },
}
# Training settings that belong to a model: in a comparison they may differ from those of the others.
RECIPES = {
    name: {f"train.{setting}" for setting in (*_EVERY_POSITION, "mask_rate", "batch_size", "epochs")}
    for name in ("tim4rec_causal", "gru4rec", "lrurec", "caser", "bert4rec")
}


def of_model(base: ModelConfig, name: str) -> ModelConfig:
    """Returns the settings of a model in the shape of another's: length, width, depth, dropout.

    Models of Mamba-2 mixers, and those of attention, take from each other all that both read. Else the rest is at its
    default.
    """
    if name == base.name:
        return base
    kind = model_class(name).Config
    if any(isinstance(base, kin) and issubclass(kind, kin) for kin in (SSDConfig, AttentionConfig)):
        given = dataclasses.asdict(base)
    else:
        given = {field: getattr(base, field) for field in _SHAPE if hasattr(base, field)}
        given |= {"attention_dropout": base.dropout, "inner_size": 4 * base.d_model, "kaiming_init": False}
        given |= {"attention_heads": 4} if name == "tisasrec" else {}
    read = kind.reads() - {"name", "module"}
    return kind(**{field: value for field, value in given.items() if field in read})


def _own(config: ExperimentConfig, changes: dict[str, Any]) -> ExperimentConfig:
    """Applies changes to the model where it has such a setting, else to the training."""
    model = {name: value for name, value in changes.items() if hasattr(config.model, name)}
    train = {name: value for name, value in changes.items() if name not in model}
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, **model), train=dataclasses.replace(config.train, **train)
    )


def exact_order(config: ExperimentConfig) -> ExperimentConfig:
    """Returns an experiment whose events are ordered by exact seconds, as all are but TiM4Rec's own reproductions."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, timestamp_precision="int64"))


def file_name(data: str) -> str:
    """Returns how files and experiments are called after a data set: ml1m after ml-1m."""
    return data.replace("-", "")


def family_names() -> list[str]:
    """Returns the names of all combinations."""
    return [f"{file_name(data)}_{model}" for data in DATA_NAMES for model in MODELS]


def compose(name: str, load: Callable[[str], ExperimentConfig]) -> ExperimentConfig:
    """Returns the settings of `<data>_<model>`.

    Args:
      name: one of `family_names()`.
      load: returns a data set's own experiment by its name.
    """
    data, _, model = name.partition("_")
    data = DATA_ALIASES.get(data, data)
    base = exact_order(load(_BASES[data]))
    config = dataclasses.replace(base, name=name, model=of_model(base.model, model))
    return _own(config, _OWN.get(model, {}).get(data, {}))
