"""GRU4Rec (arXiv 1511.06939, in the form that sequential recommenders are compared with) in plain PyTorch.

The twin of the JAX model: the same mathematics by another framework, whose recurrence is `torch.nn.GRU`.
"""

import torch
from torch import nn

from experiments.benchmarks.torch_models.next_item import NextItem
from tim4rec_jax.models import GRU4RecConfig

_INITIAL_STD = 0.02


class GRU4Rec(NextItem):
    """The recommender: items of a history to scores of the next item.

    Args:
      config: sizes and rates; `dtype` "float32" or "float64".
    """

    def __init__(self, config: GRU4RecConfig) -> None:
        super().__init__()
        d, width = config.d_model, config.hidden_size
        self.item_embedding = nn.Embedding(config.vocab_size, d, padding_idx=0)
        self.emb_dropout = nn.Dropout(config.dropout)
        self.gru_layers = nn.GRU(d, width, config.num_layers, bias=config.use_bias, batch_first=True)
        self.dense = nn.Linear(width, d)
        for name, parameter in self.named_parameters():
            if name.startswith("gru_layers.weight"):
                nn.init.xavier_uniform_(parameter)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=_INITIAL_STD)
            else:
                nn.init.zeros_(parameter)
        self.to(getattr(torch, config.dtype))

    def hidden(self, item_seq, timestamps=None):
        """Returns the hidden state [b,l,d] at every position of item_seq i64[b,l]."""
        states, _ = self.gru_layers(self.emb_dropout(self.item_embedding(item_seq)))
        return self.dense(states)
