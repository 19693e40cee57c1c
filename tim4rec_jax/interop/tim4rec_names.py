"""Names of TiM4Rec's parameters in the original program."""

from collections.abc import Iterator

from tim4rec_jax.interop.torch_names import Entry, conv, linear, norm
from tim4rec_jax.model_config import SSDConfig


def _layer(config: SSDConfig, index: int, timed: bool) -> Iterator[Entry]:
    ours, theirs = f"layers_{index}", f"ssd_layers.{index}"
    mixer, ssd = (ours, "mixer"), f"{theirs}.ssd"
    for name in ("dt_bias", "A_log", "D"):
        yield Entry((*mixer, name), f"{ssd}.{name}")
    yield Entry((*mixer, "norm_scale"), f"{ssd}.norm.weight")
    yield from linear((*mixer, "in_proj"), f"{ssd}.in_proj")
    yield from linear((*mixer, "out_proj"), f"{ssd}.out_proj")
    yield from conv((*mixer, "conv"), f"{ssd}.conv1d")
    if timed:
        time = (*mixer, "time")
        yield from conv((*time, "conv_1"), f"{ssd}.conv1d4time_1")
        yield from conv((*time, "conv_2"), f"{ssd}.conv1d4time_2")
        yield from linear((*time, "scale_in"), f"{ssd}.mlp4time_scale.1")
        yield from linear((*time, "scale_out"), f"{ssd}.mlp4time_scale.3")
        yield from linear((*time, "residual_gate"), f"{ssd}.time_gate_residual.1")
        yield from norm((*time, "norm"), f"{ssd}.time_layer_norm")
    yield from norm((ours, "norm"), f"{theirs}.layer_norm")
    if config.use_ffn:
        yield from linear((ours, "ffn", "fc1"), f"{theirs}.ffn.fc1")
        yield from linear((ours, "ffn", "fc2"), f"{theirs}.ffn.fc2")
        yield from norm((ours, "ffn", "norm"), f"{theirs}.ffn.layer_norm")


def tim4rec_names(config: SSDConfig) -> Iterator[Entry]:
    """Names every parameter of TiM4Rec."""
    return _names(config, timed=True)


def ssd4rec_names(config: SSDConfig) -> Iterator[Entry]:
    """Names every parameter of SSD4Rec."""
    return _names(config, timed=False)


def _names(config: SSDConfig, *, timed: bool) -> Iterator[Entry]:
    yield Entry(("item_embedding", "embedding"), "item_embedding.weight")
    yield from norm(("embedding_norm",), "in_layer_norm")
    if timed:
        yield from norm(("time_norm",), "layer_norm_time")
    for index in range(config.num_layers):
        yield from _layer(config, index, timed)
