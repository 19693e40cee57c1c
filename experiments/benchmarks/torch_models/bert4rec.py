"""BERT4Rec (arXiv 1904.06690) in plain PyTorch functions, with the norms that its authors' program adds.

The twin of the JAX model: the same mathematics by another framework. The mask is a token of its own, the last row of
the embedding.
"""

import torch
from torch import nn
from torch.nn import functional as F

from experiments.benchmarks.torch_models.sasrec import FeedForward
from tim4rec_jax.model_config import ModelConfig

_INITIAL_STD = 0.02


class Attention(nn.Module):
    """The parameters of one attention and of the norm behind it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(config.d_model, config.d_model) for _ in range(4))
        self.LayerNorm = nn.LayerNorm(config.d_model, eps=config.norm_eps)


class Layer(nn.Module):
    """A = LN(H + Dropout(MH(H))), then LN(A + Dropout(PFFN(A))), PFFN with the exact GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.dropout, self.weight_dropout = (
            config.attention_heads,
            config.dropout,
            config.attention_dropout,
        )
        self.multi_head_attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, h, real):
        """Maps h [b,l,d] to [b,l,d]; every position attends to those that are real, bool [b,l]."""
        own = self.multi_head_attention
        q, k, v = (part(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (own.query, own.key, own.value))
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=real[:, None, None], dropout_p=self.weight_dropout if self.training else 0.0
        )
        mixed = own.dense(mixed.transpose(1, 2).flatten(-2))
        a = own.LayerNorm(h + F.dropout(mixed, self.dropout, self.training))
        return self.feed_forward(a)


class Encoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_layers))


class BERT4Rec(nn.Module):
    """The recommender: items of a history, some of them masked, to scores of what stood there.

    Args:
      config: sizes and rates; `dtype` "float32" or "float64".

    Attributes:
      mask: the token of a masked item.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.mask = config, config.vocab_size
        self.item_embedding = nn.Embedding(config.vocab_size + 1, config.d_model, padding_idx=0)
        self.position_embedding = nn.Embedding(config.max_len, config.d_model)
        self.trm_encoder = Encoder(config)
        self.LayerNorm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.output_ffn = nn.Linear(config.d_model, config.d_model)
        self.output_ln = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.apply(_initialise)
        self.to(getattr(torch, config.dtype))

    def forward(self, item_seq):
        """Returns what scores are made from, [b,l,d], for item_seq i64[b,l], padded on the right with 0."""
        embedded = self.item_embedding(item_seq) + self.position_embedding.weight[: item_seq.shape[1]]
        hidden = F.dropout(self.LayerNorm(embedded), self.config.dropout, self.training)
        for layer in self.trm_encoder.layer:
            hidden = layer(hidden, item_seq != 0)
        return self.output_ln(F.gelu(self.output_ffn(hidden)))

    def logits(self, hidden):
        """Returns the scores [..,v] of hidden [..,d] against every item, padding included and the mask left out."""
        return hidden @ self.item_embedding.weight[: self.mask].T + self.output_bias

    def next_item(self, item_seq, lengths):
        """Returns what the next item is scored from, [b,d]: the output at a mask behind the events that are read.

        Args:
          item_seq: i64[b,l], padded on the right with 0; the latest max_len - 1 events are read.
          lengths: i64[b], items in each row.
        """
        rows = torch.zeros(len(item_seq), self.config.max_len, dtype=torch.int64)
        ends = []
        for row, items, length in zip(rows, item_seq, lengths.tolist(), strict=True):
            read = items[:length][-(self.config.max_len - 1) :]
            row[: len(read)], row[len(read)] = read, self.mask
            ends.append(len(read))
        return self(rows)[torch.arange(len(rows)), ends]

    def loss(self, item_seq, masked):
        """Returns the mean softmax cross-entropy, over the whole catalogue, of the items at the masked places.

        Args:
          item_seq: i64[b,l], padded on the right with 0.
          masked: bool[b,l], one place at least.
        """
        hidden = self(item_seq.masked_fill(masked, self.mask))
        return F.cross_entropy(self.logits(hidden[masked]), item_seq[masked])


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=_INITIAL_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
