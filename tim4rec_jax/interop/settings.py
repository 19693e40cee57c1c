"""Settings of the original PyTorch programs as a `ModelConfig`."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from tim4rec_jax.config import ModelConfig

# Original model -> ours, and what its name alone settles.
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tim4rec": ("tim4rec", {}),
    "ssd4rec": ("tim4rec", {"use_time": False}),
    "sasrec": ("sasrec", {}),
    "tisasrec": ("tisasrec", {}),
    "mamba4rec": ("mamba4rec", {"kaiming_init": False, "norm_eps": 1e-12}),
    "echomamba4rec": ("echomamba4rec", {"kaiming_init": False, "norm_eps": 1e-12}),
}
# What the original programs can vary and ours cannot.
_FIXED: dict[str, Any] = {"hidden_act": "gelu", "initializer_range": 0.02}


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return float(value)


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
_WITH_TIME: _Fields = {
    "is_time": ("use_time", _flag),
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


_KINDS: dict[Callable[[Any], Any], str] = {
    _flag: "yes-or-no value (true or false)",
    _number: "number",
    _whole_number: "whole number",
}


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
    key = model_name.lower()
    if key not in _MODELS:
        near = difflib.get_close_matches(key, _MODELS, n=3, cutoff=0.3) or sorted(_MODELS)
        raise ValueError(f"model_name={model_name!r} is unknown; nearest: {', '.join(near)}")
    ours, given = _MODELS[key]
    fields, values = _FIELDS[key], dict(given)
    missing = [name for name in fields if name not in settings]
    # Time off makes the settings of the time branch irrelevant.
    if settings.get("is_time") is False:
        missing = [name for name in missing if name not in _WITH_TIME]
    problems = [f"missing: {name}" for name in missing]
    problems += [
        f"{name}={settings[name]!r} is not offered, only {fixed!r}"
        for name, fixed in _FIXED.items()
        if settings.get(name, fixed) != fixed
    ]
    for name, (field, convert) in (fields | {"n_items": ("vocab_size", _whole_number)}).items():
        if name not in settings:
            continue
        try:
            values[field] = convert(settings[name])
        except (TypeError, ValueError, OverflowError):
            problems.append(f"{name}={settings[name]!r} is not a {_KINDS[convert]}")
    if problems:
        raise ValueError(f"the settings do not describe a {model_name}:\n  " + "\n  ".join(problems))
    return ModelConfig(name=ours, **values)
