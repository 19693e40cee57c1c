"""GRU4Rec: gated recurrent units over items."""

from dataclasses import dataclass
from typing import ClassVar

from tim4rec_jax.layers.dense import Linear
from tim4rec_jax.layers.gru import GRU
from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.model_config import ModelConfig
from tim4rec_jax.models.recommender import StateSpaceModel
from tim4rec_jax.typing import Array


@dataclass(frozen=True)
class GRU4RecConfig(ModelConfig):
    """Settings of `GRU4Rec`.

    Attributes:
      num_layers: layers of gated recurrent units.
      hidden_size: h, their width.
      use_bias: the gates have biases.
    """

    name: str = "gru4rec"
    num_layers: int = 1
    hidden_size: int = 128
    use_bias: bool = False

    UNREAD: ClassVar[tuple[str, ...]] = ("norm_eps",)


class GRU4Rec(StateSpaceModel[GRU4RecConfig]):
    """Recurrent networks for recommendation (Hidasi et al. 2016, arXiv 1511.06939), as RecBole compares with them.

      x_0 = Dropout(E[items]),    x_i = GRU_i(x_{i-1}),    score = E (x_last W + b)

    Items are embedded, where the paper begins with one-hot vectors, and a softmax over all items takes the place of its
    ranking losses within a batch.
    """

    Config = GRU4RecConfig
    causal = packable = streamable = True

    def setup(self) -> None:
        super().setup()
        self.dense = Linear(self.config.d_model, self.config.dtype)

    def block(self) -> GRU:
        config = self.config
        return GRU(config.hidden_size, config.dtype, config.use_bias)

    def embed(self, items: Array, rows: Rows) -> Array:
        """Returns x_0, [b, l, d], which is not normalised here."""
        return self.embedding_dropout(self.item_embedding(items), rows.example_ids, deterministic=rows.deterministic)

    def finish(self, x: Array, timestamps: Array | None, rows: Rows) -> Array:
        """Returns x W + b, [b, m, d]."""
        return self.dense(x)
