"""model.seen_bias: a score of its own for what was seen, exact in the loss, and the same in everything that ranks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from tests.serving.tiny_run import make_causal_config, make_config, make_run
from tim4rec_jax import fit, load_log
from tim4rec_jax.config import ExperimentConfig, ParallelConfig, TrainConfig
from tim4rec_jax.data.loader import Batch, PackedBatch
from tim4rec_jax.data.packing import LengthGroup
from tim4rec_jax.data.splits import split_log
from tim4rec_jax.evaluation.full_sort import evaluate
from tim4rec_jax.models import apply_method, build_model, init_params, item_scores, last_hidden, variables
from tim4rec_jax.serving.export import export_model
from tim4rec_jax.serving.prepared import PreparedRecommender, Row
from tim4rec_jax.serving.recommender import Recommender
from tim4rec_jax.serving.streaming import Streamer
from tim4rec_jax.serving.user_table import UserTable
from tim4rec_jax.training.checkpoint import Checkpointer
from tim4rec_jax.training.losses import seen_log_sums, with_seen_bias
from tim4rec_jax.training.step import value_and_grad
from tim4rec_jax.training.stored_run import load_model

V, L = 31, 12
WITH = {"seen_bias": True}


def with_bias(params, w):
    return {**params, "seen_bias": jnp.float32(w / 10)}


def by_definition(hidden, table, items, segments, targets, w):
    """The loss of each position from all its scores, in NumPy and float64."""
    hidden, table = np.float64(hidden), np.float64(table)
    losses = np.zeros(items.shape)
    for b, i in np.ndindex(*items.shape):
        seen = {int(v) for v, s in zip(items[b, : i + 1], segments[b, : i + 1], strict=True) if s == segments[b, i]}
        scores = table @ hidden[b, i]
        scores[sorted(seen - {0})] += w
        losses[b, i] = np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[targets[b, i]]
    return losses


@pytest.fixture(scope="module")
def rows():
    """Rows of several histories in which items repeat, of few items, so that many targets were seen."""
    rng = np.random.default_rng(0)
    items = rng.integers(1, 6, (3, L)).astype(np.int32)
    segments = np.array([[1] * 5 + [2] * 7, [1] * 12, [1] * 3 + [2] * 4 + [0] * 5], np.int32)
    items[segments == 0] = 0
    return items, segments, rng.integers(1, 8, (3, L)).astype(np.int32)


@pytest.mark.quick
@pytest.mark.parametrize("w", [-30.0, -3.0, 0.0, 2.5])
def test_the_loss_by_definition(w, rows):
    items, segments, targets = rows
    rng = np.random.default_rng(1)
    hidden, table = rng.normal(size=(3, L, 8)).astype(np.float32), rng.normal(size=(V, 8)).astype(np.float32)
    log_seen, target_seen = seen_log_sums(hidden, table, items, segments, targets)
    at_target = np.einsum("bld,bld->bl", hidden, table[targets])
    plain = jax.nn.logsumexp(hidden @ table.T, axis=-1) - at_target
    found = with_seen_bias(*(jnp.ravel(a) for a in (plain, at_target, log_seen, target_seen)), jnp.float32(w))
    real = (segments != 0).ravel()
    expected = by_definition(hidden, table, items, segments, targets, w).ravel()
    np.testing.assert_allclose(np.asarray(found)[real], expected[real], rtol=2e-5, atol=2e-5)
    assert np.asarray(target_seen)[segments != 0].any() and not np.asarray(target_seen)[segments != 0].all()


@pytest.mark.parametrize("in_tiles", [False, True])
@pytest.mark.parametrize("name", ["tim4rec_causal", "sasrec", "gru4rec"])
def test_every_position_has_the_gradient_of_the_definition(name, in_tiles, rows):
    """Against all scores with a dense mask, differentiated by JAX; also of w and of what fills the batch."""
    items, segments, targets = rows
    config = make_config(name, dropout=0.0, **WITH)
    other = {rate: 0.0 for rate in ("attention_dropout", "time_dropout") if hasattr(config.model, rate)}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=V, **other))
    model = build_model(config.model)
    params = with_bias(jax.tree.map(lambda x: 10 * x, init_params(model, jax.random.key(0))), -1.5)
    train = TrainConfig(positions="all", loss_in_tiles=in_tiles)
    weights = ((segments != 0) * np.linspace(0.5, 1.5, L)).astype(np.float32)
    times = np.cumsum(np.ones_like(items), axis=1) * 100
    batch = PackedBatch(*map(jnp.asarray, (items, segments, times, targets, weights)))
    groups = (LengthGroup(L, 3),)
    found, gradient = jax.jit(
        lambda p: value_and_grad(model, train, p, batch, groups, jax.random.key_data(jax.random.key(0)))
    )(params)

    def dense(params):
        hidden, _ = model.apply(variables(params), items, times, segment_ids=segments)
        scores = hidden @ apply_method(model, variables(params), "item_table").T
        seen = np.zeros((3, L, V), bool)
        for b, i in np.ndindex(3, L):
            inside = segments[b, : i + 1] == segments[b, i]
            seen[b, i, items[b, : i + 1][inside]] = True
        seen[..., 0] = False
        scores = scores + jnp.where(seen, 10 * params["seen_bias"], 0)
        losses = jax.nn.logsumexp(scores, -1) - jnp.take_along_axis(scores, targets[..., None], -1)[..., 0]
        return jnp.sum(weights * losses)

    expected, wanted = jax.jit(jax.value_and_grad(dense))(params)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert abs(float(wanted["seen_bias"])) > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), gradient, wanted)


def test_last_positions_have_the_loss_of_the_definition(rows):
    items, _, targets = rows
    config = make_config("ssd4rec", dropout=0.0, **WITH)
    model = build_model(dataclasses.replace(config.model, vocab_size=V))
    params = with_bias(jax.tree.map(lambda x: 10 * x, init_params(model, jax.random.key(0))), 2.0)
    lengths = np.array([5, 12, 7], np.int32)
    items = np.where(np.arange(L) < lengths[:, None], np.maximum(items, 1), 0)
    last = targets[:, 0]
    batch = Batch(*map(jnp.asarray, (items, lengths, np.zeros_like(items), last, np.ones(3, np.float32))))
    key = jax.random.key_data(jax.random.key(0))
    found, _ = value_and_grad(model, TrainConfig(), params, batch, (LengthGroup(L, 3),), key)
    hidden = last_hidden(model, variables(params), items, lengths, None)[:, None]
    table = apply_method(model, variables(params), "item_table")
    expected = 0.0
    for b in range(3):
        row = items[b : b + 1, : lengths[b]]
        one = np.broadcast_to(hidden[b : b + 1], (1, lengths[b], hidden.shape[-1]))
        expected += by_definition(one, table, row, np.ones_like(row), np.full_like(row, last[b]), 2.0)[0, -1]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory, log):
    """A run whose w says much; its histories are longer than what the model reads, and repeat items."""

    path = tmp_path_factory.mktemp("runs") / "seen"
    params = make_run(path, log, make_causal_config(**WITH))
    with Checkpointer(path / "checkpoints") as checkpointer:
        checkpointer.save_best(8, with_bias(params, -4.0), {"ndcg@10": 0.2})
    return path


@pytest.fixture(scope="module")
def recommender(run):
    return Recommender.from_run(run)


def expected_scores(recommender, user):
    """All scores of a user from the model's plain ones: w more for every item of the whole history."""
    history = recommender.history_of_user(user)
    hidden = recommender.hidden([history])[0]
    table = np.asarray(apply_method(recommender.model, variables(recommender.params), "item_table"))
    scores = table @ hidden
    scores[np.unique(history.items)] -= 4.0
    return scores


def test_recommendations(recommender):
    users = recommender.users[:10]
    assert max(len(recommender.history_of_user(user).items) for user in users) > recommender.max_len
    indices, scores = recommender.top_k([recommender.history_of_user(user) for user in users], 10)
    everything = [np.arange(1, 31)] * len(users)
    named = recommender.item_scores([recommender.history_of_user(user) for user in users], everything)
    for user, best, found, all_scores in zip(users, indices, scores, named, strict=True):
        expected = expected_scores(recommender, user)
        np.testing.assert_allclose(all_scores, expected[1:], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found, np.sort(expected[1:])[::-1][:10], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(expected[best], found, rtol=1e-4, atol=1e-4)


def test_the_service_and_the_stream_say_the_same(recommender, run):
    users = recommender.users[:6]
    prepared = PreparedRecommender(recommender, rows=4, k=10)
    histories = [recommender.history_of_user(user) for user in users]
    short = [history for history in histories if len(history.items) <= recommender.max_len]
    assert short
    best, scores = recommender.top_k(histories, 10)
    for row, answer in enumerate(prepared.rank([Row(history) for history in histories])):
        np.testing.assert_array_equal(answer.indices, best[row])
    table = UserTable(recommender)
    table.add_histories(dict(zip(users, histories, strict=True)))
    streamed, streamed_scores = table.top_k(users, 10)
    for row, history in enumerate(histories):
        if len(history.items) <= recommender.max_len:  # A stream reads all of a history.
            np.testing.assert_array_equal(streamed[row], best[row])
            np.testing.assert_allclose(streamed_scores[row], scores[row], rtol=1e-4, atol=1e-4)
    [named] = [table.item_scores(users[0], np.arange(1, 31))]
    np.testing.assert_allclose(np.sort(named)[::-1][:10], streamed_scores[0], rtol=1e-5)
    with pytest.raises(ValueError, match="its scores read every user's items; keep them"):
        UserTable(recommender, keep_items=False)
    with pytest.raises(ValueError, match="give `seen`"):
        Streamer(recommender.model, recommender.params).top_k(table.hidden[:1], 3)


def test_the_evaluation_ranks_by_it(recommender, run, log):
    config = recommender.config
    examples = split_log(log, config.data).test
    for exclude in (False, True):
        measured = dataclasses.replace(config, eval=dataclasses.replace(config.eval, exclude_seen=exclude))
        result = evaluate(recommender.model, recommender.params, log, examples, measured)
        for place in range(0, len(result.ranks), 7):
            user, end = result.measured.examples.users[place], result.measured.examples.ends[place]
            row = slice(log.offsets[user], log.offsets[user] + end)
            history = dataclasses.replace(
                recommender.history_of_user(log.user_ids[int(user)]),
                items=log.items[row],
                timestamps=log.timestamps[row],
            )
            target = int(log.items[log.offsets[user] + end])
            items = np.arange(1, 31)
            [scores] = recommender.item_scores([history], [items])
            left = np.ones(30, bool)
            if exclude:
                left[np.unique(history.items) - 1] = False
                left[target - 1] = True
            assert result.ranks[place] == 1 + np.count_nonzero(scores[left] > scores[target - 1])


def test_the_export_says_the_same(recommender, tmp_path):
    written = export_model(recommender, tmp_path / "out", k=5, platforms=("cpu",))
    names = [one["name"] for one in written["programs"]["recommend"]["inputs"]]
    assert names == ["parameters", "items", "lengths", "timestamps", "seen", "excluded", "allowed"]
    assert [one["name"] for one in written["programs"]["top_k"]["inputs"]][1:] == [
        "hidden",
        "seen",
        "excluded",
        "allowed",
    ]
    parameters = dict(np.load(tmp_path / "out" / "parameters.npz"))
    histories = [recommender.history_of_user(user) for user in recommender.users[:4]]
    lengths = np.array([min(len(one.items), recommender.max_len) for one in histories], np.int32)
    items, lengths, times = recommender.inputs(histories, lengths, recommender.max_len)
    seen = recommender.seen(histories, range(4), 4)
    rules = seen, np.zeros((4, 1), np.int32), np.load(tmp_path / "out" / "allowed.npy")
    program = jax.export.deserialize((tmp_path / "out" / "recommend.jax_export").read_bytes())
    best, scores = program.call(parameters, items, lengths, times, *rules)
    expected = recommender.top_k(histories, 5)
    np.testing.assert_array_equal(best, expected[0])
    np.testing.assert_allclose(scores, expected[1], rtol=1e-4, atol=1e-4)
    top = jax.export.deserialize((tmp_path / "out" / "top_k.jax_export").read_bytes())
    np.testing.assert_array_equal(top.call(parameters, recommender.hidden(histories), *rules)[0], expected[0])


@pytest.mark.parametrize(
    ("model", "train", "parallel", "said"),
    [
        ("tim4rec", {}, {}, "needs a causal model, which model.name='tim4rec' is not"),
        ("ssd4rec", {"loss": "bpr"}, {}, "trains with train.loss='ce', not 'bpr'"),
        ("ssd4rec", {"loss": "sampled_ce", "num_negatives": 4}, {}, "trains with train.loss='ce'"),
        ("ssd4rec", {"loss_in_tiles": True}, {}, "leave out train.loss_in_tiles, or take train.positions='all'"),
        ("ssd4rec", {}, {"catalogue_shards": 2}, "needs the item embedding whole"),
    ],
)
def test_what_it_does_not_go_with(model, train, parallel, said):
    base = make_config(model)
    with pytest.raises(ValueError, match=said):
        ExperimentConfig(
            "x",
            dataclasses.replace(base.model, seen_bias=True, vocab_multiple=2),
            train=TrainConfig(**train),
            parallel=ParallelConfig(**parallel),
        )


def test_without_it_nothing_is_read_of_the_history():
    config = make_config("ssd4rec")
    model = build_model(config.model)
    params = init_params(model, jax.random.key(0))
    assert "seen_bias" not in params
    hidden = jnp.ones((2, 8), jnp.float32)
    plain = apply_method(model, variables(params), "score", hidden)
    np.testing.assert_array_equal(item_scores(model, variables(params), hidden, jnp.ones((2, 3), jnp.int32)), plain)
    biased = build_model(make_config("ssd4rec", **WITH).model)
    with pytest.raises(ValueError, match="give `seen`"):
        apply_method(biased, variables(init_params(biased, jax.random.key(0))), "score", hidden)


def drawn_log(share: float, seed: int = 0) -> pl.DataFrame:
    """150 users of 20 events over 60 items; a share of events repeats an item of its user, the others are new to it."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(150):
        new, had = list(rng.permutation(60)), []
        for step in range(20):
            item = had[rng.integers(len(had))] if had and rng.random() < share else new.pop()
            had.append(item)
            rows.append((user, int(item), 1_000_000 + 100 * step))
    return pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row")


@pytest.mark.parametrize(("share", "sign"), [(0.7, 1), (0.0, -1)])
def test_it_learns_whether_items_repeat(share, sign, tmp_path):
    """And what is learned is worth much: such logs are drawn without any other order."""
    sizes = {"d_model": 16, "num_layers": 1, "d_state": 8, "head_dim": 16, "learning_rate": 1e-2}
    options = {"epochs": 6, "batch_size": 8, "progress": False, "tensorboard": False, **sizes}
    log = load_log(drawn_log(share), k_core=0)
    runs = {on: fit(log, "ssd4rec", seen_bias=on, run_dir=tmp_path / str(on), **options) for on in (True, False)}
    learned = float(load_model(tmp_path / "True").params["seen_bias"])
    assert sign * learned > 0.1
    with_it, without = (runs[on].metrics["test"]["hit@10"] for on in (True, False))
    assert with_it > without
