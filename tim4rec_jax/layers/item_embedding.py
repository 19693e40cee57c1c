"""Embeddings with the initial values of the family, and scores by the table of items that they are tied to."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from kernels.products import matmul
from tim4rec_jax.layers.dense import INIT_STD, wide
from tim4rec_jax.model_config import ModelConfig


def embedding_table(rows: int, config: ModelConfig) -> nn.Embed:
    """Returns a table of `rows` vectors of width d, N(0, 0.02); row 0 is drawn like all others."""
    return nn.Embed(
        rows,
        config.d_model,
        dtype=jnp.dtype(config.dtype),
        param_dtype=wide(config.dtype),
        embedding_init=nn.initializers.normal(INIT_STD),
    )


class ItemEmbedding(nn.Embed):
    """A table of items that may have rows beyond the catalogue, which are looked up and scored by no one.

    Attributes:
      vocab_size: v, rows of the catalogue; the others follow them.
    """

    vocab_size: int = 0


def item_embedding(config: ModelConfig) -> ItemEmbedding:
    """Returns the item embedding [rows, width]: N(0, 0.02) as `embedding_table`, and 0 in the columns from d on."""

    def initial(key: Array, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
        vectors = nn.initializers.normal(INIT_STD)(key, (shape[0], config.d_model), dtype)
        return jnp.pad(vectors, ((0, 0), (0, shape[1] - config.d_model)))

    return ItemEmbedding(
        config.embedding_rows,
        config.table_width,
        dtype=jnp.dtype(config.dtype),
        param_dtype=wide(config.dtype),
        embedding_init=initial,
        vocab_size=config.vocab_size,
    )


def table_rows(items: ItemEmbedding) -> Array:
    """Returns E, [v, d] in the arithmetic's dtype."""
    return items.embedding[: items.vocab_size].astype(items.dtype)


def tied_scores(hidden: Array, items: ItemEmbedding) -> Array:
    """Returns hidden E^T for hidden [.., d] over all rows of the catalogue, [.., v], float32 or wider."""
    table = table_rows(items)
    return matmul(hidden.astype(table.dtype), table.T, wide(table.dtype))
