"""A model small enough to be worked out row by row, with what evaluation and serving call."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class ToyModel(nn.Module):
    """Hidden state: embeddings of the items, fading by 0.8 a step into the past, shifted by the last time gap.

    Attributes:
      vocab_size: v.
      d_model: d.
    """

    vocab_size: int
    d_model: int = 8
    cloze = packable = streamable = False

    def setup(self) -> None:
        self.item_embedding = self.param("item_embedding", nn.initializers.normal(1.0), (self.vocab_size, self.d_model))
        self.time_shift = self.param("time_shift", nn.initializers.normal(1.0), (self.d_model,))

    def __call__(self, items, timestamps, *, segment_ids=None, positions=None):
        lengths = positions[:, 0] + 1
        position = jnp.arange(items.shape[1])
        age = lengths[:, None] - 1 - position
        weights = jnp.where(age >= 0, 0.8 ** age.astype(jnp.float32), 0.0)
        last = jnp.take_along_axis(timestamps, lengths[:, None] - 1, axis=1)[:, 0]
        before = jnp.take_along_axis(timestamps, jnp.maximum(lengths[:, None] - 2, 0), axis=1)[:, 0]
        gap = (last - before).astype(jnp.float32) / 86_400.0
        embedded = self.item_embedding[items]
        hidden = jnp.einsum("bl,bld->bd", weights, embedded) + jnp.tanh(gap)[:, None] * self.time_shift
        return hidden[:, None], None

    def score(self, hidden):
        return hidden @ self.item_embedding.T


def init_toy(vocab_size: int, seed: int = 0):
    """The model and its parameters."""
    model = ToyModel(vocab_size)
    items = jnp.ones((1, 4), jnp.int32)
    variables = model.init(jax.random.key(seed), items, jnp.zeros((1, 4)), positions=jnp.zeros((1, 1), jnp.int32))
    return model, variables["params"]
