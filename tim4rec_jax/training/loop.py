"""The training run: data, model, optimiser, epochs with validation and early stop, and the test of the best epoch."""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console

from kernels.dispatch import recording, runs_interpreted
from tim4rec_jax.config import ExperimentConfig, flat
from tim4rec_jax.data.interactions import InteractionLog
from tim4rec_jax.devices import device_line, require_capture, require_kernels
from tim4rec_jax.evaluation.full_sort import FullSortEvaluator
from tim4rec_jax.evaluation.seen_targets import ALL_ITEMS
from tim4rec_jax.figures import HINT, can_draw
from tim4rec_jax.files import locked
from tim4rec_jax.memory import (
    keep_freed_memory,
    peak_device_bytes,
    peak_resident_bytes,
    resident_mb,
    return_freed_memory,
)
from tim4rec_jax.models import build_model
from tim4rec_jax.parallel.processes import (
    is_main,
    lost_processes_named,
    on_main,
    require_same_start,
    restored_everywhere,
)
from tim4rec_jax.run_dir import (
    CHECKPOINTS,
    CURVES,
    PROFILE,
    create_run,
    discard_run,
    has_begun,
    read_config,
    read_environment,
    withdraw_results,
    write_config,
    write_results,
    write_test_ranks,
)
from tim4rec_jax.run_environment import processors_allowed
from tim4rec_jax.training.callbacks import Callback, Callbacks, require_callbacks, trackers
from tim4rec_jax.training.checkpoint import Checkpointer, leaves_on_host
from tim4rec_jax.training.logging import (
    MetricLogger,
    TrainingProgress,
    plot_training_curves,
    read_metrics,
)
from tim4rec_jax.training.profiling import StepProfile
from tim4rec_jax.training.progress import EarlyStop, Progress
from tim4rec_jax.training.setup import Setup, with_data
from tim4rec_jax.training.signals import Interrupted, StopRequests
from tim4rec_jax.training.step import TrainState
from tim4rec_jax.training.warm_start import WarmStart, require_fits, warm_params

# Drawing takes as long as an epoch of a small log.
SECONDS_BETWEEN_CURVES = 10.0


def train(
    config: ExperimentConfig,
    log: InteractionLog,
    run_dir: pathlib.Path,
    *,
    resume: bool = False,
    stop_requests: StopRequests | None = None,
    callbacks: Sequence[Callback] = (),
    profile: int | None = None,
) -> dict[str, Any]:
    """Trains one model on one log, validates each epoch, stops early and tests the best epoch.

    A start that is refused leaves no run folder, and one that was there as it was. With several processes all call it;
    process 0 writes the folder. Hold `only_writer` where others may write there too.

    Args:
      config: settings; what the data decide is filled in, see `with_data`.
      log: cleaned log.
      run_dir: run folder, made or taken up again.
      resume: go on from the newest checkpoint there, if any.
      stop_requests: those of the program that trains; None listens to signals meanwhile.
      callbacks: are told of the run, beside those of train.trackers.
      profile: trace so many steps into the run folder, see `profiling`; None traces none.

    Returns:
      What results.json holds.

    Raises:
      ValueError: the settings do not fit the data, each other or the run folder, or a callback does not start.
      FloatingPointError: a loss or a score is not finite; the checkpoint before it is kept.
      Interrupted: a signal asked to stop; the state is saved.
      CheckpointError: a save failed; the checkpoint before it is kept.
      ProcessError: another process was lost.
    """
    keep_freed_memory()
    require_kernels(config.model)
    require_capture(config.train.capture)
    require_callbacks(callbacks)
    told = [*callbacks, *trackers(config.train.trackers)] if is_main() else []
    given, config = config, with_data(config, log)
    if config.train.init_from is not None and not (resume and has_begun(run_dir)):
        require_fits(pathlib.Path(config.train.init_from), build_model(config.model))
    require_same_start(config, log.fingerprint)
    setup = Setup(config, log)
    with _session(setup, pathlib.Path(run_dir), resume, stop_requests, told, profile) as session:
        if (multiple := config.model.vocab_multiple) != given.model.vocab_multiple:
            session.bar.report(
                f"model.vocab_multiple={multiple}: the item embedding gets so many rows, for equal shards"
            )
        named = [op for op in config.model.OPERATORS if config.model.kernels in op.IMPLEMENTATIONS]
        if any(runs_interpreted(op.__name__, op.IMPLEMENTATIONS, str(config.model.kernels)) for op in named):
            session.bar.report(
                f"model.kernels={config.model.kernels}: there is no GPU here, so the kernels are interpreted, "
                "which takes many times as long as plain JAX; leave it out for that"
            )
        state, progress = setup.init_state(), Progress(stop=EarlyStop(config.train.patience))
        if resume:
            state, progress = _restore(session, state, progress)
        else:
            session.begin(progress)
        if config.train.init_from is not None and progress.step == 0:
            state = _warm_started(session, state)
        while not progress.finished:
            state = _train_epoch(session, state, progress)
            progress = _validate_epoch(session, state, progress)
        return _test(session, state, progress)


@contextlib.contextmanager
def only_writer(run_dir: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a run folder in process 0, which writes it.

    Raises:
      ValueError: another process is writing it.
      ProcessError: in the other processes, if it raised in process 0.
    """
    run_dir = run_dir.resolve()
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            run_dir.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(run_dir))

        on_main(lock)
        yield


class Session:
    """One process at work on a run: where it reports, logs and saves, and how it is asked to stop.

    Attributes:
      has_stepped: an update was made, or was about to be.
      begun: what is to be logged with the first step, for a run without a step leaves nothing.
    """

    def __init__(
        self,
        setup: Setup,
        run_dir: pathlib.Path,
        bar: TrainingProgress,
        logger: MetricLogger,
        checkpoints: Checkpointer,
        stops: StopRequests,
        callbacks: Sequence[Callback],
        profile: int | None,
    ) -> None:
        self.callbacks = Callbacks(callbacks, self.callback_failed)
        self.profile = StepProfile(profile if is_main() else None, run_dir / PROFILE, bar.report)
        self.setup, self.run_dir, self.config = setup, run_dir, setup.config
        self.bar, self.logger, self.checkpoints, self.stops = bar, logger, checkpoints, stops
        self.started, self.has_stepped = time.perf_counter(), False
        self.begun: dict[str, Any] | None = None
        self.steps: dict[int, Any] = {}
        self.losses: list[Array] = []
        self.drawn = -math.inf

    def compiled_steps(self, state: TrainState, batches: tuple[Any, ...]) -> Any:
        """Returns what takes so many steps at once, compiled the first time."""
        if (steps := len(batches)) not in self.steps:
            devices = self.setup.layout.num_devices
            rows = ", ".join(f"{group.length} ({group.rows} at once)" for group in self.setup.groups)
            where = f" on each of {devices} devices" if devices > 1 else ""
            step = "the step" if steps == 1 else f"{steps} steps"
            self.bar.report(f"compiling {step} for rows of {rows} positions{where}")
            with recording() as names:
                compiled = self.setup.compile_steps(state, batches)
            if not self.steps:
                self.bar.report(device_line(names))
            self.steps[steps] = compiled
            return_freed_memory()
        return self.steps[steps]

    def steps_at_once(self, progress: Progress) -> int:
        """Returns how many steps are taken before anything else is done: all of a dispatch, or one; 0 at the end."""
        train, step = self.config.train, progress.step
        left = min(self.setup.loader.num_batches - progress.batch, self.setup.total_steps - step)
        pauses = [every - step % every for every in (train.log_every, train.checkpoint_every) if every]
        return train.steps_per_dispatch if train.steps_per_dispatch <= min(left, *pauses) else min(left, 1)

    def fetch_losses(self, progress: Progress) -> None:
        """Takes the losses of the steps since the last fetch from the device, and stops if one is not finite."""
        losses = [float(loss) for several in jax.device_get(self.losses) for loss in several]
        self.losses.clear()
        bad = next((i for i, loss in enumerate(losses) if not np.isfinite(loss)), None)
        if bad is not None:
            step = progress.step - len(losses) + bad + 1
            rate = float(np.asarray(self.setup.schedule(step - 1)))
            self.logger.log("event", message="loss is not finite", step=step, loss=losses[bad], learning_rate=rate)
            raise self.diverged(f"the loss is {losses[bad]} at step {step} (learning rate {rate:g})")
        progress.count_losses(losses)

    def diverged(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"{what}; the last good checkpoint is kept in {self.run_dir}: start anew with a lower train.learning_rate, "
            "or set train.clip_norm"
        )

    def begin(self, progress: Progress) -> None:
        """Tells the callbacks; the last that may refuse to start, while the folder still is as it was found."""
        self.profile.require_within(self.setup.total_steps - progress.step)
        self.callbacks.start(self.run_dir, flat(self.config.to_dict()), progress.step)

    def callback_failed(self, message: str) -> None:
        self.logger.log("event", message=message)
        self.bar.report(message)

    def log_line(self, progress: Progress) -> None:
        """Logs the mean loss of the steps since the last line."""
        self.fetch_losses(progress)
        loss = float(np.mean(progress.pending))
        progress.pending = []
        values = {
            "epoch": progress.epoch,
            "loss": loss,
            "learning_rate": float(np.asarray(self.setup.schedule(progress.step - 1))),
            "examples_per_second": self.bar.examples_per_second,
            "seconds": progress.seconds + self.bar.seconds,
        }
        self.logger.log("train", step=progress.step, **values)
        self.callbacks.tell("on_log", progress.step, values)
        self.bar.advance(0, loss=loss)

    def save(self, state: TrainState, progress: Progress, seconds: float | None = None) -> None:
        """Saves inside an epoch or at its end; `seconds` it was trained for, if not until now."""
        self.fetch_losses(progress)
        if not bool(_all_finite(state.params)):
            raise self.diverged(f"parameters are not finite after step {progress.step}")
        seconds = progress.seconds + self.bar.seconds if seconds is None else seconds
        self.checkpoints.save_latest(progress.step, state, progress.to_dict() | {"seconds": seconds})
        self.callbacks.tell("on_checkpoint", progress.step, self.run_dir / CHECKPOINTS)

    def rest(self, progress: Progress) -> None:
        """Says that every step taken is saved or being saved: the run may be stopped from now on."""
        self.stops.rest(self.stopped_at(progress), self.checkpoints.settle_elsewhere)

    def stopped_at(self, progress: Progress) -> str:
        return f"stopped at step {progress.step}; the state is saved in {self.run_dir}"

    def is_last(self, progress: Progress) -> bool:
        """Tells whether training ends with this step, or with the validation behind."""
        return progress.step >= self.setup.total_steps or progress.stop.should_stop


@jax.jit
def _all_finite(params: Any) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))


@contextlib.contextmanager
def _session(
    setup: Setup,
    run_dir: pathlib.Path,
    resume: bool,
    stop_requests: StopRequests | None,
    callbacks: Sequence[Callback],
    profile: int | None,
) -> Iterator[Session]:
    """Makes or opens the run folder; one in which no step was taken is left as it was, or not at all."""
    train, session = setup.config.train, None
    before = on_main(lambda: read_config(run_dir) if has_begun(run_dir) else None)
    on_main(lambda: create_run(run_dir, setup.config, setup.log, resume=resume))
    console = None if is_main() else Console(quiet=True)
    try:
        with (
            lost_processes_named(),
            TrainingProgress(train.epochs, len(setup.split.train), enabled=train.progress, console=console) as bar,
            MetricLogger(run_dir, tensorboard=train.tensorboard, write=is_main()) as logger,
            Checkpointer(run_dir / CHECKPOINTS, report=bar.report, write=is_main()) as checkpoints,
            contextlib.nullcontext(stop_requests) if stop_requests else StopRequests() as stops,
        ):
            session = Session(setup, run_dir, bar, logger, checkpoints, stops, callbacks, profile)
            stops.rest("stopped before training began")
            try:
                yield session
            except BaseException as error:
                session.callbacks.tell("on_end", None, f"{type(error).__name__}: {error}")
                raise
            finally:
                session.profile.close()
    except Interrupted:
        raise
    except Exception:
        if is_main() and not (session and session.has_stepped):
            with contextlib.suppress(OSError):  # Of a full disk the error above is the one to tell.
                discard_run(run_dir) if before is None else write_config(run_dir, before)
        raise


def _restore(session: Session, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
    """Returns the state and progress of the newest checkpoint, or those given where there is none."""
    restored = restored_everywhere(session.checkpoints.restore_latest, state)
    if restored is None:
        session.begin(progress)
        session.bar.report("nothing to resume: no checkpoint yet, training starts from the beginning")
        session.logger.truncate_after(0, 0)
        if is_main():
            withdraw_results(session.run_dir)
        return state, progress
    step, saved, values = restored
    progress = Progress.from_dict(values, step=step, patience=session.config.train.patience)
    _require_no_less(session, progress)
    state = session.setup.layout.shard(saved)
    if progress.finished and not session.is_last(progress):
        progress = _taken_up_again(session, progress)
    session.begin(progress)
    session.logger.truncate_after(step, progress.validated)
    if is_main() and not progress.finished:
        withdraw_results(session.run_dir)
    session.rest(progress)
    session.bar.report(f"resuming at step {step}, epoch {progress.epoch}, batch {progress.batch}")
    _note_processors(session, step)
    return state, progress


def _warm_started(session: Session, state: TrainState) -> TrainState:
    """Returns the state before the first step with the parameters of `train.init_from`."""
    setup, run = session.setup, pathlib.Path(str(session.config.train.init_from))

    def read(fresh: Any) -> tuple[int, Any, dict[str, Any]]:
        whole = [leaf.data for leaf in leaves_on_host(state.params).values()]
        fresh = jax.tree.unflatten(jax.tree.structure(fresh), whole)
        params, about = warm_params(run, setup.model, setup.log, setup.split, fresh, report=session.bar.report)
        return about.step, params, dataclasses.asdict(about)

    _, params, values = restored_everywhere(read, state.params) or (0, state.params, {})
    lines = WarmStart(**values).lines(setup.split)
    for line in lines:
        session.bar.report(line)
    session.begun = {"message": "; ".join(lines), "init_from": values}
    return dataclasses.replace(state, params=setup.layout.shard(params))


def _require_no_less(session: Session, progress: Progress) -> None:
    """Refuses to go on to an end that lies behind."""
    train, begun = session.config.train, progress.epoch if progress.batch else progress.epoch - 1
    for name, asked, done in (("epochs", train.epochs, begun), ("max_steps", train.max_steps, progress.step)):
        if asked is not None and asked < done:
            raise ValueError(
                f"train.{name}={asked} is less than the {done} that this run has behind it; give "
                f"--train.{name}={done} or more, or choose another run folder"
            )


def _taken_up_again(session: Session, progress: Progress) -> Progress:
    """Returns where a run that had finished goes on: a longer one is asked for now."""
    if progress.batch >= session.setup.loader.num_batches:
        return progress.next_epoch()
    # It ended inside an epoch, by train.max_steps, and was validated there; the epoch's own validation comes now.
    failures = progress.stop.failures
    unchanged = progress.stop.improved or progress.stop.best is None
    stop = progress.stop if unchanged else dataclasses.replace(progress.stop, failures=failures - 1)
    return dataclasses.replace(progress, finished=False, stop=stop)


def _note_processors(session: Session, step: int) -> None:
    """Says so where the run began on another number of processors, which decides how XLA splits its sums."""
    if not is_main() or jax.default_backend() != "cpu":
        return
    began, now = read_environment(session.run_dir).get("cpus_allowed"), processors_allowed()
    if began not in (None, now):
        message = (
            f"this run began with {began} processors and goes on with {now}: its numbers may differ in the last "
            "digits from those of a run that was not interrupted"
        )
        session.logger.log("event", step=step, message=message)
        session.bar.report(message)


def _train_epoch(session: Session, state: TrainState, progress: Progress) -> TrainState:
    """Takes the steps that are left of an epoch."""
    setup, train = session.setup, session.config.train
    examples = setup.loader.examples_before(progress.epoch, progress.batch)
    session.bar.start_epoch(progress.epoch, done=examples)
    with contextlib.closing(setup.loader.epoch(progress.epoch, progress.batch)) as batches:
        while count := session.steps_at_once(progress):
            taken = tuple(setup.layout.shard_batch(batch) for batch in itertools.islice(batches, count))
            steps = session.compiled_steps(state, taken)
            session.stops.keep_going()
            session.has_stepped = True
            session.profile.before_steps()
            state, losses = steps(state, setup.device_data, taken)
            if session.begun is not None:
                session.logger.log("event", step=0, **session.begun)
                session.begun = None
            session.profile.after_steps(count, losses)
            session.losses.append(losses)
            progress.batch += count
            progress.step += count
            before, examples = examples, setup.loader.examples_before(progress.epoch, progress.batch)
            session.bar.advance(examples - before)
            if progress.step % train.log_every == 0:
                session.log_line(progress)
            # Processes agree on a step to stop after; each of the steps is asked for, and all of the dispatch are done.
            asked = [session.stops.after(step) for step in range(progress.step - count + 1, progress.step + 1)]
            if (number := next((a for a in asked if a is not None), None)) is not None:
                session.bar.report("asked to stop: saving")
                session.save(state, progress)
                session.checkpoints.wait()
                raise Interrupted(session.stopped_at(progress), number)
            inside = progress.batch < setup.loader.num_batches and progress.step < setup.total_steps
            if train.checkpoint_every and progress.step % train.checkpoint_every == 0 and inside:
                session.save(state, progress)
    return state


def _validate_epoch(session: Session, state: TrainState, progress: Progress) -> Progress:
    """Validates, if anything is held out, keeps the best, and returns where the next epoch starts."""
    logger, bar, monitor = session.logger, session.bar, session.config.eval.monitor
    session.fetch_losses(progress)
    seconds, rate = progress.seconds + bar.seconds, bar.examples_per_second
    if progress.pending:
        session.log_line(progress)
    resident = resident_mb()
    # Whatever happens in validation then costs no epoch.
    session.save(state, progress, seconds)
    session.rest(progress)
    metrics, valid, valid_seconds = {}, {"valid": {}}, 0.0
    if session.setup.validate is not None:
        result = session.setup.validate({**state.params, **session.setup.statistics})
        metrics, valid, valid_seconds = result.metrics, result.record("valid"), result.seconds
        return_freed_memory()
        progress.stop = progress.stop.after(metrics[monitor], progress.epoch)
    total, count = progress.epoch_losses
    loss = total / max(count, 1)
    logger.log(
        "valid",
        step=progress.step,
        epoch=progress.epoch,
        train_loss=loss,
        train_seconds=seconds,
        valid_seconds=valid_seconds,
        examples_per_second=rate,
        resident_mb=resident,
        peak_resident_bytes=peak_resident_bytes(),
        **metrics,
    )
    if metrics:
        session.callbacks.tell("on_evaluation", "valid", progress.step, metrics)
    shown = {monitor: metrics[monitor], "best": progress.stop.best} if metrics else {}
    bar.end_epoch(progress.epoch, loss=loss, seconds=seconds, rate=rate, metrics=shown)
    # Where nothing validates the last epoch counts as the best.
    if progress.stop.improved or (not metrics and session.is_last(progress)):
        best = {**state.params, **session.setup.statistics}
        session.checkpoints.save_best(progress.step, best, {"epoch": progress.epoch, **valid})
    if session.is_last(progress):
        # The seconds are what a run that ended inside an epoch needs to go on with it.
        progress = dataclasses.replace(progress, finished=True, seconds=seconds)
    else:
        progress = progress.next_epoch()
    session.checkpoints.save_latest(progress.step, state, progress.to_dict())
    if is_main() and can_draw() and (progress.finished or time.perf_counter() - session.drawn > SECONDS_BETWEEN_CURVES):
        plot_training_curves(session.run_dir, monitor=monitor)
        session.drawn = time.perf_counter()
    if progress.finished and not can_draw():
        bar.report(f"{CURVES} is not drawn: {HINT}")
    return progress


def _test(session: Session, state: TrainState, progress: Progress) -> dict[str, Any]:
    """Tests the best epoch once, if anything is held out, and writes results.json; costs are known to its writer."""
    setup, config, run_dir = session.setup, session.config, session.run_dir
    session.rest(progress)
    restored = restored_everywhere(session.checkpoints.restore_best, {**state.params, **setup.statistics})
    if restored is None:
        raise ValueError(f"{run_dir} has no best checkpoint; remove the folder and train again")
    step, params, info = restored
    metrics, ranked = {}, None
    if config.data.holds_out:
        started = time.perf_counter()
        test = FullSortEvaluator(setup.model, setup.log, setup.split.test, config, mesh=setup.layout.mesh)
        ranked = test({**setup.layout.shard(params), **setup.statistics})
        metrics, seconds = ranked.metrics, time.perf_counter() - started
        session.logger.log("test", step=step, epoch=info["epoch"], seconds=seconds, **metrics)
        session.callbacks.tell("on_evaluation", "test", step, metrics)
    results = {
        "model": config.model.name,
        "seed": config.train.seed,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "epochs": progress.epoch,
        "steps": progress.step,
        "best_epoch": info["epoch"],
        **{name: metrics for name, metrics in info.items() if name.startswith("valid")},
        "test": metrics,
    }
    if ranked is not None:
        results |= ranked.record("test") | ranked.measured.report()
    if setup.split.report:
        results["split"] = dataclasses.asdict(setup.split.report)
    if is_main():
        lines = read_metrics(run_dir)
        if begun := [line["init_from"] for line in lines if "init_from" in line]:
            results["init_from"] = begun[-1]
        results |= _costs(lines)
        results["wall_seconds_of_this_process"] = time.perf_counter() - session.started
        if ranked is not None:
            users = setup.log.user_ids[ranked.by_protocol[ALL_ITEMS].measured.examples.users]
            others = {} if ranked.other is None else {ranked.other.measured.protocol_name: ranked.other.ranks_of_part}
            write_test_ranks(run_dir, users, ranked.ranks_of_part, others)
        write_results(run_dir, results)
    session.callbacks.tell("on_end", results, None)
    return results


def _costs(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Time and memory of the whole run from its metrics, of the processes before this one too if it was resumed."""
    epochs = [line for line in lines if line["kind"] == "valid"]
    peaks = [line.get("peak_resident_bytes", 0) for line in epochs]
    return {
        "seconds_per_epoch": statistics.median(line["train_seconds"] for line in epochs if "train_seconds" in line),
        "peak_resident_bytes": max([*peaks, peak_resident_bytes()]),
        "peak_device_bytes": peak_device_bytes(),
    }
