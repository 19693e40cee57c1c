"""EchoMamba4Rec: selective state spaces in both directions behind a filter over frequencies."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from tim4rec_jax.config import ModelConfig
from tim4rec_jax.layers.dense import layer_norm
from tim4rec_jax.layers.dropout import Dropout
from tim4rec_jax.layers.gated_linear_unit import GatedLinearUnit
from tim4rec_jax.layers.item_embedding import item_embedding, table_rows, tied_scores
from tim4rec_jax.layers.mamba_mixer import MambaMixer
from tim4rec_jax.layers.spectral_filter import SpectralFilter
from tim4rec_jax.layers.ssd_mixer import take_at
from tim4rec_jax.typing import Array, Hidden, Int, Items, LastHidden, Lengths, Scores, Timestamps

DIRECTION_EPS = 1e-5


class BidirectionalMamba(nn.Module):
    """out = LayerNorm(Dropout(M_f(x)) + x) + LayerNorm(Dropout(flip(M_b(flip x))) + x), eps 1e-5 in every setting.

    The flip turns the whole padded row round, so the backward mixer reads the padding first.

    Attributes:
      config: the model's settings.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.forward_mixer, self.backward_mixer = MambaMixer(config), MambaMixer(config)
        self.forward_dropout, self.backward_dropout = Dropout(config.dropout), Dropout(config.dropout)
        self.forward_norm = layer_norm(DIRECTION_EPS, config.dtype)
        self.backward_norm = layer_norm(DIRECTION_EPS, config.dtype)

    def __call__(self, x: Array, example_ids: Array, *, deterministic: bool, read: Array | None = None) -> Array:
        """Maps x [b, max_len, d] to [b, max_len, d], or to [b, m, d] at the positions `read` [b, m]."""
        drop = {"deterministic": deterministic, "positions": read}
        ahead = self.forward_mixer(x, read)
        if read is None:
            back = self.backward_mixer(x[:, ::-1])[:, ::-1]
        else:
            back = self.backward_mixer(x[:, ::-1], x.shape[1] - 1 - read)
            x = take_at(x, read)
        ahead = self.forward_norm(self.forward_dropout(ahead, example_ids, **drop) + x)
        return ahead + self.backward_norm(self.backward_dropout(back, example_ids, **drop) + x)


class EchoMamba4RecBlock(nn.Module):
    """Spectral filter, `num_layers` bidirectional steps, gated linear unit.

    Attributes:
      config: the model's settings.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.filter = SpectralFilter(config)
        self.steps = [BidirectionalMamba(config) for _ in range(config.num_layers)]
        self.glu = GatedLinearUnit(config)

    def __call__(self, x: Array, example_ids: Array, *, deterministic: bool, read: Array | None = None) -> Array:
        """Maps x [b, max_len, d] to [b, max_len, d], or to [b, m, d] at the positions `read` [b, m]."""
        x = self.filter(x, example_ids, deterministic=deterministic)
        for step in self.steps[:-1]:
            x = step(x, example_ids, deterministic=deterministic)
        x = self.steps[-1](x, example_ids, deterministic=deterministic, read=read)
        return self.glu(x, example_ids, deterministic=deterministic, positions=read)


class EchoMamba4Rec(nn.Module):
    """Bidirectional Mamba with spectral filtering for sequential recommendation (Wang et al. 2024, arXiv 2406.02638).

      x_0 = LayerNorm(Dropout(E[items])),    x_i = block_i(x_{i-1}),    score = E x_last

    `num_layers` counts the blocks and the bidirectional steps in each, so n layers hold n^2 pairs of mixers. The
    Fourier transform and the flip read the padding, so a row is always computed at max_len positions. See
    `models.base.SequentialModel`.

    Attributes:
      config: the model's settings.
    """

    config: ModelConfig

    causal = False
    uses_time = False

    def setup(self) -> None:
        config = self.config
        self.item_embedding = item_embedding(config)
        self.embedding_dropout = Dropout(config.dropout)
        self.embedding_norm = layer_norm(config.norm_eps, config.dtype)
        self.blocks = [EchoMamba4RecBlock(config) for _ in range(config.num_layers)]

    def encode(
        self, items: Items, lengths: Lengths, timestamps: Timestamps | None, *, deterministic: bool,
        example_ids: Int[Array, " b"] | None = None,
    ) -> Hidden:  # fmt: skip
        """Returns the hidden state at every position.

        Args:
          items: int [b, l], padded on the right with 0; fewer than max_len positions are padded further.
          lengths: int [b]; not read, for item 0 tells the padding.
          timestamps: not read.
          deterministic: no dropout.
          example_ids: int [b] names of the rows for their dropout masks; None counts from 0.

        Returns:
          [b, l, d].

        Raises:
          ValueError: for more positions than max_len.
        """
        return self._encode(items, deterministic, example_ids, None)[:, : items.shape[1]]

    def encode_last(
        self, items: Items, lengths: Lengths, timestamps: Timestamps | None, *, deterministic: bool,
        example_ids: Int[Array, " b"] | None = None,
    ) -> LastHidden:  # fmt: skip
        """Returns `encode` at position length - 1 as [b, d]; what follows the last scans runs there alone.

        `items` may be cut to any static length that holds the longest row: they are padded back to max_len.
        """
        return self._encode(items, deterministic, example_ids, jnp.asarray(lengths)[:, None] - 1)[:, 0]

    def _encode(self, items: Items, deterministic: bool, example_ids: Array | None, read: Array | None) -> Array:
        missing = self.config.max_len - items.shape[1]
        if missing < 0:
            raise ValueError(f"items have {items.shape[1]} positions, more than max_len={self.config.max_len}")
        items = jnp.pad(items, ((0, 0), (0, missing)))
        example_ids = jnp.arange(items.shape[0]) if example_ids is None else example_ids
        drop = {"deterministic": deterministic}
        embedded = self.item_embedding(items)
        # Padding is read, but its row learns as a candidate only: PyTorch's `padding_idx` keeps gradients from it.
        embedded = jnp.where(items[..., None] == 0, jax.lax.stop_gradient(embedded), embedded)
        x = self.embedding_norm(self.embedding_dropout(embedded, example_ids, **drop))
        for block in self.blocks[:-1]:
            x = block(x, example_ids, **drop)
        return self.blocks[-1](x, example_ids, **drop, read=read)

    def item_table(self) -> Array:
        """Returns E, [v, d] in the arithmetic's dtype."""
        return table_rows(self.item_embedding)

    def score(self, hidden: LastHidden) -> Scores:
        """Returns hidden E^T over all rows of the embedding, [b, v], float32 or wider."""
        return tied_scores(hidden, self.item_embedding)
