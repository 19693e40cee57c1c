"""TiSASRec (Li et al. 2020, in the form that TiM4Rec is compared with) in plain PyTorch, with its [b,l,l,d] as written.

Names of the parameters are those of the original program's checkpoints.
"""

from torch import nn

from experiments.benchmarks.torch_models.sasrec import SASRec


class TiSASRec(SASRec):
    """SASRec whose attention adds a key and a value embedding of the seconds between two events.

    Args:
      config: sizes and rates; `dtype` "float32" or "float64".
    """

    def _make_tables(self) -> None:
        config = self.config
        self.time_matrix_K_emb = nn.Embedding(config.time_span + 1, config.d_model)
        self.time_matrix_V_emb = nn.Embedding(config.time_span + 1, config.d_model)

    def time_pairs(self, timestamps):
        """Returns the embeddings of min(|time_i - time_j|, time_span), two of [b,l,l,d]."""
        interval = (timestamps[:, :, None] - timestamps[:, None, :]).abs().clamp(max=self.config.time_span).long()
        return self.dropout(self.time_matrix_K_emb(interval)), self.dropout(self.time_matrix_V_emb(interval))
