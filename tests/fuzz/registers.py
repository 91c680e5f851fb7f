"""Targets for registers: interrupt controller and PrimeCells."""

from __future__ import annotations

import itertools
from typing import Any

from qvmcore.testing.fakes import plug
from qvmcore.vdev import Vdev
from tests.fuzz.bytesource import ByteSource

LINES = 96


def gicv2(data: bytes) -> None:
    """Any accesses and any lines: no exception, and the CPU sees what the registers say."""
    from qvm_emulator.gicv2 import SPURIOUS, GicV2

    source = ByteSource(data)
    levels = [False]
    gic = GicV2(LINES, levels.append)
    if source.byte() & 1:
        gic.dist_write(0x000, 4, 1)
        gic.cpu_write(0x00, 4, 1)
        gic.cpu_write(0x04, 4, 0xFF)
        for word in range(LINES // 32):
            gic.dist_write(0x100 + 4 * word, 4, 0xFFFFFFFF)
    while source:
        action = source.byte() % 7
        size = source.pick((4, 4, 4, 1, 2, 8))
        if action == 0:
            gic.set_line(32 + source.byte() % (LINES - 32), bool(source.byte() & 1))
        elif action == 1:
            gic.pulse(16 + source.byte() % (LINES - 16))
        elif action == 2:
            assert gic.dist_read(source.uint(2) % (0x1001 - size), size) >= 0
        elif action == 3:
            gic.dist_write(source.uint(2) % (0x1001 - size), size, source.value(size))
        elif action == 4:
            assert gic.cpu_read(source.byte() & 0x1C, 4) >= 0
        elif action == 5:
            gic.cpu_write(source.pick((0x00, 0x04, 0x08, 0x10, 0x10, 0x14, 0x1000)), 4, source.value(4))
        else:
            intid = gic.acknowledge() & 0x3FF
            assert intid < LINES or intid == SPURIOUS
            if source.byte() & 1:
                gic.end_of_interrupt(intid)
        # The output is told on changes only, and it is what a look at the controller gives.
        assert levels[-1] == gic.asserted
    # "Low" may be said again, to a CPU that came for an interrupt which had gone; "high" never is.
    assert (True, True) not in itertools.pairwise(levels)


def pl011(data: bytes) -> None:
    """Any accesses to the UART, with input arriving in between."""
    from qvm_primecell.pl011 import Pl011

    _plain_vdev(data, Pl011, hostdev="null")


def pl061(data: bytes) -> None:
    """Any accesses to the GPIO block, and the power button in between."""
    from qvm_primecell.pl061 import Pl061

    _plain_vdev(data, Pl061)


def _plain_vdev(data: bytes, cls: type[Vdev], **options: Any) -> None:
    source = ByteSource(data)
    window = cls.windows[0]
    with plug(cls, options) as device:
        while source:
            action, size = source.byte(), source.pick((4, 4, 4, 1, 2, 8))
            # Most registers of a PrimeCell are in the first 128 bytes and the last 32.
            offset = source.byte() if action & 0x10 else source.uint(2)
            offset = (window.size - 32 + offset % 32 if action & 0x20 else offset) % window.size
            if action % 4 == 0:
                assert 0 <= device.read(offset, size) < 1 << 8 * size
            elif action % 16 == 1:
                device.vdev.on_button()
            elif action % 16 == 5:
                device.vdev.on_reset()
                assert not device.irq.level or device.vdev.status()
            else:
                device.write(offset, source.value(size), size)
        device.settle()
        assert device.ctx.faults == []
        assert device.ctx.shutdowns == []
        assert [result for result in device.terminate() if result.verdict != "ok"] == []
