"""Exchange of settings and parameters with the original PyTorch programs."""

from tim4rec_jax.interop.settings import config_from_upstream
from tim4rec_jax.interop.torch_checkpoint import params_from_torch, params_to_torch

__all__ = ["config_from_upstream", "params_from_torch", "params_to_torch"]
