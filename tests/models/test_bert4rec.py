"""BERT4Rec against its PyTorch twin in float64, values and gradients: asked for the next item, and by the cloze."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

torch = pytest.importorskip("torch")

from experiments.benchmarks.torch_models.bert4rec import BERT4Rec
from tests.models.calls import LENGTHS, initial, rows, shapes_of, small, spread
from tests.training.test_all_positions import config_of, loader_of, only_batch, state_of, step_of
from tim4rec_jax.interop.attention_names import sasrec_names
from tim4rec_jax.interop.torch_names import linear, norm
from tim4rec_jax.models import MASK, BERT4RecConfig, build_model, init_params, last_hidden
from tim4rec_jax.training.losses import cross_entropy
from tim4rec_jax.training.step import _MASKS, _masked

STILL = {"dropout": 0.0, "attention_dropout": 0.0, "dtype": "float64"}


def as_torch(config, tree):
    """A tree of parameters, or of their gradients, by the names of the twin."""
    found = {path: np.asarray(leaf) for path, leaf in flatten_dict(tree).items()}
    vectors, bias = np.split(found.pop(("item_embedding", "embedding")), [config.d_model], axis=1)
    named = {
        "item_embedding.weight": np.concatenate([vectors, found.pop(("mask",))[None]]),
        "output_bias": bias[:, 0],
    }
    entries = [entry for entry in sasrec_names(config) if entry.path[0] == "encoder"]
    entries += [*linear(("projection",), "output_ffn"), *norm(("projection_norm",), "output_ln")]
    named |= {entry.torch_name: entry.convert(found.pop(entry.path)) for entry in entries}
    assert not found
    return {name: torch.from_numpy(np.array(value)) for name, value in named.items()}


def twin_of(config, params):
    twin = BERT4Rec(config)
    twin.load_state_dict(as_torch(config, params))
    return twin


def assert_gradients_agree(twin, config, gradients):
    ours = as_torch(config, gradients)
    for name, parameter in twin.named_parameters():
        gradient = parameter.grad.numpy()
        np.testing.assert_allclose(ours.pop(name), gradient, rtol=0, atol=1e-10, err_msg=name)
        # A key's bias adds the same to all scores of a query.
        assert np.abs(gradient).max() > (0 if name.endswith("key.bias") else 1e-6), name
    assert not ours


@pytest.mark.parametrize("layers", [1, 3])
def test_the_next_item(layers, x64):
    """Of histories that leave room for the mask, and of one that does not."""
    config = small("bert4rec", num_layers=layers, **STILL)
    params, model = jax.tree.map(lambda leaf: leaf.astype(np.float64), spread(config)), build_model(config)
    items, targets = rows()[0], np.array([3, 1, 99, 7])

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def mean_loss(params):
        hidden = last_hidden(model, {"params": params}, items, LENGTHS, None)
        scores = model.apply({"params": params}, hidden, method="score")
        return cross_entropy(scores, jnp.asarray(targets)).mean(), scores

    (loss, scores), gradients = mean_loss(params)
    twin = twin_of(config, params)
    expected = twin.logits(twin.next_item(torch.from_numpy(items.astype(np.int64)), torch.from_numpy(LENGTHS)))
    assert expected.abs().max() > 1
    np.testing.assert_allclose(scores, expected.detach(), rtol=0, atol=1e-10)
    wanted = torch.nn.functional.cross_entropy(expected, torch.from_numpy(targets))
    wanted.backward()
    np.testing.assert_allclose(loss, wanted.item(), rtol=0, atol=1e-10)
    assert_gradients_agree(twin, config, gradients)


def test_the_cloze(x64):
    """A step on packed rows of histories, some cut in windows, against the twin on one history at a time."""
    config = small("bert4rec", vocab_size=23, **STILL)
    run = dataclasses.replace(config_of(small("sasrec"), 40).train, positions="masked", window_context=3)
    experiment = dataclasses.replace(config_of(small("sasrec"), 40), model=config, train=run)
    loader = loader_of(experiment, max_events=40)
    state, payload = state_of(config), only_batch(loader)
    after, loss = step_of(experiment, 7, loader)(state, loader.resident, payload)

    key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl="threefry2x32"), state.step)
    batch = loader.batch(loader.resident, payload)
    masked = _masked(run, batch, 0, jax.random.fold_in(key, _MASKS))
    twin, losses, count = twin_of(config, state.params), 0.0, 0
    for row in range(len(batch.items)):
        for history in range(1, int(batch.segment_ids[row].max()) + 1):
            own = np.asarray(batch.segment_ids[row]) == history
            items, hidden = (torch.from_numpy(np.asarray(a)[row, own])[None] for a in (batch.items, masked.items))
            losses = losses + twin.loss(items.long(), hidden == MASK) * int((hidden == MASK).sum())
            count += int((hidden == MASK).sum())
    assert count == int(masked.weights.sum()) and count > 40
    (losses / count).backward()
    np.testing.assert_allclose(loss, losses.item() / count, rtol=0, atol=1e-10)
    assert_gradients_agree(twin, config, after.opt_state)


def test_initial_values():
    """Matrices, tables and the mask N(0, 0.02); all biases 0, those of the scores too."""
    config = small("bert4rec", vocab_size=200, max_len=50)
    found = as_torch(config, initial(config))
    assert not found["output_bias"].any()
    for name, value in found.items():
        if value.ndim == 2:
            assert float(value.std()) == pytest.approx(0.02, rel=4 / np.sqrt(2 * value.numel())), name
    assert float(found["item_embedding.weight"][-1].std()) == pytest.approx(0.02, rel=0.7)


def test_rows_beyond_the_catalogue_are_scored_by_no_one():
    config = dataclasses.replace(small("bert4rec", vocab_size=21), vocab_multiple=8)
    assert shapes_of(config)["item_embedding"]["embedding"].shape == (24, config.d_model + 1)
    model, params = build_model(config), initial(config)
    hidden = last_hidden(model, {"params": params}, rows()[0][:, :5] % 21, np.array([5, 1, 3, 5]), None)
    assert model.apply({"params": params}, hidden, method="score").shape == (4, 21)


def test_a_length_without_room_for_the_mask_is_refused():
    with pytest.raises(ValueError, match="max_len=1 must be at least 2: an event, and the mask behind it"):
        BERT4RecConfig(max_len=1)
    shortest = build_model(BERT4RecConfig(vocab_size=9, max_len=2, d_model=4, inner_size=4))
    params = init_params(shortest, jax.random.key(0))
    items = np.array([[3, 5], [5, 0]])
    hidden = last_hidden(shortest, {"params": params}, items, np.array([2, 1]), None)
    np.testing.assert_allclose(hidden[0], hidden[1], rtol=1e-6)  # The latest event alone is read.
