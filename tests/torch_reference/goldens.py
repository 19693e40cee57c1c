"""Numbers printed by the original programs, and what a PyTorch model says of itself by their names."""

import numpy as np


def load_case(golden_dir, name):
    """Returns a case's arrays by key, its hidden states and trained parameters included where they lie apart."""
    arrays = {}
    for suffix in ("", "_hid", "_hid2", "_final"):
        path = golden_dir / f"{name}{suffix}.npz"
        if suffix == "" or path.exists():
            with np.load(path) as stored:
                arrays |= {key: stored[key] for key in stored.files}
    return arrays


def section(arrays, prefix):
    """Returns the arrays under `prefix/`, without it."""
    return {key.removeprefix(prefix + "/"): value for key, value in arrays.items() if key.startswith(prefix + "/")}


def record_hidden_states(model):
    """Returns a dict that a forward pass fills with every module output, by the names of the stored `hid/*`."""
    seen = {}

    def note(name, value):
        if value is not None:
            seen[name] = value.detach().numpy()

    def hook(name, module, arguments, output):
        if name.endswith(".scan"):
            layer = name.split(".")[1]
            note(f"scan{layer}.dt_softplus", arguments[1])
            note(f"scan{layer}.y", output)
        elif isinstance(output, tuple):
            note(name, output[0])
            note(f"{name}:0", output[0])
            note(f"{name}:1", output[1])
        else:
            note(name, output)

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(
                lambda module, arguments, output, name=name: hook(name, module, arguments, output)
            )
    return seen
