"""Ranks and metrics against cases worked by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from tim4rec_jax.evaluation import measures, metrics

pytestmark = pytest.mark.quick


def _ranks(scores, targets, seen=None):
    scores, targets = jnp.asarray(scores, jnp.float32), jnp.asarray(targets)
    ranks = metrics.rank_of_target(scores, targets)
    if seen is not None:
        ranks -= metrics.ahead_among(scores, targets, jnp.asarray(seen))
    assert ranks.dtype == jnp.float32
    return ranks.tolist()


def test_rank_counts_strictly_greater_scores():
    scores = [[0.0, 3.0, 1.0, 2.0], [0.0, 3.0, 1.0, 2.0], [0.0, 3.0, 1.0, 2.0]]
    assert _ranks(scores, [1, 2, 3]) == [1, 3, 2]


def test_equals_share_their_mean_rank():
    scores = [[0.0, 5.0, 5.0, 5.0, 7.0]]
    assert _ranks(scores * 4, [1, 2, 3, 4]) == [3, 3, 3, 1]
    assert _ranks([[1.0, 1.0, 1.0]], [2]) == [1.5], "the padding is no equal"


def test_where_all_items_tie_nobody_hits_above_chance():
    scores, targets = jnp.zeros((100, 101)), jnp.arange(1, 101)
    ranks = np.asarray(metrics.rank_of_target(scores, targets))
    np.testing.assert_array_equal(ranks, 50.5)
    assert metrics.hit(ranks, 10).mean() == 0


def test_excluded_equals_are_no_equals_and_the_target_stays():
    scores = [[0.0, 5.0, 5.0, 5.0, 7.0]]
    assert _ranks(scores, [1], [[2, 0]]) == [2.5]
    assert _ranks(scores, [1], [[2, 3]]) == [2]
    assert _ranks(scores, [1], [[1, 4]]) == [2], "itself, and one ahead"
    assert _ranks([[0.0, 0.0, 0.0]], [1], [[0, 0]]) == [1.5], "the padding is no equal"


def test_padding_column_never_counts():
    assert _ranks([[9.0, 1.0, 2.0]], [2]) == [1]
    assert _ranks([[float("nan"), 1.0, 2.0]], [1]) == [2]


def test_excluded_items_leave_the_ranking_and_the_target_stays():
    scores = [[0.0, 4.0, 3.0, 2.0, 1.0]]
    assert _ranks(scores, [3], [[1, 0]]) == [2]
    assert _ranks(scores, [3], [[2, 1]]) == [1]
    assert _ranks(scores, [3], [[0, 4]]) == [3]
    assert _ranks(scores, [2], [[2, 0]]) == [2]
    assert _ranks([[9.0, 1.0, 2.0]], [2], [[0, 0]]) == [1], "the padding is no item that was ahead"


def test_nan_target_ranks_behind_the_last_item():
    assert _ranks([[0.0, float("nan"), 1.0, 2.0]], [1]) == [4]


def test_hit_ndcg_mrr_by_hand():
    ranks = np.array([1, 2, 3, 4, 7])
    np.testing.assert_array_equal(metrics.hit(ranks, 3), [1, 1, 1, 0, 0])
    np.testing.assert_allclose(metrics.ndcg(ranks, 3), [1.0, 0.6309297535714575, 0.5, 0.0, 0.0], rtol=1e-15)
    np.testing.assert_allclose(metrics.mrr(ranks, 3), [1.0, 0.5, 1 / 3, 0.0, 0.0], rtol=1e-15)
    assert metrics.hit(ranks, 3).dtype == metrics.ndcg(ranks, 3).dtype == metrics.mrr(ranks, 3).dtype == np.float64


def test_means_by_hand():
    result = measures.metrics_of_ranks(np.array([1, 3, 11, 4], np.int32), measures.names((1, 10)))
    assert list(result) == ["hit@1", "ndcg@1", "mrr@1", "hit@10", "ndcg@10", "mrr@10"]
    assert result["hit@1"] == result["ndcg@1"] == result["mrr@1"] == 0.25
    assert result["hit@10"] == 0.75
    assert result["ndcg@10"] == pytest.approx((1 + 0.5 + 1 / np.log2(5)) / 4, rel=1e-15)
    assert result["mrr@10"] == pytest.approx((1 + 1 / 3 + 1 / 4) / 4, rel=1e-15)


def test_means_are_float64_over_many_rows():
    ranks = np.full(3_000_001, 2, np.int32)
    assert measures.metrics_of_ranks(ranks, measures.names((10,)))["ndcg@10"] == pytest.approx(
        1 / np.log2(3), rel=1e-12
    )


def test_standard_error_by_hand():
    errors = measures.errors(measures.values_per_list(measures.RankedLists(np.array([1, 20, 20, 20])), ["hit@10"]))
    # hits 1 0 0 0: mean 1/4, unbiased variance (9/16 + 3/16) / 3 = 1/4, s / sqrt(4) = 1/4.
    assert errors["hit@10"] == pytest.approx(0.25, rel=1e-15)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [([], "no ranks to average: .* 0 examples"), ([1, 0], "rank 0 must be at least 1")],
)
def test_bad_ranks(ranks, message):
    with pytest.raises(ValueError, match=message):
        measures.metrics_of_ranks(np.array(ranks, np.int32), measures.names((10,)))


def test_one_rank_has_no_standard_error():
    assert measures.errors({"hit@10": np.array([1.0])}) == {}


def test_check_top_k():
    metrics.check_top_k((10, 20), 20)
    with pytest.raises(ValueError, match="k=50 is larger than the catalogue of 20 items; set k to at most 20"):
        metrics.check_top_k((10, 50), 20)
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        metrics.check_top_k((0,), 20)
