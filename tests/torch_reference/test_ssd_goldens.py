"""The PyTorch operator against numbers printed by the original programs, in float64."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments.benchmarks.torch_models.ssd import ssd_chunked, ssd_sequential
from tests.torch_reference.goldens import section


@pytest.mark.parametrize("length", [1, 31, 32, 50])
@pytest.mark.parametrize("form", ["sequential", "chunked"])
def test_operator_agrees_in_float64(golden_dir, length, form):
    with np.load(golden_dir / f"ssd_core_L{length}.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    chunk_size = json.loads(arrays["config_json"].item())["chunk_size"]
    leaves = {key: torch.from_numpy(value).double() for key, value in section(arrays, "in").items()}
    cotangents = {"y": leaves.pop("gy"), "final_state": leaves.pop("gfinal")}
    for leaf in leaves.values():
        leaf.requires_grad_()
    delta = torch.nn.functional.softplus(leaves["dt"] + leaves["dt_bias"])
    operator = ssd_sequential if form == "sequential" else lambda *a, **k: ssd_chunked(*a, **k, chunk_size=chunk_size)
    y, final_state = operator(leaves["x"], delta, leaves["A"], leaves["B"], leaves["C"], D=leaves["D"])
    outputs = {"y": y, "final_state": final_state}
    for name, stored_gradients in [("y", "seq64/grad_y"), ("final_state", "seq64/grad_final")]:
        np.testing.assert_allclose(outputs[name].detach().numpy(), arrays[f"seq64/{name}"], rtol=1e-10, atol=1e-10)
        gradients = torch.autograd.grad(
            outputs[name], list(leaves.values()), cotangents[name], retain_graph=True, allow_unused=True
        )
        for leaf, gradient in zip(leaves, gradients, strict=True):
            expected = arrays[f"{stored_gradients}/{leaf}"]
            actual = np.zeros_like(expected) if gradient is None else gradient.numpy()
            np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10, err_msg=f"{name} by {leaf}")
