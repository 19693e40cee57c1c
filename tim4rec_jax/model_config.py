"""Settings that every model reads; each model's own stand beside it, in a class that inherits from this one."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, ClassVar, Literal, get_args

from kernels import causal_conv1d, selective_scan, softmax_cross_entropy, ssd
from tim4rec_jax.checks import require

Dtype = Literal["float32", "bfloat16", "float64"]
# What no machine trains, or compiles; other whole numbers need only fit into 32 bits.
LARGEST = {"num_layers": 200, "d_model": 2**16, "expand": 2**10, "d_conv": 2**10, "max_len": 2**20, "inner_size": 2**20}
LARGEST |= {"hidden_size": 2**16, "window": 2**8, "n_h": 2**16, "n_v": 2**16}


def require_sizes(settings: Any) -> None:
    """Refuses whole numbers, also in tuples, that are beyond what can be meant."""
    for field in dataclasses.fields(settings):
        value, largest = getattr(settings, field.name), LARGEST.get(field.name) or 2**31 - 1
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and abs(number) > largest:
                shown = number if abs(number) < 2**63 else f"(about 2^{number.bit_length() - 1})"
                raise ValueError(f"{field.name}={shown} must be at most {largest}")


@dataclass(frozen=True)
class ModelConfig:
    """What all models read; `tim4rec_jax.models.MODELS[name].Config` is the class with a model's own settings too.

    Attributes:
      name: registered model, see `tim4rec_jax.models.MODELS`.
      module: Python module whose import registers the model; None for the library's own.
      vocab_size: v, rows of the item embedding: every item plus row 0 for padding; 0 means "take it from the data".
      vocab_multiple: the item embedding has so many more rows, never scored, that their number is a multiple of this;
        equal parts of it can then lie on several devices (`parallel.catalogue_shards`).
      max_len: l, positions the model reads.
      d_model: d, width of the hidden state.
      num_layers: blocks.
      dropout: rate on embeddings and on the outputs inside a block.
      norm_eps: epsilon of the norms (that of a feed-forward block keeps 1e-12).
      dtype: arithmetic; "bfloat16" keeps parameters, norms, softplus, decays and loss in float32.
      seen_bias: one learned number is added to the scores of all items that the history holds, for a state cannot
        remember each of them; of causal models.
      kernels: backend of the operators, a name in their `IMPLEMENTATIONS`; None takes what suits the device, and so do
        operators that a backend does not have.
    """

    name: str = "tim4rec"
    module: str | None = None
    vocab_size: int = 0
    vocab_multiple: int = 1
    max_len: int = 50
    d_model: int = 64
    num_layers: int = 2
    dropout: float = 0.2
    norm_eps: float = 1e-12
    dtype: Dtype = "float32"
    seen_bias: bool = False
    kernels: str | None = None

    # Packages of `kernels` that the model and its loss are computed with.
    OPERATORS: ClassVar[tuple[ModuleType, ...]] = (softmax_cross_entropy,)
    # Settings of the above that this model does not read; they are no options of it.
    UNREAD: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def reads(cls) -> set[str]:
        """Returns the names of the settings that the model reads."""
        return {field.name for field in dataclasses.fields(cls)} - {*cls.UNREAD}

    def __post_init__(self) -> None:
        require_sizes(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is int and field.name not in ("vocab_size", "date_knots"):
                require(value >= 1, f"{field.name}={value} must be at least 1")
            if field.name.endswith("dropout"):
                require(0.0 <= value < 1.0, f"{field.name}={value} must lie in [0, 1); use 0 to switch dropout off")
            require(
                field.name not in self.UNREAD or value == field.default,
                f"{field.name}={value} is not read by model.name={self.name!r}; leave it out",
            )
        require(self.vocab_size >= 0, f"vocab_size={self.vocab_size} must be at least 0 (0: taken from the data)")
        require(self.norm_eps > 0, f"norm_eps={self.norm_eps} must be positive")
        require(self.dtype in get_args(Dtype), f"dtype={self.dtype!r} must be one of {get_args(Dtype)}")
        known = list(dict.fromkeys(name for operator in self.OPERATORS for name in operator.IMPLEMENTATIONS))
        require(
            self.kernels is None or self.kernels in known,
            f"model.kernels={self.kernels!r} is not offered by any operator of the model: give one of "
            f"{', '.join(known)}, or None",
        )

    def backend(self, operator: str) -> str | None:
        """Returns the implementation by which an operator runs, a name of `kernels`; None is what suits the device."""
        room = next((room for room in self.OPERATORS if room.__name__ == f"kernels.{operator}"), None)
        return self.kernels if room is not None and self.kernels in room.IMPLEMENTATIONS else None

    @property
    def table_width(self) -> int:
        """Columns of the item embedding: d, and any that scores alone read."""
        return self.d_model

    @cached_property
    def embedding_rows(self) -> int:
        """Rows of the item embedding: v, and those beyond it that fill the last multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True)
class AttentionConfig(ModelConfig):
    """What models of self-attention read besides.

    Attributes:
      attention_heads: heads; must divide d.
      inner_size: width inside the feed-forward blocks.
      attention_dropout: rate on attention weights.
    """

    attention_heads: int = 2
    inner_size: int = 256
    attention_dropout: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.d_model % self.attention_heads == 0,
            f"attention_heads={self.attention_heads} must divide d_model={self.d_model}; "
            f"choose one of {[h for h in range(1, self.d_model + 1) if self.d_model % h == 0]}",
        )


@dataclass(frozen=True)
class MixerConfig(ModelConfig):
    """What models of state-space mixers read besides.

    Attributes:
      d_state: n, width of the state.
      d_conv: taps of the causal depthwise convolutions.
      expand: inner width e is `expand * d_model`.
      kaiming_init: convolutions start N(0, 2 / (channels * d_conv)) with zero bias, else uniform(+-1/sqrt(d_conv)).
    """

    d_state: int = 32
    d_conv: int = 4
    expand: int = 2
    kaiming_init: bool = True

    OPERATORS: ClassVar[tuple[ModuleType, ...]] = (softmax_cross_entropy, causal_conv1d, selective_scan)

    @cached_property
    def d_inner(self) -> int:
        """e, the width inside the mixer."""
        return self.expand * self.d_model


@dataclass(frozen=True)
class SSDConfig(MixerConfig):
    """What models of Mamba-2 mixers read besides.

    Attributes:
      head_dim: p, width of one head; must divide e.
      chunk_size: c, positions handled densely at once; changes speed only.
      use_ffn: a feed-forward block follows each mixer.
    """

    head_dim: int = 32
    chunk_size: int = 32
    use_ffn: bool = True

    OPERATORS: ClassVar[tuple[ModuleType, ...]] = (softmax_cross_entropy, causal_conv1d, ssd)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.d_inner % self.head_dim == 0,
            f"head_dim={self.head_dim} must divide expand*d_model={self.d_inner}; "
            f"choose one of {[p for p in (16, 32, 64, 128, 256) if self.d_inner % p == 0]}",
        )

    @cached_property
    def num_heads(self) -> int:
        """h, heads of the SSD."""
        return self.d_inner // self.head_dim

    @cached_property
    def activation(self) -> Literal["silu", "hard_swish"]:
        """Activation of the convolutions: the original takes silu only where its fast kernel ran (heads in eights)."""
        return "silu" if self.num_heads % 8 == 0 else "hard_swish"
