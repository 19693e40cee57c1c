"""TiM4Rec with the causal time branch on MovieLens-100K, trained on every position of packed rows.

Not from a paper. Batches count rows of 200 positions.
Command: python -m experiments.train --config=ml100k_tim4rec_causal
"""

import dataclasses

from experiments.configs import ml100k_tim4rec
from experiments.family import causal
from tim4rec_jax.config import ExperimentConfig


def config() -> ExperimentConfig:
    base = causal(ml100k_tim4rec.config(), max_len=200, batch_size=8, epochs=20)
    return dataclasses.replace(base, name="ml100k_tim4rec_causal")
