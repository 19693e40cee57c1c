"""Caser (Tang & Wang 2018, arXiv 1809.07426) without its user embedding, in plain PyTorch.

The twin of the JAX model: the same mathematics by another framework, with a two-dimensional convolution per height over
the window of each position.
"""

import torch
from torch import nn
from torch.nn import functional as F

from experiments.benchmarks.torch_models.next_item import NextItem
from tim4rec_jax.models import CaserConfig

_INITIAL_STD = 0.02


class Caser(NextItem):
    """The recommender: items of a history to scores of the next item.

    Args:
      config: sizes and rates; `dtype` "float32" or "float64".
    """

    def __init__(self, config: CaserConfig) -> None:
        super().__init__()
        self.window, d = config.window, config.d_model
        self.item_embedding = nn.Embedding(config.vocab_size, d, padding_idx=0)
        self.conv_v = nn.Conv2d(1, config.n_v, (self.window, 1))
        self.conv_h = nn.ModuleList(nn.Conv2d(1, config.n_h, (h, d)) for h in range(1, self.window + 1))
        self.dropout = nn.Dropout(config.dropout)
        self.dense = nn.Linear(config.n_v * d + config.n_h * self.window, d)
        for matrix in (self.item_embedding.weight, self.dense.weight):
            nn.init.normal_(matrix, std=_INITIAL_STD)
        nn.init.zeros_(self.dense.bias)
        self.to(getattr(torch, config.dtype))

    def _of_windows(self, windows):
        """Maps windows i64[w, L], 0 before the first item, to hidden states [w, d]."""
        image = (self.item_embedding(windows) * (windows != 0)[..., None])[:, None]
        vertical = self.conv_v(image).flatten(1)
        horizontal = [F.relu(conv(image)).amax(dim=(2, 3)) for conv in self.conv_h]
        return F.relu(self.dense(self.dropout(torch.cat([vertical, *horizontal], dim=1))))

    def hidden(self, item_seq, timestamps=None):
        """Returns the hidden state [b,l,d] at every position of item_seq i64[b,l]."""
        windows = F.pad(item_seq, (self.window - 1, 0)).unfold(1, self.window, 1)
        return self._of_windows(windows.flatten(0, 1)).unflatten(0, item_seq.shape)
