"""Checkpoints lie in folders of any name that the file system takes; one that is incomplete is no checkpoint."""

import contextlib
import os

import orbax.checkpoint as ocp
import pytest

from tests.training.saved_states import folder_names, restore_newest, sample_state, save_steps
from tim4rec_jax.training import array_files
from tim4rec_jax.training.checkpoint import Checkpointer, CheckpointError

NAMES = [
    "lr[0.1]",
    "[1]",
    "[!a]",
    "a]b",
    "[",
    "s*",
    "q?",
    "**",
    "{x}",
    "{a,b}",
    "a\\b",
    "\\",
    "a\nb",
    "a\tb",
    "a b ",
    " ",
    "dots...",
    "..dots",
    "50%",
    "a%20b",
    "%s{}",
    "#1",
    "a:b",
    "file:",
    "a|b",
    "$HOME",
    "~",
    "'",
    '"',
    "-x",
    "--run",
    "ü",
    "名前",
    "👍",
    "e\u0301",
    "\u200b",
    "x" * 250,
    "é" * 120,
]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_under_any_name_comes_back(tmp_path, name):
    """As the folder's own name, and as that of a folder around it."""
    for number, folder in enumerate((tmp_path / name, tmp_path / "around" / name / name / "run")):
        save_steps(folder / "checkpoints", number + 1)
        assert restore_newest(folder / "checkpoints") == (number + 1, [])


def test_a_name_that_is_a_pattern_of_its_neighbour(tmp_path):
    for number, name in enumerate(("ab", "a*", "a?", "a[b]"), start=1):
        save_steps(tmp_path / name, number)
    for number, name in enumerate(("ab", "a*", "a?", "a[b]"), start=1):
        assert restore_newest(tmp_path / name) == (number, [])


def test_names_that_are_no_text(tmp_path):
    folder = tmp_path / os.fsdecode(b"bytes-\xff")
    save_steps(folder, 1)
    assert restore_newest(folder) == (1, [])


def test_links_and_relative_paths(tmp_path, monkeypatch):
    there = tmp_path / "there[0]"
    there.mkdir()
    (tmp_path / "link[1]").symlink_to(there)
    monkeypatch.chdir(tmp_path)
    save_steps(tmp_path / "link[1]" / "run", 1)
    assert restore_newest(there / "run") == (1, [])
    save_steps(there.relative_to(tmp_path) / ".." / "link[1]" / "run", 2)
    assert restore_newest(there / "run") == (2, [])
    assert folder_names(there / "run" / "latest") == ["000001_step_1", "000002_step_2"]


def test_a_good_checkpoint_moved_to_such_a_name_is_read(tmp_path):
    save_steps(tmp_path / "plain", 1)
    (tmp_path / "plain").rename(tmp_path / "moved[0]\\*")
    assert restore_newest(tmp_path / "moved[0]\\*") == (1, [])


def test_an_incomplete_save_is_an_error_and_the_one_before_is_kept(tmp_path, monkeypatch):
    """Where Orbax is shown the folder's own name it writes an index without any array, and says nothing."""
    folder = tmp_path / "lr[0.1]"
    save_steps(folder, 1)
    with monkeypatch.context() as patch:
        patch.setattr(array_files, "_plain_path", contextlib.nullcontext)
        with pytest.raises(CheckpointError, match="2 of 2 arrays are not in what was written"):
            save_steps(folder, 2)
    assert folder_names(folder / "latest") == ["000001_step_1"]
    assert restore_newest(folder) == (1, [])


def test_an_array_that_is_missing_from_the_index_is_named(tmp_path, monkeypatch):
    """Also where the others are there."""
    save = ocp.Checkpointer.save

    def save_but_one(self, path, args):
        args.item.pop("w")
        save(self, path, args=args)

    monkeypatch.setattr(ocp.Checkpointer, "save", save_but_one)
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError, match="1 of 2 arrays .*, w first"):
        checkpointer.save_latest(1, sample_state(1), {})
        checkpointer.wait()
