"""TiM4Rec on MovieLens-100K: the setting of MovieLens-1M with 50 positions.

No published numbers at this setting. Results: experiments/results/ml100k_tim4rec.json.
Command: python -m experiments.train --config=ml100k_tim4rec
"""

import dataclasses

from experiments.configs import ml1m_tim4rec
from tim4rec_jax.config import DataConfig, ExperimentConfig


def config() -> ExperimentConfig:
    base = ml1m_tim4rec.config()
    return dataclasses.replace(
        base,
        name="ml100k_tim4rec",
        model=dataclasses.replace(base.model, max_len=50),
        data=DataConfig(name="ml-100k"),
    )
