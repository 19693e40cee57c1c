"""Significance against SciPy, against known cases, and in its error rate."""

import numpy as np
import pytest
import scipy.stats

from tim4rec_jax.evaluation.metrics import hit, ndcg
from tim4rec_jax.evaluation.significance import bootstrap_interval, compare_with_best, holm, sign_flip_test

pytestmark = pytest.mark.quick


def _ranks(users: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).geometric(0.05, users)


def test_identical_models_do_not_differ():
    values = np.tile(ndcg(_ranks(50, 1), 10), (3, 1))
    found = compare_with_best(values)
    assert found.best == 0
    assert (found.p == 1).all() and (found.p_holm == 1).all()
    assert (found.difference == 0).all() and (found.interval == 0).all()


def test_a_clear_shift_is_found_and_a_hair_is_not():
    ranks = _ranks(2000, 2)
    better, same = np.maximum(1, ranks - 3), ranks.copy()
    same[:2] = same[1::-1]  # two users change places
    found = compare_with_best(np.stack([ndcg(ranks, 10), ndcg(better, 10), ndcg(same, 10)]))
    assert found.best == 1
    assert found.p[0] < 1e-3 and found.p_holm[0] < 1e-3 and found.p[1] == 1
    assert found.interval[0, 0] > 0 and found.interval[0, 0] < found.difference[0] < found.interval[0, 1]
    against_same = compare_with_best(np.stack([ndcg(ranks, 10), ndcg(same, 10)]), best=0)
    assert against_same.p[1] == 1


def test_signs_agree_with_every_one_of_them():
    """Ten users: SciPy goes through all 1024 sign vectors, and so does the definition by hand."""
    differences = np.random.default_rng(3).choice([-1.0, 0.0, 0.5, 1.0], (4, 10))
    exact = scipy.stats.permutation_test(
        (differences,), lambda d, axis: d.mean(axis), permutation_type="samples", n_resamples=np.inf, axis=1
    ).pvalue
    np.testing.assert_allclose(sign_flip_test(differences, resamples=200_000), exact, atol=0.004)


def test_many_users_agree_with_the_t_test():
    values = np.stack([ndcg(_ranks(3000, seed), 10) for seed in range(6)])
    differences = values[1:] - values[0]
    expected = scipy.stats.ttest_rel(values[1:], values[:1], axis=1).pvalue
    np.testing.assert_allclose(sign_flip_test(differences), expected, atol=0.02)


def test_error_rate_is_the_stated_one():
    """Among models that do not differ, one in twenty has p <= 0.05: 2000 draws, 4 standard errors."""
    generator = np.random.default_rng(5)
    differences = hit(generator.geometric(0.1, (2000, 200)), 5) - hit(generator.geometric(0.1, (2000, 200)), 5)
    share = (sign_flip_test(differences, resamples=999) <= 0.05).mean()
    assert 0.05 - 4 * 0.0049 < share < 0.05 + 4 * 0.0049


def test_the_interval_is_scipys():
    differences = hit(_ranks(300, 6), 10) - hit(_ranks(300, 7), 10)
    expected = scipy.stats.bootstrap(
        (differences,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    np.testing.assert_allclose(bootstrap_interval(differences[None])[0], expected, atol=0.006)
    assert np.ptp(bootstrap_interval(differences[None], level=0.5)) < np.ptp(expected) / 2


def test_same_seed_same_numbers_in_any_block_size(monkeypatch):
    differences = np.random.default_rng(8).normal(0.05, 1, (2, 64))
    before = sign_flip_test(differences), bootstrap_interval(differences)
    monkeypatch.setattr("tim4rec_jax.evaluation.significance._BLOCK_BYTES", 8 * 64 * 1000)
    np.testing.assert_array_equal(sign_flip_test(differences), before[0])
    np.testing.assert_allclose(bootstrap_interval(differences), before[1], atol=1e-12)


def test_holm_by_hand():
    np.testing.assert_allclose(holm(np.array([0.04, 0.01, 0.03])), [0.06, 0.03, 0.06])
    np.testing.assert_allclose(holm(np.array([0.6, 0.5])), [1.0, 1.0])
    np.testing.assert_allclose(holm(np.array([0.02])), [0.02])
    assert holm(np.zeros(0)).shape == (0,)


def test_one_model_alone_has_nothing_to_differ_from():
    assert compare_with_best(np.ones((1, 4))).p.tolist() == [1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sign_flip_test(np.ones(4)), r"values of shape \(4,\) must be \[rows, users\]"),
        (lambda: compare_with_best(np.ones((2, 1))), "at least 2 users"),
        (lambda: compare_with_best(np.array([[1.0, np.nan]])), "1 of 2 values are not finite"),
        (lambda: compare_with_best(np.ones((2, 3)), best=2), "best=2 is no row of the 2 models"),
        (lambda: bootstrap_interval(np.ones((1, 3)), level=1.0), r"level=1.0 must lie in \(0, 1\)"),
        (lambda: holm(np.array([0.5, 1.5])), r"must be a list of numbers in \[0, 1\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
