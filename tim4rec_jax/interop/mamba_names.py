"""Names of Mamba4Rec's and EchoMamba4Rec's parameters in the original programs."""

import re
from collections.abc import Iterator

import numpy as np

from tim4rec_jax.interop.torch_names import Entry, conv, linear, norm
from tim4rec_jax.model_config import MixerConfig
from tim4rec_jax.models import Mamba4RecConfig

# The original EchoMamba4Rec stores an attention block in each of its layers that it never calls.
ECHOMAMBA4REC_UNUSED = re.compile(r"mamba_layers\.\d+\.multi_query_transformer_block\.")


def _spectrum(a: np.ndarray) -> np.ndarray:
    """[1, l // 2 + 1, d, 2] <-> [l // 2 + 1, d, 2]: PyTorch's weight has an axis for the batch."""
    return a[0] if a.ndim == 4 else a[None]


def _mixer(ours: tuple[str, ...], theirs: str) -> Iterator[Entry]:
    for name in ("A_log", "D"):
        yield Entry((*ours, name), f"{theirs}.{name}")
    yield from linear((*ours, "in_proj"), f"{theirs}.in_proj", bias=False)
    yield from conv((*ours, "conv"), f"{theirs}.conv1d")
    yield from linear((*ours, "x_proj"), f"{theirs}.x_proj", bias=False)
    yield from linear((*ours, "dt_proj"), f"{theirs}.dt_proj", bias=False)
    yield Entry((*ours, "dt_bias"), f"{theirs}.dt_proj.bias")
    yield from linear((*ours, "out_proj"), f"{theirs}.out_proj", bias=False)


def _embedding() -> Iterator[Entry]:
    yield Entry(("item_embedding", "embedding"), "item_embedding.weight")
    yield from norm(("embedding_norm",), "LayerNorm")


def mamba4rec_names(config: Mamba4RecConfig) -> Iterator[Entry]:
    """Names every parameter of Mamba4Rec."""
    yield from _embedding()
    for index in range(config.num_layers):
        ours, theirs = f"layers_{index}", f"mamba_layers.{index}"
        yield from _mixer((ours, "mixer"), f"{theirs}.mamba")
        yield from norm((ours, "norm"), f"{theirs}.LayerNorm")
        if config.use_ffn:
            yield from linear((ours, "ffn", "fc1"), f"{theirs}.ffn.w_1")
            yield from linear((ours, "ffn", "fc2"), f"{theirs}.ffn.w_2")
            yield from norm((ours, "ffn", "norm"), f"{theirs}.ffn.LayerNorm")


def echomamba4rec_names(config: MixerConfig) -> Iterator[Entry]:
    """Names every parameter of EchoMamba4Rec; what `ECHOMAMBA4REC_UNUSED` matches has no counterpart here."""
    yield from _embedding()
    for index in range(config.num_layers):
        ours, theirs = f"blocks_{index}", f"mamba_layers.{index}"
        yield Entry((ours, "filter", "weight"), f"{theirs}.filter_layer.complex_weight", _spectrum)
        yield from norm((ours, "filter", "norm"), f"{theirs}.filter_layer.LayerNorm")
        for step in range(config.num_layers):
            for way in ("forward", "backward"):
                pair = ours, f"steps_{step}"
                yield from _mixer((*pair, f"{way}_mixer"), f"{theirs}.mamba_{way}s.{step}")
                yield from norm((*pair, f"{way}_norm"), f"{theirs}.norms_{way}.{step}")
        yield from linear((ours, "glu", "fc1"), f"{theirs}.glu.fc1")
        yield from linear((ours, "glu", "fc2"), f"{theirs}.glu.fc2")
        yield from norm((ours, "glu", "norm"), f"{theirs}.glu.LayerNorm")
