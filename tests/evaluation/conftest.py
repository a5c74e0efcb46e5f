"""Fixtures of the evaluation tests."""

import pytest
from evaluation_cases import make_toy


@pytest.fixture
def toy(tmp_path):
    return make_toy(tmp_path)
