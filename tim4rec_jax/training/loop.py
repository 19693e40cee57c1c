"""The training run: epochs, validation, early stop, checkpoints, and the test of the best epoch."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console

from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.data.interactions import InteractionLog
from tim4rec_jax.data.length_groups import LengthGroup, plan_length_groups, plan_packed_rows
from tim4rec_jax.data.loader import Loader
from tim4rec_jax.data.packed_loader import make_loader
from tim4rec_jax.data.splits import Split, split_log
from tim4rec_jax.evaluation.full_sort import FullSortEvaluator
from tim4rec_jax.evaluation.seen_targets import measured
from tim4rec_jax.models import SequentialModel, build_model
from tim4rec_jax.parallel.item_table import require_shardable
from tim4rec_jax.parallel.mesh import Layout, make_layout
from tim4rec_jax.parallel.processes import is_main, lost_processes_named, restored_everywhere
from tim4rec_jax.run_dir import CHECKPOINTS, read_environment, withdraw_results, write_results, write_test_ranks
from tim4rec_jax.run_environment import processors_allowed
from tim4rec_jax.training.checkpoint import Checkpointer
from tim4rec_jax.training.early_stop import EarlyStop
from tim4rec_jax.training.interruption import Interrupted, StopRequests
from tim4rec_jax.training.logging import MetricLogger, TrainingProgress, plot_training_curves, read_metrics
from tim4rec_jax.training.memory import peak_device_bytes, peak_resident_bytes, resident_mb, return_freed_memory
from tim4rec_jax.training.step import (
    TrainState,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    require_packable,
    train_step,
)

# Drawing takes as long as an epoch of a small log.
SECONDS_BETWEEN_CURVES = 10.0


@dataclass
class Position:
    """Where a run stands between two steps; all of it goes into the checkpoint.

    Attributes:
      epoch: running epoch, from 1.
      batch: batches of it that are done.
      stop: early stopping.
      epoch_losses: sum of the epoch's step losses and their number, as far as they were fetched.
      pending: step losses since the last log line.
      seconds: training time of the epoch before this process took it up.
      finished: the last epoch is done.
    """

    epoch: int = 1
    batch: int = 0
    stop: EarlyStop = field(default_factory=lambda: EarlyStop(0))
    epoch_losses: tuple[float, int] = (0.0, 0)
    pending: list[float] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False

    @property
    def validated(self) -> int:
        """The last epoch whose validation is behind."""
        return self.epoch if self.finished else self.epoch - 1

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"epoch_losses": list(self.epoch_losses)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], patience: int) -> "Position":
        stop = EarlyStop(**(values["stop"] | {"patience": patience}))
        return cls(**(values | {"stop": stop, "epoch_losses": tuple(values["epoch_losses"])}))


@jax.jit
def _all_finite(params: Any) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))


class Trainer:
    """One run of one model on one log.

    With several processes every one has a trainer; that of process 0 writes the run folder.

    Args:
      config: settings with `model.vocab_size` filled in.
      log: cleaned log.
      run_dir: folder made by `run_dir.create_run`.
      resume: go on from the newest checkpoint there, if any.
      stop_requests: those of the program that trains; None listens to signals while `run` does.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        log: InteractionLog,
        run_dir: pathlib.Path,
        *,
        resume: bool,
        stop_requests: StopRequests | None = None,
    ) -> None:
        self.config, self.log, self.run_dir, self.resume = config, log, run_dir, resume
        self._given_stop_requests = stop_requests
        self.split: Split = split_log(log, config.data)
        if len(self.split.train) == 0:
            raise ValueError("the log has 0 training examples: every user has 3 events or fewer; give longer histories")
        if len(self.split.test.users) == 0:
            raise ValueError("the log has 0 test targets; give more users, or longer histories")
        self.model: SequentialModel = build_model(config.model)
        require_packable(config, self.model)
        require_shardable(config)
        self.layout: Layout = make_layout(config.parallel)
        self.loader: Loader = make_loader(
            config, log, self.split.train, self.layout.batch_indices(config.train.batch_size)
        )
        total_steps = config.train.epochs * self.loader.num_batches
        if config.train.max_steps is not None:
            total_steps = min(total_steps, config.train.max_steps)
        self.total_steps = total_steps
        self.schedule = learning_rate_schedule(config.train, total_steps)
        self.optimizer = make_optimizer(config.train, total_steps)
        self.groups = self._plan_groups()
        self.state: TrainState = self.layout.init_sharded(
            lambda: init_state(self.model, self.optimizer, config.train.seed)
        )
        self.resident = self.layout.replicate(self.loader.resident)
        # Known now rather than after training, if nothing is left to test.
        measured(log, self.split.test, config.eval)
        self._validate = FullSortEvaluator(self.model, log, self.split.valid, config, mesh=self.layout.mesh)
        self.position = Position(stop=EarlyStop(config.train.patience))
        self.has_stepped = False
        self._step = None
        self._unfetched: list[Array] = []
        self._drawn = -math.inf

    def _plan_groups(self) -> tuple[LengthGroup, ...]:
        train, max_len = self.config.train, self.config.model.max_len
        options = {
            "batch_size": self.layout.rows_per_device(train.batch_size), "microbatch_tokens": train.microbatch_tokens,
            "platform": jax.default_backend(),
        }  # fmt: skip
        if train.positions == "all":
            return plan_packed_rows(max_len, **options)
        lengths = np.minimum(self.split.train.ends, max_len)
        if train.num_negatives is not None:
            scores = train.num_negatives + 1
        else:
            # With the embedding in parts the scores of whole rows never exist, so they limit nothing.
            scores = 1 if self.layout.catalogue_shards > 1 else self.config.model.vocab_size
        return plan_length_groups(lengths, max_len, max_groups=train.length_groups, vocab_size=scores, **options)

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def run(self) -> dict[str, Any]:
        """Trains, validates each epoch, stops early, tests the best epoch; returns what results.json holds.

        Raises:
          FloatingPointError: a loss or a score is not finite; the checkpoint before it is kept.
          Interrupted: a signal asked to stop; the state is saved.
          CheckpointError: a save failed; the checkpoint before it is kept.
          ProcessError: another process was lost.
        """
        train, examples = self.config.train, len(self.split.train)
        console = None if is_main() else Console(quiet=True)
        with (
            lost_processes_named(),
            TrainingProgress(train.epochs, examples, enabled=train.progress, console=console) as progress,
            MetricLogger(self.run_dir, tensorboard=train.tensorboard, write=is_main()) as logger,
            Checkpointer(self.run_dir / CHECKPOINTS, report=progress.report, write=is_main()) as checkpoints,
            contextlib.nullcontext(self._given_stop_requests) if self._given_stop_requests else StopRequests() as stops,
        ):
            self._progress, self._logger, self._checkpoints = progress, logger, checkpoints
            self._stop_requests = stops
            stops.rest("stopped before training began")
            if self.resume:
                self._restore()
            while not self.position.finished:
                self._train_epoch()
                self._finish_epoch()
            return self._test()

    def _restore(self) -> None:
        restored = restored_everywhere(self._checkpoints.restore_latest, self.state)
        if restored is None:
            self._progress.report("nothing to resume: no checkpoint yet, training starts from the beginning")
            self._logger.truncate_after(0, 0)
            if is_main():
                withdraw_results(self.run_dir)
            return
        step, state, progress = restored
        self.position = Position.from_dict(progress, self.config.train.patience)
        self._require_no_less(step)
        self.state = self.layout.shard(state)
        if self.position.finished and not self._is_last(step):
            self._take_up_again(step)
        self._logger.truncate_after(step, self.position.validated)
        if is_main() and not self.position.finished:
            withdraw_results(self.run_dir)
        self._rest(step)
        self._progress.report(f"resuming at step {step}, epoch {self.position.epoch}, batch {self.position.batch}")
        self._note_processors(step)

    def _require_no_less(self, step: int) -> None:
        """Refuses to go on to an end that lies behind."""
        train, position = self.config.train, self.position
        begun = position.epoch if position.batch else position.epoch - 1
        for name, asked, done in (("epochs", train.epochs, begun), ("max_steps", train.max_steps, step)):
            if asked is not None and asked < done:
                raise ValueError(
                    f"train.{name}={asked} is less than the {done} that this run has behind it; give "
                    f"--train.{name}={done} or more, or choose another run folder"
                )

    def _take_up_again(self, step: int) -> None:
        """Goes on with a run that had finished: a longer one is asked for now."""
        position = self.position
        if position.batch >= self.loader.num_batches:
            self.position = Position(epoch=position.epoch + 1, stop=position.stop)
            return
        # It ended inside an epoch, by train.max_steps, and was validated there; the epoch's own validation comes now.
        position.finished = False
        if not position.stop.improved:
            position.stop = dataclasses.replace(position.stop, failures=position.stop.failures - 1)

    def _note_processors(self, step: int) -> None:
        """Says so where the run began on another number of processors, which decides how XLA splits its sums."""
        if not is_main() or jax.default_backend() != "cpu":
            return
        began, now = read_environment(self.run_dir).get("cpus_allowed"), processors_allowed()
        if began not in (None, now):
            message = (
                f"this run began with {began} processors and goes on with {now}: its numbers may differ in the last "
                "digits from those of a run that was not interrupted"
            )
            self._logger.log("event", step=step, message=message)
            self._progress.report(message)

    def _is_last(self, step: int) -> bool:
        return step >= self.total_steps or self.position.stop.should_stop

    def _compiled_step(self, payload: Any) -> Any:
        """Compiles the step once; the state is donated, so an update needs no second copy of it."""
        if self._step is None:
            self._progress.report(
                "compiling the step for rows of "
                + ", ".join(f"{group.length} ({group.rows} at once)" for group in self.groups)
                + " positions"
                + (f" on each of {self.layout.num_devices} devices" if self.layout.num_devices > 1 else "")
            )
            step = functools.partial(train_step, self.model, self.optimizer, self.config, self.groups, self.loader)
            self._step = self.layout.compile_step(step).lower(self.state, self.resident, payload).compile()
            return_freed_memory()
        return self._step

    def _train_epoch(self) -> None:
        position, train = self.position, self.config.train
        examples = self.loader.examples_before(position.epoch, position.batch)
        self._progress.start_epoch(position.epoch, done=examples)
        done = int(self.state.step)
        for payload in self.loader.epoch(position.epoch, position.batch):
            if done >= self.total_steps:
                break
            payload = self.layout.shard_batch(payload)
            step = self._compiled_step(payload)
            self._stop_requests.keep_going()
            self.has_stepped = True
            self.state, loss = step(self.state, self.resident, payload)
            self._unfetched.append(loss)
            position.batch += 1
            done += 1
            before, examples = examples, self.loader.examples_before(position.epoch, position.batch)
            self._progress.advance(examples - before)
            if done % train.log_every == 0:
                self._log_line(done)
            if (number := self._stop_requests.after(done)) is not None:
                self._save_and_stop(done, number)
            inside = position.batch < self.loader.num_batches and done < self.total_steps
            if train.checkpoint_every and done % train.checkpoint_every == 0 and inside:
                self._save(done)

    def _fetch_losses(self) -> None:
        """Takes the losses of the steps since the last fetch from the device, and stops if one is not finite."""
        losses = [float(loss) for loss in jax.device_get(self._unfetched)]
        self._unfetched.clear()
        bad = next((i for i, loss in enumerate(losses) if not np.isfinite(loss)), None)
        if bad is not None:
            step = int(self.state.step) - len(losses) + bad + 1
            rate = float(self.schedule(step - 1))
            self._logger.log("event", message="loss is not finite", step=step, loss=losses[bad], learning_rate=rate)
            raise self._diverged(f"the loss is {losses[bad]} at step {step} (learning rate {rate:g})")
        total, count = self.position.epoch_losses
        for loss in losses:
            total += loss
        self.position.epoch_losses = (total, count + len(losses))
        self.position.pending += losses

    def _diverged(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"{what}; the last good checkpoint is kept in {self.run_dir}: start anew with a lower train.learning_rate, "
            "or set train.clip_norm"
        )

    def _log_line(self, step: int) -> None:
        self._fetch_losses()
        loss = float(np.mean(self.position.pending))
        self.position.pending = []
        self._logger.log(
            "train", step=step, epoch=self.position.epoch, loss=loss, learning_rate=float(self.schedule(step - 1)),
            examples_per_second=self._progress.examples_per_second,
            seconds=self.position.seconds + self._progress.seconds,
        )  # fmt: skip
        self._progress.advance(0, loss=loss)

    def _save(self, step: int, seconds: float | None = None) -> None:
        """Saves inside an epoch or at its end; `seconds` it was trained for, if not until now."""
        self._fetch_losses()
        if not bool(_all_finite(self.state.params)):
            raise self._diverged(f"parameters are not finite after step {step}")
        seconds = self.position.seconds + self._progress.seconds if seconds is None else seconds
        self._checkpoints.save_latest(step, self.state, self.position.to_dict() | {"seconds": seconds})

    def _rest(self, step: int) -> None:
        self._stop_requests.rest(
            f"stopped at step {step}; the state is saved in {self.run_dir}", self._checkpoints.settle_elsewhere
        )

    def _save_and_stop(self, step: int, number: int) -> None:
        self._progress.report("asked to stop: saving")
        self._save(step)
        self._checkpoints.wait()
        raise Interrupted(f"stopped at step {step}; the state is saved in {self.run_dir}", number)

    def _finish_epoch(self) -> None:
        """Validates, keeps the best, and moves to the next epoch."""
        position = self.position
        self._fetch_losses()
        seconds = position.seconds + self._progress.seconds
        rate = self._progress.examples_per_second
        step = int(self.state.step)
        if position.pending:
            self._log_line(step)
        resident = resident_mb()
        # Whatever happens in validation then costs no epoch.
        self._save(step, seconds)
        self._rest(step)
        result = self._validate(self.state.params)
        return_freed_memory()
        monitor = self.config.eval.monitor
        position.stop = position.stop.after(result.metrics[monitor], position.epoch)
        total, count = position.epoch_losses
        loss = total / max(count, 1)
        self._logger.log(
            "valid", step=step, epoch=position.epoch, train_loss=loss, train_seconds=seconds,
            valid_seconds=result.seconds, examples_per_second=rate, resident_mb=resident,
            peak_resident_bytes=peak_resident_bytes(), **result.metrics,
        )  # fmt: skip
        shown = {monitor: result.metrics[monitor], "best": position.stop.best}
        self._progress.end_epoch(position.epoch, loss=loss, seconds=seconds, rate=rate, metrics=shown)
        if position.stop.improved:
            info = {"epoch": position.epoch, "valid": result.metrics}
            self._checkpoints.save_best(step, self.state.params, info)
        finished = self._is_last(step)
        if not finished:
            self.position = Position(epoch=position.epoch + 1, stop=position.stop)
        position = self.position
        position.finished = finished
        # What a run that ended inside an epoch needs to go on with it.
        spent = {"seconds": seconds} if finished else {}
        self._checkpoints.save_latest(step, self.state, position.to_dict() | spent)
        if is_main() and (finished or time.perf_counter() - self._drawn > SECONDS_BETWEEN_CURVES):
            plot_training_curves(self.run_dir, monitor=monitor)
            self._drawn = time.perf_counter()

    def _test(self) -> dict[str, Any]:
        """Tests the best epoch once and writes results.json; its costs are known to the process that writes."""
        self._rest(int(self.state.step))
        restored = restored_everywhere(self._checkpoints.restore_best, self.state.params)
        if restored is None:
            raise ValueError(f"{self.run_dir} has no best checkpoint; remove the folder and train again")
        step, params, info = restored
        started = time.perf_counter()
        test = FullSortEvaluator(self.model, self.log, self.split.test, self.config, mesh=self.layout.mesh)
        result = test(self.layout.shard(params))
        self._logger.log(
            "test", step=step, epoch=info["epoch"], seconds=time.perf_counter() - started, **result.metrics
        )
        results = {
            "model": self.config.model.name,
            "use_time": self.config.model.use_time,
            "seed": self.config.train.seed,
            "parameters": self.num_parameters,
            "epochs": self.position.epoch,
            "steps": int(self.state.step),
            "best_epoch": info["epoch"],
            "valid": info["valid"],
            "test": result.metrics,
        }
        results |= result.measured.report()
        if self.split.report:
            results["split"] = dataclasses.asdict(self.split.report)
        if not is_main():
            return results
        results |= self._costs()
        write_test_ranks(self.run_dir, self.log.user_ids[result.measured.examples.users], result.ranks)
        write_results(self.run_dir, results)
        return results

    def _costs(self) -> dict[str, Any]:
        """Time and memory of the whole run, of the processes before this one too if it was resumed."""
        epochs = [line for line in read_metrics(self.run_dir) if line["kind"] == "valid"]
        peaks = [line.get("peak_resident_bytes", 0) for line in epochs]
        return {
            "seconds_per_epoch": statistics.median(line["train_seconds"] for line in epochs if "train_seconds" in line),
            "peak_resident_bytes": max([*peaks, peak_resident_bytes()]),
            "peak_device_bytes": peak_device_bytes(),
        }
