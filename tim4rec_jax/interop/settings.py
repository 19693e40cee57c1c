"""Settings of the original PyTorch programs as those of our models."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from tim4rec_jax.checks import listed, shown
from tim4rec_jax.model_config import ModelConfig
from tim4rec_jax.models import model_class

# What the name of an original model alone settles.
_SETTLED: dict[str, dict[str, Any]] = {
    "mamba4rec": {"kaiming_init": False, "norm_eps": 1e-12},
    "echomamba4rec": {"kaiming_init": False, "norm_eps": 1e-12},
}
UPSTREAM_NAMES = ("TiM4Rec", "SSD4Rec", "SASRec", "TiSASRec", "Mamba4Rec", "EchoMamba4Rec")
# What the original programs can vary and ours cannot.
_FIXED: dict[str, Any] = {"hidden_act": "gelu", "initializer_range": 0.02}


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError("expected a number")
    return number


def _whole_number(value: Any) -> int:
    if int(value) != _number(value):
        raise ValueError("expected a whole number")
    return int(value)


# Original name -> (our name, conversion). YAML reads "1e-5" as text, so numbers are converted and not just taken.
_Fields = dict[str, tuple[str, Callable[[Any], Any]]]
_STATE_SPACE: _Fields = {
    "hidden_size": ("d_model", _whole_number),
    "num_layers": ("num_layers", _whole_number),
    "dropout_prob": ("dropout", _number),
    "d_state": ("d_state", _whole_number),
    "d_conv": ("d_conv", _whole_number),
    "expand": ("expand", _whole_number),
    "head_dim": ("head_dim", _whole_number),
    "chunk_size": ("chunk_size", _whole_number),
    "norm_eps": ("norm_eps", _number),
    "is_ffn": ("use_ffn", _flag),
    "is_kai_ming_init": ("kaiming_init", _flag),
    "MAX_ITEM_LIST_LENGTH": ("max_len", _whole_number),
}
_SELECTIVE_SCAN: _Fields = {
    name: _STATE_SPACE[name]
    for name in ("hidden_size", "num_layers", "dropout_prob", "d_state", "d_conv", "expand", "MAX_ITEM_LIST_LENGTH")
}
_ATTENTION: _Fields = {
    "hidden_size": ("d_model", _whole_number),
    "inner_size": ("inner_size", _whole_number),
    "n_layers": ("num_layers", _whole_number),
    "n_heads": ("attention_heads", _whole_number),
    "hidden_dropout_prob": ("dropout", _number),
    "attn_dropout_prob": ("attention_dropout", _number),
    "layer_norm_eps": ("norm_eps", _number),
    "MAX_ITEM_LIST_LENGTH": ("max_len", _whole_number),
}
# With `timed` off TiM4Rec is SSD4Rec.
_WITH_TIME: _Fields = {
    "is_time": ("timed", _flag),
    "time_drop_out": ("time_dropout", _number),
    "p2p_residual": ("time_gate_per_position", _flag),
}


_FIELDS: dict[str, _Fields] = {
    "tim4rec": _STATE_SPACE | _WITH_TIME,
    "ssd4rec": _STATE_SPACE,
    "mamba4rec": _SELECTIVE_SCAN,
    "echomamba4rec": _SELECTIVE_SCAN,
    "sasrec": _ATTENTION,
    "tisasrec": _ATTENTION | {"time_span": ("time_span", _whole_number)},
}


# What RecBole and the original programs read besides: data, negatives, training, measurement, logs.
_BESIDE_THE_MODEL = """
model dataset config_file_list data_path field_separator seq_separator USER_ID_FIELD ITEM_ID_FIELD RATING_FIELD
TIME_FIELD LABEL_FIELD NEG_PREFIX ITEM_LIST_LENGTH_FIELD LIST_SUFFIX POSITION_FIELD HEAD_ENTITY_ID_FIELD
TAIL_ENTITY_ID_FIELD RELATION_ID_FIELD ENTITY_ID_FIELD SOURCE_ID_FIELD TARGET_ID_FIELD seq_len threshold load_col
unload_col unused_col additional_feat_suffix rm_dup_inter lowest_val highest_val equal_val not_equal_val
val_interval filter_inter_by_user_or_item max_user_inter_num min_user_inter_num max_item_inter_num
min_item_inter_num user_inter_num_interval item_inter_num_interval fields_in_same_space preload_weight
normalize_field normalize_all numerical_features discretization augmentation data_augmentation benchmark_filename
alias_of_user_id alias_of_item_id encoding save_dataset dataset_save_path save_dataloaders dataloaders_save_path
neg_sampling train_neg_sample_args valid_neg_sample_args test_neg_sample_args eval_neg_sample_args
training_neg_sample_num training_neg_sample_distribution transform gpu_id use_gpu device seed state reproducibility
worker shuffle nproc world_size local_rank ip port offset single_spec enable_amp enable_scaler torch_compile
show_progress checkpoint_dir checkpoint_path train_from_scratch saved log_root log_wandb wandb_project epochs
train_batch_size learner learning_rate weight_decay clip_grad_norm loss_type loss_decimal_place require_pow
draw_loss_pic eval_step stopping_step eval_args eval_setting eval_type group_by_user split_ratio leave_one_num
real_time_process repeatable metrics topk valid_metric valid_metric_bigger eval_batch_size metric_decimal_place
"""
_NOT_OF_THE_MODEL = frozenset(_BESIDE_THE_MODEL.split())
# Of the attention block that the original EchoMamba4Rec builds and never calls.
_NEVER_CALLED = {"echomamba4rec": frozenset({"num_experts", "num_heads", "hidden_dim"})}


_KINDS: dict[Callable[[Any], Any], str] = {
    _flag: "yes-or-no value (true or false)",
    _number: "number",
    _whole_number: "whole number",
}


def _known_model(model_name: str) -> str:
    key = model_name.lower()
    if key not in _FIELDS:
        near = difflib.get_close_matches(key[:100], _FIELDS, n=3, cutoff=0.3) or sorted(_FIELDS)
        raise ValueError(f"model_name={shown(model_name)} is unknown; nearest: {', '.join(near)}")
    return key


def models_described_by(settings: Mapping[str, Any]) -> list[str]:
    """Returns the models ("TiM4Rec", ...) whose every setting is there; small models' settings are parts of others'."""
    return [name for name in UPSTREAM_NAMES if set(_FIELDS[name.lower()]) <= set(settings)]


def settings_beside_the_model(model_name: str, settings: Mapping[str, Any]) -> list[str]:
    """Returns the names of the settings that an original program reads and that do not describe the model.

    Args:
      model_name: as in `config_from_upstream`.
      settings: names and values as in the original's configuration.

    Raises:
      ValueError: for an unknown model, or listing every setting that no original program has, with the nearest that
        one has, and every setting of another model.
    """
    key = _known_model(model_name)
    own = {*_FIELDS[key], *_FIXED, "n_items"}
    others = {
        name: [m for m in UPSTREAM_NAMES if name in _FIELDS[m.lower()]] for name in set().union(*_FIELDS.values())
    }
    problems, beside = [], []
    if key == "ssd4rec":
        own |= set(_WITH_TIME)  # The TiM4Rec authors' program with time off.
        if settings.get("is_time", False) is not False:
            problems.append(f"is_time={shown(settings['is_time'])}: SSD4Rec has no time branch")
    for name in settings:
        if name in own:
            continue
        if name in _NOT_OF_THE_MODEL or name in _NEVER_CALLED.get(key, ()):
            beside.append(name)
        elif name in others:
            problems.append(f"{name}: a setting of {', '.join(others[name])}")
        else:
            # Where many are unknown, the nearest of the first ones are looked for: it takes long, and they are shown.
            known = [*own, *_NOT_OF_THE_MODEL] if len(problems) < 8 else []
            near = difflib.get_close_matches(str(name)[:100], known, n=1, cutoff=0.6)
            problems.append(shown(name, 40).strip("'") + ": unknown" + (f" ({near[0]}?)" if near else ""))
    if problems:
        raise ValueError(f"the settings are not all those of a {model_name}: {listed(problems)}")
    return beside


def upstream_from_config(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Returns the original program's name and its settings of the model; `config_from_upstream` reads them back.

    What the original cannot express (`log_time`, for instance) is not in them: read them back and compare.

    Raises:
      ValueError: for a model that none of the original programs has.
    """
    name = next((name for name in UPSTREAM_NAMES if name.lower() == config.name), None)
    if name is None:
        raise ValueError(
            f"the model {shown(config.name)} has no counterpart among the original programs, which are "
            f"{', '.join(UPSTREAM_NAMES)}"
        )
    ours = {"timed": True, **dataclasses.asdict(config)}
    settings = {upstream: ours[field] for upstream, (field, _) in _FIELDS[config.name].items()}
    return name, settings | {"n_items": config.vocab_size}


def config_from_upstream(model_name: str, settings: Mapping[str, Any]) -> ModelConfig:
    """Returns the settings of an original program (its YAML file's mapping) as ours.

    Settings that do not describe the model (data, training, logging) are left to the reader; a missing model setting
    is an error, never a default. `n_items` counts the rows of the embedding, padding included; without it vocab_size is
    0 and is taken from the data or the checkpoint.

    Args:
      model_name: "TiM4Rec", "SSD4Rec", "SASRec", "TiSASRec", "Mamba4Rec" or "EchoMamba4Rec", in any case.
      settings: names and values as in the original's configuration.

    Raises:
      ValueError: for an unknown model, or listing every missing setting and every value of a wrong type.
    """
    key = _known_model(model_name)
    fields, values = _FIELDS[key], dict(_SETTLED.get(key, {}))
    missing = [name for name in fields if name not in settings]
    # Time off makes the settings of the time branch irrelevant.
    if settings.get("is_time") is False:
        missing = [name for name in missing if name not in _WITH_TIME]
    problems = [f"missing: {listed(missing, 80, ', ')}"] if missing else []
    problems += [
        f"{name}={shown(settings[name], 40)} is not offered, only {fixed!r}"
        for name, fixed in _FIXED.items()
        if settings.get(name, fixed) != fixed
    ]
    for name, (field, convert) in (fields | {"n_items": ("vocab_size", _whole_number)}).items():
        if name not in settings:
            continue
        try:
            values[field] = convert(settings[name])
        except (TypeError, ValueError, OverflowError):
            problems.append(f"{name}={shown(settings[name], 40)} is not a {_KINDS[convert]}")
    if problems:
        raise ValueError(f"the settings do not describe a {model_name}: {listed(problems)}")
    ours = model_class(key if values.pop("timed", True) else "ssd4rec").Config
    read = {field.name for field in dataclasses.fields(ours)}
    return ours(**{name: value for name, value in values.items() if name in read})
