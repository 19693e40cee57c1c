"""From a log to recommendations in ten lines, cell by cell as in a notebook.

    python -m experiments.examples.ten_lines

Editors that know `# %%` (VS Code, PyCharm, Spyder, Jupytext) run the cells one by one and show what each ends with.
"""

# %% A log: a file, or a data frame. Here 80 users go round a circle of 24 items, each with its own pace.
import numpy as np
import polars as pl

import tim4rec_jax as t4r

rng = np.random.default_rng(0)
events = pl.DataFrame(
    [
        (f"u{user}", f"i{(rng.integers(24) + (1 + user % 3) * step) % 24}", 1_600_000_000 + 3600 * (user + 50 * step))
        for user in range(80)
        for step in range(int(rng.integers(8, 16)))
    ],
    schema=["user", "item", "timestamp"],
    orient="row",
)
log = t4r.load_log(events)
log

# %% A model, trained, tested and left in a run folder.
settings = {"d_model": 16, "num_layers": 1, "d_state": 8, "head_dim": 16, "progress": False, "tensorboard": False}
run = t4r.fit(log, "tim4rec_causal", epochs=3, **settings)
run

# %% Its numbers, and further ones: what else there is says `EvalConfig`.
print(run.metrics["test"])
t4r.evaluate(run, metrics=("recall@10", "coverage@10", "novelty@10"), time_buckets="week")

# %% Recommendations for users of the log: raw ids, and titles where they are known.
run.recommend(users=["u4", "u7"], k=5)

# %% After any history, also of nobody in the log.
recommender = t4r.Recommender.from_run(run.run_dir)
history = recommender.history_from_ids(["i3", "i5", "i7"])
print(recommender.recommend([history], k=3)[0])
recommender

# %% Event by event, at a constant cost per event.
stream = t4r.Stream(run)
stream.add([("u4", "i3", 1_700_000_000), ("someone new", "i9", 1_700_000_000)])
stream.recommend(users=["u4", "someone new"], k=3)

# %% Beside another model, on the same targets.
other = t4r.fit(log, "ssd4rec", epochs=3, **settings)
comparison = t4r.compare({"causal time": run, "no time": other})
print(comparison)
comparison
