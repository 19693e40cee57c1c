"""TiM4Rec on a synthetic log in which the next item depends on the time since the one before; minutes on a laptop.

Ends with the model, the same model with time off, and popularity side by side.
Command: python -m experiments.train --config=quickstart
"""

from tim4rec_jax.config import DataConfig, EvalConfig, ExperimentConfig, ModelConfig, SyntheticConfig, TrainConfig


def config() -> ExperimentConfig:
    return ExperimentConfig(
        name="quickstart",
        model=ModelConfig(
            max_len=20, d_model=32, d_state=16, head_dim=16, chunk_size=32, dropout=0.1, time_dropout=0.0,
            mask_padded_time=True, log_time=True,
        ),
        data=DataConfig(name="synthetic", synthetic=SyntheticConfig()),
        train=TrainConfig(epochs=12, batch_size=512, learning_rate=3e-3, patience=3, log_every=20, length_groups=1),
        eval=EvalConfig(baselines=("popularity", "time_off")),
    )  # fmt: skip
