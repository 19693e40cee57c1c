"""From a log to a trained model in one call, `tim4rec_jax.fit`, and to its numbers anew, `tim4rec_jax.evaluate`."""

import dataclasses
import difflib
import pathlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal

import jax
import numpy as np
import polars as pl

from tim4rec_jax.config import DataConfig, EvalConfig, ExperimentConfig, TrainConfig
from tim4rec_jax.data.columns import FILE_ORDER
from tim4rec_jax.data.interactions import InteractionLog, load_log
from tim4rec_jax.evaluation.full_sort import EvaluationResult
from tim4rec_jax.model_config import ModelConfig
from tim4rec_jax.models import model_class
from tim4rec_jax.notebook import html_table, metric_rows
from tim4rec_jax.run_dir import read_config
from tim4rec_jax.serving.history_file import HistoryLine, asked_history, table_of_lists, top_k
from tim4rec_jax.serving.recommender import Recommender
from tim4rec_jax.serving.rules import Rules, allowed_by_lists, raw_ids
from tim4rec_jax.training.callbacks import Callback
from tim4rec_jax.training.loop import only_writer, train
from tim4rec_jax.training.stored_run import evaluate_run

# Steps of an epoch that batches are made small enough for, positions that a model reads at most unless told.
STEPS_PER_EPOCH, LARGEST_BATCH, LONGEST = 50, 1024, 200
# Of a log that is read already, the settings that still decide something.
_OF_SPLITS = ("split", "valid_share", "test_share", "valid_from", "test_from", "temporal_targets", "loader")


@dataclasses.dataclass(frozen=True, repr=False)
class FittedRun:
    """A trained model and its run folder.

    Attributes:
      run_dir: the run folder, which every program of `experiments` reads.
      config: its settings.
      results: what its results.json holds.
    """

    run_dir: pathlib.Path
    config: ExperimentConfig
    results: dict[str, Any]

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Metrics of the best epoch, {"valid": {"ndcg@10": ...}, "test": ...}; none where every event trained."""
        return {part: self.results[part] for part in ("valid", "test")}

    @cached_property
    def recommender(self) -> Recommender:
        """Recommends after any history, see `Recommender`."""
        return Recommender.from_run(self.run_dir)

    def recommend(
        self,
        users: Sequence[Any],
        k: int = 10,
        *,
        exclude_seen: bool = False,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] = (),
        items: pl.DataFrame | pathlib.Path | None = None,
        where: Sequence[str] = (),
        unknown_users: Literal["refuse", "popularity"] = "refuse",
    ) -> pl.DataFrame:
        """Returns the k items that come next most likely for users of the log; fewer where rules leave fewer.

        Args:
          users: raw user ids.
          k: items per user.
          exclude_seen: leave out what a user has had already.
          allow: raw item ids, the only ones to recommend; None for all.
          deny: raw item ids, never to recommend.
          items: table of items with a column item_id and others that `where` names.
          where: conditions on it, such as "genre=Drama" and "price<20", all of which must hold.
          unknown_users: "popularity" gives users that the log lacks the most frequent items of its training part.

        Returns:
          Columns user_id, rank (from 1), item_id, title (where titles are known), score and source ("model" or
          "popularity"); users in the order given.

        Raises:
          ValueError: for an unknown user or item, rules that leave nothing, or a k over the catalogue.
        """
        names, known = raw_ids(users), self.recommender
        allowed = allowed_by_lists(known.index_of_item, allow, deny, items, where)
        rules = Rules(allowed, exclude_seen, popular_users=unknown_users == "popularity")
        lines = [HistoryLine(number, user, asked_history(known, user, rules)) for number, user in enumerate(names)]
        found = top_k(known, [line.history for line in lines], k, rules=rules)
        columns = ["rank", "item_id", *(["title"] if known.titles is not None else []), "score", "source"]
        return table_of_lists(known, lines, *found).select(pl.col("user").alias("user_id"), *columns)

    def __repr__(self) -> str:
        about = f"best epoch {self.results['best_epoch']} of {self.results['epochs']}, run folder {self.run_dir}"
        parts = [
            f"  {part}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            for part, values in self.metrics.items()
            if values
        ] or ["  every event trained, so nothing is measured"]
        return "\n".join([f"FittedRun: {self.config.name}, {about}", *parts])

    def _repr_html_(self) -> str:
        results = self.results
        about = f"best epoch {results['best_epoch']} of {results['epochs']}, {results['parameters']:,} parameters"
        rows = metric_rows(list(self.metrics.values()))
        return html_table(f"{self.config.name}: {about}", ("metric", *self.metrics), rows, str(self.run_dir))


def fit(
    log: InteractionLog | ExperimentConfig,
    model: str | ExperimentConfig | None = None,
    *,
    run_dir: str | pathlib.Path | None = None,
    resume: bool = False,
    init_from: FittedRun | str | pathlib.Path | None = None,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> FittedRun:
    """Trains a model on a log, tests its best epoch and leaves a run folder.

    Without settings, a model that can be trained on every position of packed rows is, over 20 epochs, with `seen_bias`
    where the other settings go with it, and one of the cloze on masked events, over 100; others are on every prefix,
    until validation does not improve. Rows are as long as the longest history, up to 200 (50) events, and batches so
    small that an epoch has 50 steps.

    Args:
      log: from `load_log`; or all settings of an experiment, whose log is then read.
      model: name of a model, see `MODELS`, or all settings of an experiment, for this log; None is the model of
        `init_from`, else "tim4rec_causal".
      run_dir: new folder; None is the first of runs/<name>-1, runs/<name>-2 .. that is not there, by the name of the
        model or the experiment.
      resume: go on with the run in `run_dir`, which must have been begun with the same settings.
      init_from: a run whose parameters are begun with, see `TrainConfig`; unless `model` holds all settings, those of
        its model are taken.
      callbacks: are told of the run while it trains, see `Callback`.
      **settings: by their names in the settings of the model, then of `TrainConfig`, `EvalConfig`, `ParallelConfig`,
        and for the split of `DataConfig`: epochs=5, d_model=128, seed=1, progress=False, split="temporal" ...

    Returns:
      The run, with its metrics, and recommendations for users of the log.

    Raises:
      TypeError: `log` is no log.
      ValueError: for an unknown model or setting (the nearest is named), a log without anything to train on, or
        settings that do not go together.
      FileExistsError: `run_dir` holds this run already.
    """
    if isinstance(log, ExperimentConfig):
        model, log = log, load_log(log.data)
    if not isinstance(log, InteractionLog):
        raise TypeError(
            f"fit takes a log from load_log, not {type(log).__name__}; load_log reads files and data frames"
        )
    if log.num_rows == 0:
        raise ValueError("the log has 0 events; give one with events of several users")
    begun = None
    if init_from is not None:
        folder = init_from.run_dir if isinstance(init_from, FittedRun) else pathlib.Path(init_from)
        begun, settings = read_config(folder).model, settings | {"init_from": str(folder)}
    if model is None:
        model = begun.name if begun is not None else "tim4rec_causal"
    config = _with_settings(_default_config(log, model, begun, settings) if isinstance(model, str) else model, settings)
    if run_dir is None and resume:
        raise ValueError("resume=True goes on with a run: give run_dir, its folder")
    if run_dir is None and jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes train together: give run_dir, one folder for all of them")
    run_dir = _free_folder(config.name) if run_dir is None else pathlib.Path(run_dir)
    with only_writer(run_dir):
        results = train(config, log, run_dir, resume=resume, callbacks=callbacks)
    return FittedRun(run_dir, config, results)


def evaluate(
    run: FittedRun | str | pathlib.Path, split: Literal["test", "valid"] = "test", **settings: Any
) -> EvaluationResult:
    """Measures a run's best model on a part of its log by full ranking.

    Args:
      run: from `fit`, or a run folder.
      split: the part, "test" or "valid".
      **settings: by their names in `EvalConfig`, where they are to differ from the run's own: top_k=(5,),
        metrics=("recall@10", "coverage@20"), exclude_seen=True, users="users.csv", groups="age" ...

    Raises:
      FileNotFoundError, CheckpointError: the folder is no run, or its checkpoint is not whole.
      ValueError: for an unknown setting (the nearest is named) or part, or settings that do not fit the run.
    """
    folder = run.run_dir if isinstance(run, FittedRun) else pathlib.Path(run)
    if split not in ("test", "valid"):
        raise ValueError(f"split={split!r} must be 'test' or 'valid'")
    stored, known = read_config(folder).eval, EvalConfig.__dataclass_fields__
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            raise ValueError(f"unknown setting {name!r}; nearest: {', '.join(near or known)}")
    if "top_k" in settings or "metrics" in settings:
        first = tuple(settings.get("top_k", stored.top_k))[:1]
        settings = {"monitor": f"ndcg@{first[0]}" if first else stored.monitor} | settings
    return evaluate_run(folder, dataclasses.replace(stored, **settings), split=split)


def _free_folder(name: str) -> pathlib.Path:
    number = 1
    while (folder := pathlib.Path("runs") / f"{name}-{number}").exists():
        number += 1
    return folder


def _default_config(
    log: InteractionLog, model: str, begun: ModelConfig | None, asked: dict[str, Any]
) -> ExperimentConfig:
    """Returns settings that suit a model, a log, a run of that model that is begun with, and what is asked for."""
    kind = model_class(model)
    settings, packable = kind.Config(), kind.packable and (kind.causal or kind.cloze)
    goes_with_seen_bias = {"loss": "ce", "positions": "all", "catalogue_shards": 1}
    if packable and kind.causal and all(asked.get(name, value) == value for name, value in goes_with_seen_bias.items()):
        settings = dataclasses.replace(settings, seen_bias="seen_bias" in kind.Config.reads())
    lengths = np.diff(log.offsets)
    # A model of the cloze reads the mask behind the history, too.
    longest = int(np.clip(lengths.max() - 1 + kind.cloze, 2, LONGEST if packable else settings.max_len))
    if begun is not None and begun.name == model:
        settings, longest = begun, begun.max_len
    examples = int(np.maximum(lengths - 3, 0).sum()) if not packable else int(lengths.sum()) // longest
    batch_size = int(np.clip(examples // STEPS_PER_EPOCH, 1 if packable else 32, LARGEST_BATCH))
    schedule: dict[str, Any] = {}
    if packable:
        schedule = {"positions": "all", "epochs": 20} if kind.causal else {"positions": "masked", "epochs": 100}
        schedule |= {"schedule": "cosine", "warmup_steps": 40}
    top_k = tuple(k for k in EvalConfig().top_k if k <= log.num_items) or (log.num_items,)
    return ExperimentConfig(
        model,
        dataclasses.replace(settings, max_len=longest),
        DataConfig(
            name="custom",
            timestamp_precision=log.statistics.timestamp_precision,
            order="file" if log.statistics.taken.get("order") == FILE_ORDER else "time",
            split="leave_one_out" if log.parts is None else "given",
        ),
        TrainConfig(batch_size=batch_size, patience=10, length_groups=2, **schedule),
        EvalConfig(top_k=top_k, monitor=f"ndcg@{top_k[0]}"),
    )


def _with_settings(config: ExperimentConfig, settings: dict[str, Any]) -> ExperimentConfig:
    """Puts settings where their names belong.

    Raises:
      ValueError: there is no such name; the nearest are shown.
    """
    names = {
        part: [
            field.name for field in dataclasses.fields(getattr(config, part)) if field.name not in ("name", "module")
        ]
        for part in ("model", "train", "eval", "parallel")
    } | {"data": list(_OF_SPLITS)}
    changes: dict[str, dict[str, Any]] = {part: {} for part in names}
    for name, value in settings.items():
        part = next((part for part, own in names.items() if name in own), None)
        if part is None:
            if name in DataConfig.__dataclass_fields__:
                raise ValueError(f"setting {name!r} is of reading the log; give it to load_log")
            known = [own for part in names.values() for own in part]
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            raise ValueError(f"unknown setting {name!r}; nearest: {', '.join(near) if near else 'none'}")
        changes[part][name] = value
    parts = {part: dataclasses.replace(getattr(config, part), **own) for part, own in changes.items() if own}
    return dataclasses.replace(config, **parts)
