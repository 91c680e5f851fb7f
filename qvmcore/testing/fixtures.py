"""The pytest plugin (entry point ``pytest11``): one fixture, nothing imported before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qvmcore.testing.fakes import Plugged


@pytest.fixture
def qvm_plug() -> Iterator[Callable[..., Plugged[Any]]]:
    """``qvm_plug(MyVdev, **options)``: :func:`qvmcore.testing.fakes.plug`, ended after the test."""
    from qvmcore.testing.fakes import plug

    with ExitStack() as stack:

        def plugged(*args: object, **options: object) -> Plugged[Any]:
            make: Callable[..., Plugged[Any]] = plug
            return stack.enter_context(make(*args, **options))

        yield plugged
