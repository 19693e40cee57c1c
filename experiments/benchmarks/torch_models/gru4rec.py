"""GRU4Rec (arXiv 1511.06939, in the form that sequential recommenders are compared with) in plain PyTorch.

The twin of the JAX model: the same mathematics by another framework, whose recurrence is `torch.nn.GRU`.
"""

import torch
from torch import nn
from torch.nn import functional as F

from tim4rec_jax.models import GRU4RecConfig

_INITIAL_STD = 0.02


class GRU4Rec(nn.Module):
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

    def hidden(self, item_seq):
        """Returns the hidden state [b,l,d] at every position of item_seq i64[b,l]."""
        states, _ = self.gru_layers(self.emb_dropout(self.item_embedding(item_seq)))
        return self.dense(states)

    def forward(self, item_seq, lengths, timestamps=None):
        """Returns the hidden state [b,d] at each row's last item.

        Args:
          item_seq: i64[b,l], padded on the right with 0.
          lengths: i64[b], items in each row, at least 1.
          timestamps: not read.
        """
        return self.hidden(item_seq)[torch.arange(len(lengths)), lengths - 1]

    def logits(self, seq_output):
        """Returns the scores [b,v] of seq_output [b,d] against every embedding row, padding's included."""
        return seq_output @ self.item_embedding.weight.T

    def loss(self, item_seq, lengths, targets, timestamps=None):
        """Returns the mean softmax cross-entropy of targets i64[b] over the whole catalogue."""
        return F.cross_entropy(self.logits(self(item_seq, lengths)), targets)
