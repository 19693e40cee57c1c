"""What others are told while a run trains: one small protocol, and MLflow and Weights & Biases behind it.

A callback that raises does not end the run: it is left out from there on, and the screen and an event line of
metrics.jsonl name it. In `on_start` nothing is lost yet, so there its error refuses the run.
"""

import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tim4rec_jax.checks import require, shortened
from tim4rec_jax.json_files import read_object, write_object
from tim4rec_jax.run_dir import TRACKERS


class Callback:
    """Told of a run by the process that writes its folder; inherit, and override what is wanted."""

    def on_start(self, run_dir: pathlib.Path, settings: Mapping[str, Any], step: int) -> None:
        """Training begins, or goes on after so many steps.

        Args:
          run_dir: the run folder.
          settings: by path, as in "train.learning_rate".
          step: steps done.
        """

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        """A line of training: loss, learning_rate, epoch, examples_per_second, seconds."""

    def on_evaluation(self, part: str, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of "valid" after an epoch, or of "test" at the end, whose step is the best epoch's."""

    def on_checkpoint(self, step: int, folder: pathlib.Path) -> None:
        """The state of a step was handed to the thread that writes it into the folder of checkpoints."""

    def on_end(self, results: Mapping[str, Any] | None, error: str | None) -> None:
        """The run ended: with what results.json holds, or with why it did not come to its end."""


class Callbacks:
    """Several callbacks, those that failed left out.

    Args:
      callbacks: in order.
      failed: receives a line about one that failed.
    """

    def __init__(self, callbacks: Sequence[Callback], failed: Callable[[str], None]) -> None:
        self._callbacks, self._failed = list(callbacks), failed
        self._started: list[Callback] = []

    def start(self, run_dir: pathlib.Path, settings: Mapping[str, Any], step: int) -> None:
        """Tells all of the start.

        Raises:
          ValueError: one of them raised; it is named.
        """
        for callback in self._callbacks:
            try:
                callback.on_start(run_dir, settings, step)
            except Exception as error:
                raise ValueError(
                    f"callback {_described(callback, 'on_start', error)}; mend it or leave it out"
                ) from error
            self._started.append(callback)

    def tell(self, method: str, *values: Any) -> None:
        """Calls a method of all that started and did not fail."""
        for callback in list(self._started):
            try:
                getattr(callback, method)(*values)
            except Exception as error:
                self._started.remove(callback)
                self._failed(f"callback {_described(callback, method, error)}; it is told no more, and the run goes on")


def _described(callback: Callback, method: str, error: Exception) -> str:
    return f"{type(callback).__name__}.{method} failed: {type(error).__name__}: {shortened(str(error), 120)}"


def require_callbacks(callbacks: Sequence[Any]) -> None:
    """Raises ValueError for what is no `Callback`."""
    for callback in callbacks:
        require(
            isinstance(callback, Callback),
            f"callbacks: {shortened(type(callback).__name__, 40)} must inherit from tim4rec_jax.Callback; give objects "
            "of such classes in a list",
        )


def trackers(names: Sequence[str]) -> list[Callback]:
    """Returns the callbacks of `train.trackers`.

    Raises:
      ValueError: a package is not installed.
    """
    return [{"mlflow": MLflow, "wandb": WeightsAndBiases}[name]() for name in names]


def _imported(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ValueError(
            f"train.trackers={name} needs the package {name} ({shortened(str(error), 60)}): "
            f"pip install 'tim4rec_jax[{name}]', or leave it out"
        ) from error


def _stored_ids(run_dir: pathlib.Path) -> dict[str, Any]:
    """Returns the ids that a run has with trackers."""
    file = run_dir / TRACKERS
    return read_object(file) if file.is_file() else {}


def _store_id(run_dir: pathlib.Path, name: str, value: str) -> None:
    write_object(run_dir / TRACKERS, _stored_ids(run_dir) | {name: value})


def _finite(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Numbers as trackers take them; one that is not finite is no point of a curve."""
    return {
        f"{prefix}/{name}": float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


class MLflow(Callback):
    """Writes settings, curves and metrics to MLflow, where MLFLOW_TRACKING_URI says.

    The experiment is that of MLFLOW_EXPERIMENT_NAME, or "tim4rec_jax"; the run is called by its folder, and a resumed
    run goes on with the same one. MLflow's names hold no @: ndcg@10 is ndcg_at_10.

    Raises:
      ValueError: MLflow is not installed.
    """

    def __init__(self) -> None:
        self._mlflow, self._run = _imported("mlflow"), ""

    def on_start(self, run_dir: pathlib.Path, settings: Mapping[str, Any], step: int) -> None:
        self._client = self._mlflow.MlflowClient()
        known = _stored_ids(run_dir).get("mlflow") if step else None
        if known is not None:
            self._run = known
            self._client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "tim4rec_jax")
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._run = self._client.create_run(number, run_name=run_dir.name).info.run_id
        _store_id(run_dir, "mlflow", self._run)
        for path, value in settings.items():
            self._client.log_param(self._run, path, shortened(str(value), 500))

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, _finite(values, "train"))

    def on_evaluation(self, part: str, step: int, metrics: Mapping[str, float]) -> None:
        self._log(step, _finite(metrics, part))

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name.replace("@", "_at_"), value, step=step)

    def on_end(self, results: Mapping[str, Any] | None, error: str | None) -> None:
        self._client.set_terminated(self._run, "FINISHED" if error is None else "FAILED")


class WeightsAndBiases(Callback):
    """Writes settings, curves and metrics to Weights & Biases, as its WANDB_* variables say.

    The project is that of WANDB_PROJECT, or "tim4rec_jax"; the run is called by its folder, and a resumed run goes on
    with the same one. Its steps only grow, so the test's metrics, of the best epoch, stand in the summary.

    Raises:
      ValueError: wandb is not installed.
    """

    def __init__(self) -> None:
        self._wandb, self._run = _imported("wandb"), None

    def on_start(self, run_dir: pathlib.Path, settings: Mapping[str, Any], step: int) -> None:
        known = _stored_ids(run_dir).get("wandb") if step else None
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tim4rec_jax"),
            dir=str(run_dir),
            name=run_dir.name,
            config=dict(settings),
            id=known,
            resume="allow",
        )
        _store_id(run_dir, "wandb", self._run.id)

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        self._running.log(_finite(values, "train"), step=step)

    def on_evaluation(self, part: str, step: int, metrics: Mapping[str, float]) -> None:
        if part == "test":
            self._running.summary.update(_finite(metrics, part))
        else:
            self._running.log(_finite(metrics, part), step=step)

    @property
    def _running(self) -> Any:
        assert self._run is not None
        return self._run

    def on_end(self, results: Mapping[str, Any] | None, error: str | None) -> None:
        self._running.finish(exit_code=0 if error is None else 1)
