"""What kind of file a kernel is, by its first bytes (floor 8): for the choice of a loader and for errors.

A file for another architecture is named, together with the board it starts on.
"""

from __future__ import annotations

from pathlib import Path

from qvmcore.errors import QvmError

GZIP_MAGIC = b"\x1f\x8b"
ELF_MAGIC = b"\x7fELF"

_ARM64_HEADER_SIZE = 64
_BZIMAGE_MAGIC_END = 0x206

#: First bytes, what they are, and what to do with such a file.
_OTHER: tuple[tuple[bytes, str, str], ...] = (
    (GZIP_MAGIC, "a gzip file", "unpack it with gunzip, or use the bzImage of this kernel"),
    (b"\xfd7zXZ\0", "an xz file", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it with unzstd"),
    (b"BZh", "a bzip2 file", "unpack it with bunzip2"),
    (b"\x27\x05\x19\x56", "a U-Boot image (uImage)", "use the kernel it was made from"),
    (b"\xd0\x0d\xfe\xed", "a device tree or a FIT image", "use the kernel itself"),
    (b"070701", "a cpio archive", "write it as initrd, and a kernel as kernel"),
    (b"!<arch>\n", "an archive, perhaps a Debian package", "unpack the kernel that is in it"),
)


def is_arm64_image(head: bytes) -> bool:
    """A Linux arm64 ``Image`` (Documentation/arch/arm64/booting.rst)."""
    return len(head) >= _ARM64_HEADER_SIZE and head[56:60] == b"ARM\x64"


def is_zboot(head: bytes) -> bool:
    """A compressed kernel in an EFI program that unpacks it (Linux' EFI zboot)."""
    return head[:2] == b"MZ" and head[4:8] == b"zimg" and len(head) >= 56


def is_x86_linux(head: bytes) -> bool:
    """An x86 kernel with a setup header (Documentation/arch/x86/boot.rst), a bzImage if it is not old."""
    return (
        len(head) >= _BZIMAGE_MAGIC_END and head[0x1FE:0x200] == b"\x55\xaa" and head[0x202:0x206] == b"HdrS"
    )


def refuse_foreign(path: Path, head: bytes, board: str) -> None:
    """Raise QvmError for a kernel that ``board`` cannot start but another board can."""
    found = None
    if is_arm64_image(head):
        found = "an arm64 Linux kernel (Image)", "arm64-virt"
    elif is_x86_linux(head):
        found = "an x86 Linux kernel (bzImage)", "x86_64-pc"
    elif is_zboot(head) and board != "arm64-virt":
        raise QvmError(
            f"{path}: an EFI zboot image, which {board} cannot start",
            hint='x86 kernels come as bzImage; for an arm64 kernel write board = "arm64-virt"',
        )
    if found is not None and found[1] != board:
        raise QvmError(f"{path}: {found[0]}, which {board} cannot start", hint=f'write board = "{found[1]}"')


def not_a_kernel(path: Path, data: bytes, expected: str, what: str = "") -> QvmError:
    """The error for a file that is nothing this board starts."""
    for magic, name, advice in _OTHER:
        if data.startswith(magic) and not what:
            return QvmError(f"{path}: {name}; {expected}", hint=advice)
    first = data[:8].hex(" ") if data else "none, the file is empty"
    return QvmError(f"{path}: {what}is not a kernel: first bytes {first}; {expected}")
