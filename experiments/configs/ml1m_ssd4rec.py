"""SSD4Rec on MovieLens-1M as the TiM4Rec authors replicate it: their model with the time branch off.

Source: TiM4Rec (arXiv 2409.16182) and its program. Not yet run to the end here.
Command: python -m experiments.train --config=ml1m_ssd4rec
"""

import dataclasses

from experiments.configs import ml1m_tim4rec
from tim4rec_jax.config import ExperimentConfig


def config() -> ExperimentConfig:
    base = ml1m_tim4rec.config()
    return dataclasses.replace(base, name="ml1m_ssd4rec", model=dataclasses.replace(base.model, use_time=False))
