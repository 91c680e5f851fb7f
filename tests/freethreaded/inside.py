"""Runs in the free-threaded Python: pytest with the words of the command line, and a look at the GIL.

An extension that does not say that it works without a GIL switches it on when it is imported: that would
make every test of this meaningless, so the exit status is GIL_IS_ON then, whatever pytest says.
"""

from __future__ import annotations

import sys

import pytest

GIL_IS_ON = 70


def main(arguments: list[str]) -> int:
    """The exit status of pytest, or GIL_IS_ON."""
    status = int(pytest.main(arguments))
    # The function exists from Python 3.13 on.
    enabled = bool(getattr(sys, "_is_gil_enabled", lambda: True)())
    print(f"Python {sys.version.split()[0]}, GIL {'on' if enabled else 'off'}", flush=True)
    return GIL_IS_ON if enabled else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
