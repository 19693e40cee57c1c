"""The import rule and the shape of the tree."""

import ast
import pathlib
import re

import pytest

pytestmark = pytest.mark.quick

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "tim4rec_jax", "experiments")
# What each room of the library may import of the others.
# Ground-floor files that import nothing of the library, or only each other, are everyone's.
GROUND = {"checks", "figures", "files", "json_files", "memory", "notebook", "outside"}
RUN = {"run_dir", "run_environment", "run_manifest"}
ROOMS = {
    "data": {"config", "data_config"},
    "layers": {"model_config"},
    "models": {"model_config", "typing", "layers"},
    "parallel": {"config", "models"},
    "evaluation": {"config", "eval_config", "data", "models", "parallel"},
    "training": {"config", "data", "devices", "models", "parallel", "evaluation", *RUN},
    "serving": {"config", "data", "devices", "models", "parallel", "evaluation", *RUN, "training"},
    "interop": {"config", "data", "model_config", "models", "parallel", *RUN, "training", "serving"},
}


def _modules(package: str) -> list[pathlib.Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _imports(file: pathlib.Path, *, when_opened: bool = False) -> set[str]:
    """Names of the modules that a file imports, everywhere or only those that it imports at once."""
    tree, found = ast.parse(file.read_text(encoding="utf-8")), set()
    for node in tree.body if when_opened else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize(("package", "allowed"), [(p, set(PACKAGES[: i + 1])) for i, p in enumerate(PACKAGES)])
def test_nothing_imports_back(package, allowed):
    for file in _modules(package):
        ours = {name.split(".")[0] for name in _imports(file)} & {*PACKAGES, "tests"}
        assert ours <= allowed, f"{file} imports {ours - allowed}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_know_only_what_they_may(room):
    for file in (ROOT / "tim4rec_jax" / room).rglob("*.py"):
        inner = {name.split(".")[1] for name in _imports(file) if name.startswith("tim4rec_jax.")}
        allowed = ROOMS[room] | GROUND | {room}
        assert inner <= allowed, f"{file} imports {inner - allowed}"


def test_the_ground_floor_stands_on_itself():
    for name in GROUND:
        inner = {n.split(".")[1] for n in _imports(ROOT / "tim4rec_jax" / f"{name}.py") if n.startswith("tim4rec_jax.")}
        assert inner <= GROUND, f"{name} imports {inner - GROUND}"


def test_the_library_does_not_import_torch():
    """But for the function that writes a checkpoint of PyTorch, and kernels in the language of Triton's own package."""
    writes = ROOT / "tim4rec_jax" / "interop" / "torch_checkpoint_file.py"
    for package in ("kernels", "tim4rec_jax"):
        for file in _modules(package):
            imports = _imports(file, when_opened=file == writes)
            names = {name.split(".")[0] for name in imports}
            gluon = package == "kernels" and file.stem.startswith("gluon")
            assert not ({"torch"} if gluon else {"torch", "triton", "jax_triton"}) & names, file
            # Those are only imported where they are named.
            at_once = {name.rsplit(".", 1)[-1] for name in _imports(file, when_opened=True)}
            assert gluon or "TYPE_CHECKING" in file.read_text() or not any(n.startswith("gluon") for n in at_once), file


def test_programs_open_without_torch():
    models = ROOT / "experiments" / "benchmarks" / "torch_models"
    for file in _modules("experiments"):
        if file.parent != models:
            names = _imports(file, when_opened=True)
            assert not {"torch", "triton", "mamba_ssm", "mamba2_jax"} & {name.split(".")[0] for name in names}, file
            assert not any(name.startswith("experiments.benchmarks.torch_models") for name in names), file


def test_opponents_do_not_know_our_operators():
    benchmarks = ROOT / "experiments" / "benchmarks"
    for file in (benchmarks / "opponents.py", *(benchmarks / "torch_models").iterdir()):
        if file.suffix == ".py":
            names = _imports(file)
            assert not {name for name in names if name.startswith(("kernels", "experiments.benchmarks.operator"))}, file


@pytest.mark.parametrize("package", [*PACKAGES, "tests"])
def test_files_and_functions_stay_readable(package):
    for file in _modules(package):
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 620, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 70, f"{file}: {node.name}"
        assert file.stem not in {"utils", "common", "helpers", "misc"}, file


def test_public_modules_say_what_they_are():
    for package in PACKAGES:
        for file in _modules(package):
            text = file.read_text(encoding="utf-8")
            assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{file} has no docstring"


def test_files_named_in_the_readmes_are_there():
    named = re.compile(r"(?<![\w/.-])((?:kernels|tim4rec_jax|experiments|tests)/[\w/]*\w+\.(?:py|md|json|png))")
    readmes = [ROOT / "README.md", *(ROOT / room / "README.md" for room in (*PACKAGES[:1], "experiments", "tests"))]
    found = {(readme, name) for readme in readmes for name in named.findall(readme.read_text())}
    assert len(found) > 15
    for readme, name in found:
        assert (ROOT / name).is_file(), f"{readme} names {name}"
