"""A plain recurrent network, as somebody adds it from outside: a config, a block, and one call that registers them."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn

from tim4rec_jax import ModelConfig, StateSpaceModel, register_model


@dataclass(frozen=True)
class RNN4RecConfig(ModelConfig):
    name: str = "rnn4rec"


class Recurrent(nn.Module):
    width: int

    @nn.compact
    def __call__(self, u, channel, rows, cache=None):
        cell, starts = nn.SimpleCell(self.width), jnp.zeros_like(rows.real) if rows.starts is None else rows.starts
        h, outputs = jnp.zeros((u.shape[0], self.width), u.dtype) if cache is None else cache, []
        for t in range(u.shape[1]):
            h = jnp.where(rows.real[:, t, None], cell(jnp.where(starts[:, t, None], 0, h), u[:, t])[0], h)
            outputs.append(h)
        return rows.at(jnp.stack(outputs, axis=1)), channel, None if cache is None else h

    def init_cache(self, batch):
        return jnp.zeros((batch, self.width))


class RNN4Rec(StateSpaceModel):
    causal = packable = streamable = True

    def block(self):
        return Recurrent(self.config.d_model)


register_model("rnn4rec", RNN4RecConfig, RNN4Rec)
