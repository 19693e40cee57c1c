"""Small states that the checkpoint tests save and restore."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from tim4rec_jax.training.checkpoint import Checkpointer


def sample_state(value: float) -> dict:
    return {"w": jnp.full((4, 3), value, jnp.float32), "b": jnp.arange(5) + int(value)}


def folder_names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save_steps(folder: pathlib.Path, *steps: int) -> None:
    with Checkpointer(folder) as checkpointer:
        for step in steps:
            checkpointer.save_latest(step, sample_state(step), {"epoch": step})


def restore_newest(folder: pathlib.Path) -> tuple[int, list[str]]:
    reports: list[str] = []
    with Checkpointer(folder, report=reports.append) as checkpointer:
        step, state, progress = checkpointer.restore_latest(sample_state(0))
    assert progress == {"epoch": step}
    jax.tree.map(np.testing.assert_array_equal, state, sample_state(step))
    return step, reports


def largest_file(path: pathlib.Path) -> pathlib.Path:
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
