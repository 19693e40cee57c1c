"""TiM4Rec on Amazon Beauty (2014), the paper's setting.

Source: TiM4Rec (arXiv 2409.16182) and its program, which reaches hit@10 .0779, ndcg@10 .0369, mrr@10 .0243 (seed 2020,
best epoch 16 of 37). Results: experiments/results/beauty_tim4rec.json.
Command: python -m experiments.train --config=beauty_tim4rec
"""

from tim4rec_jax.config import DataConfig, ExperimentConfig
from tim4rec_jax.models import TiM4RecConfig


def config() -> ExperimentConfig:
    return ExperimentConfig(
        name="beauty_tim4rec",
        model=TiM4RecConfig(
            max_len=50,
            d_model=64,
            d_state=32,
            head_dim=32,
            dropout=0.4,
            time_dropout=0.0,
            norm_eps=1e-5,
            time_gate_per_position=True,
            kaiming_init=False,
        ),
        data=DataConfig(name="beauty", timestamp_precision="published"),
    )
