"""Full ranking against the same thing done row by row."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from tests.evaluation.logs import random_log
from tests.evaluation.toy_model import ToyModel, init_toy
from tests.models.settings import settings_of
from tim4rec_jax import build_model
from tim4rec_jax.config import DataConfig, EvalConfig, ExperimentConfig, ModelConfig
from tim4rec_jax.data.interactions import clean
from tim4rec_jax.data.splits import Examples, leave_one_out
from tim4rec_jax.evaluation import full_sort
from tim4rec_jax.evaluation.full_sort import FullSortEvaluator, _rank_batch, evaluate
from tim4rec_jax.models import TiM4RecConfig, init_params, last_hidden

MAX_LEN, NUM_ITEMS = 20, 37
CONFIG = ExperimentConfig("toy", ModelConfig(max_len=MAX_LEN), eval=EvalConfig(batch_size=16, top_k=(10, 20)))
EXCLUDING = dataclasses.replace(CONFIG, eval=dataclasses.replace(CONFIG.eval, exclude_seen=True, seen_targets="rank"))
LEAVING_OUT = dataclasses.replace(CONFIG, eval=dataclasses.replace(CONFIG.eval, exclude_seen=True))


def both_of(config):
    """The same with seen items in the ranking."""
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, exclude_seen=False))


class FixedScores(nn.Module):
    """Scores every history alike."""

    cloze = packable = streamable = False

    def setup(self):
        self.scores = self.param("score", nn.initializers.zeros, (5,))

    def __call__(self, items, timestamps, *, segment_ids=None, positions=None):
        return jnp.zeros((len(items), 1, 1)), None

    def score(self, hidden):
        return jnp.broadcast_to(self.scores, (len(hidden), 5))


@pytest.fixture(scope="module")
def log():
    return random_log(num_users=53, num_items=NUM_ITEMS, min_events=3, max_events=45, seed=1)


@pytest.fixture(scope="module")
def examples(log):
    order = np.random.default_rng(5).permutation(log.num_users)
    return Examples(order.astype(np.int32), (np.diff(log.offsets)[order] - 1).astype(np.int32))


def _row_by_row(model, params, log, examples, exclude_seen):
    """One user at a time at full length, in NumPy from the scores on."""

    @jax.jit
    def score(items, length, stamps):
        hidden = last_hidden(model, {"params": params}, items, length, stamps)
        return model.apply({"params": params}, hidden, method="score")

    ranks = []
    for user, end in zip(examples.users, examples.ends, strict=True):
        events = slice(log.offsets[user], log.offsets[user] + end)
        seen, times, target = log.items[events], log.timestamps[events], log.items[events.stop]
        items, stamps = np.zeros((1, MAX_LEN), np.int32), np.zeros((1, MAX_LEN), np.float32)
        length = min(end, MAX_LEN)
        items[0, :length], stamps[0, :length] = seen[-length:], times[-length:]
        scores = np.asarray(score(items, np.array([length], np.int32), stamps))[0]
        rivals = set(range(1, NUM_ITEMS + 1)) - {target}
        if exclude_seen:
            rivals -= set(seen.tolist())
        ranks.append(1 + sum(scores[j] > scores[target] for j in rivals))
    return np.array(ranks)


@pytest.fixture
def small_limits(monkeypatch):
    """Several lengths, batches and tiles even for a small log."""
    monkeypatch.setattr(full_sort, "SCORE_TILE_BYTES", 5 * 4 * (NUM_ITEMS + 1))
    monkeypatch.setattr(full_sort, "GROUP_PENALTY_TOKENS", {"cpu": 1})
    monkeypatch.setattr(full_sort, "ENCODE_TOKENS", {"cpu": 150})
    monkeypatch.setattr(full_sort, "ENCODE_TOKENS_ACCELERATOR", 150)
    monkeypatch.setattr(full_sort, "SEEN_AT_ONCE", 7)
    _rank_batch.clear_cache()  # What was compiled took other turns.


@pytest.mark.parametrize("config", [CONFIG, EXCLUDING], ids=["all items", "exclude_seen"])
def test_equals_row_by_row(log, examples, config, small_limits):
    model, params = init_toy(NUM_ITEMS + 1)
    evaluator = FullSortEvaluator(model, log, examples, config)
    assert {batch.length for batch in evaluator._batches} == {8, 16, 20}
    assert len(evaluator._batches) > 3
    result = evaluator(params)
    expected = _row_by_row(model, params, log, examples, config.eval.exclude_seen)
    np.testing.assert_array_equal(result.ranks, expected)
    assert result.ranks.dtype == np.float32
    assert result.metrics["hit@10"] == np.mean(expected <= 10)
    assert result.metrics["mrr@20"] == pytest.approx(np.mean(np.where(expected <= 20, 1 / expected, 0)), rel=1e-12)
    assert result.seconds > 0


def test_targets_that_were_seen_are_left_out_and_counted(log, examples):
    model, params = init_toy(NUM_ITEMS + 1)
    events = [
        log.items[log.offsets[u] : log.offsets[u] + end + 1].tolist()
        for u, end in zip(examples.users, examples.ends, strict=True)
    ]
    new = np.array([history[-1] not in history[:-1] for history in events])
    assert 0 < new.sum() < len(new)
    result = evaluate(model, params, log, examples, LEAVING_OUT)
    np.testing.assert_array_equal(result.measured.examples.users, examples.users[new])
    np.testing.assert_array_equal(result.ranks, evaluate(model, params, log, examples, EXCLUDING).ranks[new])
    assert result.measured.report() == {"seen_target_share": pytest.approx(1 - new.mean())}
    assert evaluate(model, params, log, examples, CONFIG).measured.report() == result.measured.report()
    repeats = Examples(examples.users[~new], examples.ends[~new])
    with pytest.raises(ValueError, match=f"all {len(repeats.users)} targets were seen before .* none is left to rank"):
        evaluate(model, params, log, repeats, LEAVING_OUT)
    alone = evaluate(model, params, log, repeats, CONFIG)
    assert alone.other is None and list(alone.by_protocol) == ["all_items"]


def test_either_protocol_beside_the_other_is_that_of_an_evaluation_of_its_own(log, examples, small_limits):
    """To the bit, whichever of the two the settings name, and however many turns a history takes."""
    model, params = init_toy(NUM_ITEMS + 1)
    for asked in (EXCLUDING, LEAVING_OUT):
        excluded, whole = (evaluate(model, params, log, examples, config) for config in (asked, both_of(asked)))
        assert list(excluded.by_protocol) == list(whole.by_protocol) == ["all_items", "seen_excluded"]
        assert excluded.measured.protocol_name == "seen_excluded" and whole.measured.protocol_name == "all_items"
        for mine, other in ((excluded, whole.other), (excluded.other, whole)):
            assert mine.metrics == other.metrics and mine.standard_errors == other.standard_errors
            np.testing.assert_array_equal(mine.ranks, other.ranks)
            np.testing.assert_array_equal(mine.measured.examples.ends, other.measured.examples.ends)
        assert (excluded.ranks < excluded.other.ranks[excluded.measured.kept]).any()


def test_both_protocols_by_hand():
    """Scores are fixed: item 4 before 3 before 2 before 1; the histories repeat items, and one target was seen."""
    frame = pl.DataFrame(
        {
            "user": list("aaaabbbbccc"),
            "item": ["i4", "i4", "i3", "i2", "i1", "i4", "i1", "i4", "i2", "i3", "i1"],
            "timestamp": range(11),
        }
    )
    by_id = clean(frame, k_core=0, timestamp_precision="int64")
    index = {name: place + 1 for place, name in enumerate(by_id.item_ids)}
    score = jnp.zeros(5).at[jnp.array([index[f"i{n}"] for n in (1, 2, 3, 4)])].set(jnp.array([1.0, 2.0, 3.0, 4.0]))
    config = dataclasses.replace(CONFIG, eval=EvalConfig(top_k=(1, 2), monitor="hit@1", metrics=("coverage@2",)))
    found = evaluate(FixedScores(), {"score": score}, by_id, leave_one_out(by_id).test, config)
    # a: i2 after i4, i4, i3: third of all, first of the unseen. b: i4 after i1, i4, i1: first, and seen before.
    # c: i1 after i2, i3: last of four, then second behind i4 alone.
    assert found.ranks.tolist() == [3, 1, 4] and found.metrics["hit@1"] == pytest.approx(1 / 3)
    assert found.metrics["coverage@2"] == 2 / 4  # i4 and i3 in every list.
    unseen = found.other
    assert unseen.ranks.tolist() == [1, 2] and unseen.measured.kept.tolist() == [True, False, True]
    assert unseen.metrics["hit@1"] == 1 / 2 and unseen.metrics["ndcg@2"] == pytest.approx((1 + 1 / np.log2(3)) / 2)
    assert unseen.metrics["coverage@2"] == 3 / 4  # a: i2, i1; c: i4, i1.
    assert found.measured.report() == unseen.measured.report() == {"seen_target_share": 1 / 3}
    ranked = dataclasses.replace(config, eval=dataclasses.replace(config.eval, seen_targets="rank"))
    found = evaluate(FixedScores(), {"score": score}, by_id, leave_one_out(by_id).test, ranked)
    assert found.other.ranks.tolist() == [1, 1, 2]  # A target stays among its rivals, seen or not.
    assert found.record("test") == {"test": found.metrics, "test_seen_excluded": found.other.metrics}


def test_where_all_items_tie_every_target_has_the_mean_rank(log, examples, small_limits):
    model, params = init_toy(NUM_ITEMS + 1)
    found = evaluate(model, jax.tree.map(jnp.zeros_like, params), log, examples, CONFIG)
    assert set(found.ranks.tolist()) == {(NUM_ITEMS + 1) / 2} and found.metrics["hit@10"] == 0
    users, ends = examples.users[found.other.measured.kept], examples.ends[found.other.measured.kept]
    left = [
        NUM_ITEMS - len(set(log.items[log.offsets[u] :][:end].tolist())) for u, end in zip(users, ends, strict=True)
    ]
    np.testing.assert_array_equal(found.other.ranks, (np.array(left) + 1) / 2)


def test_short_rows_of_a_time_aware_model_are_cut_exactly(log, examples, monkeypatch):
    monkeypatch.setattr(full_sort, "GROUP_PENALTY_TOKENS", {"cpu": 100})
    settings = TiM4RecConfig(
        vocab_size=NUM_ITEMS + 1, max_len=MAX_LEN, d_model=16, d_state=8, head_dim=16, num_layers=1
    )
    model = build_model(settings)
    variables = {"params": init_params(model, jax.random.key(0))}
    evaluator = FullSortEvaluator(model, log, examples, CONFIG)
    assert [batch.length for batch in evaluator._batches][0] < MAX_LEN
    expected = _row_by_row(model, variables["params"], log, examples, exclude_seen=False)
    np.testing.assert_array_equal(evaluator(variables["params"]).ranks, expected)


def test_an_accelerator_compiles_for_one_length_where_rows_are_few(log, examples, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    evaluator = FullSortEvaluator(init_toy(NUM_ITEMS + 1)[0], log, examples, CONFIG)
    assert {batch.length for batch in evaluator._batches} == {MAX_LEN}


def test_a_program_is_compiled_per_length_and_none_the_second_time(log, examples, small_limits):
    model, params = init_toy(NUM_ITEMS + 1)
    evaluator = FullSortEvaluator(model, log, examples, CONFIG)
    lengths = {batch.length for batch in evaluator._batches}
    assert len(lengths) == 3 < len(evaluator._batches)
    _rank_batch.clear_cache()
    evaluator(params)
    assert _rank_batch._cache_size() == len(lengths)
    FullSortEvaluator(model, log, examples, CONFIG)(params)
    assert _rank_batch._cache_size() == len(lengths)


def test_limits_do_not_change_ranks(log, examples, small_limits, monkeypatch):
    model, params = init_toy(NUM_ITEMS + 1)
    small = evaluate(model, params, log, examples, EXCLUDING).ranks
    monkeypatch.undo()
    np.testing.assert_array_equal(evaluate(model, params, log, examples, EXCLUDING).ranks, small)


def test_excluding_seen_only_improves_ranks(log, examples):
    model, params = init_toy(NUM_ITEMS + 1)
    plain = evaluate(model, params, log, examples, CONFIG).ranks
    excluding = evaluate(model, params, log, examples, EXCLUDING).ranks
    assert (excluding <= plain).all() and (excluding < plain).any()


def test_score_tiles_stay_within_the_memory_limit(log, examples, small_limits, monkeypatch):
    shapes = []
    plain_score = ToyModel.score

    def recording(self, hidden):
        shapes.append(hidden.shape)
        return plain_score(self, hidden)

    monkeypatch.setattr(ToyModel, "score", recording)
    model, params = init_toy(NUM_ITEMS + 1)
    shapes.clear()
    jax.clear_caches()
    evaluate(model, params, log, examples, CONFIG)
    assert shapes and max(rows for rows, _ in shapes) <= 5


def test_second_call_compiles_and_moves_nothing(log, examples, small_limits):
    model, params = init_toy(NUM_ITEMS + 1)
    evaluator = FullSortEvaluator(model, log, examples, CONFIG)
    first = evaluator(params)
    compiled = full_sort._rank_batch._cache_size()
    other = jax.tree.map(lambda x: x * 2 + 1, params)
    with jax.transfer_guard("disallow"):
        second = evaluator(other)
        again = evaluator(params)
    assert full_sort._rank_batch._cache_size() == compiled
    np.testing.assert_array_equal(first.ranks, again.ranks)
    assert (second.ranks != first.ranks).any()


@pytest.mark.parametrize(("precision", "dtype"), [("float32", jnp.float32), ("int64", jnp.int32)])
def test_timestamps_reach_the_model_in_the_chosen_precision(log, examples, precision, dtype):
    model, _ = init_toy(NUM_ITEMS + 1)
    config = dataclasses.replace(CONFIG, data=DataConfig(timestamp_precision=precision))
    evaluator = FullSortEvaluator(model, log, examples, config)
    assert evaluator._log.timestamps.dtype == dtype
    np.testing.assert_array_equal(evaluator._log.timestamps, log.timestamps.astype(dtype))


def test_timestamps_beyond_int32_are_refused(log, examples):
    model, _ = init_toy(NUM_ITEMS + 1)
    config = dataclasses.replace(CONFIG, data=DataConfig(timestamp_precision="int64"))
    milliseconds = dataclasses.replace(log, timestamps=log.timestamps * 1000)
    with pytest.raises(ValueError, match=rf"timestamp {milliseconds.timestamps.max()} does not fit .* 2147483647"):
        FullSortEvaluator(model, milliseconds, examples, config)


def test_scores_that_are_not_finite_stop(log, examples):
    model, params = init_toy(NUM_ITEMS + 1)
    broken = {**params, "time_shift": params["time_shift"].at[0].set(jnp.nan)}
    with pytest.raises(FloatingPointError, match="scores of 53 of 53 evaluated rows are not finite"):
        evaluate(model, broken, log, examples, CONFIG)


def test_k_beyond_the_catalogue(log, examples):
    model, _ = init_toy(NUM_ITEMS + 1)
    config = dataclasses.replace(CONFIG, eval=EvalConfig(top_k=(10, 50)))
    with pytest.raises(ValueError, match="k=50 is larger than the catalogue of 37 items; set eval.top_k to at most 37"):
        FullSortEvaluator(model, log, examples, config)


def test_no_examples(log):
    model, _ = init_toy(NUM_ITEMS + 1)
    with pytest.raises(ValueError, match="0 examples to evaluate"):
        FullSortEvaluator(model, log, Examples(np.zeros(0, np.int32), np.zeros(0, np.int32)), CONFIG)


def small(model, max_len):
    sizes = {"d_model": 8, "d_state": 4, "head_dim": 4, "inner_size": 8, "num_layers": 1, "use_ffn": False}
    return settings_of(model, vocab_size=NUM_ITEMS + 1, max_len=max_len, **sizes)


def test_longer_histories_than_trained(log, examples):
    """A model of any length reads as many events as asked for; one with parameters for its length refuses."""

    def with_lengths(model, trained, read):
        shape = small(model, trained)
        return ExperimentConfig("test", shape, eval=EvalConfig(top_k=(10,), max_len=read))

    long = with_lengths("ssd4rec", 45, None)
    params = init_params(build_model(long.model), jax.random.key(0))
    params = jax.tree.map(lambda p: 20 * p if p.ndim == 2 else p, params)
    expected = evaluate(build_model(long.model), params, log, examples, long).ranks
    extended, short = (with_lengths("ssd4rec", 4, read) for read in (45, None))
    model = build_model(extended.model)
    np.testing.assert_array_equal(evaluate(model, params, log, examples, extended).ranks, expected)
    assert np.any(evaluate(model, params, log, examples, short).ranks != expected)

    with pytest.raises(ValueError, match=r"eval.max_len=45 is over the model's max_len=4, and sasrec reads no more"):
        with_lengths("sasrec", 4, 45)


@pytest.mark.parametrize("model", ["tim4rec", "tisasrec"])
def test_fewer_events_than_a_fixed_length_holds(log, examples, model):
    """The ranks are those of histories cut to as many events."""
    shape = small(model, MAX_LEN)
    config = ExperimentConfig("test", shape, eval=EvalConfig(top_k=(10,), max_len=3))
    built = build_model(shape)
    params = jax.tree.map(lambda p: 20 * p if p.ndim == 2 else p, init_params(built, jax.random.key(0)))
    ranks = evaluate(built, params, log, examples, config).ranks

    @jax.jit
    def scores_of(items, lengths, times):
        last = last_hidden(built, {"params": params}, items, lengths, times)
        return built.apply({"params": params}, last, method="score")

    for i in (0, len(examples) // 2, len(examples) - 1):
        end = log.offsets[examples.users[i]] + examples.ends[i]
        window = slice(end - min(3, examples.ends[i]), end)
        length = window.stop - window.start
        items, times = np.zeros((1, MAX_LEN), np.int32), np.zeros((1, MAX_LEN), np.float32)
        items[0, :length], times[0, :length] = log.items[window], log.timestamps[window]
        scores = np.asarray(scores_of(items, jnp.array([length]), times))[0, 1:]
        assert ranks[i] == 1 + (scores > scores[log.items[end] - 1]).sum()
