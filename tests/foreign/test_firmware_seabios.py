"""SeaBIOS' virtio driver on our disk, by vhost-user: a boot sector of ours uses the BIOS' disk service."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.foreign.firmware import booting

pytestmark = pytest.mark.guest

#: Reads 40 sectors from sector 3 with the BIOS' disk service, says on the serial port what the last one
#: begins with, writes that sector to sector 1, and stops.
BOOT_SECTOR = """
.code16
    xor %ax, %ax
    mov %ax, %ds
    mov $0x42, %ah
    mov $packet, %si
    int $0x13
    jc failed
    mov $0x8000 + 39 * 512, %si
    call say
    movw $1, count
    movw $0x8000 + 39 * 512, place
    movl $1, sector
    mov $0x4300, %ax
    mov $packet, %si
    int $0x13
    jc failed
    mov $done, %si
    call say
stop:
    hlt
    jmp stop
failed:
    mov $sorry, %si
    call say
    jmp stop
say:
    push %dx
    mov $0x3f8, %dx
next:
    lodsb
    test %al, %al
    jz said
    out %al, %dx
    jmp next
said:
    pop %dx
    ret
done: .asciz "written back\\n"
sorry: .asciz "the disk service failed\\n"
.balign 4
packet: .word 16
count: .word 40
place: .word 0x8000, 0
sector: .long 3, 0
.org 510
.word 0xaa55
"""


def assembled(source: str, folder: Path) -> bytes:
    """A boot sector, for address 0x7c00."""
    (folder / "boot.s").write_text(source)
    subprocess.run(["as", "--32", "-o", "boot.o", "boot.s"], cwd=folder, check=True)
    link = [
        "ld",
        "-m",
        "elf_i386",
        "--oformat",
        "binary",
        "-Ttext",
        "0x7c00",
        "-e",
        "0",
        "-o",
        "boot",
        "boot.o",
    ]
    subprocess.run(link, cwd=folder, check=True)
    return (folder / "boot").read_bytes()


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_seabios_boots_from_the_disk_and_reads_and_writes_sectors(tmp_path: Path, machine: str) -> None:
    marked = b"sector 42 of our disk\n".ljust(512, b"\0")
    image = bytearray(1 << 20)
    image[:512] = assembled(BOOT_SECTOR, tmp_path)
    image[42 * 512 : 43 * 512] = marked
    (tmp_path / "disk.img").write_bytes(image)
    with booting(tmp_path, ["-machine", machine]) as bios:
        bios.expect("sector 42 of our disk\nwritten back\n")
    assert (tmp_path / "disk.img").read_bytes()[512:1024] == marked
