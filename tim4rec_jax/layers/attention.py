"""Self-attention in post-norm layers, causal or not, with or without embeddings of the time between two events."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from tim4rec_jax.layers.dense import Linear, layer_norm, wide
from tim4rec_jax.layers.dropout import Dropout
from tim4rec_jax.layers.item_embedding import embedding_table
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.model_config import AttentionConfig

# Added to a score rather than put in its place: a row that may look at nothing (all of it padding) stays finite.
MASKED_SCORE = -10000.0


class Intervals(NamedTuple):
    """What attention reads of time: when events happened, and a key and a value row for each interval between two.

    Attributes:
      timestamps: [b, L] seconds, float or integer.
      keys, values: [t, d], or [b, t, d] where each example drops values of its own; row t - 1 is for t - 1 or more.
      unit: [b, L] positive seconds that count as 1 where a position looks back; None for one.
    """

    timestamps: Array
    keys: Array
    values: Array
    unit: Array | None = None

    def between(self, positions: Array) -> Array:
        """Returns min(|time_i - time_j| / unit, t - 1), rounded down, int32 [b, m, L], for i in positions [b, m]."""
        own, others = jnp.take_along_axis(self.timestamps, positions, axis=1)[:, :, None], self.timestamps[:, None]
        gaps = jnp.maximum(own, others) - jnp.minimum(own, others)
        if self.unit is not None:
            gaps = gaps // jnp.take_along_axis(self.unit, positions, axis=1)[:, :, None]
        return jnp.clip(gaps, 0, self.keys.shape[-2] - 1).astype(jnp.int32)


def shortest_gap(timestamps: Array, real: Array) -> Array:
    """Returns the shortest positive gap between two events up to each position, [b, L]; 1 where there is none.

    Args:
      timestamps: [b, L] seconds that never fall among real positions.
      real: bool [b, L].
    """
    gaps = timestamps[:, 1:] - timestamps[:, :-1]
    largest = jnp.iinfo(gaps.dtype).max if jnp.issubdtype(gaps.dtype, jnp.integer) else jnp.inf
    gaps = jnp.where(real[:, 1:] & real[:, :-1] & (gaps > 0), gaps, largest)
    shortest = jax.lax.cummin(jnp.pad(gaps, ((0, 0), (1, 0)), constant_values=largest), axis=1)
    return jnp.where(shortest == largest, 1, shortest)


def interval_scores(q: Array, keys: Array, intervals: Array) -> Array:
    """Returns q_i . key[interval_ij] without an array of b * L * L * d values.

    Every query meets every row of the table once, and the pairs pick from these products.

    Args:
      q: [b, m, h, p].
      keys: [t, h * p] or [b, t, h * p].
      intervals: int [b, m, L], 0 to t - 1.

    Returns:
      [b, h, m, L], float32 or wider.
    """
    keys = keys.reshape(*keys.shape[:-1], *q.shape[2:])
    equation = "bmhp,thp->bmth" if keys.ndim == 3 else "bmhp,bthp->bmth"
    products = jnp.einsum(equation, q, keys, preferred_element_type=wide(q.dtype.name))
    # The heads lie together, so that one index moves them all.
    picked = jnp.take_along_axis(products, intervals[..., None], axis=2, mode="promise_in_bounds")
    return jnp.moveaxis(picked, 3, 1)


def interval_values(weights: Array, values: Array, intervals: Array) -> Array:
    """Returns sum_j weight_ij value[interval_ij] without an array of b * L * L * d values.

    The weights are summed by interval first, and the sums meet the table once.

    Args:
      weights: [b, h, m, L], float32 or wider.
      values: [t, h * p] or [b, t, h * p]; their dtype is that of the product.
      intervals: int [b, m, L], 0 to t - 1.

    Returns:
      [b, m, h, p].
    """
    b, h, m, _ = weights.shape
    values = values.reshape(*values.shape[:-1], h, -1)
    rows, queries = jnp.arange(b)[:, None, None], jnp.arange(m)[:, None]
    sums = jnp.zeros((b, m, values.shape[-3], h), weights.dtype)
    sums = sums.at[rows, queries, intervals].add(jnp.moveaxis(weights, 1, 3), mode="promise_in_bounds")
    equation = "bmth,thp->bmhp" if values.ndim == 3 else "bmth,bthp->bmhp"
    return jnp.einsum(equation, sums.astype(values.dtype), values)


def first_positions(starts: Array) -> Array:
    """Returns where each position's history begins, int [b, L], from marks [b, L] of first positions.

    What lies before the first mark of a row begins at 0.
    """
    marked = jnp.where(starts, jnp.arange(starts.shape[1]), 0)
    return jax.lax.cummax(marked, axis=1)


class SelfAttention(nn.Module):
    """Multi-head attention of each position to the real positions of its history, or to those up to itself alone.

      s_ij = q_i . (k_j + K[interval_ij]) / sqrt(p) + mask_ij,    w = Dropout(softmax_j(s))
      out_i = (sum_j w_ij (v_j + V[interval_ij])) Wo + bo

    mask is 0 where both are of one history, item j is no padding and, where attention is causal (arXiv 1808.09781),
    j <= i; else it is MASKED_SCORE. K and V are there only with intervals (Li et al. 2020, "Time Interval Aware
    Self-Attention for Sequential Recommendation"). Softmax in float32 or wider.

    Attributes:
      config: the model's settings.
      causal: attend to nothing later.
    """

    config: AttentionConfig
    causal: bool = True

    def setup(self) -> None:
        config = self.config
        self.query, self.key, self.value, self.out = (Linear(config.d_model, config.dtype) for _ in range(4))
        self.weight_dropout = Dropout(config.attention_dropout)

    def __call__(self, x: Array, rows: Rows, intervals: Intervals | None, firsts: Array | None = None) -> Array:
        """Attends from the positions that are wanted to all.

        Args:
          x: [b, l, d], l <= max_len.
          rows: of x.
          intervals: time between events, or None to attend without it.
          firsts: int [b, l], where the history of each position begins, or None for 0.

        Returns:
          [b, l, d], or [b, m, d] at `rows.positions`.
        """
        dtype = wide(self.config.dtype)
        queries, length = rows.at(x), x.shape[1]
        positions = rows.positions
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length), rows.real.shape)
        q, k, v = (
            projected.reshape(*projected.shape[:2], self.config.attention_heads, -1)
            for projected in (self.query(queries), self.key(x), self.value(x))
        )
        scores = jnp.einsum("bmhp,blhp->bhml", q, k, preferred_element_type=dtype)
        between = None if intervals is None else intervals.between(positions)
        if intervals is not None and between is not None:
            scores += interval_scores(q, intervals.keys, between)
        seen = rows.real[:, None]
        if self.causal:
            seen &= jnp.arange(length) <= positions[:, :, None]
        if firsts is not None:
            own = jnp.take_along_axis(firsts, positions, axis=1)
            seen &= firsts[:, None] == own[:, :, None]
        mask = jnp.where(seen, jnp.zeros((), dtype), jnp.asarray(MASKED_SCORE, dtype))
        weights = jax.nn.softmax(scores / math.sqrt(q.shape[-1]) + mask[:, None], axis=-1)
        weights = self._dropped(weights, positions, rows)
        mixed = jnp.einsum("bhml,blhp->bmhp", weights.astype(v.dtype), v)
        if intervals is not None and between is not None:
            mixed += interval_values(weights, intervals.values, between)
        return self.out(mixed.reshape(queries.shape))

    def _dropped(self, weights: Array, positions: Array, rows: Rows) -> Array:
        """Drops weights [b, h, m, l] by their two positions, whatever the length that the rows are cut to."""
        if rows.deterministic or self.weight_dropout.rate == 0:
            return weights
        b, h, m, length = weights.shape
        pairs = positions[:, :, None] * self.config.max_len + jnp.arange(length)
        flat = jnp.moveaxis(weights, 1, 3).reshape(b, m * length, h)
        flat = self.weight_dropout(flat, rows.example_ids, deterministic=False, positions=pairs.reshape(b, -1))
        return jnp.moveaxis(flat.reshape(b, m, length, h), 3, 1)


class AttentionLayer(nn.Module):
    """h = LayerNorm(Dropout(attention(u)) + u),  out = LayerNorm(Dropout(fc2(gelu(fc1 h))) + h), with the exact GELU.

    Attributes:
      config: the model's settings.
      causal: see `SelfAttention`.
    """

    config: AttentionConfig
    causal: bool = True

    def setup(self) -> None:
        config = self.config
        self.attention = SelfAttention(config, self.causal)
        self.attention_dropout = Dropout(config.dropout)
        self.attention_norm = layer_norm(config.norm_eps, config.dtype)
        self.fc1 = Linear(config.inner_size, config.dtype)
        self.fc2 = Linear(config.d_model, config.dtype)
        self.ffn_dropout = Dropout(config.dropout)
        self.ffn_norm = layer_norm(config.norm_eps, config.dtype)

    def __call__(self, x: Array, rows: Rows, intervals: Intervals | None, firsts: Array | None = None) -> Array:
        """Returns the layer's output at `rows.positions`; see `SelfAttention` for the arguments."""
        mixed = self.attention(x, rows, intervals, firsts)
        h = self.attention_norm(self.attention_dropout(mixed, rows.example_ids, **rows.drop) + rows.at(x))
        inner = nn.gelu(self.fc1(h), approximate=False)
        return self.ffn_norm(self.ffn_dropout(self.fc2(inner), rows.example_ids, **rows.drop) + h)


class AttentionEncoder(nn.Module):
    """x_0 = Dropout(LayerNorm(E[items] + P[position])),  x_i = layer_i(x_{i-1}).

    Attributes:
      config: the model's settings.
      causal: see `SelfAttention`.
    """

    config: AttentionConfig
    causal: bool = True

    def setup(self) -> None:
        config = self.config
        self.position_embedding = embedding_table(config.max_len, config)
        self.norm = layer_norm(config.norm_eps, config.dtype)
        self.dropout = Dropout(config.dropout)
        self.layers = [AttentionLayer(config, self.causal) for _ in range(config.num_layers)]

    def __call__(self, embedded: Array, rows: Rows, intervals: Intervals | None) -> Array:
        """Returns the hidden states at `rows.positions`, without computing what is not read.

        Args:
          embedded: E[items], [b, l, d].
          rows: of them; positions count from the start of each history.
          intervals: time between events, or None to attend without it.

        Returns:
          [b, l, d] or [b, m, d].

        Raises:
          ValueError: for more positions than max_len.
        """
        length = embedded.shape[1]
        if length > self.config.max_len:
            raise ValueError(f"items have {length} positions, more than max_len={self.config.max_len}")
        firsts = None if rows.starts is None else first_positions(rows.starts)
        positions = jnp.arange(length) if firsts is None else jnp.arange(length) - firsts
        x = self.norm(embedded + self.position_embedding(positions))
        x = self.dropout(x, rows.example_ids, deterministic=rows.deterministic)
        everywhere = rows._replace(positions=None)
        for layer in self.layers[:-1]:
            x = layer(x, everywhere, intervals, firsts)
        return self.layers[-1](x, rows, intervals, firsts)
