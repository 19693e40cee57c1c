"""A run that begins with the parameters of another, on a log that has grown since."""

import dataclasses
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import polars as pl

from tim4rec_jax.data.interactions import InteractionLog
from tim4rec_jax.data.splits import Examples, Split, split_log
from tim4rec_jax.evaluation.baselines import in_training
from tim4rec_jax.models import SequentialModel
from tim4rec_jax.run_dir import SHOWN_DIFFERENCES, read_config
from tim4rec_jax.training.checkpoint import named_leaves
from tim4rec_jax.training.stored_run import load_log, load_model

PyTree = Any
# Settings in which the two may differ; where the shape of a parameter depends on one, the shapes are compared.
_FREE = {"vocab_size", "vocab_multiple", "kernels", "max_len", "module"}


@dataclass(frozen=True)
class WarmStart:
    """What was taken from a run.

    Attributes:
      run: its folder.
      step: optimiser steps after which its best parameters were saved.
      known_items: items of the log whose rows it has.
      new_items: items of the log that it does not know; their rows are the mean of its rows, plus the noise that
        initial rows are drawn from.
      gone_items: items that it knows and the log does not have; their rows are dropped.
      valid_trained_on, test_trained_on: targets held out now that it was trained on, which flatters what is measured.
    """

    run: str
    step: int
    known_items: int
    new_items: int
    gone_items: int
    valid_trained_on: int
    test_trained_on: int

    def lines(self, split: Split) -> list[str]:
        """Says it in lines to print."""
        said = [
            f"begins with the parameters of {self.run} after {self.step} steps: {self.known_items:,} items keep their "
            f"rows, {self.new_items:,} new ones begin at the mean with noise, {self.gone_items:,} are gone; the "
            "optimiser begins anew"
        ]
        for part, count in (("validation", self.valid_trained_on), ("test", self.test_trained_on)):
            if count:
                of = len(split.valid.users if part == "validation" else split.test.users)
                said.append(
                    f"{count:,} of {of:,} {part} targets were trained on by {self.run}: they flatter what is measured"
                )
        return said


def require_fits(run: pathlib.Path, model: SequentialModel) -> None:
    """Refuses a run whose parameters a model cannot begin with, as far as its settings tell.

    Raises:
      FileNotFoundError: the folder is no run.
      ValueError: its model is another, or a setting differs on which parameters depend.
    """
    there, here = (dataclasses.asdict(config) for config in (read_config(run).model, model.config))
    if there["name"] != here["name"]:
        raise ValueError(
            f"train.init_from={run} is of model.name={there['name']!r}, here it is {here['name']!r}; begin with a run "
            "of the same model"
        )
    free = _FREE | {name for name in here if "dropout" in name}
    differences = [
        f"model.{name}: {there.get(name)!r} there, {here.get(name)!r} here"
        for name in sorted({*there, *here} - free)
        if there.get(name) != here.get(name)
    ]
    if differences:
        more = f" and {len(differences) - SHOWN_DIFFERENCES} more" if len(differences) > SHOWN_DIFFERENCES else ""
        raise ValueError(
            f"train.init_from={run} has other settings: {', '.join(differences[:SHOWN_DIFFERENCES])}{more}; give "
            "those of that run, or train from initial values"
        )


def warm_params(
    run: pathlib.Path,
    model: SequentialModel,
    log: InteractionLog,
    split: Split,
    fresh: PyTree,
    *,
    report: Callable[[str], None] = print,
) -> tuple[PyTree, WarmStart]:
    """Returns a run's best parameters in the numbering of another log.

    With E the run's item table, an item that it knows by raw id keeps its row; the row of a new one is
    mean(E) + e, e its initial row in `fresh`. Rows of padding are kept; all else is taken as it is.

    Args:
      run: the run folder.
      model: what is to be trained; of the run's settings, though not of its size.
      log: what it is to be trained on.
      split: of it.
      fresh: the model's initial parameters, arrays or NumPy arrays.
      report: receives a line for every damaged checkpoint that had to be passed over.

    Returns:
      The parameters as NumPy arrays in the tree of `fresh`, and what was taken.

    Raises:
      FileNotFoundError: the folder is no run, or holds no best checkpoint.
      ValueError: its parameters do not fit the model.
      CheckpointError: none of its best checkpoints is intact.
    """
    require_fits(run, model)
    stored, before = load_model(run, report=report), load_log(run)
    old = {name: np.asarray(leaf) for name, leaf in named_leaves(stored.variables["params"]).items()}
    new = {name: np.asarray(leaf) for name, leaf in named_leaves(fresh).items()}
    index = _indices_there(log.item_ids, before.item_ids)
    mapped = {}
    for name in sorted(new.keys() | old.keys()):
        by_item = any(part in model.by_item for part in name.split("."))
        there, here = (leaves[name].shape if name in leaves else None for leaves in (old, new))
        if there is None or here is None or there[by_item:] != here[by_item:]:
            raise ValueError(
                f"train.init_from={run}: {name} is {_shown(there)} there and {_shown(here)} here; give the settings of "
                "that run, or train from initial values"
            )
        mapped[name] = (
            _rows_of_items(old[name], before.num_items, new[name], index)
            if by_item
            else old[name].astype(new[name].dtype)
        )
    leaves = [mapped[name] for name in named_leaves(fresh)]
    known = int(np.count_nonzero(index))
    trained = _trained_targets(before, split_log(before, stored.config.data), log, (split.valid, split.test))
    about = WarmStart(
        str(run), stored.step, known, log.num_items - known, before.num_items - known, trained[0], trained[1]
    )
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves), about


def _shown(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _indices_there(item_ids: pl.Series, known: pl.Series) -> np.ndarray:
    """Returns for each item its model index in another numbering, int64 [items]; 0 where that does not have it."""
    there = pl.DataFrame({"id": known.cast(pl.String), "index": np.arange(1, len(known) + 1)})
    here = pl.DataFrame({"id": item_ids.cast(pl.String)})
    return here.join(there, on="id", how="left", maintain_order="left")["index"].fill_null(0).to_numpy()


def _rows_of_items(old: np.ndarray, items_there: int, fresh: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Returns rows [v, ..] for this numbering: padding, then one per item; what fills a table up is no item's."""
    rows, items = fresh.copy(), slice(1, 1 + len(index))
    rows[0] = old[0]
    mean = old[1 : 1 + items_there].mean(axis=0, dtype=np.float64)
    is_known = (index > 0).reshape(-1, *[1] * (old.ndim - 1))
    rows[items] = np.where(is_known, old[index], mean + fresh[items])
    return rows


def _trained_targets(
    before: InteractionLog, split_before: Split, log: InteractionLog, parts: tuple[Examples, ...]
) -> list[int]:
    """Counts the targets of each part that are events, by user, item and time, on which an earlier run was trained."""
    rows = np.flatnonzero(in_training(before, split_before.first_held_out))
    users = np.repeat(np.arange(before.num_users), np.diff(before.offsets))
    trained = _events(before, users[rows], rows)
    counts = []
    for part in parts:
        held_out = _events(log, part.users, part.target_rows(log))
        counts.append(len(held_out.join(trained, on=held_out.columns, how="semi")))
    return counts


def _events(log: InteractionLog, users: np.ndarray, rows: np.ndarray) -> pl.DataFrame:
    """Returns raw user id, raw item id and second of some rows of a log, whose users are given."""
    return pl.DataFrame(
        {
            "user": log.user_ids.cast(pl.String).gather(users),
            "item": log.item_ids.cast(pl.String).gather(log.items[rows] - 1),
            "time": log.timestamps[rows],
        }
    )
