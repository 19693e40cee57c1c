"""Frozen settings of a model, its data, its training and its evaluation.

Every program resolves to one `ExperimentConfig`; derived sizes are cached properties, so no size is written twice.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tim4rec_jax.checks import require
from tim4rec_jax.data_config import DataConfig
from tim4rec_jax.parallel_config import ParallelConfig

Dtype = Literal["float32", "bfloat16", "float64"]
Baseline = Literal["popularity", "time_off"]
SeenTargets = Literal["leave_out", "rank"]
TimeMode = Literal["faithful", "causal"]
Positions = Literal["last", "all"]
Loss = Literal["ce", "bpr", "sampled_ce"]
TableOptimizer = Literal["adam", "lazy_adam"]
# What no machine trains, or compiles; other whole numbers need only fit into 32 bits.
LARGEST = {"num_layers": 200, "d_model": 2**16, "expand": 2**10, "d_conv": 2**10, "max_len": 2**20, "inner_size": 2**20}
LARGEST |= {"first_second": 2**53, "last_second": 2**53}


def _require_rate(name: str, rate: float) -> None:
    require(0.0 <= rate < 1.0, f"{name}={rate} must lie in [0, 1); use 0 to switch dropout off")


def _require_sizes(settings: Any) -> None:
    """Refuses whole numbers, also in tuples, that are beyond what can be meant."""
    for field_ in dataclasses.fields(settings):
        value, largest = getattr(settings, field_.name), LARGEST.get(field_.name, 2**31 - 1)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and abs(number) > largest:
                shown = number if abs(number) < 2**63 else f"(about 2^{number.bit_length() - 1})"
                raise ValueError(f"{field_.name}={shown} must be at most {largest}")


@dataclass(frozen=True)
class ModelConfig:
    """Shape and behaviour of a sequential recommender (TiM4Rec, arXiv 2409.16182, and its family).

    Attributes:
      name: registered model, see `tim4rec_jax.models.MODELS`.
      vocab_size: v, rows of the item embedding: every item plus row 0 for padding; 0 means "take it from the data".
      vocab_multiple: the item embedding has so many more rows, never scored, that their number is a multiple of this;
        equal parts of it can then lie on several devices (`parallel.catalogue_shards`).
      max_len: l, positions the model reads; the faithful time path has parameters of this size.
      d_model: d, width of the hidden state.
      num_layers: mixer + feed-forward blocks.
      d_state: n, width of the SSD state.
      d_conv: taps of the causal depthwise convolutions.
      expand: inner width e is `expand * d_model`.
      head_dim: p, width of one head; must divide e.
      chunk_size: c, positions handled densely at once; changes speed only.
      dropout: rate on embeddings, mixer and feed-forward outputs, and on the raw time gaps.
      time_dropout: rate inside the time branch.
      norm_eps: epsilon of the norms (the feed-forward norm keeps 1e-12).
      use_ffn: a feed-forward block follows each mixer.
      use_time: the time-aware mask; off gives the SSD-only model (SSD4Rec).
      time_mode: "faithful" is the paper's time branch, which mixes positions, so that the model is not causal and its
        length is fixed; "causal" reads gaps up to each position only.
      gap_mean, gap_std: of log1p(seconds) over the positive gaps of the training part, which the causal time branch is
        standardised with; training fills them in from the data.
      date_knots: values a channel of a piecewise linear function of the date that the causal model adds to its output;
        0 for none.
      first_second, last_second: of the training part, between which the knots lie; filled in likewise.
      time_gate_per_position: the time channel's residual gate has a value a position (`p2p_residual`), else one a head.
      kaiming_init: convolutions start N(0, 2 / (channels * d_conv)) with zero bias, else uniform(+-1/sqrt(d_conv)).
      mask_padded_time: a padded position has a gap of 0 (the original: minus the last timestamp).
      log_time: gaps are compressed to sign(gap) * log1p(|gap|) (the original: raw seconds).
      attention_heads: heads of the attention models; must divide d.
      inner_size: width inside the feed-forward blocks of the attention models.
      attention_dropout: rate on attention weights.
      time_span: largest gap in seconds that TiSASRec tells apart.
      dtype: arithmetic; "bfloat16" keeps parameters, norms, softplus, decays and loss in float32.
      ssd_implementation: backend of `kernels.ssd.ssd`; None picks by platform and shape.
      conv_implementation: likewise of `kernels.causal_conv1d.causal_conv1d`.
      scan_implementation: likewise of `kernels.selective_scan.selective_scan`.
    """

    name: str = "tim4rec"
    vocab_size: int = 0
    vocab_multiple: int = 1
    max_len: int = 50
    d_model: int = 64
    num_layers: int = 2
    d_state: int = 32
    d_conv: int = 4
    expand: int = 2
    head_dim: int = 32
    chunk_size: int = 32
    dropout: float = 0.2
    time_dropout: float = 0.2
    norm_eps: float = 1e-12
    use_ffn: bool = True
    use_time: bool = True
    time_mode: TimeMode = "faithful"
    gap_mean: float = 0.0
    gap_std: float = 1.0
    date_knots: int = 64
    first_second: int = 0
    last_second: int = 1
    time_gate_per_position: bool = False
    kaiming_init: bool = True
    mask_padded_time: bool = False
    log_time: bool = False
    attention_heads: int = 2
    inner_size: int = 256
    attention_dropout: float = 0.2
    time_span: int = 256
    dtype: Dtype = "float32"
    ssd_implementation: str | None = None
    conv_implementation: str | None = None
    scan_implementation: str | None = None

    def __post_init__(self) -> None:
        _require_sizes(self)
        sizes = (
            "max_len", "d_model", "num_layers", "d_state", "d_conv", "expand", "head_dim", "chunk_size",
            "attention_heads", "inner_size", "time_span", "vocab_multiple",
        )  # fmt: skip
        for name in sizes:
            value = getattr(self, name)
            require(value >= 1, f"{name}={value} must be at least 1")
        require(self.vocab_size >= 0, f"vocab_size={self.vocab_size} must be at least 0 (0: taken from the data)")
        if self.name in ("sasrec", "tisasrec"):
            require(
                self.d_model % self.attention_heads == 0,
                f"attention_heads={self.attention_heads} must divide d_model={self.d_model}; "
                f"choose one of {[h for h in range(1, self.d_model + 1) if self.d_model % h == 0]}",
            )
        elif self.name not in ("mamba4rec", "echomamba4rec"):
            require(
                self.d_inner % self.head_dim == 0,
                f"head_dim={self.head_dim} must divide expand*d_model={self.d_inner}; "
                f"choose one of {[p for p in (16, 32, 64, 128, 256) if self.d_inner % p == 0]}",
            )
        _require_rate("dropout", self.dropout)
        _require_rate("time_dropout", self.time_dropout)
        _require_rate("attention_dropout", self.attention_dropout)
        require(
            self.time_mode in get_args(TimeMode), f"time_mode={self.time_mode!r} must be one of {get_args(TimeMode)}"
        )
        require(self.date_knots != 1 and self.date_knots >= 0, f"date_knots={self.date_knots} must be 0, or at least 2")
        require(
            self.first_second < self.last_second,
            f"first_second={self.first_second} must lie before last_second={self.last_second}",
        )
        require(self.gap_std > 0, f"gap_std={self.gap_std} must be positive")
        require(self.norm_eps > 0, f"norm_eps={self.norm_eps} must be positive")
        require(self.dtype in get_args(Dtype), f"dtype={self.dtype!r} must be one of {get_args(Dtype)}")

    @cached_property
    def embedding_rows(self) -> int:
        """Rows of the item embedding: v, and those beyond it that fill the last multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @cached_property
    def d_inner(self) -> int:
        """e, the width inside the mixer."""
        return self.expand * self.d_model

    @cached_property
    def num_heads(self) -> int:
        """h, heads of the SSD."""
        return self.d_inner // self.head_dim

    @cached_property
    def activation(self) -> Literal["silu", "hard_swish"]:
        """Activation of the convolutions: the original takes silu only where its fast kernel ran (heads in eights)."""
        return "silu" if self.num_heads % 8 == 0 else "hard_swish"


@dataclass(frozen=True)
class TrainConfig:
    """How the parameters are fitted.

    Attributes:
      epochs: most passes over the training examples.
      max_steps: most optimiser steps; None for no limit.
      batch_size: examples a step; with `positions="all"` rows of max_len positions.
      learning_rate: peak rate of Adam.
      adam_b1, adam_b2, adam_eps: Adam's constants.
      weight_decay: decoupled (AdamW); 0 is Adam.
      clip_norm: global-norm gradient clipping; None for none.
      schedule: "constant", or "cosine" decay to 0 over all steps.
      warmup_steps: linear warm-up from 0 ahead of the schedule.
      loss: "ce" over the whole catalogue, "sampled_ce" with the sum over it estimated from a sample, or "bpr" with one
        sampled negative.
      num_negatives: items that "sampled_ce" draws a step, with replacement; all targets of the step share them.
      negatives_power: they are drawn with probabilities proportional to how often an item is a training target (at
        least once), to this power: 0 is uniform, 1 the frequency itself.
      table_optimizer: "lazy_adam" updates the item table and its moments only where a step touches it, with
        "sampled_ce": a step then costs the same for a catalogue of any size. The moments of other rows do not decay.
      loss_implementation: None computes all scores of a microbatch at once for "ce" (with `positions="all"` of some of
        its positions, and in tiles for large catalogues); a backend of `kernels.softmax_cross_entropy` never does.
      positions: "last" trains on the last position of every prefix, as the papers do; "all" on every position of a
        window at once, with short histories packed into one row, which needs a causal model.
      window_context: positions of a later window of a long history that are read and not trained on again, so that
        every target has at least this much before it; None is half of max_len.
      seed: of initial values, shuffling, dropout and negatives.
      patience: validations in a row without improvement that stop training.
      length_groups: static lengths a batch's rows are grouped into; 1 pads every row to max_len. Not read with
        `positions="all"`, whose rows are full.
      microbatch_tokens: positions computed at once within a batch; None computes each length group's rows at once up to
        a size that suits the platform.
      log_every: steps between log lines.
      checkpoint_every: steps between checkpoints inside an epoch; None saves at the end of each epoch only.
      progress: show the progress bar.
      tensorboard: write TensorBoard event files beside metrics.jsonl.
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
    negatives_power: float = 0.0
    table_optimizer: TableOptimizer = "adam"
    loss_implementation: str | None = None
    positions: Positions = "last"
    window_context: int | None = None
    seed: int = 2020
    patience: int = 20
    length_groups: int = 6
    microbatch_tokens: int | None = None
    log_every: int = 50
    checkpoint_every: int | None = None
    progress: bool = True
    tensorboard: bool = True

    def __post_init__(self) -> None:
        _require_sizes(self)
        for name in ("epochs", "batch_size", "length_groups", "log_every"):
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
            f"positions='all' trains with loss='ce' or 'sampled_ce', not {self.loss!r}; use positions='last' for it",
        )
        for name in ("patience", "warmup_steps", "weight_decay", "seed"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must be at least 0")
        require(
            self.loss == "ce" or self.loss_implementation is None,
            f"loss_implementation={self.loss_implementation!r} is for loss='ce'; leave it out for loss={self.loss!r}",
        )
        self._require_sampling()
        require(self.learning_rate > 0, f"learning_rate={self.learning_rate} must be positive")
        require(self.clip_norm is None or self.clip_norm > 0, f"clip_norm={self.clip_norm} must be positive, or None")

    def _require_sampling(self) -> None:
        require(self.loss in get_args(Loss), f"loss={self.loss!r} must be one of {get_args(Loss)}")
        require(
            self.table_optimizer in get_args(TableOptimizer),
            f"table_optimizer={self.table_optimizer!r} must be one of {get_args(TableOptimizer)}",
        )
        if self.loss == "sampled_ce":
            require(
                self.num_negatives is not None and self.num_negatives >= 1,
                f"num_negatives={self.num_negatives} must be at least 1 with loss='sampled_ce', for instance 1024",
            )
            require(
                0 <= self.negatives_power <= 1,
                f"negatives_power={self.negatives_power} must lie between 0 (uniform) and 1 (by frequency)",
            )
        else:
            for name, unset in (("num_negatives", None), ("negatives_power", 0.0), ("table_optimizer", "adam")):
                require(
                    getattr(self, name) == unset,
                    f"{name}={getattr(self, name)!r} is for loss='sampled_ce'; with loss={self.loss!r} "
                    + ("every row of the item table has a gradient" if name == "table_optimizer" else "leave it out"),
                )
        require(
            self.table_optimizer == "adam" or self.weight_decay == 0,
            f"weight_decay={self.weight_decay} decays every row of the item table in every step, which "
            "table_optimizer='lazy_adam' does not touch; use 0, or 'adam'",
        )


@dataclass(frozen=True)
class EvalConfig:
    """How a model is measured: full ranking over all items (RecBole 1.2).

    Attributes:
      batch_size: users scored at once.
      max_len: positions of a history that are read; None is the model's max_len. Longer than that needs a causal
        state-space model.
      top_k: list lengths k of hit@k, ndcg@k and mrr@k.
      monitor: the validation metric of early stopping.
      exclude_seen: leave items of the user's own history out of the ranking (the paper: no).
      seen_targets: what becomes of targets that the user has had before, with exclude_seen: "leave_out" of what is
        measured, as a recommender that leaves out what was seen can never name them; or "rank" among the unseen items.
      baselines: what is measured beside the model: "popularity" of the training part, and "time_off", the same model
        trained without its time branch.
    """

    batch_size: int = 4096
    max_len: int | None = None
    top_k: tuple[int, ...] = (10, 20, 50)
    monitor: str = "ndcg@10"
    exclude_seen: bool = False
    seen_targets: SeenTargets = "leave_out"
    baselines: tuple[Baseline, ...] = ("popularity",)

    def __post_init__(self) -> None:
        _require_sizes(self)
        require(self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1")
        require(self.max_len is None or self.max_len >= 1, f"max_len={self.max_len} must be at least 1, or None")
        require(len(self.top_k) > 0 and min(self.top_k) >= 1, f"top_k={self.top_k} needs list lengths of at least 1")
        known = [f"{metric}@{k}" for k in self.top_k for metric in ("hit", "ndcg", "mrr")]
        require(self.monitor in known, f"monitor={self.monitor!r} must be one of {known}")


@dataclass(frozen=True)
class ExperimentConfig:
    """One experiment: what `experiments.train` runs and what a run folder's config.json holds."""

    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain values, ready for JSON."""
        return dataclasses.asdict(self)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value, as JSON gives it, is of a field's type; what it may be beyond that the dataclass checks."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str)
    if get_origin(hint) is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


# Settings of earlier versions that are gone, and the one value that every run may have had: what is now the only way.
_RETIRED = {"model.time_features": "gap"}


def _from_dict(cls: type, values: Any, path: str) -> Any:
    require(isinstance(values, dict), f"{path or 'the settings'} is {values!r} and must be a mapping of settings")
    for key, only in _RETIRED.items():
        if (name := key.removeprefix(path)) in values and "." not in name:
            require(
                values[name] == only,
                f"{key}={values[name]!r} is no longer offered, only {only!r}; use the version that trained this run",
            )
            values = {other: value for other, value in values.items() if other != name}
    hints = _hints(cls)
    unknown = sorted(set(values) - set(hints))
    require(not unknown, f"unknown settings {[path + key for key in unknown]}; known: {sorted(hints)}")
    missing = [field.name for field in dataclasses.fields(cls) if _is_required(field) and field.name not in values]
    require(not missing, f"settings without {[path + name for name in missing]}")
    found = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]):
            found[key] = _from_dict(hints[key], value, f"{path}{key}.")
            continue
        shown = getattr(hints[key], "__name__", hints[key])
        require(_fits(value, hints[key]), f"{path}{key}={value!r} must be {shown}")
        found[key] = tuple(value) if isinstance(value, list) else value
    return cls(**found)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def experiment_from_dict(values: dict[str, Any]) -> ExperimentConfig:
    """Rebuilds an `ExperimentConfig` from `ExperimentConfig.to_dict()`.

    Raises:
      ValueError: for unknown keys, and values of another type or out of range.
    """
    return _from_dict(ExperimentConfig, values, "")
