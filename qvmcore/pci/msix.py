"""The vector table of MSI-X (floor 4; PCI 3.0, 6.8.2): messages and their mask bits. Not thread-safe."""

from __future__ import annotations

from qvmcore.pci import spec

_MASKED = 1
_WORD = 0xFFFFFFFF


class MsixTable:
    """``vectors`` entries, at most 2048. Raises ValueError."""

    def __init__(self, vectors: int) -> None:
        if not 0 <= vectors <= spec.MSIX_MAX_VECTORS:
            raise ValueError(f"{vectors} MSI-X vectors; expected 0 to {spec.MSIX_MAX_VECTORS}")
        self.vectors = vectors
        self.reset()

    def reset(self) -> None:
        """No messages, all masked."""
        self._rows = [[0, 0, 0, _MASKED] for _ in range(self.vectors)]

    @property
    def size(self) -> int:
        """Bytes of the table."""
        return self.vectors * spec.MSIX_ENTRY_SIZE

    @property
    def bar_size(self) -> int:
        """Bytes of a BAR with table and pending bits, at least one page."""
        need = self.size + (self.vectors + 63) // 64 * 8
        return max(4096, 1 << (need - 1).bit_length())

    def message(self, vector: int) -> tuple[int, int] | None:
        """Address and data of a vector; None while it is masked, or when there is no such vector."""
        if vector >= self.vectors:
            return None
        low, high, data, control = self._rows[vector]
        return None if control & _MASKED else (high << 32 | low, data)

    def read(self, offset: int, size: int) -> int:
        """An aligned access of 4 or 8 bytes inside the table."""
        return sum(self._word(offset + at) << 8 * at for at in range(0, size, 4))

    def write(self, offset: int, size: int, value: int) -> None:
        """Likewise."""
        for at in range(0, size, 4):
            field = (offset + at) % spec.MSIX_ENTRY_SIZE // 4
            # Address bits 1:0 and the reserved bits of Vector Control are zero (6.8.2.7, 6.8.2.9).
            word = value >> 8 * at & (~3 & _WORD, _WORD, _WORD, _MASKED)[field]
            self._rows[(offset + at) // spec.MSIX_ENTRY_SIZE][field] = word

    def _word(self, offset: int) -> int:
        return self._rows[offset // spec.MSIX_ENTRY_SIZE][offset % spec.MSIX_ENTRY_SIZE // 4]
