"""TiM4Rec (arXiv 2409.16182) in plain PyTorch; with the time branch off it is the SSD-only model, SSD4Rec.

The twin of the JAX model: the same mathematics by another framework, and the opponent of speed comparisons. Names of
the parameters are those of the authors' checkpoints.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from experiments.benchmarks.torch_models.next_item import NextItem
from experiments.benchmarks.torch_models.ssd import ssd_chunked
from tim4rec_jax.model_config import SSDConfig
from tim4rec_jax.models import TiM4RecConfig

_INITIAL_STD = 0.02
_FEED_FORWARD_NORM_EPS = 1e-12


class Scan(nn.Module):
    """The SSD operator as a module without parameters, so that a forward hook sees the step sizes and the output."""

    def __init__(self, chunk_size: int) -> None:
        super().__init__()
        self.chunk_size = chunk_size

    def forward(self, x, delta, A, B, C, D):
        """See `ssd_chunked`; B and C are [b,l,n], one group. Returns y [b,l,h,p]."""
        y, _ = ssd_chunked(x, delta, A, B[:, :, None], C[:, :, None], D=D, chunk_size=self.chunk_size)
        return y


class GatedRMSNorm(nn.Module):
    """RMSNorm(y * silu(z)) * weight over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, y, z):
        """Normalises y [b,l,e] gated by z [b,l,e]."""
        gated = y * F.silu(z)
        return gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Mixer(nn.Module):
    """The time-aware SSD mixer: (hidden [b,l,d], time channel [b,h,l] or None) to the same pair."""

    def __init__(self, config: SSDConfig) -> None:
        super().__init__()
        e, n, h, length = config.d_inner, config.d_state, config.num_heads, config.max_len
        self.config = config
        self.activation = F.silu if config.activation == "silu" else F.hardswish
        self.dt_bias = nn.Parameter(_initial_dt_bias(h))
        self.A_log = nn.Parameter(torch.empty(h).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(h))
        self.in_proj = nn.Linear(config.d_model, 2 * e + 2 * n + h)
        self.conv1d = _causal_conv(e + 2 * n, config)
        if isinstance(config, TiM4RecConfig):
            self.conv1d4time_1 = _causal_conv(h, config)
            self.conv1d4time_2 = _causal_conv(h, config)
            self.mlp4time_scale = nn.Sequential(
                nn.Dropout(config.time_dropout), nn.Linear(length, length), nn.SiLU(), nn.Linear(length, length)
            )
            self.time_gate_residual = nn.Sequential(
                nn.Dropout(config.time_dropout),
                nn.Linear(length, length if config.time_gate_per_position else 1),
                nn.Sigmoid(),
            )
            self.time_layer_norm = nn.LayerNorm(length, eps=config.norm_eps)
        self.scan = Scan(config.chunk_size)
        self.norm = GatedRMSNorm(e, config.norm_eps)
        self.out_proj = nn.Linear(e, config.d_model)

    def _convolve(self, conv: nn.Conv1d, channels):
        return self.activation(conv(channels)[..., : channels.shape[-1]])

    def time_step(self, time):
        """Returns the factor g [b,h,l] on the raw step and the next layer's channel [b,h,l], from time [b,h,l]."""
        scaled = time * self.mlp4time_scale(time)
        g = self._convolve(self.conv1d4time_2, self._convolve(self.conv1d4time_1, scaled))
        r = self.time_gate_residual(time)
        return g, self.time_layer_norm(r * time + (1 - r) * g)

    def forward(self, u, time=None):
        """Mixes u [b,l,d]; time [b,h,l] bends the steps, None leaves them alone."""
        config = self.config
        e, n, h = config.d_inner, config.d_state, config.num_heads
        z, xBC, dt = self.in_proj(u).split([e, e + 2 * n, h], dim=-1)
        x, B, C = self._convolve(self.conv1d, xBC.transpose(1, 2)).transpose(1, 2).split([e, n, n], dim=-1)
        if time is not None:
            g, time = self.time_step(time)
            dt = dt * g.transpose(1, 2)
        delta = F.softplus(dt + self.dt_bias)
        y = self.scan(x.unflatten(-1, (h, config.head_dim)), delta, -self.A_log.exp(), B, C, self.D)
        return self.out_proj(self.norm(y.flatten(-2), z)), time


class FeedForward(nn.Module):
    """LayerNorm(Dropout(fc2(Dropout(hard_swish(fc1 h)))) + h), inner width 4d."""

    def __init__(self, config: SSDConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, 4 * config.d_model)
        self.fc2 = nn.Linear(4 * config.d_model, config.d_model)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=_FEED_FORWARD_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden):
        """Maps hidden [b,l,d] to [b,l,d]."""
        inner = self.dropout(F.hardswish(self.fc1(hidden)))
        return self.layer_norm(self.dropout(self.fc2(inner)) + hidden)


class Layer(nn.Module):
    """Mixer, residual (only where there are several layers), norm, feed-forward."""

    def __init__(self, config: SSDConfig) -> None:
        super().__init__()
        self.residual = config.num_layers > 1
        self.ssd = Mixer(config)
        self.dropout = nn.Dropout(config.dropout)
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        if config.use_ffn:
            self.ffn = FeedForward(config)

    def forward(self, u, time=None):
        """Maps (u [b,l,d], time [b,h,l] or None) to the same pair."""
        mixed, time = self.ssd(u, time)
        mixed = self.dropout(mixed)
        hidden = self.layer_norm(mixed + u if self.residual else mixed)
        return self.ffn(hidden) if hasattr(self, "ffn") else hidden, time


class TiM4Rec(NextItem):
    """The recommender: items and times of a history to scores of the next item.

    Args:
      config: sizes and switches; `dtype` "float32" or "float64", `vocab_size` at least 1.

    Raises:
      ValueError: for a `vocab_size` of 0 or another `dtype`.
    """

    def __init__(self, config: SSDConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError(f"vocab_size={config.vocab_size} must be at least 1; take it from the data first")
        if config.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype={config.dtype!r} must be 'float32' or 'float64' in the PyTorch model")
        self.config = config
        self.item_embedding = nn.Embedding(config.vocab_size, config.d_model, padding_idx=0)
        self.dropout = nn.Dropout(config.dropout)
        self.in_layer_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        if isinstance(config, TiM4RecConfig):
            self.layer_norm_time = nn.LayerNorm(config.max_len, eps=config.norm_eps)
        self.ssd_layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.apply(self._initialise)
        self.to(getattr(torch, config.dtype))

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=_INITIAL_STD)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Conv1d) and self.config.kaiming_init:
            channels, _, taps = module.weight.shape
            nn.init.normal_(module.weight, std=math.sqrt(2 / (channels * taps)))
            nn.init.zeros_(module.bias)

    def time_channel(self, timestamps, lengths):
        """Returns the first layer's time channel [b,h,l] from timestamps [b,l] (seconds) and lengths [b]."""
        diff = torch.diff(timestamps, dim=1, prepend=timestamps[:, :1])
        if self.config.mask_padded_time:
            positions = torch.arange(timestamps.shape[1], device=timestamps.device)
            diff = diff.masked_fill(positions >= lengths[:, None], 0)
        diff = diff.to(self.item_embedding.weight.dtype)
        if self.config.log_time:
            diff = diff.sign() * diff.abs().log1p()
        time = self.layer_norm_time(self.dropout(diff))
        return time[:, None].expand(-1, self.config.num_heads, -1)

    def hidden(self, item_seq, time=None):
        """Returns the hidden states [b,l,d] of item_seq i64[b,l]; time as of `time_channel`."""
        hidden = self.in_layer_norm(self.dropout(self.item_embedding(item_seq)))
        for layer in self.ssd_layers:
            hidden, time = layer(hidden, time)
        return hidden

    def forward(self, item_seq, lengths, timestamps=None):
        """Returns the hidden state [b,d] at each row's last item.

        Args:
          item_seq: i64[b,l], padded on the right with 0.
          lengths: i64[b], items in each row, at least 1.
          timestamps: [b,l] seconds, padded with 0; not needed with the settings of SSD4Rec.
        """
        time = self.time_channel(timestamps, lengths) if isinstance(self.config, TiM4RecConfig) else None
        hidden = self.hidden(item_seq, time)
        return hidden[torch.arange(len(lengths), device=lengths.device), lengths - 1]


def _initial_dt_bias(num_heads: int) -> torch.Tensor:
    step = torch.empty(num_heads).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
    return step + torch.log(-torch.expm1(-step))


def _causal_conv(channels: int, config: SSDConfig) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, config.d_conv, groups=channels, padding=config.d_conv - 1)
