"""EchoMamba4Rec (arXiv 2406.02638) in plain PyTorch.

The twin of the JAX model: the same mathematics by another framework. Names of the parameters are those of the original
program's checkpoints, but for the attention block that the original makes and never calls.
"""

import torch
from torch import nn

from experiments.benchmarks.torch_models.mamba4rec import Mamba, Mamba4Rec
from tim4rec_jax.model_config import ModelConfig

_DIRECTION_NORM_EPS = 1e-5
_GLU_NORM_EPS = 1e-12
_INITIAL_STD = 0.02


class Filter(nn.Module):
    """LayerNorm(Dropout(irfft(rfft(x) W)) + x), orthonormal over the padded length."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = 1, config.max_len // 2 + 1, config.d_model, 2
        self.complex_weight = nn.Parameter(_INITIAL_STD * torch.randn(shape))
        self.LayerNorm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        """Maps x [b,l,d] to [b,l,d]."""
        spectrum = torch.fft.rfft(x, dim=1, norm="ortho") * torch.view_as_complex(self.complex_weight)
        filtered = torch.fft.irfft(spectrum, n=x.shape[1], dim=1, norm="ortho")
        return self.LayerNorm(self.dropout(filtered) + x)


class GLU(nn.Module):
    """LayerNorm(Dropout(fc2(v * sigmoid(u))) + x), [v, u] = fc1 x."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, 2 * config.d_model)
        self.fc2 = nn.Linear(config.d_model, config.d_model)
        self.LayerNorm = nn.LayerNorm(config.d_model, eps=_GLU_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        """Maps x [b,l,d] to [b,l,d]."""
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.LayerNorm(self.dropout(self.fc2(value * gate.sigmoid())) + x)


class Layer(nn.Module):
    """Filter, bidirectional steps, gated linear unit."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        count, d = config.num_layers, config.d_model
        self.filter_layer = Filter(config)
        self.norms_forward = nn.ModuleList(nn.LayerNorm(d, eps=_DIRECTION_NORM_EPS) for _ in range(count))
        self.norms_backward = nn.ModuleList(nn.LayerNorm(d, eps=_DIRECTION_NORM_EPS) for _ in range(count))
        self.mamba_forwards = nn.ModuleList(Mamba(config) for _ in range(count))
        self.mamba_backwards = nn.ModuleList(Mamba(config) for _ in range(count))
        self.glu = GLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        """Maps x [b,l,d] to [b,l,d]."""
        x = self.filter_layer(x)
        for i in range(len(self.mamba_forwards)):
            ahead = self.norms_forward[i](self.dropout(self.mamba_forwards[i](x)) + x)
            back = self.mamba_backwards[i](x.flip(1)).flip(1)
            x = ahead + self.norms_backward[i](self.dropout(back) + x)
        return self.glu(x)


class EchoMamba4Rec(Mamba4Rec):
    """The recommender: items of a history, padded to max_len, to scores of the next item.

    Args:
      config: sizes and rates; `dtype` "float32" or "float64".
    """

    layer = Layer
