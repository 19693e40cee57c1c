"""Run folders from checkpoints of the original PyTorch programs, and such checkpoints from run folders."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from tim4rec_jax.checks import listed, require, shortened, shown
from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.data.interactions import InteractionLog, load_log, with_precision
from tim4rec_jax.files import locked, remove_leftovers, replacing_folder, write_atomically
from tim4rec_jax.interop.item_ids import as_csv, beside, digest, find_item_ids, rows_of_log
from tim4rec_jax.interop.settings import (
    UPSTREAM_NAMES,
    config_from_upstream,
    models_described_by,
    settings_beside_the_model,
    upstream_from_config,
)
from tim4rec_jax.interop.settings_file import read_settings
from tim4rec_jax.interop.torch_checkpoint import params_from_torch, params_to_torch
from tim4rec_jax.interop.torch_checkpoint_file import StateDict, read_state_dict, recognise, write_state_dict
from tim4rec_jax.model_config import MixerConfig, ModelConfig
from tim4rec_jax.models import model_class
from tim4rec_jax.run_dir import CHECKPOINTS, ENVIRONMENT, create_run, read_config, read_environment, read_items
from tim4rec_jax.training.checkpoint import Checkpointer
from tim4rec_jax.training.progress import Progress
from tim4rec_jax.training.step import TrainState, make_optimizer
from tim4rec_jax.training.stored_run import load_model

_TABLE = "item_embedding.weight"
# Settings of speed and of training.
_SAME_SCORES = {
    "dtype",
    "chunk_size",
    "kernels",
    "kaiming_init",
    "dropout",
    "time_dropout",
    "attention_dropout",
}
_BOUNDED = (
    "d_model",
    "d_state",
    "d_conv",
    "expand",
    "head_dim",
    "chunk_size",
    "attention_heads",
    "inner_size",
    "time_span",
    "max_len",
)
# Of a file's name, in bytes: those beside it end in ".item_ids.csv", and file systems take 255.
_LONGEST_NAME = 240
# Largest setting that no tensor of a checkpoint bounds.
_LARGEST_SIZE = 2**20


def _looks_like(path: pathlib.Path, state: Mapping[str, np.ndarray]) -> str:
    found = recognise(state)
    if found is None:
        require(
            not any(re.match(r"attention_layernorms\.\d", name) for name in state),
            f"{shortened(str(path), 60)} looks like the SASRec of pmixer/SASRec.pytorch, which normalises queries "
            "before attention and adds them back: another model than RecBole's SASRec, and none that is offered here",
        )
        raise ValueError(
            f"{shortened(str(path), 60)} looks like none of {', '.join(UPSTREAM_NAMES)}; its parameters: "
            f"{listed(list(state), 100, ', ')}"
        )
    return found


def _named_model(
    said: str | None, found: str, settings: Mapping[str, Any], checkpoint: pathlib.Path, file: pathlib.Path
) -> str:
    """Decides which program the settings are of: what is said goes before what the checkpoint looks like."""
    said = said or settings.get("model")
    if said is not None:
        require(isinstance(said, str), f"model={shown(said)} in {file} is no name of a model")
        return next((name for name in UPSTREAM_NAMES if name.lower() == said.lower()), said)
    described = models_described_by(settings)
    if found not in described and described:
        raise ValueError(
            f"{checkpoint} looks like {found}, but the settings of {file} are those of "
            f"{' or '.join(described)}; give the settings that belong to the checkpoint"
        )
    # The TiM4Rec authors' program with time off has the parameters of SSD4Rec.
    return "TiM4Rec" if found == "SSD4Rec" and "is_time" in settings else found


def _require_plausible(config: ModelConfig, state: Mapping[str, np.ndarray]) -> None:
    """Refuses sizes that a checkpoint cannot have, before anything is built of them."""
    table = state.get(_TABLE)
    if table is None or table.ndim != 2 or len(table) < 2:
        raise ValueError(f"the checkpoint has no table of items ({_TABLE})")
    if config.vocab_size not in (0, len(table)):
        raise ValueError(
            f"shape of {_TABLE}: {table.shape}, but n_items={shown(config.vocab_size)} in the settings; give the "
            "settings that belong to the checkpoint"
        )
    require(config.num_layers <= len(state), f"{config.num_layers} layers, but {len(state)} tensors in the checkpoint")
    held = sum(array.size for array in state.values())
    sizes = {name: getattr(config, name) for name in _BOUNDED if hasattr(config, name)}
    sizes |= {"expand * d_model": config.d_inner} if isinstance(config, MixerConfig) else {}
    for name, size in sizes.items():
        most = _LARGEST_SIZE if name in ("chunk_size", "max_len") else min(held, _LARGEST_SIZE)
        require(size <= most, f"{name}={shown(size)} must be at most {most:,} for a checkpoint of {held:,} numbers")


def read_model(
    checkpoint: pathlib.Path, settings: pathlib.Path, *, model: str | None = None, report: Callable[[str], None] = print
) -> tuple[ModelConfig, dict[str, Any], StateDict]:
    """Reads the settings and parameters of an original program's model and says what was read.

    Args:
      checkpoint: file that torch.save wrote; nothing in it is executed.
      settings: the program's YAML file.
      model: the program; None takes it from the settings, or from the names in the checkpoint.
      report: receives the lines.

    Returns:
      The model's settings, its parameter tree in float32, and what the checkpoint file holds.

    Raises:
      FileNotFoundError, ValueError: for files that cannot be read, or do not fit each other.
    """
    values = read_settings(settings)
    stored = read_state_dict(checkpoint)
    state = stored.arrays
    found = _looks_like(checkpoint, state)
    name = _named_model(model, found, values, checkpoint, settings)
    aside = settings_beside_the_model(name, values)
    config = config_from_upstream(name, values)
    expected = upstream_from_config(config)[0]
    if found != expected:
        off = " with time off" if name != expected else ""
        raise ValueError(
            f"{checkpoint} looks like {found}, not {name}{off}; give the settings that belong to the checkpoint"
        )
    _require_plausible(config, state)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params_from_torch(config, state))
    if config.vocab_size == 0:
        config = dataclasses.replace(config, vocab_size=state[_TABLE].shape[0])
    used = params_to_torch(config, params)
    lines = [
        f"{checkpoint}: {name}, {sum(a.size for a in used.values()):,} parameters in {len(used)} tensors, "
        f"{config.vocab_size - 1:,} items",
        *stored.notes,
    ]
    if unused := [key for key in state if key not in used]:
        count = sum(state[key].size for key in unused)
        lines.append(f"passed over: {count:,} parameters in {len(unused)} tensors that {name} stores and never uses")
    if rounded := [key for key in used if state[key].dtype != used[key].dtype]:
        lines.append(f"rounded to float32: {len(rounded)} tensors stored as float64")
    if aside:
        lines.append(f"{settings}: not about the model, ignored: {', '.join(aside)}")
    for line in lines:
        report(line)
    return config, params, stored


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
    key = jax.random.key_data(jax.random.key(config.train.seed, impl="threefry2x32"))
    moments = make_optimizer(config.train, total_steps=1).init(params)
    state = TrainState(jnp.zeros((), jnp.int32), params, moments, key)
    output.parent.mkdir(parents=True, exist_ok=True)
    with locked(output):
        require_absent(output)
        with replacing_folder(output) as unfinished:
            create_run(unfinished, config, log)
            environment = read_environment(unfinished) | {"converted_from": dict(source)}
            write_atomically(unfinished / ENVIRONMENT, (json.dumps(environment, indent=2) + "\n").encode())
            with Checkpointer(unfinished / CHECKPOINTS) as checkpoints:
                checkpoints.save_best(0, params, {"converted_from": dict(source)})
                checkpoints.save_latest(0, state, Progress().to_dict())


def require_absent(output: pathlib.Path) -> None:
    """Refuses a name that is too long to write beside, or taken.

    Raises:
      ValueError, FileExistsError: it is.
    """
    name = output.name.encode(errors="surrogateescape")
    require(
        len(name) <= _LONGEST_NAME, f"--output has a name of {len(name)} bytes; at most {_LONGEST_NAME} can be used"
    )
    if os.path.lexists(output):
        raise FileExistsError(f"{output} is there already; choose another --output, or remove it")


def run_from_checkpoint(
    output: pathlib.Path,
    experiment: ExperimentConfig,
    *,
    checkpoint: pathlib.Path,
    settings: pathlib.Path,
    model: str | None = None,
    item_ids: pathlib.Path | None = None,
    same_model: bool = False,
    report: Callable[[str], None] = print,
) -> None:
    """Makes a run folder from a checkpoint of an original program, for evaluating, recommending and training on.

    Args:
      output: the run folder; must not exist.
      experiment: its data, train and eval settings; the model's come from the checkpoint.
      checkpoint, settings, model: see `read_model`.
      item_ids: file of the raw ids of the rows, see `read_item_ids`; None looks beside the checkpoint.
      same_model: refuse a checkpoint of another model than the experiment's.
      report: receives lines that say what was read and made.

    Raises:
      FileExistsError: the folder is there already.
      FileNotFoundError, ValueError: for files that cannot be read, or do not fit each other or the log.
    """
    require_absent(output)
    config, params, stored = read_model(checkpoint, settings, model=model, report=report)
    # The settings of TiM4Rec serve for the same model with time off.
    own = model_class(experiment.model.name)
    if same_model and config.name not in (experiment.model.name, own.without_time):
        raise ValueError(
            f"{experiment.name} is an experiment with {experiment.model.name}, the checkpoint is a {config.name}; name "
            "one on the same data with that model"
        )
    found = find_item_ids(checkpoint, item_ids, config.vocab_size - 1, stored.items_digest)
    log = load_log(experiment.data)
    data = with_precision(experiment.data, log)
    with checkpoint.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    source = {"checkpoint": checkpoint.name, "sha256": sha256, "settings": settings.name}
    if found is None:
        require_same_items(config, log)
        identity = (
            f"{checkpoint.name} does not say which items its rows are: row i of the item table is taken to "
            "be the i-th item by first appearance in the cleaned log; --item_ids names them"
        )
    else:
        file, ids = found
        table = params["item_embedding"]["embedding"]
        # The run's items are numbered as the log is, so that training on it and loading it anew agree.
        rows = rows_of_log(ids, log.item_ids)
        params = params | {"item_embedding": {"embedding": table[np.concatenate([[0], rows])]}}
        source |= {"item_ids": file.name, "item_ids_sha256": digest(ids)}
        identity = f"items: {len(ids):,} raw ids of {file.name}, found in the log"
    made = ExperimentConfig(output.name, config, data, experiment.train, experiment.eval)
    make_run(output, made, params, log, source)
    report(f"run folder: {output}; {identity}")
    if data.timestamp_precision != "float32":
        report(
            "events are ordered by exact seconds; the original programs order them by float32 seconds, and may have "
            "tested on other events: --data.timestamp_precision=float32 does as they do"
        )


def _item_ids_of(run: pathlib.Path, count: int) -> list[str]:
    items = read_items(run).sort("index")
    if items["index"].to_list() != list(range(1, count + 1)) or items["item_id"].n_unique() != count:
        raise ValueError(f"{run} does not say one id for each of its {count} items (item_ids.parquet); train it anew")
    return items["item_id"].to_list()


def _write_or_find(file: pathlib.Path, content: bytes) -> None:
    """Writes a file; one that a convert stopped before its checkpoint was written left with this content may stay."""
    remove_leftovers(file)
    if not os.path.lexists(file):
        write_atomically(file, content)
    elif not file.is_file() or file.stat().st_size != len(content) or file.read_bytes() != content:
        raise FileExistsError(f"{file} is there already, with other content; choose another --output, or remove it")


def checkpoint_from_run(run: pathlib.Path, output: pathlib.Path, *, report: Callable[[str], None] = print) -> None:
    """Writes a run's best parameters as a state dict, and its settings and the raw ids of its items beside it.

    The checkpoint appears last: without it the other two mean nothing, and with it all three are there.

    Args:
      run: the run folder.
      output: m.pth; m.yaml and m.item_ids.csv are written beside it.
      report: receives lines that say what was written, and which settings the program does not have.

    Raises:
      FileNotFoundError, ValueError, CheckpointError: the run cannot be read, or no original program has its model.
      FileExistsError: one of the three files is there already.
    """
    yaml_file, ids_file = output.with_suffix(".yaml"), beside(output)
    require(
        output not in (yaml_file, ids_file), f"--output={output.name} is the name of a file beside it; end it in .pth"
    )
    require_absent(output)
    if not os.path.isdir(run):
        raise FileNotFoundError(f"there is no run folder {shortened(str(run), 120)}")
    name, settings = upstream_from_config(read_config(run).model)
    stored = load_model(run, report=report)
    ids = _item_ids_of(run, stored.config.model.vocab_size - 1)
    arrays = params_to_torch(stored.config.model, stored.params)
    output.parent.mkdir(parents=True, exist_ok=True)
    with locked(output):
        require_absent(output)
        _write_or_find(ids_file, as_csv(ids))
        _write_or_find(yaml_file, yaml.safe_dump({"model": name, **settings}, sort_keys=False).encode())
        write_state_dict(output, arrays, digest(ids))
    report(f"{output}, {yaml_file.name}, {ids_file.name}: {name}, {len(arrays)} tensors, {len(ids):,} item ids")
    if lost := _not_expressible(stored.config.model, config_from_upstream(name, settings)):
        report(f"warning: {name} has no setting for {', '.join(lost)}; its scores will differ from this run's")


def _not_expressible(ours: ModelConfig, back: ModelConfig) -> list[str]:
    """Settings that change scores and that the original program does not read."""
    names = [field.name for field in dataclasses.fields(ours) if field.name not in _SAME_SCORES]
    return [f"{name}={getattr(ours, name)}" for name in names if getattr(ours, name) != getattr(back, name)]
