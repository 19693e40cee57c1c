"""Names of SASRec's and TiSASRec's parameters in the original programs."""

from collections.abc import Iterator

from tim4rec_jax.interop.torch_names import Entry, linear, norm
from tim4rec_jax.model_config import AttentionConfig


def _layer(index: int) -> Iterator[Entry]:
    ours, theirs = ("encoder", f"layers_{index}"), f"trm_encoder.layer.{index}"
    attention, feed_forward = f"{theirs}.multi_head_attention", f"{theirs}.feed_forward"
    for name in ("query", "key", "value"):
        yield from linear((*ours, "attention", name), f"{attention}.{name}")
    yield from linear((*ours, "attention", "out"), f"{attention}.dense")
    yield from norm((*ours, "attention_norm"), f"{attention}.LayerNorm")
    yield from linear((*ours, "fc1"), f"{feed_forward}.dense_1")
    yield from linear((*ours, "fc2"), f"{feed_forward}.dense_2")
    yield from norm((*ours, "ffn_norm"), f"{feed_forward}.LayerNorm")


def sasrec_names(config: AttentionConfig) -> Iterator[Entry]:
    """Names every parameter of SASRec (RecBole's form)."""
    yield Entry(("item_embedding", "embedding"), "item_embedding.weight")
    yield Entry(("encoder", "position_embedding", "embedding"), "position_embedding.weight")
    for index in range(config.num_layers):
        yield from _layer(index)
    yield from norm(("encoder", "norm"), "LayerNorm")


def tisasrec_names(config: AttentionConfig) -> Iterator[Entry]:
    """Names every parameter of TiSASRec."""
    yield from sasrec_names(config)
    yield Entry(("interval_keys", "embedding"), "time_matrix_K_emb.weight")
    yield Entry(("interval_values", "embedding"), "time_matrix_V_emb.weight")
