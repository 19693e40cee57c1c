"""Trains models on one log with several seeds each and puts them side by side, with their spread and significance.

    python -m experiments.compare --data=ml-100k --models=tim4rec,ssd4rec,sasrec --seeds=3
    python -m experiments.compare --data=ml-1m --seeds=2020,7,11 --epochs=10 --train.batch_size=256 --jobs=2
    python -m experiments.compare --data=ml-100k --seeds=3 --report-only
    python -m experiments.compare --rows "faithful=runs/a/seed_*" "causal=runs/b/seed_*" --output=runs/time_branch

Only what is not there yet is trained; the same command goes on after Ctrl-C, SIGTERM, a crash or a kill. All models run
with the first seed, then with the second. Any setting of `tim4rec_jax.config` given by its path holds for every model.
With --rows nothing is trained: runs that are there, of any settings but tested on the same, are put side by side.
Writes <output>.md, <output>.json and <output>.png, and with --latex=table.tex a table for LaTeX. What cannot be
trained with these settings, or on this log, is refused before anything is. Exit codes: 0 done, 2 an error or a training
that failed, 130 stopped by Ctrl-C and 0 by SIGTERM with the state saved.
"""

from rich.console import Console

from experiments.cli import has_option, program
from experiments.comparison.numbers import collect
from experiments.comparison.plan import Plan, parse, parse_rows, require_fit, require_same_settings
from experiments.comparison.report import write_report
from experiments.family import file_name
from experiments.runs import Job, is_finished, options, processor_shares, train_all
from tim4rec_jax.data.interactions import load_log
from tim4rec_jax.training.signals import exit_code


def train_missing(plan: Plan, jobs: int, console: Console) -> tuple[dict[str, str], int | None]:
    """Trains what is not finished; returns the error of each run that failed and the signal that stopped it, if any."""
    wanted = list(plan.runs_in_order())
    missing = [(model, seed) for model, seed in wanted if not is_finished(plan.folder(model, seed))]

    def report(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    report(f"{len(wanted) - len(missing)} of {len(wanted)} runs are finished, {len(missing)} to train")
    queue = [
        Job(
            f"{model}, seed {seed} ({wanted.index((model, seed)) + 1} of {len(wanted)})",
            plan.folder(model, seed),
            options(plan.config(model, seed), f"{file_name(plan.data_set)}_{model}"),
        )
        for model, seed in missing
    ]
    result = train_all(queue, at_once=jobs, report=report)
    return result.failures, result.stopped_by


def show_report(plan: Plan, note: str, console: Console) -> None:
    """Writes and shows the comparison of what is finished."""
    written = write_report(plan, collect(plan, note))
    console.print(written[0].read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
    console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True)


@program
def main(argv: list[str]) -> int:
    """Trains what is missing and compares, or compares run folders."""
    if has_option(argv, "--rows"):
        of_rows, plan = parse_rows(argv)
        show_report(plan, of_rows.note, Console())
        return 0
    arguments, plan = parse(argv)
    processor_shares(arguments.jobs)
    console, failures = Console(), {}
    if arguments.report_only:
        require_same_settings(plan, None)
    else:
        config = next(iter(plan.configs.values()))
        log = load_log(config.data)
        console.print(log.statistics.table(config.data.name))
        require_same_settings(plan, log.fingerprint)
        require_fit(plan, log)
        del log
        failures, stopped_by = train_missing(plan, arguments.jobs, console)
        if stopped_by is not None:
            console.print("stopped; the same command goes on, and --report-only shows what is finished", soft_wrap=True)
            return exit_code(stopped_by)
    if not failures or any(is_finished(plan.folder(*run)) for run in plan.runs_in_order()):
        show_report(plan, arguments.note, console)
    if failures:
        raise ValueError("trainings failed:\n" + "\n".join(f"{label}: {error}" for label, error in failures.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
