"""What a finished or running training left in its folder: the best parameters, the log, and what they measure."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.dispatch import gpu_capability, missing
from tim4rec_jax.checks import require
from tim4rec_jax.config import EvalConfig, ExperimentConfig, ParallelConfig
from tim4rec_jax.data.columns import FILE_ORDER
from tim4rec_jax.data.interactions import InteractionLog, LogStatistics
from tim4rec_jax.data.splits import require_held_out, split_log, training_times
from tim4rec_jax.devices import device_line, taken_by
from tim4rec_jax.evaluation.baselines import popularity_counts
from tim4rec_jax.evaluation.full_sort import EvaluationResult, evaluate
from tim4rec_jax.models import STATISTICS, SequentialModel, build_model, init_params, variables
from tim4rec_jax.run_dir import CHECKPOINTS, read_config, read_environment, read_histories, read_items
from tim4rec_jax.run_manifest import read_manifest
from tim4rec_jax.training.checkpoint import Checkpointer


class StoredModel(NamedTuple):
    """The best model of a run.

    Attributes:
      config: the run's resolved settings.
      model: the Linen module.
      params: its best parameters, and its statistics of the data among them, on the device; `variables` are the
        collections of `model.apply`.
      step: optimiser steps after which they were saved.
    """

    config: ExperimentConfig
    model: SequentialModel
    params: Any
    step: int

    @property
    def variables(self) -> dict[str, Any]:
        return variables(self.params)


def load_model(run: pathlib.Path, *, report: Callable[[str], None] = print) -> StoredModel:
    """Builds a run's model and restores its best parameters.

    Args:
      run: the run folder.
      report: receives a line for every damaged checkpoint that had to be passed over, and for a run whose files cannot
        be checked.

    Raises:
      FileNotFoundError: the folder is no run, or holds no best checkpoint yet.
      ValueError: the run has another format, or its checkpoint does not fit its settings.
      CheckpointError: best checkpoints are there but none is intact.
    """
    run = pathlib.Path(run)
    config = read_config(run)
    if read_manifest(run) is None:
        report(f"{run} is of a version without a manifest: whether its files were changed since cannot be told")
    if config.model.kernels is not None and (lack := missing(config.model.kernels)) is not None:
        report(f"{run} was trained with model.kernels={config.model.kernels}; here plain JAX computes: {lack}")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, kernels=None))
    model = build_model(config.model)
    if gpu_capability() is not None or config.model.kernels is not None:  # Else there is nothing to choose from.
        report(device_line(taken_by(model, config.eval.batch_size)))
    template = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    if statistics := model.data_statistics():
        template[STATISTICS] = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in statistics.items()}
    with Checkpointer(run / CHECKPOINTS, report=report) as checkpointer:
        restored = checkpointer.restore_best(template)
    if restored is None:
        raise FileNotFoundError(
            f"{run / CHECKPOINTS} holds no best checkpoint: the run has not finished its first validation; train on"
        )
    step, params, _ = restored
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        # Earlier versions kept them among the settings.
        log = load_log(run)
        times = training_times(log, split_log(log, config.data))
        params[STATISTICS] = jax.tree.map(jnp.asarray, model.data_statistics(**times))
    return StoredModel(config, model, params, step)


def load_log(run: pathlib.Path) -> InteractionLog:
    """Rebuilds the cleaned log that a run was trained on, in its numbering and order, from the run folder alone.

    Args:
      run: the run folder.

    Returns:
      The log; its statistics describe what is stored, what cleaning had left out is not known here.

    Raises:
      FileNotFoundError: the folder is no run.
      ValueError: its files are not those training left, or do not fit each other.
    """
    run = pathlib.Path(run)
    config, items_table, histories = read_config(run), read_items(run), read_histories(run)
    if len(items_table) + 1 != config.model.vocab_size:
        raise ValueError(
            f"{run}: item_ids.parquet lists {len(items_table)} items, but the model has "
            f"vocab_size={config.model.vocab_size} (items + 1); the folder mixes two runs"
        )
    items = histories["items"].explode().to_numpy().astype(np.int32)
    counts = histories["items"].list.len().to_numpy().astype(np.int64)
    users = np.repeat(np.arange(len(counts)), counts)
    pairs = users * np.int64(len(items_table) + 1) + items
    precision = config.data.timestamp_precision
    assert precision != "published"  # A run keeps what that came to.
    timestamps = histories["timestamps"].explode().to_numpy().astype(np.int64)
    tied = (np.diff(users) == 0) & (np.diff(timestamps.astype(precision)) == 0)
    parts = None
    if config.data.split == "given":
        require("before_valid" in histories.columns, f"{run}: its histories do not say how the files were split")
        parts = histories.select("before_valid", "before_test").to_numpy()
    # Times are stored in order, so they do not tell what float32 seconds have changed.
    changed = 0 if precision == "int64" else None
    return InteractionLog(
        items=items,
        timestamps=timestamps,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        user_ids=histories["user_id"],
        item_ids=items_table["item_id"],
        titles=None if items_table["title"].is_null().all() else items_table["title"],
        statistics=LogStatistics(
            rows_read=len(items),
            dropped={},
            duplicates=len(items) - len(np.unique(pairs)),
            rounded_timestamps=0,
            users=len(counts),
            items=len(items_table),
            rows=len(items),
            first_time=int(timestamps.min()),
            last_time=int(timestamps.max()),
            tied_share=float(tied.sum() / len(items)),
            training_examples=int(np.maximum(counts - 3, 0).sum()),
            timestamp_precision=precision,
            reordered_users=changed,
            changed_valid_targets=changed,
            changed_test_targets=changed,
            taken={"order": FILE_ORDER} if config.data.order == "file" else {},
        ),
        fingerprint=read_environment(run)["data_fingerprint"],
        parts=parts,
    )


def training_counts(run: pathlib.Path) -> np.ndarray:
    """Returns how often each item occurs in the training part of a run's log, int64 [v]; entry 0, the padding, is 0."""
    log = load_log(run)
    return popularity_counts(log, split_log(log, read_config(run).data).first_held_out)


def evaluate_run(
    run: pathlib.Path,
    evaluation: EvalConfig | None = None,
    *,
    split: Literal["test", "valid"] = "test",
    report: Callable[[str], None] = print,
) -> EvaluationResult:
    """Measures a run's best model on a part of its log by full ranking, see `evaluate`.

    Args:
      run: the run folder.
      evaluation: how; None is the run's own way.
      split: the part.
      report: see `load_model`.

    Raises:
      FileNotFoundError, ValueError, CheckpointError: the run cannot be read, or the settings do not fit it.
      FloatingPointError: the model's scores are not finite.
    """
    require_held_out(read_config(run).data, f"evaluating {run}")
    stored, log = load_model(run, report=report), load_log(run)
    examples = getattr(split_log(log, stored.config.data), split)
    # Here the item table is whole, whatever devices shared it in training.
    config = dataclasses.replace(stored.config, eval=evaluation or stored.config.eval, parallel=ParallelConfig())
    return evaluate(stored.model, stored.params, log, examples, config)
