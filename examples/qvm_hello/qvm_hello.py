"""vdev 'hello': greets, keeps one scratch word, counts writes and pulses its interrupt."""

from qvmcore.api import Vdev, Window, hookimpl

GREETING, SCRATCH, WRITES = 0x00, 0x04, 0x08


class Hello(Vdev):
    vdev_type = "hello"
    windows = (Window(0x1000, access=frozenset({4})),)
    irqs = 1
    scratch = writes = 0

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        return {GREETING: 0x6F6C6568, SCRATCH: self.scratch, WRITES: self.writes}.get(offset, 0)

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        if offset == SCRATCH:
            self.scratch, self.writes = value, self.writes + 1
            self.ctx.irq().pulse()


@hookimpl
def qvm_vdev_types() -> list[type[Vdev]]:
    return [Hello]
