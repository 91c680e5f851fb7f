"""Kernels of every kind end up where the arm64 booting protocol wants them; bad files are named."""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qvmcore.boards import Placement
from qvmcore.engine import CpuEntry
from qvmcore.errors import HostError, QvmError
from qvmcore.load.arm64 import load_arm64
from qvmcore.memory import GuestMemory
from qvmcore.types import LoadSpec, MemorySpec
from tests.unit import x86_files

BASE = 0x40000000
MIB = 1 << 20


def image(body: bytes = b"code", *, text_offset: int = 0, size: int = 1 * MIB, flags: int = 0xA) -> bytes:
    header = struct.pack("<IIQQQ24s4sI", 0x91005A4D, 0x14000000, text_offset, size, flags, b"", b"ARM\x64", 0)
    return header + body


def zboot(payload: bytes, method: bytes = b"gzip", *, offset: int = 64, size: int | None = None) -> bytes:
    size = len(payload) if size is None else size
    return struct.pack("<4s4sII8x32s8x", b"MZ", b"zimg", offset, size, method) + payload


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory.allocate([MemorySpec(BASE, 16 * MIB)])
    yield memory
    memory.close()


class Loader:
    """Loads one file and remembers the placement the device tree was built for."""

    def __init__(self, folder: Path, memory: GuestMemory) -> None:
        self.folder, self.memory = folder, memory
        self.placement = Placement(0, 0, 0)
        self.dtb = b"\xd0\x0d\xfe\xed dtb"

    def __call__(
        self, data: bytes, *, initrd: bytes | None = None, kind: str = "auto", address: int | None = None
    ) -> CpuEntry:
        (self.folder / "Image").write_bytes(data)
        if initrd is not None:
            (self.folder / "initrd").write_bytes(initrd)
        spec = LoadSpec(
            self.folder / "Image", self.folder / "initrd" if initrd is not None else None, "", kind, address
        )
        return load_arm64(spec, self.memory, self._fdt)

    def _fdt(self, placement: Placement) -> bytes:
        self.placement = placement
        return self.dtb

    def error(self, data: bytes, **arguments: object) -> str:
        with pytest.raises(QvmError) as caught:
            self(data, **arguments)  # type: ignore[arg-type]
        return str(caught.value).replace(str(self.folder), "DIR")


@pytest.fixture
def load(tmp_path: Path, memory: GuestMemory) -> Loader:
    return Loader(tmp_path, memory)


def test_a_plain_image_with_initrd(load: Loader) -> None:
    entry = load(image(size=3 * MIB), initrd=b"initrd!")
    assert entry == CpuEntry(BASE, {"x0": BASE + 4 * MIB, "x1": 0, "x2": 0, "x3": 0})
    assert load.memory.read(BASE + 56, 4) == b"ARM\x64"
    # The device tree has a 2 MiB block of its own behind the BSS, the initrd follows.
    assert load.memory.read(BASE + 4 * MIB, 8) == load.dtb[:8]
    assert load.placement.initrd == (BASE + 6 * MIB, BASE + 6 * MIB + 7)
    assert load.memory.read(BASE + 6 * MIB, 7) == b"initrd!"


def test_text_offset_and_old_kernels(load: Loader) -> None:
    assert load(image(text_offset=0x8000)).pc == BASE + 0x8000
    assert load(image(size=0)).pc == BASE + 0x80000


def test_ram_that_does_not_begin_on_2_mib(tmp_path: Path) -> None:
    memory = GuestMemory.allocate([MemorySpec(BASE + 4096, 16 * MIB)])
    assert Loader(tmp_path, memory)(image()).pc == BASE + 2 * MIB
    memory.close()


@pytest.mark.parametrize(
    "pack",
    [
        gzip.compress,
        lambda data: zboot(gzip.compress(data)),
        lambda data: zboot(lzma.compress(data), b"xzkern"),
        lambda data: zboot(lzma.compress(data, lzma.FORMAT_ALONE), b"lzma"),
    ],
    ids=["gzip", "zboot-gzip", "zboot-xz", "zboot-lzma"],
)
def test_compressed_images(load: Loader, pack: object) -> None:
    kernel = image(b"\x5a" * 5000)
    assert load(pack(kernel)).pc == BASE  # type: ignore[operator]
    assert load.memory.read(BASE, len(kernel)) == kernel


def test_zstd_without_a_library_says_what_to_install(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compression", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    text = load.error(zboot(b"x", b"zstd"))
    assert text == "DIR/Image: compressed with zstd, which this Python cannot read; pip install zstandard"


def test_zstd(load: Loader) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    assert load(zboot(zstandard.compress(image()), b"zstd")).pc == BASE


def test_raw(load: Loader) -> None:
    assert load(b"\x01\x02", kind="raw").pc == BASE
    assert load(b"\x01\x02", kind="raw", address=BASE + 4 * MIB).pc == BASE + 4 * MIB
    assert load.memory.read(BASE + 4 * MIB, 2) == b"\x01\x02"
    assert load.placement.dtb == BASE + 6 * MIB


def elf(*, machine: int = 183, address: int = BASE + 0x1000, entry: int = BASE + 0x1004) -> bytes:
    body = b"\xaa" * 16
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, machine, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    return header + struct.pack("<IIQQQQQQ", 1, 5, 120, address, address, len(body), 0x3000, 4096) + body


def test_elf(load: Loader) -> None:
    pytest.importorskip("elftools", reason="pyelftools is not installed")
    assert load(elf()).pc == BASE + 0x1004
    assert load.memory.read(BASE + 0x1000, 17) == b"\xaa" * 16 + b"\0"
    assert load.placement.kernel == BASE + 0x1000
    assert load.placement.dtb == BASE + 2 * MIB


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "DIR/Image: is not a kernel: first bytes none, the file is empty; "
              "expected a Linux arm64 Image (plain, gzip or EFI zboot) or an ELF file"),
        (b"#!/bin/sh\n", "DIR/Image: is not a kernel: first bytes 23 21 2f 62 69 6e 2f 73; "
                         "expected a Linux arm64 Image (plain, gzip or EFI zboot) or an ELF file"),
        (gzip.compress(b"hello"), "DIR/Image: its content is not a kernel: first bytes 68 65 6c 6c 6f; "
                                  "expected a Linux arm64 Image inside"),
        (gzip.compress(image())[:-9], "DIR/Image: damaged gzip data: it ends too early; get the file again"),
        (b"\x1f\x8b\x08\x00" + b"\xff" * 40, "DIR/Image: damaged gzip data: "),
        (gzip.compress(bytes(20 * MIB)),
         "DIR/Image: the decompressed kernel is larger than the guest's RAM (16777216 bytes)"),
        (zboot(b"x", b"lzo"), "DIR/Image: compressed with 'lzo'; gzip, lzma, xz and zstd can be read"),
        (zboot(b"x", size=1000), "DIR/Image: damaged EFI zboot header: payload [0x40, +0x3e8) is not inside "
                                 "the file; the file may be cut short; get it again"),
        (image(flags=1), "DIR/Image: a big-endian kernel; only little-endian guests can be started"),
        (image(text_offset=1 << 40), "DIR/Image: damaged kernel header: text offset 0x10000000000 is not "
                                     "below 2 MiB"),
        (image(size=64 * MIB), "DIR/Image: the kernel with its work space (64M at 0x40000000) does not fit "
                               "into RAM; RAM is [0x40000000, 0x41000000); give the guest more"),
        (elf(machine=62), "DIR/Image: an ELF file for EM_X86_64, not for AArch64; "
                          'write board = "x86_64-pc" instead of "arm64-virt"'),
        (elf(address=0), "DIR/Image: the ELF segment [0x0, +0x3000) is not in RAM; "
                         "RAM is [0x40000000, 0x41000000); give the guest more"),
        (elf(entry=0x10), "DIR/Image: the entry point 0x10 of the ELF file is not in RAM"),
        (elf()[:70], "DIR/Image: damaged ELF file: "),
        (x86_files.bzimage(), "DIR/Image: an x86 Linux kernel (bzImage), which arm64-virt cannot start; "
                              'write board = "x86_64-pc"'),
        (gzip.compress(x86_files.bzimage()), "DIR/Image: an x86 Linux kernel (bzImage), which arm64-virt "
                                             'cannot start; write board = "x86_64-pc"'),
        (lzma.compress(image()), "DIR/Image: an xz file; expected a Linux arm64 Image (plain, gzip or EFI "
                                 "zboot) or an ELF file; unpack it with unxz"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_started(load: Loader, data: bytes, message: str) -> None:
    if data.startswith(b"\x7fELF"):
        pytest.importorskip("elftools", reason="pyelftools is not installed")
    text = load.error(data)
    assert text == message or (message.endswith(": ") and text.startswith(message))


@pytest.mark.parametrize("size", [8, 56, 60, 63])
def test_a_header_that_is_cut_short_is_no_header(load: Loader, size: int) -> None:
    assert "is not a kernel" in load.error(image()[:size])
    assert "is not a kernel" in load.error(gzip.compress(image()[:size]))
    assert "is not a kernel" in load.error(zboot(b"")[: min(size, 55)])


def test_a_bomb_is_never_unpacked(load: Loader) -> None:
    bomb = gzip.compress(bytes(600 * MIB), 1)
    assert len(bomb) < 4 * MIB
    assert "larger than the guest's RAM" in load.error(bomb)


def test_what_does_not_fit(load: Loader) -> None:
    assert load.error(image(), initrd=bytes(13 * MIB)) == (
        "DIR/initrd: the initrd (13M at 0x40400000) does not fit into RAM; "
        "RAM is [0x40000000, 0x41000000); give the guest more"
    )
    assert load.error(image(size=16 * MIB)) == (
        "the device tree (8 bytes at 0x41000000) does not fit into RAM; "
        "RAM is [0x40000000, 0x41000000); give the guest more"
    )
    load.dtb = bytes(2 * MIB + 1)
    assert load.error(image()) == "the device tree has 2097153 bytes; a guest takes at most 2097152"


def test_missing_files_and_foreign_keys(load: Loader, memory: GuestMemory) -> None:
    spec = LoadSpec(load.folder / "gone")
    with pytest.raises(HostError, match=r"^cannot read .*gone: No such file or directory$"):
        load_arm64(spec, memory, lambda _: b"")
    with pytest.raises(QvmError, match=r"^mode = 'real16' is for x86 CPUs, and arm64-virt has none"):
        load_arm64(LoadSpec(spec.kernel, format="raw", mode="real16"), memory, lambda _: b"")
    with pytest.raises(QvmError, match="nothing to start: the VM file has no kernel"):
        load_arm64(LoadSpec(), memory, lambda _: b"")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(
    st.binary(max_size=200)
    | st.builds(lambda data, at, byte: data[:at] + bytes([byte]) + data[at + 1 :],
                st.sampled_from([image(), gzip.compress(image()), zboot(gzip.compress(image())), elf()]),
                st.integers(0, 127), st.integers(0, 255))
)  # fmt: skip
def test_any_file_is_loaded_or_refused_in_words(load: Loader, data: bytes) -> None:
    try:
        entry = load(data)
    except QvmError as error:
        assert str(error)
    else:
        assert isinstance(entry.pc, int)


def test_gzip_is_read_as_a_stream() -> None:
    # The bomb test would pass by luck if zlib ignored its limit; make sure it does not.
    unpacker = zlib.decompressobj(wbits=31)
    packed = io.BytesIO(gzip.compress(bytes(MIB))).getvalue()
    assert len(unpacker.decompress(packed, 1000)) == 1000
