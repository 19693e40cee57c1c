"""TiM4Rec with the causal time branch on Amazon Beauty (2014), trained on every position of packed rows.

Not from a paper. Batches count rows of 50 positions.
Command: python -m experiments.train --config=beauty_tim4rec_causal
"""

import dataclasses

from experiments.configs import beauty_tim4rec
from experiments.family import causal
from tim4rec_jax.config import ExperimentConfig


def config() -> ExperimentConfig:
    base = causal(beauty_tim4rec.config(), max_len=50, batch_size=32, epochs=10, learning_rate=2e-3)
    model = dataclasses.replace(base.model, dropout=0.3)
    return dataclasses.replace(base, name="beauty_tim4rec_causal", model=model)
