"""What every registered model has to do, and one that is registered from outside: the contract of the one call."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.calls import (
    LENGTHS,
    D,
    L,
    V,
    asked,
    call,
    initial,
    primitives,
    program,
    rows,
    shapes_of,
    small,
    spread,
)
from tim4rec_jax import build_model
from tim4rec_jax.model_config import AttentionConfig
from tim4rec_jax.models import MODELS, STATISTICS, SequentialModel, one_segment, variables

TIMES = {"gap_mean": 8.0, "gap_std": 3.0, "first_second": 1_000, "last_second": 40_000_000}
ONE_LAYER = {"num_layers": 1, "use_ffn": False, "date_knots": 0}
FORMS = {name: {"name": name} for name in (*(name for name in MODELS if name != "rnn4rec"), "rnn4rec")}
STATES = {
    f"{name}, {label}": {"name": name, "dtype": "float64", **changes}
    for name in ("tim4rec_causal", "ssd4rec", "mamba4rec", "gru4rec", "lrurec")
    for label, changes in (("float64", {}), ("float64, one layer", ONE_LAYER))
}
# Streamable like those, and blind to what is further back than their window.
WINDOWS = {"caser, float64": {"name": "caser", "dtype": "float64"}}
EXACT = (
    STATES
    | WINDOWS
    | {
        "sasrec, float64": {"name": "sasrec", "dtype": "float64"},
        "sasrec, float64, one layer": {"name": "sasrec", "dtype": "float64", "num_layers": 1},
        "bert4rec, float64": {"name": "bert4rec", "dtype": "float64"},
    }
)
# Three rows of several histories or one, and one that ends in padding.
HISTORIES = ((5, 4, 2), (12,), (1, 1, 9), (2, 4))


@pytest.fixture(autouse=True, scope="module")
def one_from_outside():
    from tests.models import rnn4rec

    yield
    MODELS.pop(rnn4rec.RNN4RecConfig.name, None)


@functools.cache
def made(config):
    """A model, parameters far from their initial values, and its jitted calls."""
    model, double = build_model(config), config.dtype == "float64"
    statistics = model.data_statistics(**TIMES)
    params = spread(config) | ({STATISTICS: statistics} if statistics else {})

    @jax.jit
    def bare(params, items, timestamps, **options):
        return model.apply(variables(params), items, timestamps, **options)

    def near(actual, expected, tolerance=1e-11 if double else 1e-5):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)

    named = {where: functools.partial(program(config, where), params) for where in ("all", "last")}
    named |= {"call": functools.partial(bare, params)}
    named |= {"init_cache": functools.partial(model.apply, variables(params), method="init_cache")}
    return SimpleNamespace(model=model, config=config, params=params, near=near, double=double, **named)


@pytest.fixture
def form(request):
    settings = (FORMS | EXACT)[request.param]
    with jax.enable_x64(settings.get("dtype") == "float64"):
        yield made(small(**settings))


def over(forms):
    quick = ("tim4rec_causal", "sasrec")
    params = [pytest.param(form, marks=[pytest.mark.quick] * (form in quick)) for form in forms]
    return pytest.mark.parametrize("form", params, indirect=True)


def other(items):
    return 1 + (items + 5) % (V - 1)


def histories(items):
    """Segment ids of rows that hold several histories, and (row, first, end) of each."""
    segment_ids, found = np.zeros_like(items), []
    for row, lengths in enumerate(HISTORIES):
        for number, (n, end) in enumerate(zip(lengths, np.cumsum(lengths).tolist(), strict=True), start=1):
            segment_ids[row, end - n : end] = number
            found.append((row, end - n, end))
    return segment_ids, found


def packed():
    """Items and times of full rows, segment ids and places of their histories."""
    items, times = rows(lengths=[sum(lengths) for lengths in HISTORIES])
    return items, times, *histories(items)


@over(FORMS)
def test_shapes_and_scores(form):
    assert isinstance(form.model, SequentialModel)
    assert form.model.uses_time == (form.config.name in ("tim4rec", "tim4rec_causal", "tisasrec"))
    hidden = form.all(rows()[0], LENGTHS, rows()[1])
    width = form.config.table_width
    assert width == D + (form.config.name == "bert4rec")
    assert hidden.shape == (4, L, width) and np.isfinite(hidden).all()
    assert jax.eval_shape(form.call, *rows())[1] is None
    table = form.model.apply(variables(form.params), method="item_table")
    assert table.shape == (V, width)
    scores = form.model.apply(variables(form.params), hidden, method="score")
    assert scores.shape == (4, L, V)
    form.near(scores, hidden @ table.T, 1e-4)


@over(FORMS | EXACT)
def test_single_positions_are_those_of_all(form):
    items, times = rows()
    full = np.asarray(form.all(items, LENGTHS, times))
    read, lengths = asked(form.config.name, items, LENGTHS)
    form.near(form.last(items, LENGTHS, times), np.asarray(form.all(read, lengths, times))[np.arange(4), lengths - 1])
    positions = np.stack([LENGTHS - 1, LENGTHS // 2], axis=1)
    some, _ = form.call(items, times, positions=positions)
    form.near(some, np.take_along_axis(full, positions[..., None], axis=1))


@over(FORMS)
def test_one_segment_says_what_padding_says(form):
    items, times = rows()
    options = {"segment_ids": (items != 0).astype(np.int32)} if form.model.packable else {}
    found, _ = form.call(items, times, **options)
    form.near(np.asarray(found)[items != 0], np.asarray(form.all(items, LENGTHS, times))[items != 0])


@over(FORMS | EXACT)
def test_a_causal_model_reads_nothing_later(form):
    """Items and times of the future change nothing before them, at any length."""
    items, times = rows()
    full = np.full(4, L)
    before = np.asarray(form.all(items, full, times))
    for start in (1, 7, 11):
        changed, later = items.copy(), times.copy()
        changed[:, start:] = other(changed[:, start:])
        # The faithful form reads later times, not later items.
        later[:, start:] += 3 * form.model.causal
        after = np.asarray(form.all(changed, full, later))
        same = (after[:, :start] == before[:, :start]).all()
        assert same == (form.model.causal or form.config.name == "tim4rec")
        assert (np.abs(after[:, start:] - before[:, start:]).max(axis=(1, 2)) > 1e-2).all()
        if not same:
            assert (np.abs(after - before)[:, :start].max(axis=(1, 2)) > 1e-2).all()
    if form.model.causal:
        np.testing.assert_array_equal(form.all(items, LENGTHS, times), before)


@over(STATES | WINDOWS)
def test_every_later_position_reads_an_event(form):
    """All later positions, or those in whose window it lies."""
    items, times = rows(lengths=[L] * 4)
    before = np.asarray(form.all(items, [L] * 4, times))
    for position in (1, 5, 8):
        changed, later = items.copy(), times.copy()
        changed[:, position] = other(changed[:, position])
        later[:, position:] += 777
        after = np.asarray(form.all(changed, [L] * 4, later))
        end = position + getattr(form.config, "window", L)
        np.testing.assert_array_equal(after[:, :position], before[:, :position])
        assert np.abs(after - before)[:, position:end].max(axis=(0, 2)).min() > 1e-6
        np.testing.assert_array_equal(after[:, end:], before[:, end:])


@over(FORMS)
def test_padding_and_batch_do_not_matter(form):
    """The last state does not depend on what lies beyond the length, on a shorter cut, or on the rows beside it."""
    items, times = rows()
    before = np.asarray(form.last(items, LENGTHS, times))
    padded = np.arange(L) >= LENGTHS[:, None]
    junk = np.where(padded, 9, items), LENGTHS, np.where(padded & form.model.causal, 1003, times)
    if form.model.causal or form.config.name in ("tim4rec", "bert4rec"):
        np.testing.assert_array_equal(form.last(*junk), before)
    order = np.array([3, 1, 2])
    cut = items[order, :8], LENGTHS[order], times[order]
    form.near(form.last(*cut), before[order])
    if not form.model.causal:  # It is padded back.
        form.near(form.all(*cut), np.asarray(form.all(items, LENGTHS, times))[order, :8])
    assert np.isfinite(form.last(np.zeros_like(items), np.ones(4, int), np.zeros_like(times))).all()


@over(FORMS | EXACT)
def test_packed_histories_are_as_if_alone(form):
    items, times, segment_ids, places = packed()
    if not form.model.packable:
        with pytest.raises(ValueError, match="is not packable: segment_ids go up to 3"):
            form.model.apply(variables(form.params), items, times, segment_ids=segment_ids)
        return
    found = np.asarray(form.call(items, times, segment_ids=segment_ids)[0])
    assert found.dtype == form.config.dtype and np.isfinite(found).all()
    alone, alone_times = np.zeros((2, len(places), L), np.int32)
    for i, (row, first, end) in enumerate(places):
        alone[i, : end - first], alone_times[i, : end - first] = items[row, first:end], times[row, first:end]
    expected = np.asarray(form.all(alone, np.array([end - first for _, first, end in places]), alone_times))
    for i, (row, first, end) in enumerate(places):
        form.near(found[row, first:end], expected[i, : end - first], 1e-12 if form.double else 2e-5)
    some, _ = form.call(items, times, segment_ids=segment_ids, positions=np.array([[6], [0], [3], [5]]))
    form.near(some[:, 0], found[np.arange(4), [6, 0, 3, 5]])
    # The marks are what does it.
    unmarked = np.asarray(form.all(items, np.full(4, L), times))
    assert np.abs(unmarked - found)[0, 5:9].max() > 1e-3
    form.near(unmarked[1], found[1])
    changed, later = items.copy(), times.copy()
    changed[0, :5], later[0, :5] = 1, 5
    after, _ = form.call(changed, later, segment_ids=segment_ids)
    np.testing.assert_array_equal(np.asarray(after)[0, 5:11], found[0, 5:11])


@over(EXACT)
def test_nothing_of_a_packed_neighbour_has_a_gradient(form):
    assert form.model.packable
    items, times, segment_ids, places = packed()

    @jax.jit
    @jax.grad
    def gradient(table, first, end):
        params = form.params | {"item_embedding": {"embedding": table}}
        hidden, _ = form.model.apply(variables(params), items, times, segment_ids=segment_ids)
        inside = (jnp.arange(L) >= first) & (jnp.arange(L) < end)
        return jnp.sum(jnp.sin(hidden[0]) * inside[:, None])

    for row, first, end in places[:3]:
        moved = np.asarray(gradient(form.params["item_embedding"]["embedding"], first, end)).any(axis=1)
        assert np.flatnonzero(moved).tolist() == sorted(items[row, first:end])


@over(FORMS | STATES | WINDOWS)
def test_pieces_of_any_size_give_what_one_pass_gives(form):
    if not form.model.streamable:
        with pytest.raises(ValueError, match="is not streamable"):
            form.init_cache(1)
        return
    ways, lengths = ([3, 1, 8],), LENGTHS
    if form.double:
        ways, lengths = ([23], [1] * 23, [7, 1, 2, 13]), [23] * 4
    items, times = rows(max(lengths), lengths)
    whole, final = np.asarray(form.all(items, lengths, times)), None
    for sizes in ways:
        cache, parts = form.init_cache(4), []
        for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
            piece = slice(start, start + size)
            hidden, cache = form.call(items[:, piece], times[:, piece], cache=cache)
            parts.append(hidden)
        form.near(np.concatenate(parts, axis=1)[items != 0], whole[items != 0], 1e-10 if form.double else 2e-5)
        final = cache if final is None else final
        for one, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(final), strict=True):
            assert one.shape == theirs.shape
            form.near(one, theirs, 1e-10)
    np.testing.assert_array_equal(final.events, lengths)


@over(STATES | WINDOWS)
def test_ragged_pieces_leave_what_is_padded_alone(form):
    items, times = (column[:, :8] for column in rows(lengths=[8] * 4))
    empty = form.init_cache(4)
    jax.tree.map(np.testing.assert_array_equal, empty, form.model.init_cache(4))  # It depends on no parameter.
    options = {"segment_ids": one_segment(jnp.array([0, 2, 6, 8]), 8), "cache": empty}
    _, cache = form.call(items, times, **options)
    for leaf, start in zip(jax.tree.leaves(cache), jax.tree.leaves(empty), strict=True):
        np.testing.assert_array_equal(leaf[0], start[0])
    assert any((leaf[1] != 0).any() for leaf in jax.tree.leaves(cache.layers))
    items[1, 2:], times[1, 2:] = 7, 1
    _, again = form.call(items, times, **options)
    jax.tree.map(np.testing.assert_array_equal, cache, again)
    assert cache.events.tolist() == [0, 2, 6, 8]


@over(FORMS)
def test_dropout_follows_the_example_and_not_the_batch(form):
    """Masks follow the example, the positions and the seed, not the layout of the batch."""
    items, times = rows()
    run = functools.partial(program(form.config, "last", deterministic=False), form.params)
    ids = np.arange(4)
    before = np.asarray(run(items, LENGTHS, times, ids))
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    order = np.array([3, 1, 2])
    near(run(items[order, :8], LENGTHS[order], times[order], ids[order]), before[order])
    np.testing.assert_array_equal(run(items, LENGTHS, times, ids), before)
    assert (np.abs(run(items, LENGTHS, times, ids + 4) - before).max(axis=1) > 1e-2).all()
    assert (np.abs(run(items, LENGTHS, times, ids, 1) - before).max(axis=1) > 1e-2).all()
    read, lengths = asked(form.config.name, items, LENGTHS)
    full = np.asarray(program(form.config, "all", deterministic=False)(form.params, read, lengths, times))
    near(full[ids, lengths - 1], before)


@over(FORMS)
def test_segment_ids_of_another_shape_are_refused(form):
    for wrong in (np.ones((4, L - 1), np.int32), np.ones((4, L), np.float32)):
        with pytest.raises(ValueError, match=r"segment_ids are .*, expected integers of the items' shape"):
            form.model.apply(variables(form.params), *rows(), segment_ids=wrong)


@over(FORMS)
def test_any_length_is_read_or_what_is_too_long_is_refused(form):
    """More positions than a streamable model was trained with: no parameter depends on the length."""
    if form.model.streamable:
        items, times = rows(24, [24] * 4)
        long = np.asarray(form.all(items, LENGTHS, times))
        form.near(long[:, :L], form.all(items[:, :L], LENGTHS, times[:, :L]))
        form.near(form.last(items, np.full(4, 24), times), long[:, -1])
        assert shapes_of(dataclasses.replace(form.config, max_len=3)) == shapes_of(form.config)
        return
    for where in (form.all, form.last):
        with pytest.raises(ValueError, match="items have 13 positions, more than max_len=12"):
            jax.eval_shape(where, np.ones((4, 13), np.int32), LENGTHS, rows()[1])


@over(["tim4rec", "tisasrec"])
def test_times_of_another_shape_are_refused(form):
    items, times = rows()
    for where in (form.all, form.last):
        with pytest.raises(ValueError, match=r"timestamps have shape None, expected \(b, max_len\)=\(4, 12\)"):
            jax.eval_shape(where, items, LENGTHS, None)
        with pytest.raises(ValueError, match=r"timestamps have shape \(4, 8\), expected \(b, max_len\)=\(4, 12\)"):
            jax.eval_shape(where, items[:, :8], LENGTHS, times[:, :8])


@pytest.mark.parametrize("name", ["sasrec", "tisasrec", "mamba4rec", "echomamba4rec"])
def test_initial_values(name):
    """Matrices, tables and the spectrum N(0, 0.02); convolutions uniform; A 1 to n; biases 0, gains and D 1."""
    attention = name.endswith("sasrec")
    sizes = {"max_len": 50, "time_span": 256} if attention else {"num_layers": 2 - (name == "echomamba4rec")}
    config = small(name, vocab_size=200, kaiming_init=False, **sizes)
    params, draws = initial(config), []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        kind = path[-1].key
        if path[-2].key == "conv":
            bound = 1 / math.sqrt(config.d_conv)
            assert 0.9 * bound < float(jnp.abs(leaf).max()) <= bound, path
            assert float(leaf.std()) == pytest.approx(bound / math.sqrt(3), rel=4 / math.sqrt(2 * leaf.size)), path
        elif kind in ("kernel", "embedding", "weight"):
            assert float(leaf.std()) == pytest.approx(0.02, rel=4 / math.sqrt(2 * leaf.size)), path
            assert abs(float(leaf.mean())) < 4.5 * 0.02 / math.sqrt(leaf.size), path
            draws.append(leaf.ravel()[:8])
        elif kind == "A_log":
            every = np.broadcast_to(np.arange(1, config.d_state + 1), (config.d_inner, config.d_state))
            np.testing.assert_allclose(np.exp(leaf), every, rtol=1e-6)
        else:
            assert (leaf == (1 if kind in ("scale", "D") else 0)).all(), path
    assert len(np.unique(np.concatenate(draws))) == 8 * len(draws)
    assert float(jnp.abs(params["item_embedding"]["embedding"][0]).min()) > 0


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("rnn4rec", "tim4rec_causal", "ssd4rec")])
def test_bfloat16_is_close_and_keeps_sensitive_parts_in_float32(name):
    """Parameters, softmax, decays and norms stay in float32, and the result is close."""
    config = small(name, **({"num_layers": 1} if name == "echomamba4rec" else {}))
    low = dataclasses.replace(config, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(low))} == {jnp.dtype("float32")}
    params, model, (items, times) = initial(config), build_model(low), rows()

    def run(params):
        hidden, full = (call(model, params, items, LENGTHS, times, where) for where in ("last", "all"))
        return hidden, model.apply({"params": params}, hidden, method="score"), full

    traced = jax.jit(run).trace(params)
    found = [(name, output.dtype.name) for name, output in primitives(traced.jaxpr.jaxpr)]
    assert ("dot_general", "bfloat16") in found
    kinds = ("exp", "log1p", "rsqrt", "cumsum", "reduce_sum")
    assert not [one for one in found if one[0] in kinds and one[1] == "bfloat16"]
    if isinstance(config, AttentionConfig):  # Two softmaxes and five norms or one more, in each of two calls.
        assert [found.count((kind, "float32")) for kind in ("exp", "rsqrt")] == [2 * 2, 2 * (5 + (name == "bert4rec"))]
    else:
        kept = {"gru4rec": {"logistic", "tanh"}, "lrurec": {"exp", "rsqrt"}, "caser": set()}
        assert {(kind, "float32") for kind in kept.get(name, {"exp", "log1p", "rsqrt"})} <= {*found}
        assert not {(kind, "bfloat16") for kind in kept.get(name, ())} & {*found}
    hidden, scores, full = traced.lower().compile()(params)
    assert (hidden.dtype, full.dtype, scores.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    expected = np.asarray(program(config, "all")(params, items, LENGTHS, times))
    read, lengths = asked(name, items, LENGTHS)
    last = np.asarray(program(config, "all")(params, read, lengths, times))[np.arange(4), lengths - 1]
    np.testing.assert_allclose(np.asarray(full, np.float32), expected, rtol=0, atol=0.1)
    np.testing.assert_allclose(np.asarray(hidden, np.float32), last, rtol=0, atol=0.1)
    np.testing.assert_allclose(scores, last @ params["item_embedding"]["embedding"].T, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("name", "operation", "width"),
    [("sasrec", "erf", 24), ("bert4rec", "erf", 24), ("mamba4rec", "erf", 4 * D), ("echomamba4rec", "logistic", D)],
)
def test_the_last_layer_is_computed_where_it_is_read(name, operation, width):
    """Its feed-forward, or the gated unit of the last block, runs at one position per row."""
    config, (items, _), found = small(name), rows(), {}
    for where in ("all", "last"):
        jaxpr = program(config, where).trace(spread(config), items, LENGTHS, None).jaxpr
        shapes = [output.shape for name, output in primitives(jaxpr.jaxpr) if name.startswith(operation)]
        found[where] = [shape[1] for shape in shapes if shape[2] == width]
    assert found == {"all": [L, L], "last": [L, 1]}


@over(["mamba4rec", "echomamba4rec"])
def test_the_backend_of_scan_and_convolution_can_be_named(form):
    items, times = rows()
    named = dataclasses.replace(form.config, kernels="reference")
    form.near(program(named, "last")(form.params, items, LENGTHS, times), form.last(items, LENGTHS, times), 1e-4)
    with pytest.raises(ValueError, match="model.kernels='fortran' is not offered by any operator"):
        dataclasses.replace(form.config, kernels="fortran")
