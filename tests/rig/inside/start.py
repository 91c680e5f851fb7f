"""Run in the machine as its only program: the selected tests, by pytest."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

CODE = Path("/code")


def main() -> int:
    """Run the tests named by the disk; pytest's exit code."""
    os.environ.update(HOME="/root", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", QVM_RIG_INSIDE="1")
    os.environ["PYTHONPATH"] = f"{CODE}/site:{CODE}"  # for what the tests start
    if not list(CODE.glob(f"site/qvmcore/__pycache__/*.{sys.implementation.cache_tag}.pyc")):
        # Made by another Python: compiled here once, not by each `qvm run` again.
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = "/tmp/pyc"
    run = json.loads((CODE / "run.json").read_text())
    os.environ.update(run["environment"])
    import pytest

    return int(pytest.main(["-v", "-c", str(CODE / "pytest.ini"), "--rootdir", str(CODE), *run["tests"]]))


if __name__ == "__main__":
    os.chdir(CODE)
    sys.path[:0] = [f"{CODE}/site", str(CODE)]
    sys.exit(main())
