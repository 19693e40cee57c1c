"""Models of which no original program's numbers are kept, against PyTorch twins that were written from the papers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments.benchmarks.torch_models import caser, gru4rec, lrurec
from tests.models.calls import LENGTHS, call, initial, rows, small, spread
from tim4rec_jax import build_model
from tim4rec_jax.training.losses import cross_entropy


def named_gru4rec(config, params):
    """Our tree, parameters or gradients, by the names of the twin."""
    found = {"dense.weight": params["dense"]["kernel"].T, "dense.bias": params["dense"]["bias"]}
    for i in range(config.num_layers):
        for ours, theirs in (("input", "ih"), ("recurrent", "hh")):
            found[f"gru_layers.weight_{theirs}_l{i}"] = params[f"layers_{i}"][f"{ours}_kernel"].T
            if config.use_bias:
                found[f"gru_layers.bias_{theirs}_l{i}"] = params[f"layers_{i}"][f"{ours}_bias"]
    return found


def named_lrurec(config, params):
    found = {f"norm.{theirs}": params["embedding_norm"][ours] for ours, theirs in (("scale", "weight"), ("bias",) * 2)}
    for i in range(config.num_layers):
        layer, at = params[f"layers_{i}"], f"blocks.{i}."
        unit, ffn = layer["mixer"], layer["ffn"]
        found |= {f"{at}lru.{name}": unit[name] for name in ("nu_log", "theta_log", "gamma_log")}
        for part, name in (("kernel", "B"), ("bias", "b")):
            real, imaginary = np.split(unit["in_proj"][part], 2, axis=-1)
            found[f"{at}lru.{name}"] = (real + 1j * imaginary).T
        real, imaginary = np.split(unit["out_proj"]["kernel"], 2)
        found |= {f"{at}lru.C": (real - 1j * imaginary).T, f"{at}lru.c": unit["out_proj"]["bias"]}
        for name, dense in (("w_1", ffn["fc1"]), ("w_2", ffn["fc2"])):
            found |= {f"{at}{name}.weight": dense["kernel"].T, f"{at}{name}.bias": dense["bias"]}
        for name, norm in (("lru_norm", layer["norm"]), ("ffn_norm", ffn["norm"])):
            found |= {f"{at}{name}.weight": norm["scale"], f"{at}{name}.bias": norm["bias"]}
    return found


def named_caser(config, params):
    found = {"dense.weight": params["dense"]["kernel"].T, "dense.bias": params["dense"]["bias"]}
    for h in range(1, config.window + 1):
        kernel = np.moveaxis(params[f"horizontal_{h}_kernel"], 2, 0)
        found |= {f"conv_h.{h - 1}.weight": kernel[:, None], f"conv_h.{h - 1}.bias": params[f"horizontal_{h}_bias"]}
    vertical = params["vertical_kernel"].T
    return found | {"conv_v.weight": vertical[:, None, :, None], "conv_v.bias": params["vertical_bias"]}


TWINS = {
    "gru4rec": (gru4rec.GRU4Rec, named_gru4rec),
    "lrurec": (lrurec.LRURec, named_lrurec),
    "caser": (caser.Caser, named_caser),
}
SETTINGS = (
    ("gru4rec", {"num_layers": 2, "hidden_size": 24}),
    ("gru4rec", {"num_layers": 1, "hidden_size": 8, "use_bias": True}),
    ("lrurec", {"num_layers": 2}),
    ("lrurec", {"num_layers": 1, "expand": 3}),
    ("caser", {}),
    ("caser", {"window": 2, "n_h": 3, "n_v": 1}),
    ("caser", {"window": 13, "n_h": 4, "n_v": 2}),
)


def by_name(config, params):
    named = TWINS[config.name][1](config, params)
    return {"item_embedding.weight": params["item_embedding"]["embedding"], **named}


@pytest.mark.parametrize(("name", "changes"), SETTINGS)
@pytest.mark.parametrize("where", ["all", "last"])
def test_outputs_and_every_gradient_are_the_twins(name, changes, where, x64):
    """In float64, with parameters far from their initial values; the loss is of every position, or of the last one."""
    config = small(name, dtype="float64", dropout=0.0, **changes)
    params, model, (items, _) = spread(config), build_model(config), rows()
    targets = np.random.default_rng(1).integers(1, config.vocab_size, items.shape)
    last = np.arange(len(items)), LENGTHS - 1
    read = np.nonzero(items) if where == "all" else last

    @jax.jit
    @jax.value_and_grad
    def value_and_grad(params):
        hidden = call(model, params, items, LENGTHS, None, where)
        hidden = hidden[read] if where == "all" else hidden
        scores = model.apply({"params": params}, hidden, method="score")
        return cross_entropy(scores, jnp.asarray(targets[read])).mean()

    twin = TWINS[name][0](config)
    state = {key: torch.from_numpy(np.array(value)) for key, value in by_name(config, params).items()}
    twin.load_state_dict(state)
    given = torch.from_numpy(items.astype(np.int64))
    hidden = twin.hidden(given)
    scores = twin.logits(hidden[read] if where == "all" else twin(given, torch.from_numpy(LENGTHS)))
    expected = torch.nn.functional.cross_entropy(scores, torch.from_numpy(targets[read]))
    expected.backward()

    ours = np.asarray(call(model, params, items, LENGTHS, None, where))
    theirs = hidden.detach().numpy()
    assert np.abs(theirs[last]).max() > 0.1
    np.testing.assert_allclose(ours[read] if where == "all" else ours, theirs[read], rtol=0, atol=1e-10)
    loss, gradients = value_and_grad(params)
    np.testing.assert_allclose(loss, expected.item(), rtol=0, atol=1e-10)
    actual = by_name(config, jax.tree.map(np.asarray, gradients))
    for key, parameter in twin.named_parameters():
        gradient = parameter.grad.numpy()
        assert np.abs(gradient).max() > 1e-9, key
        np.testing.assert_allclose(actual.pop(key), gradient, rtol=0, atol=1e-10, err_msg=key)
    assert not actual


@pytest.mark.parametrize("name", TWINS)
def test_initial_values_are_drawn_alike(name):
    """Each parameter of the twin is spread as ours is, whatever the framework draws."""
    config = small(name, vocab_size=400, d_model=64, num_layers=1, window=4, use_bias=True)
    torch.manual_seed(0)
    twin = dict(TWINS[name][0](config).named_parameters())
    ours = by_name(config, jax.tree.map(np.asarray, initial(config)))
    assert set(ours) == set(twin)
    for key, value in ours.items():
        theirs = twin[key].detach().numpy()
        # Five standard errors of a difference of means, and of deviations.
        far = 5 * np.sqrt(2 / value.size)
        assert value.shape == theirs.shape and np.abs(value.mean() - theirs.mean()) <= far * theirs.std(), key
        np.testing.assert_allclose(value.std(), theirs.std(), rtol=far, err_msg=key)


def test_the_ring_of_lrurec():
    """|lambda| lies on the ring and gamma makes the state as large as what drives it."""
    config = small("lrurec", d_model=256, num_layers=1, r_min=0.5, r_max=0.9)
    unit = initial(config)["layers_0"]["mixer"]
    radius, angle = np.exp(-np.exp(unit["nu_log"])), np.exp(unit["theta_log"])
    assert radius.shape == (2 * 256,) and 0.5 <= radius.min() < 0.53 and 0.88 < radius.max() <= 0.9
    # Uniform on the ring: the squares are uniform between those of its borders.
    assert float(np.mean(radius**2)) == pytest.approx((0.25 + 0.81) / 2, abs=0.03)
    assert angle.min() > 0 and angle.max() <= 2 * np.pi and angle.mean() == pytest.approx(np.pi, abs=0.3)
    np.testing.assert_allclose(np.exp(unit["gamma_log"]), np.sqrt(1 - radius**2), rtol=1e-4)


def test_both_forms_of_the_linear_recurrence_agree(x64):
    """What runs on a CPU and what runs elsewhere, with starts and a state before, in value and gradient."""
    from tim4rec_jax.layers.linear_recurrence import by_association, by_position

    rng = np.random.default_rng(0)
    decay = 0.95 * np.exp(2j * np.pi * rng.random(5))
    x, before = (rng.normal(size=(*shape, 2)) @ [1, 1j] for shape in ((3, 17, 5), (3, 5)))
    starts = rng.random((3, 17)) < 0.2

    def found(run, starts):
        def loss(decay, x, before):
            states = run(decay, x, before, starts)
            return jnp.sum(jnp.sin(states.real) * jnp.cos(states.imag))

        return run(decay, x, before, starts), jax.grad(loss, (0, 1, 2))(decay, x, before)

    decay, x, before, starts = map(jnp.asarray, (decay, x, before, starts))
    for marks in (None, starts):
        one, other = (jax.tree.leaves(found(run, marks)) for run in (by_position, by_association))
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("lrurec", {"r_min": 0.9, "r_max": 0.9}, "r_min=0.9 and r_max=0.9 must be 0 < r_min < r_max < 1"),
        ("lrurec", {"r_max": 1.0}, "r_min=0.8 and r_max=1.0 must be"),
        ("lrurec", {"r_min": 0.0}, "r_min=0.0 and r_max=0.99 must be"),
        ("caser", {"window": 1}, "window=1 must be at least 2"),
        ("caser", {"window": 1000}, "window=1000 must be at most 256"),
        ("caser", {"n_v": 0}, "n_v=0 must be at least 1"),
        ("gru4rec", {"hidden_size": 0}, "hidden_size=0 must be at least 1"),
    ],
)
def test_settings_out_of_range(name, changes, message):
    with pytest.raises(ValueError, match=message):
        small(name, **changes)


@pytest.mark.parametrize(("name", "unread"), [("caser", {"num_layers": 3}), ("gru4rec", {"norm_eps": 1e-5})])
def test_settings_that_a_model_does_not_read_are_refused(name, unread):
    (setting, value), *_ = unread.items()
    with pytest.raises(ValueError, match=f"{setting}={value} is not read by model.name='{name}'; leave it out"):
        dataclasses.replace(small(name), **unread)
