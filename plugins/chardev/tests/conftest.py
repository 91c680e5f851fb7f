"""An owner whose worker must see no exception and must end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from qvm_chardev.testing import Owner


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    """Stands for the vdev; relative paths start at ``tmp_path``."""
    owner = Owner(tmp_path)
    yield owner
    assert owner.worker.stop(5)
    assert not owner.errors
