"""The six models of the family on the same data: `--config=<data>_<model>`.

A data set's own settings (length, widths, training, evaluation) are said once, in its TiM4Rec experiment; a model's own
settings are said once, here.

Mamba4Rec: arXiv 2403.03900 (two layers, the stronger form of its authors' rerun). EchoMamba4Rec: arXiv 2406.02638.
SASRec: arXiv 1808.09781 in RecBole's form with two heads. TiSASRec: Li et al. 2020 with four heads, batches of 256 and
a time span of 256 seconds, as in the comparison of TiM4Rec (arXiv 2409.16182). SSD4Rec: TiM4Rec with time off.
"""

import dataclasses
from collections.abc import Callable

from tim4rec_jax.config import ExperimentConfig, ModelConfig
from tim4rec_jax.data_config import DATA_ALIASES

# Data set -> the experiment that holds its settings.
_BASES = {
    "quickstart": "quickstart",
    "ml-100k": "ml100k_tim4rec",
    "ml-1m": "ml1m_tim4rec",
    "beauty": "beauty_tim4rec",
    "videogames": "videogames_tim4rec",
}


def _shape(base: ModelConfig) -> ModelConfig:
    """Length, width, depth and dropout of the data set; everything else at its default."""
    return ModelConfig(
        max_len=base.max_len, d_model=base.d_model, num_layers=base.num_layers, d_state=base.d_state,
        dropout=base.dropout, attention_dropout=base.dropout, inner_size=4 * base.d_model, norm_eps=1e-12,
        kaiming_init=False,
    )  # fmt: skip


def _tim4rec(base: ModelConfig) -> ModelConfig:
    return base


def _ssd4rec(base: ModelConfig) -> ModelConfig:
    return dataclasses.replace(base, use_time=False)


def _mamba4rec(base: ModelConfig) -> ModelConfig:
    return dataclasses.replace(_shape(base), name="mamba4rec")


def _echomamba4rec(base: ModelConfig) -> ModelConfig:
    return dataclasses.replace(_shape(base), name="echomamba4rec")


def _sasrec(base: ModelConfig) -> ModelConfig:
    return dataclasses.replace(_shape(base), name="sasrec", attention_heads=2)


def _tisasrec(base: ModelConfig) -> ModelConfig:
    return dataclasses.replace(_shape(base), name="tisasrec", attention_heads=4, time_span=256)


_MODELS: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "tim4rec": _tim4rec,
    "ssd4rec": _ssd4rec,
    "mamba4rec": _mamba4rec,
    "echomamba4rec": _echomamba4rec,
    "sasrec": _sasrec,
    "tisasrec": _tisasrec,
}
DATA_NAMES: tuple[str, ...] = tuple(_BASES)
MODEL_NAMES: tuple[str, ...] = tuple(_MODELS)


def _own(config: ExperimentConfig, changes: dict[str, float]) -> ExperimentConfig:
    """Applies changes to the model where it has such a setting, else to the training."""
    model = {name: value for name, value in changes.items() if hasattr(config.model, name)}
    train = {name: value for name, value in changes.items() if name not in model}
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, **model), train=dataclasses.replace(config.train, **train)
    )


# What the papers give for a model on published logs. On ml-100k, which has no published setting, EchoMamba4Rec has one
# block, and with it two Mamba mixers like Mamba4Rec's two layers; n blocks would have 2 n^2.
_OWN: dict[str, dict[str, dict[str, float]]] = {
    "echomamba4rec": {
        "ml-100k": {"num_layers": 1},
        "ml-1m": {"patience": 10},
        "beauty": {"patience": 10, "dropout": 0.2},
        "videogames": {"patience": 10, "dropout": 0.2},
    },
    "tisasrec": {name: {"batch_size": 256} for name in ("ml-1m", "beauty", "videogames")},
}


def exact_order(config: ExperimentConfig) -> ExperimentConfig:
    """Returns an experiment whose events are ordered by exact seconds, as all are but TiM4Rec's own reproductions."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, timestamp_precision="int64"))


def file_name(data: str) -> str:
    """Returns how files and experiments are called after a data set: ml1m after ml-1m."""
    return data.replace("-", "")


def family_names() -> list[str]:
    """Returns the names of all combinations."""
    return [f"{file_name(data)}_{model}" for data in DATA_NAMES for model in MODEL_NAMES]


def compose(name: str, load: Callable[[str], ExperimentConfig]) -> ExperimentConfig:
    """Returns the settings of `<data>_<model>`.

    Args:
      name: one of `family_names()`.
      load: returns a data set's own experiment by its name.
    """
    data, _, model = name.partition("_")
    data = DATA_ALIASES.get(data, data)
    base = exact_order(load(_BASES[data]))
    config = dataclasses.replace(base, name=name, model=_MODELS[model](base.model))
    return _own(config, _OWN.get(model, {}).get(data, {}))


def causal(
    config: ExperimentConfig, *, max_len: int, batch_size: int, epochs: int, learning_rate: float = 1e-3
) -> ExperimentConfig:
    """Returns an experiment with the causal time branch, trained on every position of packed rows.

    Every target is used once an epoch, so a few epochs suffice, and the rate falls to 0 over them. Validation chose the
    rate: on MovieLens-100K of 1e-3, 2e-3 and 4e-3 the first (experiments/results/sweep_ml100k_tim4rec_causal), on
    Amazon Beauty of 2e-3 and 3e-3 the first, and less dropout than the paper's (sweep_beauty_tim4rec_causal and
    sweep_beauty_tim4rec_causal_dropout).
    """
    return dataclasses.replace(
        exact_order(config),
        model=dataclasses.replace(config.model, time_mode="causal", max_len=max_len),
        train=dataclasses.replace(
            config.train, positions="all", batch_size=batch_size, epochs=epochs, learning_rate=learning_rate,
            schedule="cosine", warmup_steps=40,
        ),
    )  # fmt: skip
