"""What every registered model has to do, and one that is registered from outside: the contract of the one call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.settings import settings_of
from tim4rec_jax import build_model
from tim4rec_jax.models import MODELS, STATISTICS, SequentialModel, init_params, last_hidden, variables

L, V, D = 10, 30, 16
SHAPE = {
    "vocab_size": V, "max_len": L, "d_model": D, "d_state": 4, "head_dim": 8, "chunk_size": 4, "inner_size": 24,
    "num_layers": 2, "dropout": 0.2, "time_dropout": 0.2, "attention_dropout": 0.2, "norm_eps": 1e-6, "date_knots": 4,
}  # fmt: skip
TIMES = {"gap_mean": 8.0, "gap_std": 3.0, "first_second": 1_000, "last_second": 40_000_000}


FORMS = [*(name for name in MODELS if name != "gru4rec"), "gru4rec"]


@pytest.fixture(autouse=True, scope="module")
def one_from_outside():
    from tests.models import gru4rec

    yield
    MODELS.pop(gru4rec.GRU4RecConfig.name, None)


LENGTHS = np.array([10, 1, 6])


@functools.cache
def made(name):
    """The model, parameters far from their initial values, and the jitted call."""
    model = build_model(settings_of(name, **SHAPE))
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    draws = [jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]

    @functools.partial(jax.jit, static_argnames="deterministic")
    def call(params, items, timestamps, seed=0, **options):
        return model.apply(variables(params), items, timestamps, rngs={"dropout": jax.random.key(seed)}, **options)

    params = jax.tree.unflatten(tree, draws)
    statistics = model.data_statistics(**TIMES)
    return model, params | ({STATISTICS: statistics} if statistics else {}), call


def rows(seed=0):
    rng = np.random.default_rng(seed)
    inside = np.arange(L) < LENGTHS[:, None]
    items = (rng.integers(1, V, inside.shape) * inside).astype(np.int32)
    times = ((5_000 + np.cumsum(rng.integers(0, 90_000, inside.shape), axis=1)) * inside).astype(np.int32)
    return items, times


def near(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


QUICK = ("tim4rec_causal", "sasrec")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.quick] * (name in QUICK)) for name in FORMS])
class TestContract:
    def test_shapes_and_scores(self, name):
        model, params, call = made(name)
        assert isinstance(model, SequentialModel)
        hidden, cache = call(params, *rows())
        assert hidden.shape == (3, L, D) and cache is None and np.isfinite(hidden).all()
        table = model.apply(variables(params), method="item_table")
        assert table.shape == (V, D)
        scores = model.apply(variables(params), hidden, method="score")
        assert scores.shape == (3, L, V)
        near(scores, hidden @ table.T, 1e-4)

    def test_single_positions_are_those_of_all(self, name):
        model, params, call = made(name)
        items, times = rows()
        full, _ = call(params, items, times)
        for positions in (LENGTHS[:, None] - 1, np.stack([LENGTHS - 1, LENGTHS // 2], axis=1)):
            some, _ = call(params, items, times, positions=positions)
            near(some, np.take_along_axis(np.asarray(full), positions[..., None], axis=1))
        near(last_hidden(model, variables(params), items, LENGTHS, times), full[np.arange(3), LENGTHS - 1])

    def test_one_segment_says_what_padding_says(self, name):
        _, params, call = made(name)
        items, times = rows()
        expected, _ = call(params, items, times)
        found, _ = call(params, items, times, segment_ids=(items != 0).astype(np.int32))
        real = items != 0
        near(np.asarray(found)[real], np.asarray(expected)[real])

    def test_a_causal_model_reads_nothing_later(self, name):
        model, params, call = made(name)
        items, times = rows()
        before, _ = call(params, items, times)
        after, _ = call(params, np.where(np.arange(L) >= 6, 1 + (items + 4) % (V - 1), items), times)
        same = (np.asarray(after)[:, :6] == np.asarray(before)[:, :6]).all()
        # The faithful form reads later times, not later items.
        assert same == (model.causal or name == "tim4rec")

    def test_packed_histories_are_as_if_alone(self, name):
        model, params, call = made(name)
        items, times = rows()
        segments = np.array([[1] * 4 + [2] * 6, [1] + [0] * 9, [1] * 2 + [2] * 4 + [0] * 4], np.int32)
        if not model.packable:
            with pytest.raises(ValueError, match="is not packable: segment_ids go up to 2"):
                model.apply(variables(params), items, times, segment_ids=segments)
            return
        packed, _ = call(params, items, times, segment_ids=segments)
        for row, first, end in ((0, 0, 4), (0, 4, 10), (1, 0, 1), (2, 0, 2), (2, 2, 6)):
            alone, alone_times = np.zeros((1, L), np.int32), np.zeros((1, L), np.int32)
            alone[0, : end - first], alone_times[0, : end - first] = items[row, first:end], times[row, first:end]
            near(packed[row, first:end], call(params, alone, alone_times)[0][0, : end - first])
        some, _ = call(params, items, times, segment_ids=segments, positions=np.array([[6], [0], [3]]))
        near(some[:, 0], np.asarray(packed)[np.arange(3), [6, 0, 3]])

    def test_pieces_of_any_size_give_what_one_pass_gives(self, name):
        model, params, call = made(name)
        items, times = rows()
        if not model.streamable:
            with pytest.raises(ValueError, match="is not streamable"):
                model.apply(variables(params), 1, method="init_cache")
            return
        whole, _ = call(params, items, times)
        cache, parts = model.apply(variables(params), 3, method="init_cache"), []
        for piece in (slice(0, 3), slice(3, 4), slice(4, 10)):
            hidden, cache = call(params, items[:, piece], times[:, piece], cache=cache)
            parts.append(hidden)
        real = items != 0
        near(np.concatenate(parts, axis=1)[real], np.asarray(whole)[real])
        assert cache.events.tolist() == LENGTHS.tolist()

    def test_dropout_follows_the_example_and_not_the_batch(self, name):
        _, params, call = made(name)
        items, times = rows()
        options = {"deterministic": False, "example_ids": np.arange(3)}
        before, _ = call(params, items, times, **options)
        order = np.array([2, 0])
        cut, _ = call(params, items[order], times[order], deterministic=False, example_ids=order)
        real = items[order] != 0
        near(np.asarray(cut)[real], np.asarray(before)[order][real], 1e-4)
        other, _ = call(params, items, times, seed=1, **options)
        assert np.abs(np.asarray(other) - before).max() > 1e-2

    def test_segment_ids_of_another_shape_are_refused(self, name):
        model, params, _ = made(name)
        items, times = rows()
        for wrong in (np.ones((3, L - 1), np.int32), np.ones((3, L), np.float32)):
            with pytest.raises(ValueError, match=r"segment_ids are .*, expected integers of the items' shape"):
                model.apply(variables(params), items, times, segment_ids=wrong)
