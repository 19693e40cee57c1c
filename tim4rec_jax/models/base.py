"""The contract of every model: what training, evaluation and serving may ask of it."""

from typing import Protocol, runtime_checkable

from tim4rec_jax.config import ModelConfig
from tim4rec_jax.typing import Array, Float, Hidden, Int, Items, LastHidden, Lengths, Scores, Timestamps


@runtime_checkable
class SequentialModel(Protocol):
    """A Flax Linen module that reads a history and scores the catalogue.

    Item 0 is padding, rows are padded on the right, and every length is at least 1. Dropout draws from the "dropout"
    key under each row's `example_ids`, so a row's mask does not depend on the batch it is computed in.

    Attributes:
      config: settings the module was built from.
      causal: output i depends on inputs up to i only; such a model may be trained on all positions at once.
      uses_time: timestamps change the output.

    Two more facts hold where a class says so: `packable`, `encode` takes `starts` and so rows of several histories, and
    `any_length`, no parameter depends on the length, and histories longer than max_len may be read.
    """

    config: ModelConfig
    causal: bool
    uses_time: bool

    def encode(
        self, items: Items, lengths: Lengths, timestamps: Timestamps | None, *, deterministic: bool,
        example_ids: Int[Array, " b"] | None = None,
    ) -> Hidden:  # fmt: skip
        """Returns the hidden state at every position."""
        ...

    def encode_last(
        self, items: Items, lengths: Lengths, timestamps: Timestamps | None, *, deterministic: bool,
        example_ids: Int[Array, " b"] | None = None,
    ) -> LastHidden:  # fmt: skip
        """Returns `encode` at position length - 1, without computing what is not read.

        `items` may be cut to any static length that holds the longest row; `timestamps` keep max_len columns.
        """
        ...

    def item_table(self) -> Float[Array, "v d"]:
        """Returns the rows that `score` multiplies with."""
        ...

    def score(self, hidden: LastHidden) -> Scores:
        """Returns one score for every row of the item embedding, padding included."""
        ...
