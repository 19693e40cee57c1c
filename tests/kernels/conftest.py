"""Fixtures of the kernels' tests."""

import pytest

from kernels import dispatch


@pytest.fixture
def any_machine(monkeypatch):
    """Backends are not asked whether they run here: their kernels are compiled, lowered or interpreted as PTX."""
    monkeypatch.setattr(dispatch, "missing", lambda name: None)
