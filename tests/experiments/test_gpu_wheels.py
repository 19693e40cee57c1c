"""Which wheels a GPU machine lacks, by what pyproject.toml asks for and `pip freeze` says; nothing is downloaded."""

import tomllib

import pytest

from experiments import gpu_wheels

PROJECT = {
    "project": {
        "name": "mine",
        "dependencies": ["numpy>=2"],
        "optional-dependencies": {
            "gluon": ["jax-triton>=0.4; python_version>='3.12'", "old; python_version<'3.12'"],
            "all": ["mine[gluon]", "triton>=3.6"],
        },
    }
}


def test_requirements_follow_extras_and_python():
    names = [str(one.name) for one in gpu_wheels.requirements(PROJECT, ["all"])]
    assert names == ["numpy", "triton", "jax-triton"]
    with pytest.raises(ValueError, match="--extras=none"):
        gpu_wheels.requirements(PROJECT, ["none"])


def test_our_own_file_names_jax_triton():
    project = tomllib.loads((gpu_wheels.ROOT / "pyproject.toml").read_text())
    names = {one.name for one in gpu_wheels.requirements(project, gpu_wheels.EXTRAS)}
    assert {"jax", "jax-triton", "triton", "tyro", "polars"} <= names and "torch" not in names


def test_what_is_there_is_left_out_unless_its_version_is_refused():
    present = gpu_wheels.read_present("numpy==1.26\ntriton==3.6.0+git\nMy_Own @ file:///x\n# note\n-e git+x\n")
    assert present == {"numpy": "1.26", "triton": "3.6.0+git", "my-own": ""}
    resolved = {"numpy": "2.5.5", "triton": "3.9.0", "jax_triton": "0.4.1", "my.own": "1"}
    wanted = gpu_wheels.requirements(PROJECT, ["all"])
    assert gpu_wheels.lacking(resolved, present, wanted) == ["numpy==2.5.5", "jax_triton==0.4.1"]


def test_wheels_are_fetched_for_the_machine_and_summed(tmp_path, monkeypatch, capsys):
    called = []

    def pip(*arguments):
        called.append(arguments)
        (tmp_path / "wheels" / "polars-2-py3-none-any.whl").write_bytes(b"0" * 1_500_000)

    monkeypatch.setattr(gpu_wheels, "_pip", pip)
    monkeypatch.setattr(gpu_wheels, "resolve", lambda wanted: {"polars": "2", "jax": "0.11.2"})
    (tmp_path / "freeze.txt").write_text("jax==0.11.2\n")
    given = [f"--dest={tmp_path / 'wheels'}", f"--present={tmp_path / 'freeze.txt'}"]
    assert gpu_wheels.main(given) == 0
    [arguments] = called
    assert arguments[-1] == "polars==2" and "--python-version=3.12" in arguments
    said = capsys.readouterr().out
    assert "1 in all" in said and "1.5" in said and "--no-index --no-deps wheels/*.whl" in said
