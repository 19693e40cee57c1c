"""TiM4Rec on a synthetic log in which the next item depends on the time since the one before; minutes on a laptop.

Ends with the model, the same model with time off, and popularity side by side. The faithful time branch starts with
gradients below Adam's usual epsilon and learns in one jump after a plateau; many narrow heads, a small epsilon and
little noise in the log bring the jump into the first epochs.
Result: experiments/results/quickstart.json. Command: python -m experiments.train --config=quickstart
"""

from tim4rec_jax.config import DataConfig, EvalConfig, ExperimentConfig, TrainConfig
from tim4rec_jax.data_config import SyntheticConfig
from tim4rec_jax.models import TiM4RecConfig


def config() -> ExperimentConfig:
    return ExperimentConfig(
        name="quickstart",
        model=TiM4RecConfig(
            max_len=20,
            d_model=32,
            num_layers=1,
            d_state=16,
            expand=4,
            head_dim=4,
            dropout=0.0,
            time_dropout=0.0,
            kaiming_init=False,
            mask_padded_time=True,
            log_time=True,
        ),
        data=DataConfig(name="synthetic", synthetic=SyntheticConfig(noise=0.02)),
        train=TrainConfig(
            epochs=16, batch_size=256, learning_rate=1e-2, adam_eps=1e-15, patience=15, log_every=40, length_groups=1
        ),
        eval=EvalConfig(top_k=(1, 5, 10), baselines=("popularity", "time_off")),
    )
