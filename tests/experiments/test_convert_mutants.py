"""experiments.convert on files that were changed at random: a result, or one line."""

import random
import zipfile

import pytest

torch = pytest.importorskip("torch")

from tests.experiments.test_convert_hostile import _options, _outcome, _saved, _with_pickle, folder, honest
from tim4rec_jax.interop import conversion

__all__ = ["folder", "honest"]  # Fixtures.


def _mutants(content, count, seed):
    """Bytes flipped, cut, doubled and moved."""
    source = random.Random(seed)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(source.randint(1, 3)):
            place, length = source.randrange(len(changed) + 1), source.choice((1, 4, 40, 400))
            kind = source.randrange(4)
            if kind == 0 and place < len(changed):
                changed[place] = source.randrange(256)
            elif kind == 1:
                del changed[place : place + length]
            elif kind == 2:
                changed[place:place] = source.randbytes(length)
            else:
                other = source.randrange(len(content))
                changed[place : place + length] = content[other : other + length]
        if source.random() < 0.2:
            del changed[source.randrange(len(changed) + 1) :]
        yield bytes(changed)


_TOKENS = [
    *":-[]{},&*<!|>'\"#%@`~?\n\t",
    "- ",
    "<<",
    "!!int",
    "!!float",
    "!!binary",
    "null",
    ".nan",
    "1e999",
    "0x",
    "1:2:3",
    "&a",
    "*a",
    "---",
    "...",
    "\ufeff",
    "\u2028",
    "hidden_size",
    "model",
    "true",
]


def _texts(text, count, seed):
    source = random.Random(seed)
    for _ in range(count):
        changed = text
        for _ in range(source.randint(1, 4)):
            place = source.randrange(len(changed) + 1)
            changed = changed[:place] + source.choice(_TOKENS) * source.choice((1, 1, 30)) + changed[place:]
        yield changed.encode()


@pytest.mark.parametrize("which", ["m.pth", "pickle", "legacy", "m.yaml", "m.item_ids.csv"])
def test_mutants_give_a_result_or_one_line(folder, honest, capsys, monkeypatch, which):
    monkeypatch.setattr(conversion, "make_run", lambda *arguments: None)  # After everything was read and checked.
    target = folder / ("m.pth" if which in ("pickle", "legacy") else which)
    content = target.read_bytes()
    if which == "pickle":  # Changed, with the checksum that belongs to it.
        with zipfile.ZipFile(honest / "m.pth") as archive:
            mutants = _mutants(archive.read("archive/data.pkl"), 60, 3)
    elif which == "legacy":
        state = torch.load(honest / "m.pth", weights_only=True)
        mutants = _mutants(_saved(state, _use_new_zipfile_serialization=False), 60, 4)
    elif which == "m.yaml":
        mutants = _texts(content.decode(), 60, 5)
    else:
        mutants = _mutants(content, 60, 6)
    codes = []
    for mutant in mutants:
        if which == "pickle":
            _with_pickle(honest / "m.pth", target, lambda _, mutant=mutant: mutant)
        else:
            target.write_bytes(mutant)
        codes.append(_outcome(capsys, _options(folder, honest))[0])
    assert codes.count(2) > 20
