"""How the scores of other libraries are ranked; the libraries themselves are trained by hand."""

import numpy as np
import pytest

from experiments.benchmarks import outside_anchors, outside_models
from tim4rec_jax.data.splits import leave_one_out
from tim4rec_jax.evaluation.seen_targets import ALL_ITEMS, SEEN_EXCLUDED

pytestmark = pytest.mark.quick


def test_ranks_of_scores_are_the_definition(log):
    test = leave_one_out(log).test
    scores = np.random.default_rng(0).normal(size=(len(test), log.num_items + 1)).astype(np.float32)
    scores[0, test.targets(log)[0]] = -np.inf  # An item that the library does not know.
    found = outside_anchors.ranks_of_scores(log, test, scores)
    for row, (user, end, target) in enumerate(zip(test.users, test.ends, test.targets(log), strict=True)):
        start = log.offsets[user]
        ahead = set(np.flatnonzero(scores[row] > scores[row, target])) - {0}
        assert found[ALL_ITEMS][row] == 1 + len(ahead)
        assert found[SEEN_EXCLUDED][row] == 1 + len(ahead - set(log.items[start : start + end].tolist()))
    assert found[ALL_ITEMS][0] == log.num_items
    scores[1, 2] = np.nan
    with pytest.raises(ValueError, match="1 scores are NaN"):
        outside_anchors.ranks_of_scores(log, test, scores)


def test_events_before_what_is_held_out(log):
    columns = {"items": log.items, "timestamps": log.timestamps, "offsets": log.offsets, "num_items": log.num_items}
    events, split = outside_models.Events(columns), leave_one_out(log)
    for held_out, examples in ((1, split.test), (2, split.valid)):
        assert events.before(held_out).sum() == examples.ends.sum()
        np.testing.assert_array_equal(events.targets(held_out), examples.target_rows(log))


def test_what_a_library_fails_at_is_one_line(tmp_path, capsys):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho first >&2\necho no module rectools >&2\nexit 1\n")
    python.chmod(0o755)
    argv = ["--config=quickstart_sasrec", "--anchor=rectools_sasrec", f"--python={python}"]
    assert outside_anchors.main([*argv, f"--output={tmp_path / 'anchors.json'}"]) == 2
    assert capsys.readouterr().err == f"error: rectools_sasrec with {python}: no module rectools\n"
    assert not (tmp_path / "anchors.json").exists()
