"""Trains a model on a log, tests its best epoch, and leaves a run folder.

    python -m experiments.train --config=quickstart
    python -m experiments.train --config=ml1m_tim4rec --train.learning_rate=3e-4 --run_dir=runs/try
    python -m experiments.train --config=ml1m_tim4rec --resume
    python -m experiments.train --config=ml1m_tim4rec --init_from=runs/yesterday --run_dir=runs/today
    python -m experiments.train --config=ml1m_tim4rec --data.split=none --train.epochs=30 --run_dir=runs/final
    python -m experiments.train --config=quickstart --profile=20
    python -m experiments.train --config=ml1m_tim4rec --parallel.distributed=auto   # in every task of SLURM

It trains on all devices of the machine, unless --parallel.strategy=single. On several machines every process gets the
same options, but for --parallel.process_id where the processes are counted by hand; process 0 writes the run folder.

Every setting of `tim4rec_jax.config` is an option by its path. Exit codes: 0 done, 2 an error (one line on standard
error), 130 stopped by Ctrl-C and 0 by SIGTERM with the state saved.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence

from rich.console import Console

from experiments.cli import parse_settings, run_program
from experiments.comparison.published import final_tables
from experiments.configs import chosen, config_names
from experiments.evaluate import parts_table
from experiments.family import of_model
from tim4rec_jax.checks import require
from tim4rec_jax.config import DataConfig, EvalConfig, ExperimentConfig, ParallelConfig, TrainConfig
from tim4rec_jax.data.interactions import load_log
from tim4rec_jax.data.splits import split_log
from tim4rec_jax.devices import require_capture, require_kernels
from tim4rec_jax.evaluation.baselines import popularity_metrics
from tim4rec_jax.evaluation.seen_targets import TITLES, by_protocol, main_protocol, other_protocol
from tim4rec_jax.model_config import ModelConfig
from tim4rec_jax.models import model_class
from tim4rec_jax.parallel.processes import ProcessError, initialize, is_main, quiet_unless_main
from tim4rec_jax.run_dir import CONFIG, read_config, write_results
from tim4rec_jax.training.callbacks import trackers
from tim4rec_jax.training.loop import only_writer, train
from tim4rec_jax.training.signals import StopRequests


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of the program; the settings start from the named experiment.

    Attributes:
      model, data, train, eval, parallel: settings, each an option by its path.
      config: the experiment's name.
      run_dir: run folder; None is runs/<name of the experiment>.
      resume: continue the run in that folder.
      init_from: short for --train.init_from.
      profile: trace so many steps after the warm-up into the run folder, for Perfetto and XProf.
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig
    parallel: ParallelConfig
    config: str
    run_dir: pathlib.Path | None = None
    resume: bool = False
    init_from: pathlib.Path | None = None
    profile: int | None = None

    def __post_init__(self) -> None:
        require(self.profile is None or self.profile >= 1, f"--profile={self.profile} must be at least 1, in steps")


def parse(argv: Sequence[str]) -> tuple[ExperimentConfig, pathlib.Path, bool]:
    """Reads settings, the run folder and whether to resume; ValueError names the nearest of what is unknown."""
    config, given = parse_all(argv)
    return config, given.run_dir or pathlib.Path("runs") / config.name, given.resume


def parse_all(argv: Sequence[str]) -> tuple[ExperimentConfig, Arguments]:
    """Reads settings and all options, as `parse`."""
    base, model = chosen(argv)
    default = Arguments(model, base.data, base.train, base.eval, base.parallel, base.name)
    about = f"Experiments: {', '.join(config_names())}"
    given = parse_settings(Arguments, argv, default, prog="experiments.train", description=about)
    training = given.train
    if given.init_from is not None:
        short, long = str(given.init_from), training.init_from
        require(long in (None, short), f"--init_from={short} and --train.init_from={long} differ; give one of them")
        training = dataclasses.replace(training, init_from=short)
    if training.init_from is not None and not given.resume:
        read_config(pathlib.Path(training.init_from))  # No log is read where there is no such run.
    config = ExperimentConfig(base.name, given.model, given.data, training, given.eval, given.parallel)
    trackers(config.train.trackers)  # Whether they are installed is known before a log is read.
    if not config.parallel.several_processes:  # They meet before any of them asks for its device.
        require_kernels(config.model)
        require_capture(config.train.capture)
    return config, given


def run(
    config: ExperimentConfig,
    run_dir: pathlib.Path,
    console: Console,
    stops: StopRequests,
    *,
    resume: bool,
    profile: int | None = None,
) -> None:
    """Trains the model and its baselines and prints the final table."""
    log = load_log(config.data)
    console.print(log.statistics.table(config.data.name))
    if report := split_log(log, config.data).report:
        console.print(report.table())

    def trained(name: str, config: ExperimentConfig, folder: pathlib.Path, profile: int | None = None) -> dict:
        results = train(config, log, folder, resume=resume, stop_requests=stops, profile=profile)
        found = by_protocol(results, "test", config.eval)
        rows.append((name, found, f"this run, best epoch {results['best_epoch']} of {results['epochs']}"))
        return results

    rows, name = [], config.model.name
    results = trained(name, config, run_dir, profile)
    if not config.data.holds_out:
        console.print(
            f"data.split=none: every event trains, nothing validates or tests, and epoch {results['epochs']} is kept; "
            "eval.baselines are left out",
            soft_wrap=True,
        )
        console.print(f"run folder: {run_dir}", soft_wrap=True)
        return
    if "time_off" in config.eval.baselines and (without_time := model_class(name).without_time) is not None:
        console.print("the same model with time off")
        plain = dataclasses.replace(config, model=of_model(config.model, without_time), train=_of_time_off(config))
        with only_writer(run_dir / "time_off"):
            trained(f"{name}, time off", plain, run_dir / "time_off")
    if "popularity" in config.eval.baselines:
        rows.append(("popularity", popularity_metrics(log, config), "this log, counts of the training part"))
    if is_main():
        others = {name: found for name, found, _ in rows[1:]}
        main, other = (protocol(config.eval) for protocol in (main_protocol, other_protocol))
        results |= {"baselines": {name: found[main] for name, found in others.items()}}
        results |= {f"baselines_{other}": {name: found[other] for name, found in others.items() if other in found}}
        write_results(run_dir, results)
    console.print(*final_tables(config, rows, results["seen_target_share"]))
    for protocol, of_protocol in by_protocol(results, "test_parts", config.eval).items():
        console.print(*(parts_table(f"{name}, {TITLES[protocol]}", parts) for name, parts in of_protocol.items()))
    console.print(f"run folder: {run_dir}", soft_wrap=True)


def _of_time_off(config: ExperimentConfig) -> TrainConfig:
    """The training of the model with time off, which begins with the one that was trained beside `train.init_from`."""
    if config.train.init_from is None:
        return config.train
    beside = pathlib.Path(config.train.init_from) / "time_off"
    return dataclasses.replace(config.train, init_from=str(beside) if (beside / CONFIG).is_file() else None)


def program(argv: list[str]) -> int:
    """The program behind `main`."""
    config, given = parse_all(argv)
    run_dir = given.run_dir or pathlib.Path("runs") / config.name
    initialize(config.parallel)
    with quiet_unless_main():
        try:
            with StopRequests() as stops, only_writer(run_dir):
                run(config, run_dir, Console(), stops, resume=given.resume, profile=given.profile)
        except ProcessError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            # JAX's orderly end at exit waits for all processes, and one of them is gone.
            os._exit(2)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    return run_program(program, argv)


if __name__ == "__main__":
    raise SystemExit(main())
