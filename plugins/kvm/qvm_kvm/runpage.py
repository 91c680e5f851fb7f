"""The page or pages a vCPU shares with the kernel (struct kvm_run), as typed views."""

from __future__ import annotations

import mmap

IMMEDIATE_EXIT = 1  # index into u8
REASON = 8 // 4  # into u32
IO_DIRECTION = 32  # u8: 1 = out
IO_SIZE = 33  # u8
IO_PORT = 34 // 2  # u16
IO_COUNT = 36 // 4  # u32
IO_OFFSET = 40 // 8  # u64
MMIO_ADDRESS = 32 // 8  # u64
MMIO_DATA = 40  # bytes
MMIO_LENGTH = 48 // 4  # u32
MMIO_IS_WRITE = 52  # u8
FAIL_REASON = 32 // 8  # u64
EVENT_TYPE = 32 // 4  # u32
SUBERROR = 32 // 4  # u32
SUBERROR_NDATA = 36 // 4  # u32
SUBERROR_DATA = 40 // 8  # u64
INSTRUCTION_SIZE = 48  # u8
INSTRUCTION = 49  # 15 bytes


class RunPage:
    """Maps it. Raises OSError."""

    def __init__(self, vcpu_fd: int, size: int) -> None:
        self.size = size
        self._map = mmap.mmap(vcpu_fd, size)
        self._bytes = memoryview(self._map)
        self.u8 = self._bytes.cast("B")
        self.u16 = self._bytes.cast("H")
        self.u32 = self._bytes.cast("I")
        self.u64 = self._bytes.cast("Q")

    def close(self) -> None:
        """Unmap it; idempotent."""
        for view in (self.u8, self.u16, self.u32, self.u64, self._bytes):
            view.release()
        self._map.close()
