"""Embeddings with the initial values of the family, and scores by the table of items that they are tied to."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from tim4rec_jax.config import ModelConfig
from tim4rec_jax.layers.dense import INIT_STD, wide


def embedding_table(rows: int, config: ModelConfig) -> nn.Embed:
    """Returns a table of `rows` vectors of width d, N(0, 0.02); row 0 is drawn like all others."""
    return nn.Embed(
        rows, config.d_model, dtype=jnp.dtype(config.dtype), param_dtype=wide(config.dtype),
        embedding_init=nn.initializers.normal(INIT_STD),
    )  # fmt: skip


def table_rows(items: nn.Embed) -> Array:
    """Returns E, [v, d] in the arithmetic's dtype."""
    return items.embedding.astype(items.dtype)


def tied_scores(hidden: Array, items: nn.Embed) -> Array:
    """Returns hidden E^T for hidden [b, d] over all rows of the embedding, [b, v], float32 or wider."""
    return jnp.einsum(
        "bd,vd->bv", hidden.astype(items.dtype), table_rows(items),
        preferred_element_type=jnp.promote_types(items.dtype, jnp.float32),
    )  # fmt: skip
