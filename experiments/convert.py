"""Makes a run folder from a checkpoint of an original PyTorch program, or such a checkpoint from a run folder.

    python -m experiments.convert --checkpoint=m.pth --settings=config.yaml --output=runs/theirs --data.path=log.inter
    python -m experiments.convert --checkpoint=m.pth --settings=config.yaml --output=runs/theirs --config=ml1m_tim4rec
    python -m experiments.convert --run=runs/ml1m_tim4rec --output=model.pth

TiM4Rec, SSD4Rec, Mamba4Rec, EchoMamba4Rec, SASRec and TiSASRec in RecBole's form. The checkpoint is a state dict, or a
dict with "state_dict"; nothing in it is executed. The settings are the program's YAML file. The log must be the one the
model was trained on: row i of the item table is the i-th item by first appearance in the cleaned log.
`experiments.evaluate` and `experiments.recommend` read the folder; `experiments.train --resume` trains on from it.
The other direction also writes the YAML file, beside the checkpoint. It needs PyTorch: pip install torch
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from rich.console import Console

from experiments.command_line import parse_settings, run_program
from experiments.configs import load_config
from experiments.torch_checkpoint_file import read_state_dict, recognise, write_state_dict
from tim4rec_jax.config import DataConfig, EvalConfig, ExperimentConfig, ModelConfig, TrainConfig
from tim4rec_jax.data.interactions import InteractionLog, load_log, with_precision
from tim4rec_jax.files import replacing, write_atomically
from tim4rec_jax.interop.settings import (
    UPSTREAM_NAMES,
    config_from_upstream,
    models_described_by,
    settings_beside_the_model,
    upstream_from_config,
)
from tim4rec_jax.interop.torch_checkpoint import params_from_torch, params_to_torch
from tim4rec_jax.run_dir import CHECKPOINTS, ENVIRONMENT, create_run, read_environment
from tim4rec_jax.serving.stored_run import load_model
from tim4rec_jax.training.checkpoint import Checkpointer
from tim4rec_jax.training.loop import Position
from tim4rec_jax.training.step import TrainState, make_optimizer

_TABLE = "item_embedding.weight"
# Settings of speed and of training.
_SAME_SCORES = {
    "dtype", "chunk_size", "ssd_implementation", "conv_implementation", "scan_implementation", "kaiming_init",
    "dropout", "time_dropout", "attention_dropout",
}  # fmt: skip
# Settings that a model does not read; those of the time branch come on top.
_OF_ATTENTION = {"attention_heads", "inner_size", "time_span"}
_OF_MIXERS = {"d_state", "d_conv", "expand", "head_dim", "use_ffn"}
_UNREAD = {
    "tim4rec": _OF_ATTENTION,
    "mamba4rec": _OF_ATTENTION | {"head_dim", "use_time"},
    "echomamba4rec": _OF_ATTENTION | {"head_dim", "use_time", "use_ffn"},
    "sasrec": _OF_MIXERS | {"use_time", "time_span"},
    "tisasrec": _OF_MIXERS,
}


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
    run: pathlib.Path | None = None
    output: pathlib.Path | None = None


def parse(argv: Sequence[str]) -> tuple[Arguments, ExperimentConfig | None]:
    """Reads the command line; returns the options and the named experiment, if any.

    Raises:
      ValueError: for an unknown experiment or option, or options that do not go together.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    name = finder.parse_known_args(argv)[0].config
    base = None if name is None else load_config(name)
    start = base or ExperimentConfig("converted", data=DataConfig(name="custom"))
    default = Arguments(start.data, start.train, start.eval, config=name)
    arguments = parse_settings(Arguments, argv, default, prog="experiments.convert")
    needed = {"output": arguments.output}
    if arguments.run is None:
        needed |= {"checkpoint": arguments.checkpoint, "settings": arguments.settings}
    elif given := [f"--{name}" for name in ("checkpoint", "settings", "model") if getattr(arguments, name) is not None]:
        raise ValueError(f"--run writes a checkpoint and {' and '.join(given)} describe one to read; give either")
    if missing := [f"--{name}" for name, value in needed.items() if value is None]:
        raise ValueError(f"give {' and '.join(missing)}: --checkpoint, --settings and --output, or --run and --output")
    return arguments, base


def read_settings(path: pathlib.Path) -> dict[str, Any]:
    """Returns the mapping of a YAML file; tags that would make objects are refused.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not YAML, or holds something other than names and values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no settings file {path}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable as YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__} where names and values are expected")
    return settings


def _looks_like(path: pathlib.Path, state: Mapping[str, np.ndarray]) -> str:
    found = recognise(state)
    if found is None:
        raise ValueError(
            f"{path} looks like none of {', '.join(UPSTREAM_NAMES)}; its parameters: {', '.join(list(state)[:8])}"
        )
    return found


def _named_model(arguments: Arguments, settings: Mapping[str, Any], found: str) -> str:
    """Decides which program the settings are of: what is said goes before what the checkpoint looks like."""
    said = arguments.model or settings.get("model")
    if said is not None:
        return next((name for name in UPSTREAM_NAMES if name.lower() == str(said).lower()), str(said))
    described = models_described_by(settings)
    if found not in described and described:
        raise ValueError(
            f"{arguments.checkpoint} looks like {found}, but the settings of {arguments.settings} are those of "
            f"{' or '.join(described)}; give the settings that belong to the checkpoint"
        )
    # The TiM4Rec authors' program with time off has the parameters of SSD4Rec.
    return "TiM4Rec" if found == "SSD4Rec" and "is_time" in settings else found


def read_model(arguments: Arguments, console: Console) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads settings and parameters and says what was read.

    Raises:
      FileNotFoundError, ValueError: for files that cannot be read, or do not fit each other.
    """
    settings, state = read_settings(arguments.settings), read_state_dict(arguments.checkpoint)
    found = _looks_like(arguments.checkpoint, state)
    name = _named_model(arguments, settings, found)
    beside = settings_beside_the_model(name, settings)
    config = config_from_upstream(name, settings)
    expected = upstream_from_config(config)[0]
    if found != expected:
        off = " with time off" if name != expected else ""
        raise ValueError(
            f"{arguments.checkpoint} looks like {found}, not {name}{off}; give the settings that belong to the "
            "checkpoint"
        )
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params_from_torch(config, state))
    if config.vocab_size == 0:
        config = dataclasses.replace(config, vocab_size=state[_TABLE].shape[0])
    used = params_to_torch(config, params)
    lines = [
        f"{arguments.checkpoint}: {name}, {sum(a.size for a in used.values()):,} parameters in {len(used)} tensors, "
        f"{config.vocab_size - 1:,} items"
    ]
    if unused := [key for key in state if key not in used]:
        count = sum(state[key].size for key in unused)
        lines.append(f"passed over: {count:,} parameters in {len(unused)} tensors that {name} stores and never uses")
    if rounded := [key for key in used if state[key].dtype != used[key].dtype]:
        lines.append(f"rounded to float32: {len(rounded)} tensors stored as float64")
    if beside:
        lines.append(f"{arguments.settings}: not about the model, ignored: {', '.join(beside)}")
    console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)
    return config, params


def require_same_items(config: ModelConfig, log: InteractionLog) -> None:
    """Refuses a log with another number of items than the model has rows.

    Raises:
      ValueError: quoting both.
    """
    if config.vocab_size != log.num_items + 1:
        raise ValueError(
            f"the checkpoint has vocab_size={config.vocab_size} ({config.vocab_size - 1} items and padding), the "
            f"cleaned log has {log.num_items} items, so vocab_size={log.num_items + 1}; give the log that the model "
            "was trained on (--data.path), cleaned as there (--data.k_core)"
        )


def make_run(
    output: pathlib.Path, config: ExperimentConfig, params: Any, log: InteractionLog, source: Mapping[str, str]
) -> None:
    """Writes a run folder whose training has not begun and whose best parameters are the given ones.

    Args:
      output: folder that is not there; comes into being whole, or not at all.
      config: settings with `model.vocab_size` filled in.
      params: parameter tree.
      log: the cleaned log.
      source: what environment.json says of the origin, under "converted_from".
    """
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.unfinished")
    output.parent.mkdir(parents=True, exist_ok=True)
    key = jax.random.key_data(jax.random.key(config.train.seed, impl="threefry2x32"))
    moments = make_optimizer(config.train, total_steps=1).init(params)
    state = TrainState(jnp.zeros((), jnp.int32), params, moments, key)
    try:
        create_run(unfinished, config, log)
        environment = read_environment(unfinished) | {"converted_from": dict(source)}
        write_atomically(unfinished / ENVIRONMENT, (json.dumps(environment, indent=2) + "\n").encode())
        with Checkpointer(unfinished / CHECKPOINTS) as checkpoints:
            checkpoints.save_best(0, params, {"converted_from": dict(source)})
            checkpoints.save_latest(0, state, Position().to_dict())
        os.rename(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def from_checkpoint(arguments: Arguments, base: ExperimentConfig | None, console: Console) -> None:
    """Makes the run folder.

    Raises:
      FileExistsError: the folder is there already.
      FileNotFoundError, ValueError: for files that cannot be read, or do not fit each other or the log.
    """
    if arguments.output.exists():
        raise FileExistsError(f"{arguments.output} is there already; choose another --output, or remove it")
    model, params = read_model(arguments, console)
    if base is not None and base.model.name != model.name:
        raise ValueError(
            f"--config={base.name} is an experiment with {base.model.name}, the checkpoint is a {model.name}; name one "
            "on the same data with that model"
        )
    log = load_log(arguments.data)
    data = with_precision(arguments.data, log)
    require_same_items(model, log)
    digest = hashlib.sha256(arguments.checkpoint.read_bytes()).hexdigest()
    source = {"checkpoint": arguments.checkpoint.name, "sha256": digest, "settings": arguments.settings.name}
    config = ExperimentConfig(arguments.output.name, model, data, arguments.train, arguments.eval)
    make_run(arguments.output, config, params, log, source)
    console.print(
        f"run folder: {arguments.output}; row i of the item table is taken to be the i-th item by first appearance in "
        f"the cleaned log\n{_said_of_order(data)}now: python -m experiments.evaluate --run={arguments.output}",
        soft_wrap=True, markup=False, highlight=False,
    )  # fmt: skip


def _said_of_order(data: DataConfig) -> str:
    if data.timestamp_precision == "float32":
        return ""
    return (
        "events are ordered by exact seconds; the original programs order them by float32 seconds, and may have tested "
        "on other events: --data.timestamp_precision=float32 does as they do\n"
    )


def to_checkpoint(run: pathlib.Path, output: pathlib.Path, console: Console) -> None:
    """Writes a run's best parameters as a state dict, and its settings as a YAML file beside it.

    Raises:
      FileNotFoundError, ValueError, CheckpointError: the run cannot be read.
      FileExistsError: one of the two files is there already.
    """
    stored = load_model(run)
    name, settings = upstream_from_config(stored.config.model)
    yaml_file = output.with_suffix(".yaml")
    if yaml_file.exists():
        raise FileExistsError(f"{yaml_file} is there already; choose another --output, or remove it")
    arrays = params_to_torch(stored.config.model, stored.params)
    write_state_dict(output, arrays)
    with replacing(yaml_file) as temporary:
        temporary.write_text(yaml.safe_dump({"model": name, **settings}, sort_keys=False), encoding="utf-8")
    console.print(f"{output}, {yaml_file}: {name}, {len(arrays)} tensors", soft_wrap=True, markup=False)
    if lost := _not_expressible(stored.config.model, config_from_upstream(name, settings)):
        console.print(
            f"warning: {name} has no setting for {', '.join(lost)}; its scores will differ from this run's",
            soft_wrap=True, markup=False,
        )  # fmt: skip


def _not_expressible(ours: ModelConfig, back: ModelConfig) -> list[str]:
    """Settings that change scores and that the original program does not read."""
    names = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in _SAME_SCORES]
    lost = [name for name in names if getattr(ours, name) != getattr(back, name)]
    timed = ours.name == "tim4rec" and ours.use_time
    return [f"{name}={getattr(ours, name)}" for name in lost if name not in _UNREAD[ours.name] | _unread_time(timed)]


def _unread_time(timed: bool) -> set[str]:
    return set() if timed else {"time_gate_per_position", "mask_padded_time", "log_time", "time_mode"}


def program(argv: list[str]) -> int:
    """The program behind `main`."""
    arguments, base = parse(argv)
    console = Console()
    if arguments.run is not None:
        to_checkpoint(arguments.run, arguments.output, console)
    else:
        from_checkpoint(arguments, base, console)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    return run_program(program, argv)


if __name__ == "__main__":
    raise SystemExit(main())
