"""The block of the state-space models: a mixer and a feed-forward part, each with dropout, residual and norm."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from flax import linen as nn
from jax import Array

from tim4rec_jax.layers.dense import layer_norm
from tim4rec_jax.layers.dropout import Dropout
from tim4rec_jax.layers.feed_forward import FeedForward
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.model_config import ModelConfig

Settings = TypeVar("Settings", bound=ModelConfig)


class ResidualBlock(nn.Module, Generic[Settings]):
    """h = LayerNorm(Dropout(mixer(u)) + u), then the feed-forward part.

    Attributes:
      config: the model's settings.
      mixer_type: makes the mixer from them; it is called as this block is.
      activation: of the feed-forward part.
      use_ffn: there is one.
      residual: "+ u" is there; None leaves it out of a model of one block, as TiM4Rec and Mamba4Rec have it.
    """

    config: Settings
    mixer_type: Callable[[Settings], nn.Module]
    activation: Callable[[Array], Array]
    use_ffn: bool
    residual: bool | None = None

    def setup(self) -> None:
        config = self.config
        self.mixer = self.mixer_type(config)
        self.dropout = Dropout(config.dropout)
        self.norm = layer_norm(config.norm_eps, config.dtype)
        if self.use_ffn:
            self.ffn = FeedForward(config, self.activation)

    def __call__(
        self, u: Array, channel: Array | None, rows: Rows, cache: Any = None
    ) -> tuple[Array, Array | None, Any]:
        """Maps u [b, l, d] and the time channel to the next block's.

        Args:
          u: [b, l, d].
          channel: what the mixers hand on of time, or None.
          rows: of u.
          cache: of the positions before, or None where there are none and none is wanted.

        Returns:
          [b, l, d], or [b, m, d] at `rows.positions`; the next channel; the cache behind these positions, or None.
        """
        mixed, channel, cache = self.mixer(u, channel, rows, cache)
        h = self.dropout(mixed, rows.example_ids, **rows.drop)
        residual = self.config.num_layers > 1 if self.residual is None else self.residual
        h = self.norm(h + rows.at(u) if residual else h)
        return (self.ffn(h, rows) if self.use_ffn else h), channel, cache

    def init_cache(self, batch: int) -> Any:
        """Returns the cache before the first event of `batch` histories."""
        return self.mixer.init_cache(batch)
