"""TiM4Rec's program on MovieLens-1M at width 256, where the original switches the time branch off.

Source: TiM4Rec (arXiv 2409.16182) and its program. Not yet run to the end here.
Command: python -m experiments.train --config=ml1m_tim4rec_256d
"""

import dataclasses

from experiments.configs import ml1m_tim4rec
from experiments.family import of_model
from tim4rec_jax.config import ExperimentConfig


def config() -> ExperimentConfig:
    base = ml1m_tim4rec.config()
    return dataclasses.replace(
        base,
        name="ml1m_tim4rec_256d",
        model=dataclasses.replace(of_model(base.model, "ssd4rec"), d_model=256, d_state=64, head_dim=128),
        train=dataclasses.replace(base.train, batch_size=512),
    )
