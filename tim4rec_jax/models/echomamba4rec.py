"""EchoMamba4Rec: selective state spaces in both directions behind a filter over frequencies."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from tim4rec_jax.layers.dense import layer_norm
from tim4rec_jax.layers.dropout import Dropout
from tim4rec_jax.layers.gated_linear_unit import GatedLinearUnit
from tim4rec_jax.layers.mamba_mixer import MambaMixer
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.layers.spectral_filter import SpectralFilter
from tim4rec_jax.model_config import MixerConfig
from tim4rec_jax.models.recommender import Cache, SequentialModel
from tim4rec_jax.typing import Array

DIRECTION_EPS = 1e-5


class BidirectionalMamba(nn.Module):
    """out = LayerNorm(Dropout(M_f(x)) + x) + LayerNorm(Dropout(flip(M_b(flip x))) + x), eps 1e-5 in every setting.

    The flip turns the whole padded row round, so the backward mixer reads the padding first.

    Attributes:
      config: the model's settings.
    """

    config: MixerConfig

    def setup(self) -> None:
        config = self.config
        self.forward_mixer, self.backward_mixer = MambaMixer(config), MambaMixer(config)
        self.forward_dropout, self.backward_dropout = Dropout(config.dropout), Dropout(config.dropout)
        self.forward_norm = layer_norm(DIRECTION_EPS, config.dtype)
        self.backward_norm = layer_norm(DIRECTION_EPS, config.dtype)

    def __call__(self, x: Array, rows: Rows) -> Array:
        """Maps x [b, max_len, d] to [b, max_len, d], or to [b, m, d] at `rows.positions`."""
        ahead, _, _ = self.forward_mixer(x, None, rows)
        if rows.positions is None:
            back, _, _ = self.backward_mixer(x[:, ::-1], None, rows)
            back = back[:, ::-1]
        else:
            turned = rows._replace(positions=x.shape[1] - 1 - rows.positions)
            back, _, _ = self.backward_mixer(x[:, ::-1], None, turned)
        x = rows.at(x)
        ahead = self.forward_norm(self.forward_dropout(ahead, rows.example_ids, **rows.drop) + x)
        return ahead + self.backward_norm(self.backward_dropout(back, rows.example_ids, **rows.drop) + x)


class EchoMamba4RecBlock(nn.Module):
    """Spectral filter, `num_layers` bidirectional steps, gated linear unit.

    Attributes:
      config: the model's settings.
    """

    config: MixerConfig

    def setup(self) -> None:
        config = self.config
        self.filter = SpectralFilter(config)
        self.steps = [BidirectionalMamba(config) for _ in range(config.num_layers)]
        self.glu = GatedLinearUnit(config)

    def __call__(self, x: Array, rows: Rows) -> Array:
        """Maps x [b, max_len, d] to [b, max_len, d], or to [b, m, d] at `rows.positions`."""
        everywhere = rows._replace(positions=None)
        x = self.filter(x, everywhere)
        for step in self.steps[:-1]:
            x = step(x, everywhere)
        return self.glu(self.steps[-1](x, rows), rows)


@dataclass(frozen=True)
class EchoMamba4RecConfig(MixerConfig):
    """Settings of `EchoMamba4Rec`."""

    name: str = "echomamba4rec"


class EchoMamba4Rec(SequentialModel[EchoMamba4RecConfig]):
    """Bidirectional Mamba with spectral filtering for sequential recommendation (Wang et al. 2024, arXiv 2406.02638).

      x_0 = LayerNorm(Dropout(E[items])),    x_i = block_i(x_{i-1}),    score = E x_last

    `num_layers` counts the blocks and the bidirectional steps in each, so n layers hold n^2 pairs of mixers. The
    Fourier transform and the flip read the padding, so a row is always computed at max_len positions.
    """

    Config = EchoMamba4RecConfig

    def setup(self) -> None:
        super().setup()
        config = self.config
        self.embedding_dropout = Dropout(config.dropout)
        self.embedding_norm = layer_norm(config.norm_eps, config.dtype)
        self.blocks = [EchoMamba4RecBlock(config) for _ in range(config.num_layers)]

    def forward(self, items: Array, timestamps: Array | None, rows: Rows, cache: Cache | None) -> tuple[Array, None]:
        length = items.shape[1]
        missing = self.config.max_len - length
        if missing < 0:
            raise ValueError(f"items have {length} positions, more than max_len={self.config.max_len}")
        items = jnp.pad(items, ((0, 0), (0, missing)))
        embedded = self.item_embedding(items)
        # Padding is read, but its row learns as a candidate only: PyTorch's `padding_idx` keeps gradients from it.
        embedded = jnp.where(items[..., None] == 0, jax.lax.stop_gradient(embedded), embedded)
        everywhere = rows._replace(real=items != 0, positions=None)
        x = self.embedding_dropout(embedded, rows.example_ids, deterministic=rows.deterministic)
        x = self.embedding_norm(x)
        for block in self.blocks[:-1]:
            x = block(x, everywhere)
        x = self.blocks[-1](x, everywhere._replace(positions=rows.positions))
        return (x[:, :length] if rows.positions is None else x), None
