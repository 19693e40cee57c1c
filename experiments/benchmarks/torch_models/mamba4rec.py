"""Mamba4Rec (arXiv 2403.03900) in plain PyTorch, and the mixer that EchoMamba4Rec shares with it.

The twin of the JAX model: the same mathematics by another framework. Names of the parameters are those of the original
program's checkpoints.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from experiments.benchmarks.torch_models.next_item import NextItem
from experiments.benchmarks.torch_models.selective_scan import selective_scan_sequential
from tim4rec_jax.model_config import ModelConfig

_INITIAL_STD = 0.02
_FEED_FORWARD_NORM_EPS = 1e-12


class Mamba(nn.Module):
    """The Mamba-1 mixer: [b,l,d] to [b,l,d]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, e, n = config.d_model, config.d_inner, config.d_state
        self.sizes = (math.ceil(d / 16), n, n)
        self.A_log = nn.Parameter(torch.arange(1.0, n + 1).log().repeat(e, 1))
        self.D = nn.Parameter(torch.ones(e))
        self.in_proj = nn.Linear(d, 2 * e, bias=False)
        self.conv1d = nn.Conv1d(e, e, config.d_conv, groups=e, padding=config.d_conv - 1)
        self.x_proj = nn.Linear(e, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(self.sizes[0], e)
        self.out_proj = nn.Linear(e, d, bias=False)

    def forward(self, u):
        """Mixes u [b,l,d]."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., : u.shape[1]]).transpose(1, 2)
        r, B, C = self.x_proj(x).split(self.sizes, dim=-1)
        y, _ = selective_scan_sequential(x, F.softplus(self.dt_proj(r)), -self.A_log.exp(), B, C, D=self.D)
        return self.out_proj(y * F.silu(z))


class FeedForward(nn.Module):
    """LayerNorm(Dropout(w_2(Dropout(gelu(w_1 h)))) + h), inner width 4d."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w_1 = nn.Linear(config.d_model, 4 * config.d_model)
        self.w_2 = nn.Linear(4 * config.d_model, config.d_model)
        self.LayerNorm = nn.LayerNorm(config.d_model, eps=_FEED_FORWARD_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden):
        """Maps hidden [b,l,d] to [b,l,d]."""
        inner = self.dropout(F.gelu(self.w_1(hidden)))
        return self.LayerNorm(self.dropout(self.w_2(inner)) + hidden)


class Layer(nn.Module):
    """Mixer, residual (only where there are several layers), norm, feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.residual = config.num_layers > 1
        self.mamba = Mamba(config)
        self.dropout = nn.Dropout(config.dropout)
        self.LayerNorm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, u):
        """Maps u [b,l,d] to [b,l,d]."""
        mixed = self.dropout(self.mamba(u))
        return self.ffn(self.LayerNorm(mixed + u if self.residual else mixed))


class Mamba4Rec(NextItem):
    """The recommender: items of a history to scores of the next item.

    Args:
      config: sizes and rates; `dtype` "float32" or "float64".
    """

    layer = Layer

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.item_embedding = nn.Embedding(config.vocab_size, config.d_model, padding_idx=0)
        self.LayerNorm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.mamba_layers = nn.ModuleList(self.layer(config) for _ in range(config.num_layers))
        self.apply(_initialise)
        self.to(getattr(torch, config.dtype))

    def hidden(self, item_seq, timestamps=None):
        """Returns the hidden state [b,l,d] at every position of item_seq i64[b,l]."""
        hidden = self.LayerNorm(self.dropout(self.item_embedding(item_seq)))
        for layer in self.mamba_layers:
            hidden = layer(hidden)
        return hidden


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=_INITIAL_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def perturbed(state_dict, seed=2025):
    """Returns a perturbed copy, in float64, of a float32 state dict of Mamba4Rec or EchoMamba4Rec.

    Each parameter, in the order of the state dict, takes a standard normal draw of its shape: matrices are replaced by
    it (scaled), all else moves by it. All arithmetic is float32 and only the result is widened.
    """
    generator = torch.Generator().manual_seed(seed)
    moved = {
        name: _move(name, value, torch.randn(value.shape, generator=generator)) for name, value in state_dict.items()
    }
    return {name: value.double() for name, value in moved.items()}


def _move(name, value, noise):
    kind = name.rsplit(".", 1)[-1]
    if "_emb" in name:
        return 0.3 * noise
    if kind == "A_log":
        return value + 0.05 * noise
    if kind == "bias":
        return value + 0.1 * noise
    if kind == "complex_weight":
        return value + 0.3 * noise
    if value.ndim == 1:
        return value + 0.2 * noise
    if value.ndim == 3:
        return value + 0.15 * noise
    return 0.6 * noise / math.sqrt(value.shape[1])
