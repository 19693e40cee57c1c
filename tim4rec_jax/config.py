"""Frozen settings of an experiment: its model (see `tim4rec_jax.models`), data, training, evaluation and devices.

Every program resolves to one `ExperimentConfig`, which refuses what does not go together before anything is written.
"""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp

from kernels.dispatch import missing
from kernels.softmax_cross_entropy import softmax_cross_entropy
from tim4rec_jax.checks import require
from tim4rec_jax.data_config import DataConfig
from tim4rec_jax.eval_config import EvalConfig
from tim4rec_jax.evaluation.measures import list_length
from tim4rec_jax.model_config import ModelConfig, require_sizes
from tim4rec_jax.models import MODELS, full_config, import_model_module, init_params, model_class, require_x64
from tim4rec_jax.parallel_config import ParallelConfig

Positions = Literal["last", "all", "masked"]
Loss = Literal["ce", "bpr", "bce", "gbce", "sampled_ce"]
BINARY_LOSSES = ("bce", "gbce")
TableOptimizer = Literal["adam", "lazy_adam"]
Tracker = Literal["mlflow", "wandb"]


@dataclass(frozen=True)
class TrainConfig:
    """How the parameters are fitted.

    Attributes:
      epochs: most passes over the training examples.
      max_steps: most optimiser steps; None for no limit.
      batch_size: examples per step; with `positions="all"` and "masked" rows of max_len positions.
      learning_rate: peak rate of Adam.
      adam_b1, adam_b2, adam_eps: Adam's constants.
      weight_decay: decoupled (AdamW); 0 is Adam.
      clip_norm: global-norm gradient clipping; None for none.
      schedule: "constant", or "cosine" decay to 0 over all steps.
      warmup_steps: linear warm-up from 0 ahead of the schedule.
      loss: "ce" over the whole catalogue, "sampled_ce" with the sum over it estimated from a sample, "bpr" with one
        sampled negative, "bce", the binary cross-entropy of each target and its own sampled negatives, or "gbce", which
        corrects it for their being a sample; see `training.losses`.
      num_negatives: items that "sampled_ce" draws a step, with replacement, and all targets of the step share; or that
        "bce" and "gbce" draw for each target, uniformly among the others (SASRec: 1, gSASRec: 256).
      gbce_t: calibration of "gbce", from 0, plain "bce", to 1; None is 0.75, as recommended for gSASRec.
      negatives_power: they are drawn with probabilities proportional to how often an item is a training target (at
        least once), to this power: 0 is uniform, 1 the frequency itself.
      table_optimizer: "lazy_adam" updates the item table and its moments only where a step touches it, with
        "sampled_ce": a step then costs the same for a catalogue of any size. The moments of other rows do not decay.
      loss_in_tiles: "ce" never holds all scores of a microbatch, which saves memory, by the operator
        `kernels.softmax_cross_entropy` in the backend of `model.kernels`; else it does (with `positions="all"` those of
        some of its positions, and in tiles where the catalogue is large).
      positions: "last" trains on the last position of every prefix, as the papers do; "all" on every position of a
        window at once, with short histories packed into one row, which needs a causal model; "masked" on events of
        such rows that a model of the cloze is to tell from the others, drawn anew in every step.
      mask_rate: share of events that "masked" hides, in (0, 1]; None is 0.2, BERT4Rec's on MovieLens.
      mask_last_share: share of histories in which the last event alone is hidden, as where the model is asked for the
        next item; so it is wherever none was drawn. None is 1/11, that of BERT4Rec's authors' program.
      window_context: positions of a later window of a long history that are read and not trained on again, so that
        every target has at least this much before it; None is half of max_len.
      init_from: run folder whose best parameters are begun with, in place of initial values: of the same model and
        settings, on a log that may have other users and items.
      seed: of initial values, shuffling, dropout and negatives.
      patience: validations in a row without improvement that stop training.
      length_groups: static lengths a batch's rows are grouped into; 1 pads every row to max_len. Not read with
        `positions="all"`, whose rows are full.
      microbatch_tokens: positions computed at once within a batch; None computes each length group's rows at once up to
        a size that suits the platform.
      steps_per_dispatch: steps that the device takes in one call, where so many are left before the next log line,
        checkpoint or end; a device that waits for calls takes small steps faster so. Numbers change by rounding alone.
      capture: XLA records a step's kernels, those of Triton too, into CUDA graphs, each launched as one; for a GPU that
        waits for launches. What it gains has not been measured.
      log_every: steps between log lines.
      checkpoint_every: steps between checkpoints inside an epoch; None saves at the end of each epoch only.
      progress: show the progress bar.
      tensorboard: write TensorBoard event files beside metrics.jsonl.
      trackers: also tell "mlflow" or "wandb", which must be installed; see `training.callbacks`.
    """

    epochs: int = 300
    max_steps: int | None = None
    batch_size: int = 2048
    learning_rate: float = 1e-3
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    loss: Loss = "ce"
    num_negatives: int | None = None
    gbce_t: float | None = None
    negatives_power: float = 0.0
    table_optimizer: TableOptimizer = "adam"
    loss_in_tiles: bool = False
    positions: Positions = "last"
    mask_rate: float | None = None
    mask_last_share: float | None = None
    window_context: int | None = None
    init_from: str | None = None
    seed: int = 2020
    patience: int = 20
    length_groups: int = 6
    microbatch_tokens: int | None = None
    steps_per_dispatch: int = 1
    capture: bool = False
    log_every: int = 50
    checkpoint_every: int | None = None
    progress: bool = True
    tensorboard: bool = True
    trackers: tuple[Tracker, ...] = ()

    def __post_init__(self) -> None:
        require_sizes(self)
        for name in ("epochs", "batch_size", "length_groups", "steps_per_dispatch", "log_every"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("max_steps", "microbatch_tokens", "checkpoint_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value} must be at least 1, or None")
        require(
            self.positions in get_args(Positions), f"positions={self.positions!r} must be one of {get_args(Positions)}"
        )
        require(
            self.window_context is None or self.window_context >= 0,
            f"window_context={self.window_context} must be at least 0, or None",
        )
        require(
            self.positions == "last" or self.loss != "bpr",
            f"positions={self.positions!r} trains with every loss but {self.loss!r}; use positions='last' for it",
        )
        self._require_masking()
        for name in self.trackers:
            require(name in get_args(Tracker), f"trackers={name!r} must be of {get_args(Tracker)}")
        for name in ("patience", "warmup_steps", "weight_decay", "seed"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must be at least 0")
        require(
            self.loss == "ce" or not self.loss_in_tiles,
            f"loss_in_tiles=True is for loss='ce'; leave it out for loss={self.loss!r}",
        )
        self._require_sampling()
        require(self.learning_rate > 0, f"learning_rate={self.learning_rate} must be positive")
        require(self.clip_norm is None or self.clip_norm > 0, f"clip_norm={self.clip_norm} must be positive, or None")

    def _require_masking(self) -> None:
        rate, last = self.mask_rate, self.mask_last_share
        require(rate is None or 0 < rate <= 1, f"mask_rate={rate} must be over 0 and at most 1, or None for 0.2")
        require(last is None or 0 <= last <= 1, f"mask_last_share={last} must lie between 0 and 1, or None for 1/11")
        for name in ("mask_rate", "mask_last_share"):
            require(
                getattr(self, name) is None or self.positions == "masked",
                f"{name}={getattr(self, name)} is for positions='masked'; with positions={self.positions!r} leave it "
                "out",
            )

    def _require_sampling(self) -> None:
        require(self.loss in get_args(Loss), f"loss={self.loss!r} must be one of {get_args(Loss)}")
        require(
            self.table_optimizer in get_args(TableOptimizer),
            f"table_optimizer={self.table_optimizer!r} must be one of {get_args(TableOptimizer)}",
        )
        if self.loss in ("sampled_ce", *BINARY_LOSSES):
            usual = {"sampled_ce": 1024, "bce": 1, "gbce": 256}[self.loss]
            require(
                self.num_negatives is not None and self.num_negatives >= 1,
                f"num_negatives={self.num_negatives} must be at least 1 with loss={self.loss!r}, for instance {usual}",
            )
        require(
            0 <= self.negatives_power <= 1,
            f"negatives_power={self.negatives_power} must lie between 0 (uniform) and 1 (by frequency)",
        )
        t = self.gbce_t
        require(t is None or 0 <= t <= 1, f"gbce_t={t} must lie between 0 (plain bce) and 1, or None for 0.75")
        others = {
            "num_negatives": (None, ("sampled_ce", *BINARY_LOSSES)),
            "gbce_t": (None, ("gbce",)),
            "negatives_power": (0.0, ("sampled_ce",)),
            "table_optimizer": ("adam", ("sampled_ce",)),
        }
        for name, (unset, losses) in others.items():
            require(
                getattr(self, name) == unset or self.loss in losses,
                f"{name}={getattr(self, name)!r} is for loss={' or '.join(map(repr, losses))}; with loss={self.loss!r} "
                + ("every row of the item table has a gradient" if name == "table_optimizer" else "leave it out"),
            )
        require(
            self.table_optimizer == "adam" or self.weight_decay == 0,
            f"weight_decay={self.weight_decay} decays every row of the item table in every step, which "
            "table_optimizer='lazy_adam' does not touch; use 0, or 'adam'",
        )

    @property
    def calibration(self) -> float:
        """t of "gbce"."""
        return 0.75 if self.gbce_t is None else self.gbce_t

    @property
    def masking(self) -> tuple[float, float]:
        """`mask_rate` and `mask_last_share` of "masked"."""
        rate, last = self.mask_rate, self.mask_last_share
        return 0.2 if rate is None else rate, 1 / 11 if last is None else last


@dataclass(frozen=True)
class ExperimentConfig:
    """One experiment: what `experiments.train` runs and what a run folder's config.json holds.

    Raises:
      ValueError: for settings that do not go together.
    """

    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", full_config(self.model))
        require_x64(self.model)
        self._require_readable()
        self._require_shardable()
        # Several processes must meet before any of them asks for a device; theirs are refused where they are traced.
        if self.model.kernels is not None and not self.parallel.several_processes:
            _require_offered(dataclasses.replace(self.model, vocab_size=2, vocab_multiple=1), self.train.loss_in_tiles)

    def _require_readable(self) -> None:
        """Refuses what the model cannot be trained on, or measured by."""
        model, kind = self.model, model_class(self.model.name)
        require(
            self.train.positions != "all" or (kind.causal and kind.packable),
            "train.positions='all' needs a causal model that can start anew inside a row, which "
            f"model.name={model.name!r} is not: take one of "
            f"{', '.join(name for name, known in MODELS.items() if known.causal and known.packable)}, or "
            f"train.positions={'masked' if kind.cloze else 'last'!r}",
        )
        require(
            self.train.positions != "masked" or (kind.cloze and kind.packable),
            f"train.positions='masked' needs a model that reads masked events, which model.name={model.name!r} does "
            f"not: take one of {', '.join(name for name, known in MODELS.items() if known.cloze and known.packable)}, "
            "or another train.positions",
        )
        require(
            not kind.whole_seconds or self.data.timestamp_precision != "float32",
            f"data.timestamp_precision='float32' rounds times, and model.name={model.name!r} reads whole seconds: give "
            "int64",
        )
        require(
            not kind.uses_time or self.data.order == "time",
            f"data.order='file' reads no times, and model.name={model.name!r} does: take one of "
            f"{', '.join(name for name, known in MODELS.items() if not known.uses_time)}, or a log with times",
        )
        require(
            self.eval.max_len is None or self.eval.max_len <= model.max_len or kind.streamable,
            f"eval.max_len={self.eval.max_len} is over the model's max_len={model.max_len}, and {model.name} reads no "
            "more: train with a larger model.max_len, or take one of "
            f"{', '.join(name for name, known in MODELS.items() if known.streamable)}",
        )

        require(
            self.eval.time_buckets is None or self.data.order == "time",
            f"data.order='file' reads no times, which eval.time_buckets={self.eval.time_buckets!r} needs; leave it out",
        )

        self._require_seen_bias()
        negatives, v = self.train.num_negatives, model.vocab_size
        require(
            self.train.loss not in BINARY_LOSSES or negatives is None or v == 0 or negatives <= v - 2,
            f"train.num_negatives={negatives} must be at most {v - 2}: a target has no more other items than that in a "
            f"catalogue of {v - 1}",
        )

    def _require_seen_bias(self) -> None:
        """Refuses what a score of what was seen does not go with."""
        if not self.model.seen_bias:
            return
        name, train = self.model.name, self.train
        require(
            model_class(name).causal,
            f"model.seen_bias needs a causal model, which model.name={name!r} is not: take one of "
            f"{', '.join(known for known, kind in MODELS.items() if kind.causal)}",
        )
        require(
            train.loss == "ce",
            f"model.seen_bias trains with train.loss='ce', not {train.loss!r}; use it, or model.seen_bias=False",
        )
        require(
            not train.loss_in_tiles or train.positions == "all",
            "model.seen_bias needs all scores of a last position: leave out train.loss_in_tiles, or take "
            "train.positions='all'",
        )
        require(
            self.parallel.catalogue_shards == 1,
            f"model.seen_bias needs the item embedding whole: parallel.catalogue_shards="
            f"{self.parallel.catalogue_shards} must be 1, or model.seen_bias=False",
        )

    def _require_shardable(self) -> None:
        """Refuses what does not go with the item embedding in parts."""
        shards, model = self.parallel.catalogue_shards, self.model
        require(
            shards == 1 or not list_length(self.eval.measures),
            f"parallel.catalogue_shards={shards} holds the item embedding in parts and gives ranks alone: leave out "
            f"{', '.join(m for m in self.eval.measures if list_length([m]))}, and measure it by experiments.evaluate",
        )
        require(
            shards == 1 or self.train.loss in ("ce", "sampled_ce"),
            f"parallel.catalogue_shards={shards} trains with train.loss='ce' or 'sampled_ce', not {self.train.loss!r}; "
            "use one of them, or parallel.catalogue_shards=1",
        )
        require(
            model.embedding_rows % shards == 0,
            f"parallel.catalogue_shards={shards} must divide the {model.embedding_rows} rows of the item embedding "
            f"(model.vocab_size={model.vocab_size}, model.vocab_multiple={model.vocab_multiple}); set "
            f"model.vocab_multiple to a multiple of {shards}",
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain values, ready for JSON."""
        return dataclasses.asdict(self)


@cache
def _require_offered(config: ModelConfig, loss_in_tiles: bool) -> None:
    """Refuses a backend that does not offer what the model asks of it, by what the operators themselves say."""
    if missing(str(config.kernels)):
        return  # Runs of other machines are read, too; who computes asks `devices.require_kernels`.
    try:
        jax.eval_shape(partial(init_params, model_class(config.name)(config)), jax.random.key(0))
        if loss_in_tiles:
            rows = jax.ShapeDtypeStruct((2, config.table_width), config.dtype)
            loss = partial(softmax_cross_entropy, implementation=config.backend("softmax_cross_entropy"))
            jax.eval_shape(loss, rows, rows, jax.ShapeDtypeStruct((2,), jnp.int32))
    except ValueError as error:
        raise ValueError(f"model.kernels={config.kernels!r}: {error}") from error


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value, as JSON gives it, is of a field's type; what it may be beyond that the dataclass checks."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, float) or (_is_whole(value) and abs(value) <= sys.float_info.max)
    if hint is int:
        return _is_whole(value)
    return isinstance(value, hint)


def _as_declared(value: Any, hint: Any) -> Any:
    """Returns a fitting value as its field declares it: JSON has lists for tuples, and people write 2 for 2.0."""
    if isinstance(value, list):
        return tuple(value)
    return float(value) if _is_whole(value) and float in (hint, *get_args(hint)) else value


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


_MEASURED = ("gap_mean", "gap_std", "first_second", "last_second")
_BACKENDS = ("ssd_implementation", "conv_implementation", "scan_implementation")
_RETIRED = {"time_mode", "use_time", "time_features", *_MEASURED, *_BACKENDS}
# What is one model now, from the former name, whether time was on, and its form.
_FORMER_MODELS = {
    ("tim4rec", True, "causal"): "tim4rec_causal",
    ("tim4rec", False, "causal"): "ssd4rec",
    ("tim4rec", False, "faithful"): "ssd4rec",
    ("tisasrec", False, "causal"): "sasrec",
    ("tisasrec", False, "faithful"): "sasrec",
}


def _upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """Returns settings of an earlier version as today's: one class of settings for all models, time by flags.

    Statistics of the data are left out, for they stand with the parameters; where an older checkpoint has none they are
    measured again.
    """
    model, train = values.get("model"), values.get("train")
    if isinstance(train, dict) and "loss_implementation" in train:
        backend = train["loss_implementation"]
        rest = {name: value for name, value in train.items() if name != "loss_implementation"}
        values = values | {"train": rest | {"loss_in_tiles": backend is not None}}
    if not isinstance(model, dict) or not _RETIRED & set(model):
        return values
    require(
        model.get("time_features", "gap") == "gap",
        f"model.time_features={model.get('time_features')!r} is no longer offered, only 'gap'; use the version that "
        "trained this run",
    )
    name, mode = model.get("name", "tim4rec"), model.get("time_mode", "faithful")
    require(mode in ("faithful", "causal"), f"model.time_mode={mode!r} must be 'faithful' or 'causal'")
    name = _FORMER_MODELS.get((name, bool(model.get("use_time", True)), mode)) or name
    backends = {model.get(flag) for flag in _BACKENDS} - {None}
    backend = backends.pop() if len(backends) == 1 else None  # All of them compute the same.
    kernels = backend.removesuffix("_interpreted") if isinstance(backend, str) else backend
    read = {field.name for field in dataclasses.fields(model_class(name).Config)}
    of_others = {field.name for known in MODELS.values() for field in dataclasses.fields(known.Config)} - read
    kept = {key: value for key, value in model.items() if key not in _RETIRED | of_others}
    return values | {"model": kept | {"name": name, "kernels": kernels}}


def _model_config_class(values: Any) -> type[ModelConfig]:
    """Returns the class of the settings of a model, whose module is imported where that has to be."""
    require(isinstance(values, dict), f"model is {values!r} and must be a mapping of settings")
    name, module = values.get("name", ModelConfig.name), values.get("module")
    require(isinstance(name, str), f"model.name={name!r} must be str")
    if isinstance(module, str) and name not in MODELS:
        import_model_module(module)
    return model_class(name).Config


def _from_dict(cls: type, values: Any, path: str) -> Any:
    require(isinstance(values, dict), f"{path or 'the settings'} is {values!r} and must be a mapping of settings")
    hints = _hints(cls)
    unknown = sorted(set(values) - set(hints))
    require(not unknown, f"unknown settings {[path + key for key in unknown]}; known: {sorted(hints)}")
    missing = [field.name for field in dataclasses.fields(cls) if _is_required(field) and field.name not in values]
    require(not missing, f"settings without {[path + name for name in missing]}")
    found = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]):
            kind = _model_config_class(value) if hints[key] is ModelConfig else hints[key]
            found[key] = _from_dict(kind, value, f"{path}{key}.")
            continue
        hint = hints[key]
        shown = f"one of {get_args(hint)}" if get_origin(hint) is Literal else getattr(hint, "__name__", hint)
        require(_fits(value, hint), f"{path}{key}={value!r} must be {shown}")
        found[key] = _as_declared(value, hint)
    return cls(**found)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Returns nested settings by path, as in "train.learning_rate"; lists become tuples."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{path}{key}.")
        else:
            found[path + key] = tuple(value) if isinstance(value, list) else value
    return found


def experiment_from_dict(values: dict[str, Any]) -> ExperimentConfig:
    """Rebuilds an `ExperimentConfig` from `ExperimentConfig.to_dict()`, also from that of an earlier version.

    Raises:
      ValueError: for unknown keys, and values of another type or out of range.
    """
    require(isinstance(values, dict), f"the settings is {values!r} and must be a mapping of settings")
    return _from_dict(ExperimentConfig, _upgraded(values), "")
