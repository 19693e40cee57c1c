"""experiments.convert on files that mean harm or are damaged: one line each, bounded memory, nothing executed."""

import copy
import io
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import yaml

from experiments import convert
from tests.experiments.test_convert_identity import OPTIONS, _frame, _make_run
from tim4rec_jax.interop.settings_file import read_settings
from tim4rec_jax.interop.torch_checkpoint_file import read_state_dict

TABLE = "item_embedding.weight"


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A checkpoint with its settings, its ids and its log, none of them hostile."""
    folder = tmp_path_factory.mktemp("honest")
    run = _make_run(folder, _frame())
    assert convert.main([f"--run={run}", f"--output={folder / 'm.pth'}"]) == 0
    return folder


@pytest.fixture
def folder(honest, tmp_path):
    for name in ("m.pth", "m.yaml", "m.item_ids.csv", "log.csv"):
        (tmp_path / name).write_bytes((honest / name).read_bytes())
    return tmp_path


def _options(folder, honest):
    return [
        f"--checkpoint={folder / 'm.pth'}",
        f"--settings={folder / 'm.yaml'}",
        f"--output={folder / 'out'}",
        f"--data.path={honest / 'log.csv'}",
        f"--data.cache_dir={honest / 'cache'}",
        *OPTIONS,
    ]


def _outcome(capsys, options):
    """Exit code and what went to standard error but notes of reading; anything but a result or one line fails."""
    code = convert.main(options)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("reading ")]
    assert (code, lines) == (0, []) or (code == 2 and len(lines) == 1 and len(lines[0]) < 300), lines
    return code, "".join(lines)


def _refused(capsys, folder, honest, message):
    code, line = _outcome(capsys, _options(folder, honest))
    assert code == 2 and message in line and not (folder / "out").exists(), line


def _with_pickle(source, target, change, compression=zipfile.ZIP_STORED):
    """Writes a checkpoint whose pickle is changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith("/data.pkl") else content)


def _pickled(operations):
    """A checkpoint whose pickle is given byte by byte."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + operations + b".")
    return content.getvalue()


def _saved(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def _claimed(count, legacy=False):
    """A tensor of four numbers whose storage is said to hold `count`."""
    content = _saved({TABLE: torch.ones(4)}, _use_new_zipfile_serialization=not legacy)
    if legacy:
        return _claim(content, count)
    target = io.BytesIO()
    _with_pickle(io.BytesIO(content), target, lambda pickled: _claim(pickled, count))
    return target.getvalue()


def _claim(pickled, count):
    place = pickled.index(b"K\x04", pickled.index(b"cpu"))
    number = b"\x8a\x09" + count.to_bytes(9, "little", signed=True)
    return pickled[:place] + number + pickled[place + 2 :]


def _view(*shape):
    return _saved({TABLE: torch.as_strided(torch.zeros(1), shape, (0,) * len(shape))})


def _packed(megabytes):
    content = io.BytesIO()
    _with_pickle(io.BytesIO(_saved({TABLE: torch.zeros(megabytes * 2**18)})), content, bytes, zipfile.ZIP_DEFLATED)
    return content.getvalue()


def _overlapping():
    """Entries of a zip file that are all the same bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(2**20))
        for number in range(1, 100):
            entry = copy.copy(archive.getinfo("archive/data/0"))
            entry.filename = f"archive/data/{number}"
            archive.filelist.append(entry)
    return content.getvalue()


def _calls(function, argument):
    """A state dict with what would be `function(argument)`, were it called."""
    module, name = function
    number = b"\x8a\x08" + struct.pack("<q", argument)
    call = b"c" + module + b"\n" + name + b"\n" + number + b"\x85R"
    return _pickled(b"}X" + struct.pack("<I", len(TABLE)) + TABLE.encode() + call + b"s")


def _class_of(value):
    class Evil:
        def __reduce__(self):
            return value

    return Evil()


def _cyclic():
    state = {}
    state["model"] = state["state_dict"] = state
    return _saved(state)


_COLLIDING = b"".join(b"\x8a\x0a" + ((2**61 - 1) * n).to_bytes(10, "little") + b"N" for n in range(1, 30_000))
BOMBS = {
    "view": lambda: _view(10**6, 1000),
    "larger view": lambda: _view(10**8, 10**7),
    "claimed": lambda: _claimed(10**12),
    "claimed in the old format": lambda: _claimed(10**12, legacy=True),
    "packed": lambda: _packed(400),
    "overlapping": _overlapping,
    "one storage under many names": lambda: _saved(dict.fromkeys((f"a{i}" for i in range(1000)), torch.ones(2**18))),
    "bytearray": lambda: _calls((b"__builtin__", b"bytearray"), 10**10),
    "tensor": lambda: _calls((b"torch", b"Tensor"), 10**10),
    "memo": lambda: _pickled(b"}r\xff\xff\xff\x7f"),
    "long text": lambda: _pickled(b"X\xff\xff\xff\x7fabc"),
    "deep": lambda: _pickled(b"]" * 100_000 + b"a" * 99_999),
    "deep key": lambda: _pickled(b"}" + b")" + b"\x85" * 100_000 + b"Ns"),
    "wide key": lambda: _pickled(b"})" + b"2\x86" * 60 + b"Ns"),
    "many": lambda: _pickled(b"(" + b"]" * 600_000 + b"l"),
    "colliding": lambda: _pickled(b"}(" + _COLLIDING + b"u"),
    "cyclic": _cyclic,
}

_CHILD = """
import json, resource, sys
from experiments import convert
resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30,) * 2)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for options in json.load(sys.stdin):
    before = peak()
    code = convert.main(options)
    print(json.dumps([code, peak() - before]), flush=True)
"""


def test_small_files_take_little_memory(honest, tmp_path):
    """In a process of their own, which may not take the machine's memory if one of them succeeds."""
    tasks = []
    for index, make in enumerate(BOMBS.values()):
        one = tmp_path / str(index)
        one.mkdir()
        (one / "m.pth").write_bytes(make())
        (one / "m.yaml").write_bytes((honest / "m.yaml").read_bytes())
        tasks.append(_options(one, honest))
    for text in _ALIASES.values():
        one = tmp_path / f"y{len(tasks)}"
        one.mkdir()
        (one / "m.pth").write_bytes((honest / "m.pth").read_bytes())
        (one / "m.yaml").write_text((honest / "m.yaml").read_text().replace("hidden_size: 16\n", "") + text)
        tasks.append(_options(one, honest))
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    root = pathlib.Path(convert.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=json.dumps(tasks),
        capture_output=True,
        text=True,
        timeout=400,
        cwd=root,
        env=environment,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    lines = done.stderr.splitlines()
    assert len(results) == len(tasks) == len(lines), done.stderr[-2000:]
    for name, (code, grown), line in zip([*BOMBS, *_ALIASES], results, lines, strict=True):
        assert code == 2 and line.startswith("error: ") and len(line) < 300, (name, line)
        assert grown < 200, f"{name} took {grown} MiB: {line}"


_PAIRS = list(zip("abcdefgh", "bcdefghi", strict=True))
_LEVELS = "".join(f"  - &{here} [{', '.join([f'*{before}'] * 10)}]\n" for before, here in _PAIRS)
_NEST = "learner:\n  - &a [x, x, x, x, x, x, x, x, x, x]\n" + _LEVELS
_ALIASES = {
    "aliases": f"{_NEST}hidden_size: *i\n",
    "aliases of a fixed setting": f"{_NEST}hidden_act: *i\nhidden_size: 16\n",
    "merged": "m: {a: &a {k: 1}}\n"
    + "".join(f"{n}: &{n} {{<<: [{', '.join([f'*{b}'] * 10)}]}}\n" for b, n in _PAIRS)
    + "hidden_size: 16\n",
    "cyclic": "hidden_size: &a [*a]\n",
    "cyclic mapping": "hidden_size: &a {b: *a}\n",
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 20_000 + "]" * 20_000, "lie more than 20 deep"),
        ("a: " + "{b: " * 20_000 + "}" * 20_000, "lie more than 20 deep"),
        ("\n".join(" " * n + "a:" for n in range(500)), "lie more than 20 deep"),
        ("a: [" + "x, " * 50_000 + "]", "more than 10,000 values"),
        ("a: " + "x" * 300_000, "more than 262,144 bytes"),
        ("hidden_size: " + "9" * 5000, "more than 1,000 characters"),
        ("hidden_size: 1" + ":1" * 450, "hidden_size stands twice"),
        ("1: 2", "1 is no name of a setting"),
        ("null: 2", "None is no name of a setting"),
        ("? [a, b]\n: 3", "unhashable key"),
        ("a: 2001-99-99", "month must be in 1..12"),
        ("a: !!timestamp x", "is not readable as YAML"),
        ("a: !!int ''", "is not readable as YAML"),
        ("a: !!bool x", "is not readable as YAML"),
        ("a: !!binary '\u00e9'", "is not readable as YAML"),
        ("a: \0", "is not readable as YAML"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("hidden_size: 16", "hidden_size stands twice"),
        ("model: [SASRec]", "model stands twice"),
        ("%YAML 9.9\n---\na: 1", "is not readable as YAML"),
        ("---\na: 1", "is not readable as YAML"),
        ("\x1b[31m: 1", "is not readable as YAML"),
    ],
)
def test_settings_that_no_program_writes(folder, honest, capsys, text, message):
    (folder / "m.yaml").write_text((folder / "m.yaml").read_text() + text + "\n", encoding="utf-8")
    code, line = _outcome(capsys, _options(folder, honest))
    assert (
        code == 2
        and message.replace("hidden_size stands", "'hidden_size' stands").replace("model stands", "'model' stands")
        in line
    ), line


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_size", 10**300, "hidden_size"),
        ("hidden_size", 10**8, "d_model=100000000 must be at most"),
        ("n_layers", 10**6, "num_layers=1000000 must be at most 200"),
        ("n_items", 10**9, "n_items=1000000000"),
        ("MAX_ITEM_LIST_LENGTH", 10**9, "max_len=1000000000 must be at most"),
        ("inner_size", 10**12, "inner_size=1000000000000 must be at most"),
        ("n_heads", -1, "attention_heads=-1"),
        ("hidden_size", ["x" * 500] * 500, "is not a whole number"),
        ("hidden_size", {"a": {"b": {"c": "d"}}}, "is not a whole number"),
        ("hidden_dropout_prob", float("nan"), "hidden_dropout_prob=nan is not a number"),
        ("layer_norm_eps", float("inf"), "layer_norm_eps=inf is not a number"),
        ("layer_norm_eps", -1.0, "norm_eps=-1.0"),
        ("model", ["SASRec"], "model=['SASRec']"),
        ("model", "x" * 900, "is unknown"),
        ("x" * 900, 1, "unknown"),
        ("hidden_act", {"a": 1}, "hidden_act={'a': 1} is not offered"),
    ],
)
def test_settings_that_no_model_has(folder, honest, capsys, name, value, message):
    settings = yaml.safe_load((folder / "m.yaml").read_text())
    (folder / "m.yaml").write_text(yaml.safe_dump(settings | {name: value}))
    _refused(capsys, folder, honest, message)


def _table(value):
    return _saved({TABLE: value})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: _table(torch.zeros(3, 2).to(torch.float8_e4m3fn)), "float8_e4m3fn, where float32"),
        (lambda: _table(torch.zeros(3, 2, device="meta")), "no dense tensor (_rebuild_meta_tensor_no_storage)"),
        (lambda: _table(torch.eye(3).to_sparse()), "no dense tensor (_rebuild_sparse_tensor)"),
        (lambda: _table(torch.zeros(3, 2, dtype=torch.complex64)), "ComplexFloatStorage, where"),
        (lambda: _table(torch.zeros(3, 2, dtype=torch.bool)), "BoolStorage, where"),
        (lambda: _table(torch.zeros(3, 2, dtype=torch.uint16)), "torch.uint16, where"),
        (lambda: _table(torch.zeros(3, dtype=torch.complex64).conj().imag), "view that negates"),
        (lambda: _table(torch.tensor([[1.0, float("inf")]])), "holds numbers that are not finite as float32"),
        (lambda: _table(torch.tensor([[1e300]], dtype=torch.float64)), "holds numbers that are not finite as float32"),
        (lambda: _table(torch.tensor(1.0)), "looks like none of"),
        (lambda: _table(torch.zeros(0, 64)), "(0, 64) numbers, of which 0 are stored"),
        (lambda: _claimed(-1), "is damaged"),
        (lambda: _claimed(5), "cut short"),
        (lambda: _claimed(-5, legacy=True), "is damaged"),
        (lambda: _claimed(5, legacy=True), "numbers are missing"),
        (lambda: _saved({("a", "b"): torch.ones(2), 1: torch.ones(2)}), "not a tensor under a name"),
        (lambda: _saved({"\x1b[31m\n" * 500: 1}), "is a int, not a tensor"),
        (lambda: pickle.dumps({TABLE: [1.0]}), "in another format"),
        (lambda: b"PK\x05\x06" + bytes(18), "is no checkpoint of torch.save"),
        (lambda: _pickled(b"}"), "holds an empty dict"),
        (lambda: _pickled(b""), "is damaged"),
        (lambda: _pickled(b"(" * 10), "a mark where a value is expected"),
        (lambda: _pickled(b"}Nb0"), "is damaged"),
        (lambda: _pickled(b"\x82\x01"), "EXT1, which checkpoints do not use"),
        (lambda: _pickled(b"Pkey\n"), "PERSID, which checkpoints do not use"),
        (lambda: _saved({"x": _class_of((os.system, ("true",)))}), "could execute posix.system"),
        (lambda: _saved({"x": _class_of((getattr, (1, "real")))}), "could execute __builtin__.getattr"),
        (lambda: _saved({"x": _class_of((torch.load, ("m.pth",)))}), "could execute torch.serialization.load"),
        (lambda: _pickled(b"(V1\nios\nsystem\n"), "could execute os.system"),
        (lambda: _pickled(b"(ios\nsystem\n"), "could execute os.system"),
    ],
)
def test_checkpoints_without_a_model(folder, honest, capsys, content, message):
    (folder / "m.pth").write_bytes(content())
    _refused(capsys, folder, honest, message)


def test_torchscript_and_old_tar_files(folder, honest, capsys):
    with zipfile.ZipFile(folder / "m.pth", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"m/{name}", b"")
    _refused(capsys, folder, honest, "TorchScript, or another zip file")
    (folder / "m.pth").write_bytes(bytes(257) + b"ustar" + bytes(250))
    _refused(capsys, folder, honest, "is of a PyTorch before 0.2")


@pytest.mark.parametrize("which", ["m.pth", "m.yaml", "m.item_ids.csv"])
def test_what_is_no_file(folder, honest, capsys, which):
    (folder / which).unlink()
    (folder / which).mkdir()
    _refused(capsys, folder, honest, "is a folder, where a")
    (folder / which).rmdir()
    os.mkfifo(folder / which)
    _refused(capsys, folder, honest, "is a pipe, where a")
    (folder / which).unlink()
    (folder / which).symlink_to("/dev/zero")
    _refused(capsys, folder, honest, "is no file on a disk, where a")
    (folder / which).unlink()
    (folder / which).symlink_to(folder / which)
    _refused(capsys, folder, honest, "there is no")


@pytest.mark.parametrize("option", ["checkpoint", "settings", "item_ids", "run"])
@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "/".join(["y" * 200] * 30)])
def test_names_that_no_file_has(folder, honest, capsys, option, path):
    options = [word for word in _options(folder, honest) if not word.startswith(f"--{option}=")]
    if option == "run":
        options = [f"--output={folder / 'n.pth'}"]
    code, line = _outcome(capsys, [*options, f"--{option}={path}"])
    assert code == 2, line


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(3)}}}},
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"model": {"state_dict": s}, "args": {"lr": 0.1, 3: (None, True)}},
    ],
)
def test_what_programs_wrap_a_state_dict_in(honest, tmp_path, legacy, prefix, wrap):
    plain = torch.load(honest / "m.pth", weights_only=True)
    named = {prefix + name: torch.nn.Parameter(value) for name, value in plain.items()}
    torch.save(wrap(named), tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy)
    read = read_state_dict(tmp_path / "m.pth")
    assert read.notes == [f"taken off all names: {part}." for part in prefix[:-1].split(".")]
    assert read.arrays.keys() == plain.keys() and read.items_digest is None
    for name, value in plain.items():
        np.testing.assert_array_equal(read.arrays[name], value.numpy())


def test_a_prefix_that_only_some_names_have_stays(tmp_path):
    torch.save({"module.a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "m.pth")
    assert set(read_state_dict(tmp_path / "m.pth").arrays) == {"module.a", "b"}


@pytest.mark.parametrize("legacy", [False, True])
def test_views_and_precisions_are_read_as_pytorch_reads_them(tmp_path, legacy):
    base = torch.arange(24.0)
    state = {
        "transposed": base.view(4, 6).t(),
        "part": base[3:9],
        "steps": base[::5],
        "expanded": base[:1].expand(5),
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "double": base.double() / 3,
        "scalar": torch.tensor(2.0),
    }
    torch.save(state | {"other": torch.arange(3)}, tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="other is of torch.LongStorage"):
        read_state_dict(tmp_path / "m.pth")
    torch.save(
        {"state_dict": state, "n": torch.arange(3)}, tmp_path / "m.pth", _use_new_zipfile_serialization=not legacy
    )
    for name, array in read_state_dict(tmp_path / "m.pth").arrays.items():
        expected = state[name] if name == "double" else state[name].float()
        np.testing.assert_array_equal(array, expected.numpy(), err_msg=name)
        assert array.dtype == (np.float64 if name == "double" else np.float32)


def test_harmless_aliases_and_merges_are_read(tmp_path):
    (tmp_path / "s.yaml").write_text("base: &b {lr: 1}\nother: {<<: *b, k: [1, 2]}\nsize: &s 3\nagain: *s\n")
    settings = read_settings(tmp_path / "s.yaml")
    assert settings == {"base": {"lr": 1}, "other": {"lr": 1, "k": [1, 2]}, "size": 3, "again": 3}
