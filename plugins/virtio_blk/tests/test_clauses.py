"""Clauses of virtio 1.4, 5.2.6.2, that no other test of the disk shows."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qvm_virtio_blk import spec
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_blk.testing import IOERR, OK, UNSUPP, Guest, Start, header

from qvmcore.testing.fakes import Plugged

Disk = Callable[..., Plugged[VirtioBlk]]
VERSION_1 = 1 << 32


@pytest.mark.parametrize("kind", [15, 16, 18, 20, 22, 24, 26])
def test_5_2_6_2_requests_for_zones_are_unsupp(guest: Guest, image: Path, kind: int) -> None:
    before = image.read_bytes()
    assert guest.io([header(kind, 8)], [512, 1])[0] == UNSUPP
    assert guest.io([header(kind, 8), b"z" * 512], [8, 1])[0] == UNSUPP
    assert guest.alive() and image.read_bytes() == before


def test_5_2_6_2_a_read_only_disk_refuses_a_driver_that_did_not_accept_ro(disk: Disk, start: Start) -> None:
    # In memory: nothing but the device itself keeps this disk from being written.
    guest = start(disk(hostdev="memory:64K", readonly=True), VERSION_1)
    assert guest.driver.offered() & spec.F_RO and not guest.driver.features & spec.F_RO
    assert guest.write(0, b"x" * 512) == IOERR
    assert guest.read(0) == (OK, bytes(512))


def test_5_2_6_2_a_driver_without_flush_and_wce_gets_durable_writes(
    disk: Disk, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: list[int] = []
    real = os.pwritev

    def write(fd: int, views: Any, at: int, flag: int) -> int:
        flags.append(flag)
        return real(fd, views, at, flag)

    monkeypatch.setattr(os, "pwritev", write)
    guest = start(disk(), VERSION_1)
    assert guest.write(0, b"x" * 512) == OK
    assert flags == [os.RWF_DSYNC]
