"""One tiny run for all tests of serving and of the programs that read run folders."""

import pytest

from tests.serving.tiny_run import make_config, make_log, make_run
from tim4rec_jax.serving.recommender import Recommender


@pytest.fixture(scope="session")
def log():
    return make_log()


@pytest.fixture(scope="session")
def run(tmp_path_factory, log):
    path = tmp_path_factory.mktemp("runs") / "tiny"
    make_run(path, log, make_config())
    return path


@pytest.fixture(scope="session")
def recommender(run):
    return Recommender.from_run(run)
