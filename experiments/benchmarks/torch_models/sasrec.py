"""SASRec (arXiv 1808.09781, RecBole's form) in plain PyTorch, and the parts that TiSASRec shares with it.

The twin of the JAX model: the same mathematics by another framework. Names of the parameters are those of the original
program's checkpoints.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from experiments.benchmarks.torch_models.next_item import NextItem
from tim4rec_jax.model_config import ModelConfig

_INITIAL_STD = 0.02
_MASKED_SCORE = -10000.0


class Attention(nn.Module):
    """LayerNorm(Dropout(dense(attention(u))) + u)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.d_model
        self.heads = config.attention_heads
        self.query, self.key, self.value, self.dense = (nn.Linear(d, d) for _ in range(4))
        self.LayerNorm = nn.LayerNorm(d, eps=config.norm_eps)
        self.weight_dropout = nn.Dropout(config.attention_dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, u, mask, time=None):
        """Maps u [b,l,d] to [b,l,d].

        Args:
          u: [b,l,d].
          mask: [b,l,l], added to the scores.
          time: None, or what is added to the key and the value of each pair: two of [b,l,l,d].
        """
        q, k, v = (part(u).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value))
        scores = torch.einsum("bihp,bjhp->bhij", q, k)
        if time is not None:
            time_k, time_v = (part.unflatten(-1, (self.heads, -1)) for part in time)
            scores = scores + torch.einsum("bihp,bijhp->bhij", q, time_k)
        weights = self.weight_dropout((scores / math.sqrt(q.shape[-1]) + mask[:, None]).softmax(-1))
        mixed = torch.einsum("bhij,bjhp->bihp", weights, v)
        if time is not None:
            mixed = mixed + torch.einsum("bhij,bijhp->bihp", weights, time_v)
        return self.LayerNorm(self.dropout(self.dense(mixed.flatten(-2))) + u)


class FeedForward(nn.Module):
    """LayerNorm(Dropout(dense_2(gelu(dense_1 h))) + h)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense_1 = nn.Linear(config.d_model, config.inner_size)
        self.dense_2 = nn.Linear(config.inner_size, config.d_model)
        self.LayerNorm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden):
        """Maps hidden [b,l,d] to [b,l,d]."""
        return self.LayerNorm(self.dropout(self.dense_2(F.gelu(self.dense_1(hidden)))) + hidden)


class Layer(nn.Module):
    """Attention, then feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.multi_head_attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, u, mask, time=None):
        """Maps u [b,l,d] to [b,l,d]; see `Attention.forward`."""
        return self.feed_forward(self.multi_head_attention(u, mask, time))


class Encoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_layers))

    def forward(self, hidden, mask, time=None):
        """Maps hidden [b,l,d] to [b,l,d]; see `Attention.forward`."""
        for layer in self.layer:
            hidden = layer(hidden, mask, time)
        return hidden


class SASRec(NextItem):
    """The recommender: items of a history to scores of the next item.

    Args:
      config: sizes and rates; `dtype` "float32" or "float64".
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.item_embedding = nn.Embedding(config.vocab_size, config.d_model, padding_idx=0)
        self._make_tables()
        self.position_embedding = nn.Embedding(config.max_len, config.d_model)
        self.trm_encoder = Encoder(config)
        self.LayerNorm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.apply(_initialise)
        self.to(getattr(torch, config.dtype))

    def _make_tables(self) -> None:
        """Makes the tables of another model, where the original program's order has them."""

    def time_pairs(self, timestamps):
        """Returns what each pair of positions adds to key and value, see `Attention.forward`."""
        return None

    def hidden(self, item_seq, timestamps=None):
        """Returns the hidden state [b,l,d] at every position of item_seq i64[b,l]."""
        positions = torch.arange(item_seq.shape[1])
        embedded = self.item_embedding(item_seq) + self.position_embedding(positions)
        hidden = self.dropout(self.LayerNorm(embedded))
        seen = (positions <= positions[:, None]) & (item_seq != 0)[:, None]
        mask = torch.where(seen, 0.0, _MASKED_SCORE).to(hidden.dtype)
        return self.trm_encoder(hidden, mask, self.time_pairs(timestamps))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=_INITIAL_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def perturbed(state_dict, seed=2025):
    """Returns a perturbed copy, in float64, of a float32 state dict of SASRec or TiSASRec.

    Each parameter, in the order of the state dict, takes a standard normal draw of its shape: matrices are replaced by
    it (scaled), all else moves by it. All arithmetic is float32 and only the result is widened.
    """
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, value in state_dict.items():
        noise = torch.randn(value.shape, generator=generator)
        if "_emb" in name:
            moved[name] = 0.3 * noise
        elif value.ndim == 2:
            moved[name] = 0.6 * noise / math.sqrt(value.shape[1])
        else:
            moved[name] = value + (0.1 if name.endswith("bias") else 0.2) * noise
    return {name: value.double() for name, value in moved.items()}
