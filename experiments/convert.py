"""Makes a run folder from a checkpoint of an original PyTorch program, or such a checkpoint from a run folder.

    python -m experiments.convert --checkpoint=m.pth --settings=config.yaml --output=runs/theirs --data.path=log.inter
    python -m experiments.convert --checkpoint=m.pth --settings=config.yaml --output=runs/theirs --config=ml1m_tim4rec
    python -m experiments.convert --run=runs/ml1m_tim4rec --output=model.pth

TiM4Rec, SSD4Rec, Mamba4Rec, EchoMamba4Rec, SASRec and TiSASRec in RecBole's form. The checkpoint is a state dict, or a
dict with "state_dict", "model_state_dict" or "model"; nothing in it is executed. The settings are the program's YAML
file. `experiments.evaluate` and `experiments.recommend` read the folder; `experiments.train --resume` trains on from
it.

The other direction writes m.yaml and m.item_ids.csv (index, item_id) beside m.pth, which holds the hash of the ids. On
the way back the ids are found there, and rows and log are brought together by them. For a checkpoint from elsewhere
--item_ids=FILE names its ids: CSV or Parquet with item_id and index, or text with an id per line. Without them row i of
the item table is taken to be the i-th item by first appearance in the cleaned log, which must be the one that the model
was trained on.
Writing a checkpoint needs PyTorch: pip install torch
"""

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from experiments.cli import parse_settings, peek, program
from experiments.configs import load_config
from tim4rec_jax.config import DataConfig, EvalConfig, ExperimentConfig, TrainConfig
from tim4rec_jax.interop.conversion import checkpoint_from_run, run_from_checkpoint

# What describes a checkpoint to read.
_OF_CHECKPOINTS = ("checkpoint", "settings", "model", "item_ids")


@dataclass(frozen=True)
class Arguments:
    """Options of the program; `data`, `train` and `eval` start from the named experiment.

    Attributes:
      data: the log that the model was trained on.
      train: what `experiments.train --resume` would go on with.
      eval: how `experiments.evaluate` measures.
      config: experiment whose log and settings to use; None is a log of your own (`--data.path`).
      checkpoint: file that torch.save wrote.
      settings: the original program's YAML file.
      model: the original program; None takes it from the YAML file, or from the names in the checkpoint.
      item_ids: raw id of every row of the checkpoint's item table; None looks for m.item_ids.csv beside m.pth.
      run: run folder to write as a checkpoint, instead of reading one.
      output: run folder to make, or checkpoint file to write with --run.
    """

    data: DataConfig
    train: TrainConfig
    eval: EvalConfig
    config: str | None = None
    checkpoint: pathlib.Path | None = None
    settings: pathlib.Path | None = None
    model: str | None = None
    item_ids: pathlib.Path | None = None
    run: pathlib.Path | None = None
    output: pathlib.Path | None = None


def parse(argv: Sequence[str]) -> tuple[Arguments, ExperimentConfig | None]:
    """Reads the command line; returns the options and the named experiment, if any.

    Raises:
      ValueError: for an unknown experiment or option, or options that do not go together.
    """
    name = peek(argv, "--config")
    base = None if name is None else load_config(name)
    start = base or ExperimentConfig("converted", data=DataConfig(name="custom"))
    default = Arguments(start.data, start.train, start.eval, config=name)
    arguments = parse_settings(Arguments, argv, default, prog="experiments.convert")
    needed = {"output": arguments.output}
    if arguments.run is None:
        needed |= {"checkpoint": arguments.checkpoint, "settings": arguments.settings}
    elif given := [f"--{name}" for name in _OF_CHECKPOINTS if getattr(arguments, name) is not None]:
        raise ValueError(f"--run writes a checkpoint and {' and '.join(given)} describe one to read; give either")
    if missing := [f"--{name}" for name, value in needed.items() if value is None]:
        raise ValueError(f"give {' and '.join(missing)}: --checkpoint, --settings and --output, or --run and --output")
    return arguments, base


@program
def main(argv: list[str]) -> int:
    """Converts in the direction that is asked for."""
    arguments, base = parse(argv)
    console = Console()

    def report(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False, highlight=False)

    output = arguments.output
    if arguments.run is not None:
        checkpoint_from_run(arguments.run, output, report=report)
        return 0
    start = base or ExperimentConfig("converted")
    experiment = ExperimentConfig(start.name, start.model, arguments.data, arguments.train, arguments.eval)
    named = {name: getattr(arguments, name) for name in _OF_CHECKPOINTS}
    run_from_checkpoint(output, experiment, **named, same_model=base is not None, report=report)
    report(f"now: python -m experiments.evaluate --run={output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
