"""The Python of the front page runs as it stands there, on a tiny run."""

import pathlib
import re

from tim4rec_jax.run_dir import read_histories

README = pathlib.Path(__file__).resolve().parents[2] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_recommending_from_a_run(run, capsys):
    [code] = [block for block in blocks() if "Recommender" in block]
    user = read_histories(run)["user_id"][0]
    exec(code.replace('"runs/mine"', repr(str(run))).replace('"42"', repr(user)), {})
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_a_model_alone():
    [code] = [block for block in blocks() if "build_model" in block]
    names = {}
    exec(code, names)
    assert names["hidden"].shape == (1, 1, 64) and names["scores"].shape == (1, 1, 3417)
