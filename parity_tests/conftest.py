"""Shared by all tests: the golden helper on the path, and a clean precision after every test."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # golden_files and other helpers beside the tests
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def clean_precision():
    """An exception inside a mixed-precision cell leaves its precision to the process: no test may inherit it."""
    yield
    if "osp_mindspore" in sys.modules:
        from osp_mindspore import runtime

        runtime.reset_precision()


# The same examples in every run: a red build can be repeated. `--hypothesis-profile=default` draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
