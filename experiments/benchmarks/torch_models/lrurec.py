"""LRURec (arXiv 2310.02367) in plain PyTorch, with complex parameters and one step of the recurrence after another.

The twin of the JAX model: the same mathematics by another framework.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from experiments.benchmarks.torch_models.next_item import NextItem
from tim4rec_jax.models import LRURecConfig

_INITIAL_STD = 0.02
_FEED_FORWARD_NORM_EPS = 1e-12


class LRU(nn.Module):
    """Re(C h) + c of h_t = lambda h_{t-1} + gamma (B u_t + b), [b,l,d] to [b,l,d]."""

    def __init__(self, config: LRURecConfig) -> None:
        super().__init__()
        n = config.expand * config.d_model
        squared = torch.empty(n).uniform_(config.r_min**2, config.r_max**2)
        self.nu_log = nn.Parameter((-squared.log() / 2).log())
        self.theta_log = nn.Parameter((2 * math.pi * torch.rand(n)).clamp(min=1e-30).log())
        self.gamma_log = nn.Parameter((1 - squared).sqrt().log())
        self.B = nn.Parameter(torch.complex(*(_INITIAL_STD * torch.randn(n, config.d_model) for _ in range(2))))
        self.b = nn.Parameter(torch.zeros(n, dtype=torch.cfloat))
        self.C = nn.Parameter(torch.complex(*(_INITIAL_STD * torch.randn(config.d_model, n) for _ in range(2))))
        self.c = nn.Parameter(torch.zeros(config.d_model))

    def forward(self, u):
        """Mixes u [b,l,d]."""
        eigenvalues = torch.polar((-self.nu_log.exp()).exp(), self.theta_log.exp())
        driven = self.gamma_log.exp() * (u.to(self.B.dtype) @ self.B.mT + self.b)
        h, outputs = torch.zeros_like(driven[:, 0]), []
        for t in range(u.shape[1]):
            h = eigenvalues * h + driven[:, t]
            outputs.append((h @ self.C.mT).real + self.c)
        return torch.stack(outputs, dim=1)


class Block(nn.Module):
    """Recurrence, then feed-forward, each with dropout, residual and norm."""

    def __init__(self, config: LRURecConfig) -> None:
        super().__init__()
        d = config.d_model
        self.lru = LRU(config)
        self.lru_norm = nn.LayerNorm(d, eps=config.norm_eps)
        self.w_1, self.w_2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.ffn_norm = nn.LayerNorm(d, eps=_FEED_FORWARD_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)
        for linear in (self.w_1, self.w_2):
            nn.init.normal_(linear.weight, std=_INITIAL_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, u):
        """Maps u [b,l,d] to [b,l,d]."""
        h = self.lru_norm(self.dropout(self.lru(u)) + u)
        inner = self.dropout(F.gelu(self.w_1(h)))
        return self.ffn_norm(self.dropout(self.w_2(inner)) + h)


class LRURec(NextItem):
    """The recommender: items of a history to scores of the next item.

    Args:
      config: sizes and rates; `dtype` "float32" or "float64".
    """

    def __init__(self, config: LRURecConfig) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(config.vocab_size, config.d_model, padding_idx=0)
        nn.init.normal_(self.item_embedding.weight, std=_INITIAL_STD)
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        if config.dtype == "float64":
            self.double()
            for name, parameter in self.named_parameters():
                if parameter.is_complex():
                    owner, _, last = name.rpartition(".")
                    setattr(self.get_submodule(owner), last, nn.Parameter(parameter.data.to(torch.cdouble)))

    def hidden(self, item_seq, timestamps=None):
        """Returns the hidden state [b,l,d] at every position of item_seq i64[b,l]."""
        x = self.norm(self.dropout(self.item_embedding(item_seq)))
        for block in self.blocks:
            x = block(x)
        return x
