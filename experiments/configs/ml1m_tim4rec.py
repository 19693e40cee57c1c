"""TiM4Rec on MovieLens-1M, the paper's setting of width 64.

Source: TiM4Rec (arXiv 2409.16182) and its program. The paper's own test numbers were not at hand; Mamba4Rec with two
layers reaches hit@10 .3253 there (rerun by the TiM4Rec authors). Not yet run to the end here.
Command: python -m experiments.train --config=ml1m_tim4rec
"""

from tim4rec_jax.config import DataConfig, ExperimentConfig
from tim4rec_jax.models import TiM4RecConfig


def config() -> ExperimentConfig:
    return ExperimentConfig(
        name="ml1m_tim4rec",
        model=TiM4RecConfig(
            max_len=200,
            d_model=64,
            d_state=32,
            head_dim=32,
            dropout=0.2,
            time_dropout=0.2,
            norm_eps=1e-12,
            time_gate_per_position=False,
            kaiming_init=True,
        ),
        data=DataConfig(name="ml-1m", timestamp_precision="published"),
    )
