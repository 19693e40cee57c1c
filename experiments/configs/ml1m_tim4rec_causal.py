"""TiM4Rec with the causal time branch on MovieLens-1M, trained on every position of packed rows.

Not from a paper. Batches count rows of 200 positions.
Command: python -m experiments.train --config=ml1m_tim4rec_causal
"""

import dataclasses

from experiments.configs import ml1m_tim4rec
from experiments.family import causal
from tim4rec_jax.config import ExperimentConfig


def config() -> ExperimentConfig:
    base = causal(ml1m_tim4rec.config(), max_len=200, batch_size=16, epochs=30)
    return dataclasses.replace(base, name="ml1m_tim4rec_causal")
