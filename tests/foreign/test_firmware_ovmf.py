"""OVMF's virtio driver on our disk, by vhost-user: its shell runs a script from a FAT file system on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from qvm_guests.cache import GuestCache
from qvm_guests.debs import DebArchive
from qvm_guests.progress import Progress

from qvmcore.api import HostError
from tests.foreign.firmware import booting
from tests.rig import packages

pytestmark = pytest.mark.guest

CODE, VARIABLES = "usr/share/OVMF/OVMF_CODE_4M.fd", "usr/share/OVMF/OVMF_VARS_4M.fd"
SECTOR = 512
#: Of the file system: its size, that of one FAT, its root folder. The clusters are of one sector.
SECTORS, FAT_SECTORS, ROOT_SECTORS = 2048, 6, 2
_FIRST = 1 + FAT_SECTORS + ROOT_SECTORS


def fat12(files: dict[str, bytes]) -> bytes:
    """A FAT12 file system with ``files`` (names like ``KNOWN.TXT``) in its root folder."""
    boot = b"\xeb\x3c\x90" + b"qvm     " + SECTOR.to_bytes(2, "little")
    boot += bytes([1, 1, 0, 1]) + (ROOT_SECTORS * 16).to_bytes(2, "little") + SECTORS.to_bytes(2, "little")
    boot += b"\xf8" + FAT_SECTORS.to_bytes(2, "little") + bytes([32, 0, 2, 0]) + bytes(10)
    boot += b"\x29" + b"qvm!" + b"QVM        " + b"FAT12   "
    entries, root, data = [0xFF8, 0xFFF], b"", b""
    for name, content in files.items():
        stem, _, suffix = name.partition(".")
        clusters = -(-len(content) // SECTOR)
        first = len(entries)
        entries += [*range(first + 1, first + clusters), 0xFFF]
        root += f"{stem:8}{suffix:3}".encode() + b"\x20" + bytes(14)
        root += first.to_bytes(2, "little") + len(content).to_bytes(4, "little")
        data += content.ljust(clusters * SECTOR, b"\0")
    table = sum(entry << (12 * number) for number, entry in enumerate(entries))
    parts = (
        boot.ljust(510, b"\0") + b"\x55\xaa",
        table.to_bytes(FAT_SECTORS * SECTOR, "little"),
        root.ljust(ROOT_SECTORS * SECTOR, b"\0"),
        data,
    )
    return b"".join(parts).ljust(SECTORS * SECTOR, b"\0")


@pytest.fixture(scope="module")
def firmware(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with OVMF's two files: of this machine, else of Debian's package, kept in qvm's cache."""
    folder = tmp_path_factory.mktemp("ovmf")
    installed = [Path("/", name) for name in (CODE, VARIABLES)]
    if all(path.is_file() for path in installed):
        for path in installed:
            shutil.copy(path, folder)
        return folder
    progress = Progress()
    cache = GuestCache("ovmf")
    try:
        with cache.locked(progress.note) as lock:
            found = packages.obtain(cache, ["ovmf"], progress, lock)
        with DebArchive(next(cache.path(package) for package in found if package.name == "ovmf")) as deb:
            for name in (CODE, VARIABLES):
                (folder / Path(name).name).write_bytes(deb.read(deb.find(name)))
    except HostError as error:
        pytest.skip(f"no OVMF: {error}")
    return folder


#: The shell runs it by itself; 23 KB are many sectors, of which it prints the end.
STARTUP = "\r\n".join(
    [
        "@echo -off",
        "echo marker: startup.nsh",
        "fs0:",
        "type known.txt",
        "cp known.txt copy.txt",
        "reset -s",
        "",
    ]
)
KNOWN = b"".join(b"line %d of a file on our disk\r\n" % number for number in range(800))


def test_ovmf_runs_a_script_from_the_disk_and_writes_a_file(firmware: Path, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(fat12({"STARTUP.NSH": STARTUP.encode(), "KNOWN.TXT": KNOWN}))
    options = [
        "-machine", "q35",
        "-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={firmware / Path(CODE).name}",
        "-drive", f"if=pflash,format=raw,unit=1,file={firmware / Path(VARIABLES).name}",
        "-no-reboot",
    ]  # fmt: skip
    with booting(tmp_path, options) as machine:
        machine.expect("to skip .*startup.nsh")
        machine.type(" ")
        machine.expect("marker: startup.nsh")
        machine.expect("line 799 of a file on our disk")
        assert machine.wait() == 0
    image = (tmp_path / "disk.img").read_bytes()
    assert b"COPY    TXT" in image[SECTOR * (1 + FAT_SECTORS) : SECTOR * _FIRST]
    assert image.count(KNOWN) == 2
