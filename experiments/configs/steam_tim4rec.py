"""TiM4Rec on Steam reviews, the original program's setting.

Source: TiM4Rec's program. Not run here.
Command: python -m experiments.train --config=steam_tim4rec
"""

from tim4rec_jax.config import DataConfig, ExperimentConfig, TrainConfig
from tim4rec_jax.models import TiM4RecConfig


def config() -> ExperimentConfig:
    return ExperimentConfig(
        name="steam_tim4rec",
        model=TiM4RecConfig(
            max_len=50,
            d_model=64,
            d_state=32,
            head_dim=32,
            dropout=0.2,
            time_dropout=0.2,
            norm_eps=1e-10,
            time_gate_per_position=False,
            kaiming_init=True,
        ),
        data=DataConfig(name="steam", timestamp_precision="published"),
        train=TrainConfig(learning_rate=5e-4),
    )
