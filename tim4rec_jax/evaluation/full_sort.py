"""Full ranking: every evaluated user's target is ranked against the whole catalogue (RecBole 1.2 protocol).

No [users, v] matrix exists: users are encoded in batches and scored in tiles, of which only ranks leave the device, and
the items at the top where a metric reads them. Either protocol of `seen_targets` is measured from the same scores: the
rank among unseen items is that among all, less the seen items ahead of the target. Rows are sorted by length once and
worked through in a few static lengths, so a short history is not computed at max_len. Given a mesh, its devices share
the users of every batch, and only ranks are exchanged; where the item table is sharded over them, see
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
from tim4rec_jax.evaluation.metrics import ahead_among, check_top_k, rank_of_target, self_information
from tim4rec_jax.evaluation.seen_targets import (
    ALL_ITEMS,
    PROTOCOLS,
    SEEN_EXCLUDED,
    TITLES,
    Measured,
    Protocol,
    first_rows,
    measured,
    new_items,
)
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
# Events of a history whose items are looked up at once, in as many turns as the longest of a tile needs.
SEEN_AT_ONCE = 128
MAX_GROUPS = 8


@dataclasses.dataclass(frozen=True, repr=False)
class EvaluationResult:
    """What one evaluation found under one protocol.

    Attributes:
      metrics: {"hit@10": ...}, means over the lists in float64.
      standard_errors: of these means, as far as they are some and there is more than one list.
      parts: the same of parts of the lists, {"gender": {"F": {"lists": 12, "hit@10": ...}}, "month": ..}, as asked for
        by eval.groups and eval.time_buckets.
      ranks: [n] float32 from 1, whole or in halves where scores tie, in the order of the examples that were measured.
      measured: which these are.
      seconds: wall time, of both protocols together.
      other: the same evaluation under the other protocol; None in that one itself, and where every target was seen and
        none is left of it.
    """

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    parts: dict[str, dict[str, dict[str, float]]]
    ranks: np.ndarray
    measured: Measured
    seconds: float
    other: "EvaluationResult | None" = None

    @property
    def by_protocol(self) -> dict[Protocol, "EvaluationResult"]:
        """Either result by the name of its protocol, all items first."""
        both = {one.measured.protocol_name: one for one in (self, self.other) if one is not None}
        return {protocol: both[protocol] for protocol in PROTOCOLS if protocol in both}

    @property
    def ranks_of_part(self) -> np.ndarray:
        """Ranks of all targets of the part, float32 [total], 0 where one is left out."""
        ranks = np.zeros(self.measured.total, np.float32)
        ranks[self.measured.kept] = self.ranks
        return ranks

    def record(self, part: str) -> dict[str, Any]:
        """What a run's results say of a part: metrics as "test" and "test_seen_excluded", "test_parts" .. if any."""
        found = {}
        for one in (self, self.other):
            if one is not None:
                suffix = "" if one is self else f"_{one.measured.protocol_name}"
                found[f"{part}{suffix}"] = one.metrics
                found |= {f"{part}_parts{suffix}": one.parts} if one.parts else {}
        return found

    def __repr__(self) -> str:
        lines = []
        for protocol, one in self.by_protocol.items():
            shown = ", ".join(f"{name} {value:.4f}" for name, value in one.metrics.items())
            lines.append(f"{TITLES[protocol]}: {len(one.ranks):,} targets, {shown}")
        return "EvaluationResult: " + "\n  ".join(lines)

    def _repr_html_(self) -> str:
        both = self.by_protocol
        columns = [column for one in both.values() for column in (one.metrics, one.standard_errors)]
        header = ["metric", *(name for protocol in both for name in (TITLES[protocol], "error"))]
        targets = ", ".join(f"{TITLES[protocol]}: {len(one.ranks):,} targets" for protocol, one in both.items())
        tables = [html_table(targets, header, metric_rows(columns))]
        for name, parts in self.parts.items():
            lists = [f"{part} ({own['lists']:,.0f})" for part, own in parts.items()]
            own = [{metric: value for metric, value in part.items() if metric != "lists"} for part in parts.values()]
            tables.append(html_table(f"by {name}", ("metric", *lists), metric_rows(own)))
        return "".join(tables)


class _DeviceLog(NamedTuple):
    """The log's columns on the device: items [rows], timestamps [rows], offsets [users + 1].

    `new_items` [rows] are the items at a user's first event with each, 0 where one is repeated.
    """

    items: jax.Array
    timestamps: jax.Array
    offsets: jax.Array
    new_items: jax.Array


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
    jax.jit, static_argnames=("mesh", "model", "max_len", "time_len", "length", "tile", "seen_len", "top")
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
    top: int,
    sharded: bool,
) -> tuple[jax.Array, ...]:
    """Ranks the rows' targets.

    Returns:
      Ranks [b] float32 among all items and among the unseen, whether all scores of a row are finite [b] bool, and the
      first `top` items of each list [b, top] int32 of the one and of the other, 0 where fewer are left; nothing of the
      kind for top 0.
    """
    columns = log.items, log.timestamps, log.offsets
    windows = gather_windows(*columns, users, ends, max_len, xp=jnp)
    # Models of fixed length ask for all their timestamps, also where fewer events are read.
    timestamps = jnp.pad(windows.timestamps, ((0, 0), (0, time_len - max_len)))
    inputs = windows.items[:, :length], windows.lengths, timestamps
    hidden = sharded_last_hidden(model, params, *inputs) if sharded else last_hidden(model, variables(params), *inputs)

    def rank_tile(rows: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        hidden, targets, users, ends = rows
        if sharded:
            users, ends = jax.lax.all_gather((users, ends), MODEL_AXIS, tiled=True)
            seen = gather_windows(log.new_items, *columns[1:], users, ends, seen_len, xp=jnp).items
            return sharded_ranks(hidden, targets, params[TABLE]["embedding"], seen, vocab_size=model.config.vocab_size)
        seen = gather_windows(*columns, users, ends, seen_len, xp=jnp).items if seen_len else None
        scores = item_scores(model, variables(params), hidden, seen)
        ahead, unseen = _seen_ahead(scores, targets, log, users, ends, bool(top))
        ranks = rank_of_target(scores, targets)
        found = ranks, ranks - ahead, jnp.isfinite(scores).all(axis=1)
        return found if unseen is None else (*found, _first_items(scores, top), _first_items(unseen, top))

    tiles = jax.tree.map(lambda x: x.reshape(-1, tile, *x.shape[1:]), (hidden, targets, users, ends))
    return tuple(found.reshape(-1, *found.shape[2:]) for found in jax.lax.map(rank_tile, tiles))


def _seen_ahead(
    scores: jax.Array, targets: jax.Array, log: _DeviceLog, users: jax.Array, ends: jax.Array, listed: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Counts the seen items ahead of the targets, float32 [b]; and the scores without the seen, where listed."""
    steps, rows = jnp.arange(SEEN_AT_ONCE), jnp.arange(len(users))[:, None]

    def add(turn: jax.Array, found: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
        place = turn * SEEN_AT_ONCE + steps
        inside = place < ends[:, None]
        items = jnp.where(inside, log.new_items[jnp.where(inside, log.offsets[users][:, None] + place, 0)], 0)
        ahead, unseen = found
        unseen = None if unseen is None else unseen.at[rows, items].set(-jnp.inf)
        return ahead + ahead_among(scores, targets, items), unseen

    nothing = jnp.zeros(len(users), jnp.float32), scores if listed else None
    return jax.lax.fori_loop(0, -(-ends.max() // SEEN_AT_ONCE), add, nothing)


def _first_items(scores: jax.Array, k: int) -> jax.Array:
    """Returns the k best items of every row but those at -inf, equals in order of id; 0 where none is left."""
    best, items = jax.lax.top_k(scores.at[:, 0].set(-jnp.inf), k)
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
        first = first_rows(log)
        self.measured = measured(log, examples, config.eval, first)
        examples = self.measured[ALL_ITEMS].examples
        self.num_examples = len(examples.users)
        timestamps = timestamps_for_device(log.timestamps, config.data.timestamp_precision)
        columns = np.asarray(log.items, np.int32), timestamps, np.asarray(log.offsets, np.int32), new_items(log, first)
        self._log = _DeviceLog(*(_put(column, mesh, P()) for column in columns))
        reads_seen = num_shards(mesh) > 1 or scores_read_history(model)
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
        # By whole histories, so that those of a tile are looked up in like numbers of turns.
        order = np.argsort(examples.ends, kind="stable")
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
                top=self._top,
            )
            for batch in self._batches
        ]
        ranks = {protocol: np.zeros(self.num_examples, np.float32) for protocol in PROTOCOLS}
        items = {protocol: np.zeros((self.num_examples, self._top), np.int32) for protocol in PROTOCOLS}
        broken = 0
        for batch, found in zip(self._batches, jax.device_get(outputs), strict=True):
            all_items, unseen, finite, *lists = (of_rows[: len(batch.rows)] for of_rows in found)
            ranks[ALL_ITEMS][batch.rows], ranks[SEEN_EXCLUDED][batch.rows] = all_items, unseen
            if lists:
                items[ALL_ITEMS][batch.rows], items[SEEN_EXCLUDED][batch.rows] = lists
            broken += int(np.count_nonzero(~finite))
        if broken:
            raise FloatingPointError(
                f"the scores of {broken} of {self.num_examples} evaluated rows are not finite; "
                "the parameters hold NaN or infinity, or overflow: lower the learning rate or set clip_norm"
            )
        both = [self._measure(params, part, ranks[name], items[name]) for name, part in self.measured.items()]
        seconds = time.perf_counter() - started
        result, *others = (EvaluationResult(*one, seconds) for one in both)
        return dataclasses.replace(result, other=others[0]) if others else result

    def _measure(
        self, params: Any, part: Measured, ranks: np.ndarray, items: np.ndarray
    ) -> tuple[Any, Any, Any, np.ndarray, Measured]:
        """Returns the metrics, their standard errors, the metrics of parts, and the ranks that are measured."""
        ranks, items = ranks[part.kept], items[part.kept]
        lists = RankedLists(ranks, part.lists, num_items=self._num_items, information=self._information)
        starts, directions = lists.starts, None
        if "directions" in self._needs:
            table = np.asarray(apply_method(self.model, variables(params), "item_table"), np.float64)
            norms = np.linalg.norm(table, axis=1, keepdims=True)
            directions = table / np.where(norms > 0, norms, 1)
        lists = dataclasses.replace(lists, items=items[starts] if self._top else None, directions=directions)
        values = values_per_list(lists, self._measures)
        parts = {}
        for name, labels in self._parts.items():
            of_list, parts[name] = labels[part.kept][starts], {}
            for label in np.unique(of_list):
                chosen = np.flatnonzero(of_list == label)
                own = means(lists, self._measures, values, chosen)
                parts[name][str(label)] = {"lists": len(chosen)} | own
        return means(lists, self._measures, values), errors(values), parts, ranks, part


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
