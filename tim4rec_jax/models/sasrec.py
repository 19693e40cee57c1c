"""SASRec: causal self-attention over items and their positions."""

from dataclasses import dataclass

from tim4rec_jax.layers.attention import AttentionEncoder
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.model_config import AttentionConfig
from tim4rec_jax.models.recommender import Cache, SequentialModel
from tim4rec_jax.typing import Array


@dataclass(frozen=True)
class SASRecConfig(AttentionConfig):
    """Settings of `SASRec`."""

    name: str = "sasrec"


class SASRec(SequentialModel[SASRecConfig]):
    """Self-attentive sequential recommendation (Kang & McAuley 2018, arXiv 1808.09781), with post-norm layers.

      x_0 = Dropout(LayerNorm(E[items] + P[position])),    x_i = layer_i(x_{i-1}),    score = E x_last

    See `layers.attention` for the layer.
    """

    Config = SASRecConfig
    causal = packable = True

    def setup(self) -> None:
        super().setup()
        self.encoder = AttentionEncoder(self.config)

    def forward(self, items: Array, timestamps: Array | None, rows: Rows, cache: Cache | None) -> tuple[Array, None]:
        return self.encoder(self.item_embedding(items), rows, None), None
