"""Full ranking: every evaluated user's target is ranked against the whole catalogue (RecBole 1.2 protocol).

No [users, v] matrix exists: users are encoded in batches and scored in tiles, of which only ranks leave the device, and
the items at the top where a metric reads them. Rows are sorted by length once and worked
through in a few static lengths, so a short history is not computed at max_len. Given a mesh, its devices share the
users of every batch, and only ranks are exchanged; where the item table is sharded over them, see
`parallel.item_table`.
"""

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tim4rec_jax.config import EvalConfig, ExperimentConfig
from tim4rec_jax.data.interactions import InteractionLog
from tim4rec_jax.data.loader import timestamps_for_device
from tim4rec_jax.data.packing import choose_lengths
from tim4rec_jax.data.splits import Examples, gather_windows, split_log
from tim4rec_jax.evaluation.baselines import users_of_items
from tim4rec_jax.evaluation.measures import (
    RankedLists,
    errors,
    list_length,
    means,
    needs,
    parse_name,
    values_per_list,
)
from tim4rec_jax.evaluation.metrics import check_top_k, rank_of_target, self_information
from tim4rec_jax.evaluation.seen_targets import Measured, measured
from tim4rec_jax.evaluation.slices import slices
from tim4rec_jax.models import apply_method, item_scores, last_hidden, scores_read_history, variables
from tim4rec_jax.notebook import html_table, metric_rows
from tim4rec_jax.parallel.item_table import (
    ITEM_TILE,
    MODEL_AXIS,
    TABLE,
    num_shards,
    partition_specs,
    sharded_last_hidden,
    sharded_ranks,
)

SCORE_TILE_BYTES = 64 * 2**20
# Positions encoded in one call: on a CPU small enough for its caches, elsewhere large enough to fill the device.
ENCODE_TOKENS = {"cpu": 2**14}
ENCODE_TOKENS_ACCELERATOR = 2**18
# Positions a further static length must save in each evaluation before compiling for it pays. An H100 trains on 2**24
# positions in less than a second and compiles a step of training for 20.
GROUP_PENALTY_TOKENS = {"cpu": 2**16}
GROUP_PENALTY_TOKENS_ACCELERATOR = 2**23
LENGTH_STEP = 8
MAX_GROUPS = 8


@dataclasses.dataclass(frozen=True, repr=False)
class EvaluationResult:
    """What one evaluation found.

    Attributes:
      metrics: {"hit@10": ...}, means over the lists in float64.
      standard_errors: of these means, as far as they are some and there is more than one list.
      parts: the same of parts of the lists, {"gender": {"F": {"lists": 12, "hit@10": ...}}, "month": ..}, as asked for
        by eval.groups and eval.time_buckets.
      ranks: [n] int32 from 1, in the order of the examples that were measured.
      measured: which these are.
      seconds: wall time.
    """

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    parts: dict[str, dict[str, dict[str, float]]]
    ranks: np.ndarray
    measured: Measured
    seconds: float

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        return f"EvaluationResult: {len(self.ranks):,} targets, {shown}"

    def _repr_html_(self) -> str:
        columns = [self.metrics, self.standard_errors]
        tables = [html_table(f"{len(self.ranks):,} targets", ("metric", "value", "error"), metric_rows(columns))]
        for name, parts in self.parts.items():
            lists = [f"{part} ({own['lists']:,.0f})" for part, own in parts.items()]
            own = [{metric: value for metric, value in part.items() if metric != "lists"} for part in parts.values()]
            tables.append(html_table(f"by {name}", ("metric", *lists), metric_rows(own)))
        return "".join(tables)


class _DeviceLog(NamedTuple):
    """The log's columns on the device: items [rows], timestamps [rows], offsets [users + 1]."""

    items: jax.Array
    timestamps: jax.Array
    offsets: jax.Array


class _Batch(NamedTuple):
    """Rows of one static shape: `rows` are their places among the examples, the arrays [tiles * tile]."""

    rows: np.ndarray
    users: jax.Array
    ends: jax.Array
    targets: jax.Array
    length: int
    tile: int


def _batch_shape(num_rows: int, row_limit: int, tile_limit: int) -> tuple[int, int, int]:
    """Splits rows evenly: (batches, tiles a batch, rows a tile) with the least padding within the limits."""
    batches = -(-num_rows // row_limit)
    rows = -(-num_rows // batches)
    tiles = -(-rows // tile_limit)
    return batches, tiles, -(-rows // tiles)


def _put(array: np.ndarray, mesh: Mesh | None, spec: P) -> jax.Array:
    """Puts an array that every process has whole on the device, or on those of a mesh."""
    if mesh is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


@functools.partial(
    jax.jit, static_argnames=("mesh", "model", "max_len", "time_len", "length", "tile", "seen_len", "excludes", "top")
)
def _rank_batch(
    params: Any,
    log: _DeviceLog,
    users: jax.Array,
    ends: jax.Array,
    targets: jax.Array,
    *,
    mesh: Mesh | None,
    **options: Any,
) -> tuple[jax.Array, ...]:
    """Ranks one batch's targets, whose rows are shared among the devices of the mesh; see `_rank_rows`."""
    sharded = num_shards(mesh) > 1
    rank_rows = functools.partial(_rank_rows, sharded=sharded, **options)
    if mesh is None:
        return rank_rows(params, log, users, ends, targets)
    axes = mesh.axis_names

    def rank_share(*arguments: Any) -> tuple[jax.Array, ...]:
        return jax.lax.all_gather(rank_rows(*arguments), axes, tiled=True)

    specs = (partition_specs(params) if sharded else P(), P(), P(axes), P(axes), P(axes))
    return jax.shard_map(rank_share, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(
        params, log, users, ends, targets
    )


def _rank_rows(
    params: Any,
    log: _DeviceLog,
    users: jax.Array,
    ends: jax.Array,
    targets: jax.Array,
    *,
    model: nn.Module,
    max_len: int,
    time_len: int,
    length: int,
    tile: int,
    seen_len: int,
    excludes: bool,
    top: int,
    sharded: bool,
) -> tuple[jax.Array, ...]:
    """Ranks the rows' targets.

    Returns:
      Ranks [b] int32, whether all scores of a row are finite [b] bool, and the first `top` items of each list
      [b, top] int32, 0 where fewer are left; nothing of the kind for top 0.
    """
    windows = gather_windows(*log, users, ends, max_len, xp=jnp)
    # Models of fixed length ask for all their timestamps, also where fewer events are read.
    timestamps = jnp.pad(windows.timestamps, ((0, 0), (0, time_len - max_len)))
    inputs = windows.items[:, :length], windows.lengths, timestamps
    hidden = sharded_last_hidden(model, params, *inputs) if sharded else last_hidden(model, variables(params), *inputs)

    def rank_tile(rows: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        hidden, targets, users, ends = rows
        if sharded:
            seen = None
            if seen_len:
                users, ends = jax.lax.all_gather((users, ends), MODEL_AXIS, tiled=True)
                seen = gather_windows(*log, users, ends, seen_len, xp=jnp).items
            return sharded_ranks(hidden, targets, params[TABLE]["embedding"], seen, vocab_size=model.config.vocab_size)
        seen = excluded = None
        if seen_len:
            seen = gather_windows(*log, users, ends, seen_len, xp=jnp).items
        scores = item_scores(model, variables(params), hidden, seen)
        if excludes:
            excluded = jnp.zeros(scores.shape, bool).at[jnp.arange(tile)[:, None], seen].set(True)
        found = rank_of_target(scores, targets, excluded=excluded), jnp.isfinite(scores).all(axis=1)
        return (*found, _first_items(scores, excluded, top)) if top else found

    tiles = jax.tree.map(lambda x: x.reshape(-1, tile, *x.shape[1:]), (hidden, targets, users, ends))
    return tuple(found.reshape(-1, *found.shape[2:]) for found in jax.lax.map(rank_tile, tiles))


def _first_items(scores: jax.Array, excluded: jax.Array | None, k: int) -> jax.Array:
    """Returns the k best items of every row but those excluded, equals in order of id; 0 where none is left."""
    left = scores.at[:, 0].set(-jnp.inf)
    best, items = jax.lax.top_k(left if excluded is None else jnp.where(excluded, -jnp.inf, left), k)
    return jnp.where(best == -jnp.inf, 0, items)


def positions_read(config: ExperimentConfig) -> int:
    """Returns how many events of a history are read, at most: eval.max_len, or the model's max_len."""
    return config.model.max_len if config.eval.max_len is None else config.eval.max_len


def require_lengths(evaluation: EvalConfig, num_items: int) -> None:
    """Raises ValueError for a list longer than the catalogue."""
    check_top_k(evaluation.top_k, num_items, "eval.top_k")
    check_top_k([parse_name(name)[1] for name in evaluation.metrics], num_items, "k in eval.metrics")


class FullSortEvaluator:
    """Ranks the targets of fixed examples under changing parameters; batches and programs are made once.

    The log lies on the device from the start; a call moves nothing there.
    """

    def __init__(
        self,
        model: nn.Module,
        log: InteractionLog,
        examples: Examples,
        config: ExperimentConfig,
        mesh: Mesh | None = None,
        in_parts: bool = True,
    ):
        """Lays out the batches.

        Args:
          model: from `build_model(config.model)`.
          log: the cleaned log.
          examples: what to predict, by user and end position.
          config: reads model.max_len, eval.max_len, data.timestamp_precision and eval.
          mesh: devices that share the work, [data, model] as in `parallel.mesh`, with the item table of the
            parameters in shards along "model" where that has several devices; None is one device.
          in_parts: measure parts of the lists too, as far as the settings ask for them.

        Raises:
          ValueError: for a metric of lists where the item table is in shards, a table of users that cannot be read;
            without examples, or without any whose target is new where seen ones are left out, for a k larger
            than the catalogue, or a timestamp beyond the precision.
        """
        if len(examples.users) == 0:
            raise ValueError("there are 0 examples to evaluate; does the log have users with at least 3 events?")
        require_lengths(config.eval, log.num_items)
        self._measures = config.eval.measures
        self._max_len = positions_read(config)
        self.model, self.config, self._mesh = model, config, mesh
        self.measured = measured(log, examples, config.eval)
        examples = self.measured.examples
        self.num_examples = len(examples.users)
        timestamps = timestamps_for_device(log.timestamps, config.data.timestamp_precision)
        columns = np.asarray(log.items, np.int32), timestamps, np.asarray(log.offsets, np.int32)
        self._log = _DeviceLog(*(_put(column, mesh, P()) for column in columns))
        reads_seen = config.eval.exclude_seen or scores_read_history(model)
        self._seen_len = int(examples.ends.max()) if reads_seen else 0
        self._top, self._needs = list_length(self._measures), needs(self._measures)
        if self._top and num_shards(mesh) > 1:
            raise ValueError("metrics that read lists need the item table whole: set parallel.catalogue_shards=1")
        self._information = None
        if "information" in self._needs:
            self._information = self_information(*users_of_items(log, split_log(log, config.data).first_held_out))
        self._parts = slices(log, examples, config.eval) if in_parts else {}
        self._targets, self._num_items = examples.targets(log), log.num_items
        self._batches = self._lay_out(examples, log.num_items + 1)

    def _lay_out(self, examples: Examples, v: int) -> list[_Batch]:
        max_len = self._max_len
        lengths = np.minimum(examples.ends, max_len)
        order = np.argsort(lengths, kind="stable")
        backend = jax.default_backend()
        tokens = ENCODE_TOKENS.get(backend, ENCODE_TOKENS_ACCELERATOR)
        penalty = GROUP_PENALTY_TOKENS.get(backend, GROUP_PENALTY_TOKENS_ACCELERATOR)
        shards = num_shards(self._mesh)
        # In parts, the rows of all devices that share an embedding meet a tile of items on each of them.
        columns = max(v if shards == 1 else min(v, ITEM_TILE), self._seen_len)
        tile_limit = max(1, SCORE_TILE_BYTES // (4 * columns * shards))
        devices, spec = (1, P()) if self._mesh is None else (self._mesh.size, P(self._mesh.axis_names))
        batches, first = [], 0
        for length in choose_lengths(lengths, max_len, max_groups=MAX_GROUPS, penalty=penalty, step=LENGTH_STEP):
            last = int(np.searchsorted(lengths[order], length, side="right"))
            row_limit = min(self.config.eval.batch_size, max(1, tokens // length))
            _, tiles, tile = _batch_shape(-(-(last - first) // devices), row_limit, tile_limit)
            size = devices * tiles * tile
            for rows in np.split(order[first:last], range(size, last - first, size)):
                # A short batch is filled by repeating its last row; `rows` says how many results are kept.
                filled = np.pad(rows, (0, size - len(rows)), mode="edge")
                users = _put(examples.users[filled].astype(np.int32), self._mesh, spec)
                ends = _put(examples.ends[filled].astype(np.int32), self._mesh, spec)
                targets = _put(self._targets[filled].astype(np.int32), self._mesh, spec)
                batches.append(_Batch(rows, users, ends, targets, length, tile))
            first = last
        return batches

    def __call__(self, params: Any) -> EvaluationResult:
        """Evaluates one set of parameters.

        Args:
          params: the model's parameter tree.

        Raises:
          FloatingPointError: where scores are not finite.
        """
        started = time.perf_counter()
        outputs = [
            _rank_batch(
                params,
                self._log,
                batch.users,
                batch.ends,
                batch.targets,
                mesh=self._mesh,
                model=self.model,
                max_len=self._max_len,
                time_len=max(self._max_len, self.config.model.max_len),
                length=batch.length,
                tile=batch.tile,
                seen_len=self._seen_len,
                excludes=self.config.eval.exclude_seen,
                top=self._top,
            )
            for batch in self._batches
        ]
        ranks = np.zeros(self.num_examples, np.int32)
        items = np.zeros((self.num_examples, self._top), np.int32)
        broken = 0
        for batch, (batch_ranks, finite, *batch_items) in zip(self._batches, jax.device_get(outputs), strict=True):
            ranks[batch.rows] = batch_ranks[: len(batch.rows)]
            for first in batch_items:
                items[batch.rows] = first[: len(batch.rows)]
            broken += int(np.count_nonzero(~finite[: len(batch.rows)]))
        if broken:
            raise FloatingPointError(
                f"the scores of {broken} of {self.num_examples} evaluated rows are not finite; "
                "the parameters hold NaN or infinity, or overflow: lower the learning rate or set clip_norm"
            )
        metrics, standard_errors, parts = self._measure(params, ranks, items)
        seconds = time.perf_counter() - started
        return EvaluationResult(metrics, standard_errors, parts, ranks, self.measured, seconds)

    def _measure(self, params: Any, ranks: np.ndarray, items: np.ndarray) -> tuple[Any, Any, Any]:
        """Returns the metrics, their standard errors, and the metrics of parts."""
        lists = RankedLists(ranks, self.measured.lists, num_items=self._num_items, information=self._information)
        starts, directions = lists.starts, None
        if "directions" in self._needs:
            table = np.asarray(apply_method(self.model, variables(params), "item_table"), np.float64)
            norms = np.linalg.norm(table, axis=1, keepdims=True)
            directions = table / np.where(norms > 0, norms, 1)
        lists = dataclasses.replace(lists, items=items[starts] if self._top else None, directions=directions)
        values = values_per_list(lists, self._measures)
        parts = {}
        for name, labels in self._parts.items():
            of_list, parts[name] = labels[starts], {}
            for label in np.unique(of_list):
                chosen = np.flatnonzero(of_list == label)
                own = means(lists, self._measures, values, chosen)
                parts[name][str(label)] = {"lists": len(chosen)} | own
        return means(lists, self._measures, values), errors(values), parts


def evaluate(
    model: nn.Module, params: Any, log: InteractionLog, examples: Examples, config: ExperimentConfig
) -> EvaluationResult:
    """Evaluates once; for repeated calls on the same examples keep a `FullSortEvaluator`.

    Args:
      model: from `build_model(config.model)`.
      params: the model's parameter tree.
      log: the cleaned log.
      examples: what to predict, by user and end position.
      config: reads model.max_len, data.timestamp_precision and eval.

    Raises:
      ValueError: without examples, for a k larger than the catalogue, or a timestamp beyond the precision.
      FloatingPointError: where scores are not finite.
    """
    return FullSortEvaluator(model, log, examples, config)(params)
