"""One tiny run for all tests of serving and of the programs that read run folders."""

import pytest

from tests.serving.tiny_run import make_causal_config, make_config, make_run
from tim4rec_jax.serving.recommender import Recommender


@pytest.fixture(scope="session")
def run(tmp_path_factory, log):
    path = tmp_path_factory.mktemp("runs") / "tiny"
    make_run(path, log, make_config())
    return path


@pytest.fixture(scope="session")
def recommender(run):
    return Recommender.from_run(run)


@pytest.fixture(scope="session")
def causal_run(tmp_path_factory, log):
    path = tmp_path_factory.mktemp("runs") / "causal"
    make_run(path, log, make_causal_config())
    return path


@pytest.fixture(scope="session")
def causal_recommender(causal_run):
    return Recommender.from_run(causal_run)
