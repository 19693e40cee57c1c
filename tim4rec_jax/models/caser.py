"""Caser: convolutions over the last few items."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from tim4rec_jax.checks import require
from tim4rec_jax.layers.attention import first_positions
from tim4rec_jax.layers.dense import Linear, wide
from tim4rec_jax.layers.dropout import Dropout
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.model_config import ModelConfig
from tim4rec_jax.models.recommender import Cache, SequentialModel
from tim4rec_jax.typing import Array


@dataclass(frozen=True)
class CaserConfig(ModelConfig):
    """Settings of `Caser`.

    Attributes:
      window: L, how many of the last items are read.
      n_h: horizontal filters of each height from 1 to L.
      n_v: vertical filters.
    """

    name: str = "caser"
    num_layers: int = 1
    window: int = 5
    n_h: int = 16
    n_v: int = 8

    UNREAD: ClassVar[tuple[str, ...]] = ("num_layers", "norm_eps")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.window >= 2, f"window={self.window} must be at least 2: the last item and one before it")


class Caser(SequentialModel[CaserConfig]):
    """Convolutional sequence embedding for recommendation (Tang & Wang 2018, arXiv 1809.07426).

      X = E[last L items], [L, d], 0 before the first;    o_v = concat_k(sum_j V_jk X_j)
      o_h = concat_h(max_j relu(<F_h, X_{j..j+h-1}> + b_h));    score = E relu(W Dropout([o_v, o_h]) + b)

    Filters F_h, n_h of them, have every height h from 1 to L; V has n_v columns. A position reads the L items up to it
    and nothing else, so every position is computed from a window of its own. The paper's user embedding is left out,
    because recommendations must exist for users who were not in training; the paper measures its model without it, too.
    Scores are by the item embedding, as in RecBole's form, not by a table of their own.
    """

    Config = CaserConfig
    causal = packable = streamable = True

    def setup(self) -> None:
        super().setup()
        config, L, d, n_h = self.config, self.config.window, self.config.d_model, self.config.n_h
        heights = range(1, L + 1)
        self.horizontal = [self._filters(f"horizontal_{h}", h * d, (h, d, n_h), n_h) for h in heights]
        self.vertical = self._filters("vertical", L, (L, config.n_v), config.n_v)
        self.dropout = Dropout(config.dropout)
        self.dense = Linear(d, config.dtype)

    def _filters(self, name: str, inputs: int, shape: tuple[int, ...], filters: int) -> tuple[Array, Array]:
        """Returns kernel and bias of a convolution, both uniform within 1 / sqrt(inputs) at the start."""
        bound, dtype = 1 / math.sqrt(inputs), wide(self.config.dtype)

        def uniform(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        kernel, bias = (
            self.param(f"{name}_{part}", uniform, of) for part, of in (("kernel", shape), ("bias", (filters,)))
        )
        return kernel.astype(self.config.dtype), bias.astype(self.config.dtype)

    def forward(
        self, items: Array, timestamps: Array | None, rows: Rows, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        windows, own = self._windows(items, rows, None if cache is None else cache.layers[0])
        convolved = jnp.concatenate([self._vertical(windows), self._horizontal(windows)], axis=-1)
        hidden = jax.nn.relu(self.dense(self.dropout(convolved, rows.example_ids, **rows.drop)))
        return hidden, None if cache is None else Cache(cache.timestamps, cache.events + rows.lengths, (own,))

    def _windows(self, items: Array, rows: Rows, before: Array | None) -> tuple[Array, Array]:
        """Returns X [b, m, L, d] at `rows.positions`, and the last L - 1 items behind the rows, [b, L - 1]."""
        (b, length), L = items.shape, self.config.window
        before = jnp.zeros((b, L - 1), items.dtype) if before is None else before
        items = jnp.concatenate([before, items], axis=1)
        embedded = jnp.where(items[..., None] == 0, 0, self.item_embedding(items))
        # Place j of a position's window is the item L - 1 - j before it.
        windows = jnp.stack([embedded[:, j : j + length] for j in range(L)], axis=2)
        if rows.starts is not None:
            read = jnp.arange(length) - first_positions(rows.starts)
            windows = jnp.where((jnp.arange(L - 1, -1, -1) <= read[..., None])[..., None], windows, 0)
        windows = rows.at(windows.reshape(b, length, -1))
        last = jnp.take_along_axis(items, rows.lengths[:, None] + jnp.arange(L - 1), axis=1)
        return windows.reshape(*windows.shape[:2], L, -1), last

    def _vertical(self, windows: Array) -> Array:
        """Returns o_v, [b, m, n_v * d]."""
        kernel, bias = self.vertical
        mixed = jnp.einsum("bmjd,jk->bmkd", windows, kernel) + bias[:, None]
        return mixed.reshape(*mixed.shape[:2], -1)

    def _horizontal(self, windows: Array) -> Array:
        """Returns o_h, [b, m, L * n_h]: filters at all their places in the window are one matrix."""
        (b, m, L, d), n_h = windows.shape, self.config.n_h
        matrix = jnp.concatenate([self._placed(kernel) for kernel, _ in self.horizontal], axis=2)
        products = (windows.reshape(b, m, L * d) @ matrix.reshape(L * d, -1)).reshape(b, m, -1, n_h)
        by_height = jnp.split(products, np.cumsum(np.arange(L, 1, -1)), axis=2)
        found = [jnp.max(one, axis=2) + bias for one, (_, bias) in zip(by_height, self.horizontal, strict=True)]
        return jax.nn.relu(jnp.concatenate(found, axis=-1))

    def _placed(self, kernel: Array) -> Array:
        """Returns filters [h, d, n_h] over the whole window at each of their places, [L, d, L - h + 1, n_h]."""
        rest = self.config.window - kernel.shape[0]
        places = [jnp.pad(kernel, ((j, rest - j), (0, 0), (0, 0))) for j in range(rest + 1)]
        return jnp.stack(places, axis=2)

    def init_cache(self, batch: int) -> Cache:
        """Returns the cache before the first event of `batch` histories: no items."""
        zeros = jnp.zeros(batch, jnp.int32)
        return Cache(zeros, zeros, (jnp.zeros((batch, self.config.window - 1), jnp.int32),))
