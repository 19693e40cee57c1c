"""Parameters moved away from their initial values, so that no bias is 0, no gain 1 and every gradient counts."""

import pytest

torch = pytest.importorskip("torch")

import math

SEED = 2025
_DT_ROW_SCALE = 2.0
_DT_BIAS_SHIFT = 2.0
_TIME_CONV_STD = 0.4
_TIME_CONV_BIAS_SHIFT = 0.6


def perturbed(state_dict, seed=SEED):
    """Returns a perturbed copy, in float64, of a float32 state dict of a TiM4Rec or SSD4Rec model.

    Each parameter, in the order of the state dict, takes a standard normal draw of its shape: matrices are replaced by
    it (scaled), all else moves by it. A second pass over the layers widens the step sizes and opens the time
    convolutions. All arithmetic is float32 and only the result is widened, so the same dict comes out everywhere.

    Args:
      state_dict: name -> float32 tensor, in the model's order; left as it is.
      seed: of the generator on the CPU.

    Raises:
      ValueError: for a tensor that is not float32.
    """
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, value in state_dict.items():
        if value.dtype != torch.float32:
            raise ValueError(f"{name} is {value.dtype}; perturb the float32 state dict, the result is float64")
        moved[name] = _move(name, value, torch.randn(value.shape, generator=generator))
    for layer in sorted({name.split(".")[1] for name in moved if name.startswith("ssd_layers.")}, key=int):
        _widen_steps(moved, f"ssd_layers.{layer}.ssd.", generator)
    return {name: value.double() for name, value in moved.items()}


def _move(name: str, value: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    kind = name.rsplit(".", 1)[-1]
    if name == "item_embedding.weight":
        return 0.3 * noise
    if kind == "A_log":
        return value + 0.05 * noise
    if kind == "D":
        return value + 0.2 * noise
    if kind in ("bias", "dt_bias"):
        return value + 0.1 * noise
    if "norm" in name:
        return value + 0.2 * noise
    if value.ndim == 3:
        return value + 0.15 * noise
    return 0.6 * noise / math.sqrt(value.shape[1])  # in this order: the last bit counts


def _widen_steps(moved: dict, prefix: str, generator: torch.Generator) -> None:
    dt_bias = moved[prefix + "dt_bias"]
    heads = len(dt_bias)
    moved[prefix + "dt_bias"] = dt_bias + _DT_BIAS_SHIFT
    moved[prefix + "in_proj.weight"][-heads:] *= _DT_ROW_SCALE
    moved[prefix + "in_proj.bias"][-heads:] += torch.randn(heads, generator=generator)
    for conv in (prefix + "conv1d4time_1", prefix + "conv1d4time_2"):
        if conv + ".weight" in moved:
            weight = moved[conv + ".weight"]
            moved[conv + ".weight"] = weight + _TIME_CONV_STD * torch.randn(weight.shape, generator=generator)
            moved[conv + ".bias"] = moved[conv + ".bias"] + _TIME_CONV_BIAS_SHIFT
