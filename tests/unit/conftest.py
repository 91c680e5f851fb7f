"""Test files here share helpers by ``from tests.unit.vmfiles import ...``."""

from __future__ import annotations

import sys
from pathlib import Path

# pytest's importlib mode leaves sys.path alone, and the command `pytest` does not add the root.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
