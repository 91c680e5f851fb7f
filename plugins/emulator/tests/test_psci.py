"""PSCI alone."""

from __future__ import annotations

import pytest
from qvm_emulator.psci import Function, Psci

from qvmcore.api import GuestEnd, Reason

NOT_SUPPORTED = (1 << 64) - 1
INVALID_PARAMETERS = (1 << 64) - 2


@pytest.fixture
def ends() -> list[GuestEnd]:
    return []


@pytest.fixture
def psci(ends: list[GuestEnd]) -> Psci:
    return Psci(ends.append)


def test_version_and_features(psci: Psci) -> None:
    assert psci.call(Function.VERSION, 0) == 0x10000
    assert psci.call(Function.FEATURES, Function.SYSTEM_OFF) == 0
    assert psci.call(Function.FEATURES, 0x8000_0000) == NOT_SUPPORTED  # SMCCC_VERSION
    assert psci.call(Function.MIGRATE_INFO_TYPE, 0) == 2


def test_one_cpu(psci: Psci) -> None:
    assert psci.call(Function.AFFINITY_INFO, 0) == 0
    assert psci.call(Function.AFFINITY_INFO | 1 << 30, 1) == INVALID_PARAMETERS
    assert psci.call(Function.CPU_ON | 1 << 30, 0) == (1 << 64) - 4
    assert psci.call(Function.CPU_ON, 1) == INVALID_PARAMETERS
    assert psci.call(Function.CPU_OFF, 0) == (1 << 64) - 3
    assert psci.call(Function.CPU_SUSPEND, 0) == 0


def test_unknown_functions(psci: Psci, ends: list[GuestEnd]) -> None:
    for function in (0, 0x8400_0005, 0xC400_0008, 0xFFFF_FFFF):
        assert psci.call(function, 0) == NOT_SUPPORTED
    assert ends == []


@pytest.mark.parametrize(
    ("function", "reason"),
    [(Function.SYSTEM_OFF, Reason.GUEST_SHUTDOWN), (Function.SYSTEM_RESET, Reason.GUEST_RESET)],
)
def test_system_end(psci: Psci, ends: list[GuestEnd], function: Function, reason: Reason) -> None:
    # The upper half of w0 is not part of the function number.
    psci.call(0xDEAD_0000_0000_0000 | function, 0)
    assert [end.reason for end in ends] == [reason]
