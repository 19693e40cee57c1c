"""SASRec: causal self-attention over items and their positions."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tim4rec_jax.config import ModelConfig
from tim4rec_jax.layers.attention import AttentionEncoder
from tim4rec_jax.layers.item_embedding import item_embedding, table_rows, tied_scores
from tim4rec_jax.typing import Array, Bool, Hidden, Int, Items, LastHidden, Lengths, Scores, Timestamps


class SASRec(nn.Module):
    """Self-attentive sequential recommendation (Kang & McAuley 2018, arXiv 1808.09781), with post-norm layers.

      x_0 = Dropout(LayerNorm(E[items] + P[position])),    x_i = layer_i(x_{i-1}),    score = E x_last

    See `models.base.SequentialModel`, and `layers.attention` for the layer.

    Attributes:
      config: the model's settings.
    """

    config: ModelConfig

    causal = True
    packable = True
    uses_time = False

    def setup(self) -> None:
        config = self.config
        self.item_embedding = item_embedding(config)
        self.encoder = AttentionEncoder(config)

    def encode(
        self, items: Items, lengths: Lengths, timestamps: Timestamps | None, *, deterministic: bool,
        example_ids: Int[Array, " b"] | None = None, starts: Bool[Array | np.ndarray, "b l"] | None = None,
    ) -> Hidden:  # fmt: skip
        """Returns the hidden state at every position.

        Args:
          items: int [b, l], padded on the right with 0.
          lengths: int [b]; not read, for item 0 tells the padding.
          timestamps: not read.
          deterministic: no dropout.
          example_ids: int [b] names of the rows for their dropout masks; None counts from 0.
          starts: bool [b, l], true where a row's history begins anew: what lies before has no effect from there on,
            and positions count from there. None is one history a row.

        Returns:
          [b, l, d].

        Raises:
          ValueError: for more positions than max_len.
        """
        return self._encode(items, deterministic, example_ids, starts=starts)

    def encode_last(
        self, items: Items, lengths: Lengths, timestamps: Timestamps | None, *, deterministic: bool,
        example_ids: Int[Array, " b"] | None = None,
    ) -> LastHidden:  # fmt: skip
        """Returns `encode` at position length - 1 as [b, d], without computing what is not read.

        `items` may be cut to any static length that holds the longest row.
        """
        return self._encode(items, deterministic, example_ids, read=jnp.asarray(lengths)[:, None] - 1)[:, 0]

    def _encode(
        self, items: Items, deterministic: bool, example_ids: Array | None, *, read: Array | None = None,
        starts: Array | np.ndarray | None = None,
    ) -> Array:  # fmt: skip
        example_ids = jnp.arange(items.shape[0]) if example_ids is None else example_ids
        embedded = self.item_embedding(items)
        options = {"deterministic": deterministic, "read": read, "starts": starts}
        return self.encoder(embedded, items != 0, None, example_ids, **options)

    def item_table(self) -> Array:
        """Returns E, [v, d] in the arithmetic's dtype."""
        return table_rows(self.item_embedding)

    def score(self, hidden: LastHidden) -> Scores:
        """Returns hidden E^T over all rows of the embedding, [b, v], float32 or wider."""
        return tied_scores(hidden, self.item_embedding)
