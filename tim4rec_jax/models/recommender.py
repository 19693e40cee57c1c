"""What all models share: one call for training, packed rows, single positions and streaming; embedding and scores."""

import functools
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.core import Tracer

from tim4rec_jax.layers.dense import layer_norm, wide
from tim4rec_jax.layers.dropout import Dropout
from tim4rec_jax.layers.item_embedding import item_embedding, table_rows, tied_scores
from tim4rec_jax.layers.rows import Rows, one_segment, rows_of
from tim4rec_jax.model_config import ModelConfig
from tim4rec_jax.models.cloze import with_mask_behind
from tim4rec_jax.typing import Array, Float, Hidden, Int, Items, Lengths, Params, Timestamps

# w is so many times its parameter: optimisers that take steps of one size reach -10 as soon as others reach -1.
SEEN_BIAS_SCALE = 10.0
# Collection of what a model has to know of its training data beside the parameters.
STATISTICS = "data_statistics"

Settings = TypeVar("Settings", bound=ModelConfig)


def variables(params: Any) -> dict[str, Any]:
    """Returns the collections of `model.apply`.

    Args:
      params: parameter tree, in which the model's data statistics may stand under `STATISTICS`: so they are saved,
        exported and moved to devices with the parameters.
    """
    if STATISTICS not in params:
        return {"params": params}
    return {
        "params": {name: part for name, part in params.items() if name != STATISTICS},
        STATISTICS: params[STATISTICS],
    }


def scores_read_history(model: nn.Module) -> bool:
    """Returns whether a model's method `score` also reads the items of the history, see `ModelConfig.seen_bias`."""
    return getattr(getattr(model, "config", None), "seen_bias", False)


def item_scores(model: nn.Module, variables: Any, hidden: Array, seen: Array | None = None) -> Array:
    """Returns the scores [b, v] of all items.

    Args:
      model: see `scores_read_history`.
      variables: of `model.apply`.
      hidden: [b, d].
      seen: int [b, s] items of the history, 0 for none; or bool [b, v]; None where the model does not read them.
    """
    return apply_method(model, variables, "score", hidden, *([seen] if scores_read_history(model) else []))


def apply_method(model: nn.Module, variables: Any, method: str, *arguments: Any) -> Array:
    """Returns the array that a method of the model gives, as "score" or "item_table"."""
    return cast(Array, model.apply(variables, *arguments, method=method))


class Cache(NamedTuple):
    """All that a model keeps of `b` histories; its size does not depend on their length.

    Attributes:
      timestamps: int32 [b] seconds of the last event; 0 before the first, and in models that read no times.
      events: int32 [b] events so far.
      layers: one per layer.
    """

    timestamps: Array
    events: Array
    layers: tuple[Any, ...]


class SequentialModel(nn.Module, Generic[Settings]):
    """A recommender that reads a history of items and scores the catalogue; the base of every model.

    Item 0 is padding, and rows are padded on the right. Dropout draws from the "dropout" key under each row's
    `example_ids`, so a row's mask does not depend on the batch it is computed in. A model says in `setup` what it is
    made of and in `forward` how it reads rows. Sharding and lazy updates look for the embedding's name,
    `item_embedding`.

    Attributes:
      config: settings the module was built from.
      causal: output i depends on inputs up to i only; such a model may be trained on all positions at once.
      cloze: reads MASK for events that it is to tell from the others, see `models.cloze`; it is trained by that, and
        asked for the next item by a MASK behind the history, which `last_hidden` puts there.
      packable: a row may hold several histories, told apart by `segment_ids`.
      streamable: `cache` is offered, no parameter depends on the length, and rows of any length are read.
      uses_time: timestamps change the output.
      whole_seconds: they must be exact (`data.timestamp_precision`).
      without_time: name of the model that is this one without its time branch.
      by_item: names of the parameters that have a row per item, padding's first; a run on another log maps their rows.
      Config: class of the settings, the model's own beside those that all models read.
    """

    config: Settings

    Config: ClassVar[type[ModelConfig]] = ModelConfig

    causal: ClassVar[bool] = False
    cloze: ClassVar[bool] = False
    packable: ClassVar[bool] = False
    streamable: ClassVar[bool] = False
    uses_time: ClassVar[bool] = False
    whole_seconds: ClassVar[bool] = False
    without_time: ClassVar[str | None] = None
    by_item: ClassVar[tuple[str, ...]] = ("item_embedding",)

    def setup(self) -> None:
        self.item_embedding = item_embedding(self.config)
        if self.config.seen_bias:
            self.seen_parameter = self.param("seen_bias", nn.initializers.zeros, (), wide(self.config.dtype))

    def __call__(
        self,
        items: Items,
        timestamps: Timestamps | None = None,
        *,
        segment_ids: Array | np.ndarray | None = None,
        positions: Int[Array | np.ndarray, "b m"] | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
        example_ids: Int[Array | np.ndarray, " b"] | None = None,
    ) -> tuple[Hidden, Cache | None]:
        """Returns hidden states, and the cache behind these items: pieces of any size give what one pass gives.

        Args:
          items: int [b, l], padded on the right with 0; MASK, too, where the model is `cloze`.
          timestamps: [b, l or more] seconds, padded with 0; the paper's time branch and TiSASRec want max_len columns
            whatever l is, the causal time branch whole seconds. May be None where the model reads none.
          segment_ids: int [b, l], which history a position belongs to, 0 for padding; with a cache, or in a model that
            is not packable, 1 or 0. None takes every item but 0 as of one history.
          positions: int [b, m], the only places whose outputs are wanted, and computed where the model can; None is
            all l.
          cache: of the events before, from `init_cache` or an earlier call; a row of padding leaves its own as it is.
          deterministic: no dropout.
          example_ids: int [b] names of the rows for their dropout masks; None counts from 0.

        Returns:
          Hidden states [b, l, d], or [b, m, d] at `positions`, d being `config.table_width`; the next cache, or None
          where none was given.

        Raises:
          ValueError: for shapes or dtypes that do not fit, several histories in a row of a model that is not packable,
            or a cache for one that is not streamable.
        """
        self._check(segment_ids, cache)
        items, rows = rows_of(items, segment_ids, example_ids, deterministic)
        # Where a row is one history, segment ids are a mask.
        ids = rows.segment_ids if self.packable and cache is None else None
        rows = rows._replace(segment_ids=ids, positions=None if positions is None else jnp.asarray(positions))
        return self.forward(items, None if timestamps is None else jnp.asarray(timestamps), rows, cache)

    def _check(self, segment_ids: Any, cache: Cache | None) -> None:
        name = type(self).__name__
        if cache is not None and not self.streamable:
            raise ValueError(f"{name} is not streamable: it has no cache; give whole histories")
        if self.packable and cache is None or segment_ids is None or isinstance(segment_ids, Tracer):
            return
        most = int(np.max(segment_ids, initial=0))
        if most > 1:
            what = "is not packable" if not self.packable else "goes on from a cache"
            raise ValueError(
                f"{name} {what}: segment_ids go up to {most}, but each row is one history (1; 0 for padding)"
            )

    def forward(
        self, items: Array, timestamps: Array | None, rows: Rows, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        """What `__call__` returns, from items that are 0 where there is padding."""
        raise NotImplementedError(f"{type(self).__name__} has no forward: say there how it reads rows")

    def init_cache(self, batch: int) -> Cache:
        """Returns the cache before the first event of `batch` histories.

        Raises:
          ValueError: the model is not streamable.
        """
        raise ValueError(f"{type(self).__name__} is not streamable: it has no cache")

    def data_statistics(
        self,
        *,
        gap_mean: float = 0.0,
        gap_std: float = 1.0,
        first_second: float | int = 0,
        last_second: float | int = 1,
    ) -> dict[str, np.ndarray]:
        """Returns what the model has to know of its training data, for the collection `STATISTICS`.

        Args:
          gap_mean, gap_std: of log1p(seconds) over the positive gaps of the training part.
          first_second, last_second: of the training part.
        """
        return {}

    def item_table(self) -> Float[Array, "v d"]:
        """Returns E, [v, d] in the arithmetic's dtype."""
        return table_rows(self.item_embedding)

    def seen_bias(self) -> Float[Array, ""]:
        """Returns w, which `score` adds for items of the history; of models with `config.seen_bias`."""
        return SEEN_BIAS_SCALE * self.seen_parameter

    def score(self, hidden: Float[Array, "*b d"], seen: Array | None = None) -> Float[Array, "*b v"]:
        """Returns hidden E^T over all v rows, padding included, and w more for what was seen, [.., v].

        Args:
          hidden: [.., d].
          seen: of hidden [b, d], int [b, s] items of the history, 0 for none, which count once each; or bool [b, v],
            which they are. Read with `config.seen_bias` alone.

        Returns:
          Float32 or wider.
        """
        scores = tied_scores(hidden, self.item_embedding)
        if not self.config.seen_bias:
            return scores
        if seen is None:
            raise ValueError("with model.seen_bias scores depend on the history: give `seen`, its items")
        if seen.dtype != bool:
            seen = jnp.zeros(scores.shape, bool).at[jnp.arange(scores.shape[0])[:, None], seen].set(True)
        return scores + jnp.where(seen.at[..., 0].set(False), self.seen_bias(), 0)

    def full_timestamps(self, timestamps: Array | None, items: Array) -> Array:
        """Returns timestamps [b, max_len], as models want them whose parameters depend on the length.

        Raises:
          ValueError: for another shape, or none.
        """
        expected = (items.shape[0], self.config.max_len)
        if timestamps is None or timestamps.shape != expected:
            given = None if timestamps is None else timestamps.shape
            raise ValueError(f"timestamps have shape {given}, expected (b, max_len)={expected}")
        return timestamps


class StateSpaceModel(SequentialModel[Settings]):
    """x_0 = LayerNorm(Dropout(E[items])), x_i = block_i(x_{i-1}); a model is a config and a block."""

    def setup(self) -> None:
        config = self.config
        super().setup()
        self.embedding_dropout = Dropout(config.dropout)
        self.embedding_norm = layer_norm(config.norm_eps, config.dtype)
        self.layers = [self.block() for _ in range(config.num_layers)]

    def block(self) -> nn.Module:
        """Returns a new block; it is called as `layers.residual_block.ResidualBlock` is, and has its `init_cache`."""
        raise NotImplementedError(f"{type(self).__name__} has no block: return a module there")

    def time_channel(self, timestamps: Array | None, rows: Rows, cache: Cache | None) -> Array | None:
        """Returns what the first block reads of time, or None."""
        return None

    def finish(self, x: Array, timestamps: Array | None, rows: Rows) -> Array:
        """Returns the hidden states from the last block's output at `rows.positions`."""
        return x

    def embed(self, items: Array, rows: Rows) -> Array:
        """Returns x_0, [b, l, d]."""
        embedded = self.item_embedding(items)
        return self.embedding_norm(self.embedding_dropout(embedded, rows.example_ids, deterministic=rows.deterministic))

    def forward(
        self, items: Array, timestamps: Array | None, rows: Rows, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        everywhere = rows._replace(positions=None)
        x, channel = self.embed(items, everywhere), self.time_channel(timestamps, everywhere, cache)
        caches = []
        for i, layer in enumerate(self.layers):
            own = rows if i == len(self.layers) - 1 else everywhere
            x, channel, kept = layer(x, channel, own, None if cache is None else cache.layers[i])
            caches.append(kept)
        x = self.finish(x, timestamps, rows)
        return x, None if cache is None else self._next_cache(cache, tuple(caches), timestamps, rows)

    def _next_cache(self, cache: Cache, layers: tuple[Any, ...], timestamps: Array | None, rows: Rows) -> Cache:
        last, lengths = cache.timestamps, rows.lengths
        if self.uses_time:
            assert timestamps is not None  # Else the time branch has refused them.
            ends = jnp.take_along_axis(timestamps, jnp.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
            last = jnp.where(lengths > 0, ends, last)
        return Cache(last, cache.events + lengths, layers)

    def init_cache(self, batch: int) -> Cache:
        if not self.streamable:
            return super().init_cache(batch)
        if self.scope is None:
            return self._empty_cache(batch)
        zeros = jnp.zeros(batch, jnp.int32)
        return Cache(zeros, zeros, tuple(layer.init_cache(batch) for layer in self.layers))

    def _empty_cache(self, batch: int) -> Cache:
        """What `init_cache` is outside of `apply`; it depends on no parameter."""
        shapes = jax.eval_shape(functools.partial(init_params, self), jax.random.key(0))

        def empty() -> Any:
            nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            return self.apply({"params": nothing}, batch, method="init_cache")

        return jax.jit(empty)()


def init_params(model: SequentialModel, key: Array) -> Params:
    """Returns a model's initial parameters; under `jax.eval_shape`, the shapes of its tree.

    Args:
      model: from `build_model`.
      key: typed PRNG key.
    """
    items = jnp.ones((1, model.config.max_len), jnp.int32)
    return model.init(key, items, jnp.zeros_like(items))["params"]


def last_hidden(
    model: nn.Module,
    variables: Any,
    items: Items,
    lengths: Lengths,
    timestamps: Timestamps | None,
    **options: Any,
) -> Float[Array, "b d"]:
    """Returns the hidden state [b, d] that scores each row's next item, without computing what is not read.

    It is that of the last real position; in a `cloze` model of the MASK behind it, and then of rows of max_len events
    all but the first are read.

    Args:
      model: a `SequentialModel`, or what is called like one.
      variables: of `model.apply`.
      items: int [b, l], cut to any static length that holds the longest row.
      lengths: int [b], 1 to l.
      timestamps: as the model wants them.
      options: of the call, and `rngs` of `model.apply`.
    """
    lengths = jnp.asarray(lengths)
    if model.cloze:
        items, lengths = with_mask_behind(jnp.asarray(items), lengths, model.config.max_len)
    positions = lengths[:, None] - 1
    if not model.packable or not model.causal:  # What lies behind the last position may matter to them.
        options["segment_ids"] = one_segment(lengths, items.shape[1])
    return model.apply(variables, items, timestamps, positions=positions, **options)[0][:, 0]
