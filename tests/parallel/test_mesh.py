"""One device, `shard_map` and `pmap` give the same losses and ranks; devices exchange gradients and no more."""

import functools
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.evaluation.logs import random_log
from tests.kernels.codegen import capture
from tests.models.settings import sibling
from tests.parallel.fake_devices import ROOT, environment
from tests.training.test_step import GROUPED, MODEL, GivenBatches, batch_of
from tim4rec_jax import DataConfig, ExperimentConfig, ModelConfig, TrainConfig, build_model
from tim4rec_jax.config import ParallelConfig, experiment_from_dict
from tim4rec_jax.data.loader import make_loader
from tim4rec_jax.data.splits import leave_one_out
from tim4rec_jax.parallel.mesh import make_layout
from tim4rec_jax.run_dir import CHANGEABLE_ON_RESUME
from tim4rec_jax.training.step import init_state, make_optimizer, train_step

BYTES = {"f64": 8, "f32": 4, "s64": 8, "s32": 4, "u32": 4, "pred": 1}


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
    """What `eight_devices` writes for one of its parts."""
    folder = tmp_path_factory.mktemp("eight")

    @functools.cache
    def run(part):
        command = [sys.executable, "-m", "tests.parallel.eight_devices", str(folder / part), part]
        done = subprocess.run(command, cwd=ROOT, env=environment(8), capture_output=True, text=True, timeout=3000)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads((folder / part).read_text())

    return run


@pytest.mark.parametrize("positions", ["last", "all", "masked"])
def test_many_devices_train_evaluate_and_resume_as_one(on_eight, positions):
    record = on_eight("everything")
    assert record["devices"] == 8
    alone = record[f"{positions} single"]
    ways = [name for name in record if name.startswith(positions) and name != f"{positions} single"]
    assert {name.split()[1] for name in ways} == {"sharded", "pmap"}
    assert {name.split()[2] for name in ways} == {"device", "grain"}
    assert len(alone["losses"]) == 50 and len(set(alone["losses"])) == 50
    for name in ways:
        np.testing.assert_allclose(record[name]["losses"], alone["losses"], rtol=0, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(
            record[name]["resumed_on_one"], alone["losses"][25:], rtol=0, atol=1e-6, err_msg=name
        )
        assert record[name]["ranks"] == alone["ranks"], name


def _exchanges(hlo):
    """Names and bytes of the instructions by which devices exchange values."""
    found = []
    pattern = r" = (\S.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)"
    for shapes, name in re.findall(pattern + r"(?:-start)?\(", hlo):
        sizes = re.findall(r"\b(f64|f32|s64|s32|u32|pred)\[([\d,]*)\]", shapes)
        found.append(
            (name, sum(BYTES[kind] * int(np.prod([int(d) for d in dims.split(",") if d])) for kind, dims in sizes))
        )
    return found


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", ["last sharded device", "all sharded grain"])
def test_devices_exchange_one_sum_of_the_gradients(on_eight, way):
    """Of the size of the parameters, beside the loss and the weight."""
    found = on_eight("everything")[way]
    loss_and_weight = 2 * 8
    assert _exchanges(found["hlo"]) == [("all-reduce", found["parameter_bytes"] + loss_and_weight)]


@pytest.mark.exhaustive
def test_interpreted_kernels_on_eight_devices(on_eight):
    alone, many = on_eight("with_kernels")
    assert len(set(alone)) == 4
    np.testing.assert_allclose(many, alone, rtol=1e-5)


def test_compiled_kernels_lower_inside_the_sharded_step(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    model_config = sibling(MODEL, "ssd4rec", num_layers=2, head_dim=16, d_state=16, kernels="pallas_triton")
    config = ExperimentConfig("test", model_config, train=TrainConfig(loss_in_tiles=True))
    model, optimizer = build_model(model_config), make_optimizer(config.train, 1)
    layout = make_layout(ParallelConfig("sharded"))
    state = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    step = functools.partial(train_step, model, optimizer, config, GROUPED[:1], GivenBatches())
    batch = batch_of([12] * (2 * layout.num_devices))
    kernels = {kernel.name for kernel in capture(layout.compile_step(step), state, (), batch)}
    assert kernels >= {"ssd_forward", "ssd_backward", "causal_conv1d_backward"}


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("name", ["device", "grain"])
def test_parts_of_a_batch_are_the_batch(positions, name):
    log = random_log(num_users=30, num_items=22, min_events=3, max_events=14, seed=5)
    model = ModelConfig(name="sasrec", vocab_size=23, max_len=12)
    train = TrainConfig(positions=positions, batch_size=10 if positions == "last" else 3)
    config, examples = ExperimentConfig("test", model, DataConfig(loader=name), train), leave_one_out(log).train
    whole = make_loader(config, log, examples)
    size, filled = train.batch_size, 4 * -(-train.batch_size // 4)
    parts = [make_loader(config, log, examples, range(i, i + filled // 4)) for i in range(0, filled, filled // 4)]
    assert whole.num_batches == parts[0].num_batches > 2

    def batches(loader):
        return [jax.tree.map(np.asarray, loader.batch(loader.resident, payload)) for payload in loader.epoch(2, 1)]

    for expected, *pieces in zip(batches(whole), *map(batches, parts), strict=True):
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:size], b), joined, expected)
        assert len(joined.weights) == filled and not joined.weights[size:].any()


def test_layouts():
    single, sharded = make_layout(ParallelConfig("single")), make_layout(ParallelConfig("auto"))
    count = jax.device_count()
    assert (single.num_devices, single.batch_indices(10)) == (1, range(10))
    assert (sharded.strategy, sharded.num_devices, sharded.mesh.axis_names) == ("sharded", count, ("data", "model"))
    assert sharded.mesh.shape == {"data": count, "model": 1}
    assert sharded.batch_indices(4 * count + 1) == range(5 * count)
    assert make_layout(ParallelConfig("pmap")).shard_batch(np.arange(2 * count)).shape == (count, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "ddp"}, r"parallel.strategy='ddp' must be one of \('auto', 'single', 'sharded', 'pmap'\)"),
        ({"coordinator": "a:1"}, "coordinator needs parallel.num_processes and parallel.process_id too"),
        ({"num_processes": 2}, "num_processes needs parallel.coordinator and parallel.process_id too"),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
            "process_id=2 must be under parallel.num_processes=2",
        ),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "coordinator='a' must be host:port"),
        ({"num_processes": 0}, "num_processes=0 must be at least 1"),
        ({"heartbeat_seconds": 0}, "heartbeat_seconds=0 must be at least 1"),
        ({"strategy": "pmap", "distributed": "auto"}, "strategy='pmap' works in one process; use 'sharded'"),
        ({"distributed": "slurm"}, "distributed='slurm' must be 'off' or 'auto'"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**settings)


def test_settings_of_older_runs_have_no_devices_in_them():
    config = ExperimentConfig("test", parallel=ParallelConfig("pmap"))
    values = config.to_dict()
    assert experiment_from_dict(values) == config
    del values["parallel"]
    assert experiment_from_dict(values).parallel == ParallelConfig()
    assert "parallel.strategy" in CHANGEABLE_ON_RESUME and "parallel.process_id" in CHANGEABLE_ON_RESUME
