"""Two runs with one seed end with the same bits, with either loader, on one device and on eight."""

import pytest

from tests.training.forked_runs import OPTIONS, require_same_runs, run_forking
from tests.training.seeded_runs import LOADERS
from tim4rec_jax.run_dir import read_environment

SHORT = [*OPTIONS, "--train.epochs=1", "--train.tensorboard=false"]
READ_BY_ALL = [option for option in SHORT if not option.startswith("--model.inner_size")]
WAYS = {
    "prefixes": SHORT,
    "all positions": [
        *READ_BY_ALL,
        "--model.name=tim4rec_causal",
        "--model.d_state=8",
        "--model.head_dim=16",
        "--train.positions=all",
        "--data.timestamp_precision=int64",
    ],
}


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("way", WAYS)
def test_one_seed_gives_one_run(tmp_path, devices, way):
    run_forking("seeded_runs", str(tmp_path), *WAYS[way], folder=tmp_path, devices=devices)
    for loader in LOADERS:
        first, second = (tmp_path / f"{loader}_{number}" for number in range(2))
        assert read_environment(second)["device_count"] == devices
        require_same_runs([second], first)
