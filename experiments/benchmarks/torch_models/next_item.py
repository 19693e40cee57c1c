"""What the twins share: which position is read, scores against the item embedding, and the loss."""

import torch
from torch import nn
from torch.nn import functional as F


class NextItem(nn.Module):
    """A recommender with an `item_embedding`, and `hidden` or a `forward` of its own."""

    item_embedding: nn.Embedding

    def hidden(self, item_seq, timestamps=None):
        """Returns the hidden state [b,l,d] at every position of item_seq i64[b,l]; timestamps as of `forward`."""
        raise NotImplementedError

    def forward(self, item_seq, lengths, timestamps=None):
        """Returns the hidden state [b,d] at each row's last item.

        Args:
          item_seq: i64[b,l], padded on the right with 0.
          lengths: i64[b], items in each row, at least 1.
          timestamps: [b,l] seconds, padded with 0; needed where time is read.
        """
        return self.hidden(item_seq, timestamps)[torch.arange(len(lengths)), lengths - 1]

    def logits(self, seq_output):
        """Returns the scores [b,v] of seq_output [b,d] against every embedding row, padding's included."""
        return seq_output @ self.item_embedding.weight.T

    def loss(self, item_seq, lengths, targets, timestamps=None):
        """Returns the mean softmax cross-entropy of targets i64[b] over the whole catalogue."""
        return F.cross_entropy(self.logits(self(item_seq, lengths, timestamps)), targets)
