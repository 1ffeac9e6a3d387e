"""Helpers of the tests: the real command line, without a network, on a tiny budget."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import DEAD_PROXY, ROOT


@pytest.fixture
def run_script(tmp_path):
    """Run a script of the project as a user would, offline, in an empty folder."""

    def run(script: str, *flags: str, timeout: float = 120) -> subprocess.CompletedProcess:
        environment = os.environ | {
            **{name: DEAD_PROXY for name in ("http_proxy", "https_proxy", "HTTPS_PROXY")},
            "no_proxy": "",
        }
        return subprocess.run(
            [sys.executable, "-W", "error::DeprecationWarning:__main__", ROOT / script, *flags],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def data_dir():
    """The folder with the real datasets, from DATA_DIR; the test is skipped without it."""
    if "DATA_DIR" not in os.environ:
        pytest.skip("DATA_DIR is not set")
    return Path(os.environ["DATA_DIR"]).resolve()
