"""TiM4Rec on KuaiRand-Pure, the original program's setting, in which the time branch is off.

Source: TiM4Rec (arXiv 2409.16182): hit@10 .1109, ndcg@10 .0611, mrr@10 .0463 in its table, which says time on; pass
--model.name=tim4rec --model.time_dropout=0 for that. Not run here.
Command: python -m experiments.train --config=kuairand_tim4rec
"""

from tim4rec_jax.config import DataConfig, ExperimentConfig, TrainConfig
from tim4rec_jax.models import SSD4RecConfig


def config() -> ExperimentConfig:
    return ExperimentConfig(
        name="kuairand_tim4rec",
        model=SSD4RecConfig(
            max_len=50,
            d_model=64,
            d_state=32,
            head_dim=32,
            dropout=0.2,
            norm_eps=1e-10,
            kaiming_init=False,
        ),
        data=DataConfig(name="kuairand", timestamp_precision="published"),
        train=TrainConfig(patience=10),
    )
