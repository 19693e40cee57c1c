"""TiM4Rec on Amazon Video Games (2014), in the setting of Amazon Beauty.

No published numbers of TiM4Rec at this setting. Not run here.
Command: python -m experiments.train --config=videogames_tim4rec
"""

import dataclasses

from experiments.configs import beauty_tim4rec
from tim4rec_jax.config import DataConfig, ExperimentConfig


def config() -> ExperimentConfig:
    return dataclasses.replace(beauty_tim4rec.config(), name="videogames_tim4rec", data=DataConfig(name="videogames"))
