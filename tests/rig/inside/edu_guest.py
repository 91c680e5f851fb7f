"""An emulated 64-bit Arm guest of a few instructions that drives the machine's edu device.

What it does is in ``edu_guest.s``; its machine code is here, too, so no assembler is needed. A test on the
other side compares the two.
"""

from __future__ import annotations

import enum
import mmap
import re
from pathlib import Path

#: What the device writes: offset from the start of the guest's memory, bytes.
WRITTEN, SIZE = 0x41000, 2048
#: The guest itself looks at the first of them.
_CANARY = slice(WRITTEN + 64, WRITTEN + SIZE)
#: Where the guest tells the device to write once though it has no memory there.
NOWHERE = 0x3000_0000
#: The interrupt of its message.
MESSAGE = 120
_MEMORY = 8 << 20
_ORDER_AT = 8

_MACHINE = """
[system]
name = "edu"
board = "arm64-virt"
engine = "emulated"
ram = "8M"

[load]
kernel = "{kernel}"
format = "raw"

[[vdev]]
type = "pl011"
name = "uart0"
hostdev = "file:{console}"
"""


class Order(enum.IntEnum):
    """What the guest does before it powers off; it always finds the device and places its BAR first."""

    ONCE = 0  # a register, a computation, a transfer in both directions, interrupts, no bus mastering
    LOOP = 1  # transfers to memory without end; only the power button ends it
    ABUSE = 2  # sizes and places no driver uses, then a computation
    MESSAGE = 3  # as ONCE, interrupts by MSI


_LISTING = """
000 be020014000000000000000000000000c117403861000034810200b9fdffff17de0f0091def77e92c0035fd601018052
030 00708013020c001242c000115fe4007149000054429c0011820200b92104007101ffff5442018052820200b9c0035fd6
060 df4203d5610240f93f0000ea810000547f2003d5ff4203d5faffff172100208a610200f9ff4203d5c0035fd6c08200b9
090 c18a00b900008152c09200b9c29a00b900208052e2fd1737c09a40b9e0ff0737c0035fd6fc031eaa00108052c02200b9
0c0 40018052c00a00b9200080d2e5ffff97c00a40b9e903002aceffff97666163746f7269616c200000e003092ad0ffff97
0f0 80035fd6fc031eaa210200182202001803408052e0031aaa014400b82100020b2140034a6304007181ffff54e0031a2a
120 8100a05222008052d9ffff9780035fd6a0000018020000d4feffff170001020304040404080000840000000000000000
9f0 00000000000000000000000000000000095238d50a6038d582fdff976661756c74200000e003092a85fdff977dfdff97
a20 61742000e0030a2a81fdff97c1fdff170000000000000000000000000000000000000000000000000000000000000000
a80 e007bea9e20b00f9a00e40b9012400123ff00f71420200543f9c007160020054c22640b942010034c26600b9610e00f9
ab0 610240f9210002aa610200f9610640f921040091610600f904000014610a40f921040091610a00f9a01200b9e20b40f9
ae0 e007c2a8e0039fd64afdff97627574746f6e0a008ffdff1740a8ff1013404091018040913f0000911ac040911b044191
b10 142500583525005840e7ff1000c018d5df3f03d5e0240058011f8052010401b921008052010000b9e21f8052a20600b9
b40 a10200b92024005801018052010c04b9011004b9f72300582122001809008052e00240b91f00016b20010054f7224091
b70 290500113f81007141ffff5425fdff976e6f206564750a006afdff1721fdff976465766963652000e003092a24fdff97
ba0 ff0a007900008012e01200b9e91240b9296d1c12e903094b16fdff9773697a6520000000e003092a19fdff97ef000094
bd0 c00240b9e903002a0efdff9769642000e003092a12fdff97ff4203d5e0a0ff581f0400f1e00a00541f0800f1800d0054
c00 08190054e01c0018c00600b9c00640b9e903002afffcff97696e76657274656420000000e003092a01fdff9722fdff97
c30 600740d1811b001802808152014400b842040071c1ffff542bfdff978000a052e1031b2ae20080520dfdff97e0031aaa
c60 e1031baa0240805209008052034440b8244440b87f00046b2915891a4204007161ffff54e3fcff976d6f766564200000
c90 e003092ae6fcff97600740d1411800180280815209008052034440b87f00016b2915891a4204007181ffff54d5fcff97
cc0 61726f756e642000e003092ad8fcff97a1160018610300b940008052e00a00798000a052e1031b2a62008052e8fcff97
cf0 690340b9c7fcff97756e6d617374657265642000e003092ac9fcff97690a40b9c0fcff97696e74657272757074732000
d20 e003092ac2fcff97691a40b9b9fcff976c696e6520000000e003092abcfcff97b4fcff97656e640a00000000f9fcff17
d50 e9fcff97590340b9180080527f0300b98000a052e1031b2ae2008052c8fcff97600340b91f00196b2101005418070011
d80 1f0b0071c1feff54a2fcff976c6f6f70696e670a00000000f1ffff179dfcff976c6f73740a000000e2fcff17c0024039
db0 e903002a97fcff976279746520000000e003092a9afcff97c0024079e903002a90fcff9768616c6620000000e003092a
de0 93fcff97c00240f9e903002a89fcff977769646520000000e003092a8cfcff970b008092cb060039cb060079cb821ff8
e10 ca0244914b0100f9490140b97dfcff97626568696e642000e003092a80fcff9749c15ff877fcff976163726f73732000
e40 e003092a7afcff9749c15fb871fcff976c61737420000000e003092a74fcff97e90240f96bfcff977769646520636f6e
e70 6669672000000000e003092a6cfcff97eb0a00f9ff0a0079c00240b9e903002a60fcff97636c6f7365642000e003092a
ea0 63fcff9700008012010080d2e06a21b8211000913f0440f1a1ffff540004001140ffff34e90240b952fcff977374696c
ed0 6c200000e003092a55fcff972b00009485fcff978000a052010600186200805267fcff97c00240b9e903002a45fcff97
f00 69642000e003092a49fcff976afcff9740fcff97616c6976650a000085fcff17000500580120a052010c01b9e0d24039
f30 40020034e102008b220040395f1400716000005420044039faffff1700030018200400b9000f80522204407923200091
f60 420038367f4400b860000079420000322204007924ffff1726fcff976e6f204d53490a006bfcff1796020058f61200b9
f90 c0008052e00a0079c0035fd63412e81178563412a5a5a5a5000000304000020800000009000000000000010800000000
fc0 00000008000000000000030900000000000000100000000000000028
"""


def code() -> bytes:
    """The program."""
    image = bytearray()
    for line in _LISTING.split("\n"):
        if line.strip():
            offset, part = line.split()
            image += bytes(int(offset, 16) - len(image)) + bytes.fromhex(part)
    return bytes(image)


def machine(folder: Path, order: Order, vdevs: str) -> Path:
    """Write the program and a VM file that runs it. What it says goes to the file ``console``: on a terminal
    qvm's own lines come between."""
    image = bytearray(code())
    image[_ORDER_AT] = order
    (folder / "guest.bin").write_bytes(image)
    path = folder / "vm.toml"
    path.write_text(_MACHINE.format(kernel=folder / "guest.bin", console=folder / "console") + vdevs)
    return path


def told(text: str) -> dict[str, int]:
    """What the guest said of numbers, by name; of those it said twice, the last."""
    return {
        name: int(value, 16) for name, value in re.findall(r"^([a-z ]+) ([0-9a-f]{8})$", text, re.MULTILINE)
    }


class Ram:
    """The memory of the running guest as another process sees it, which outlives the guest."""

    def __init__(self, pid: int) -> None:
        name = f"/memfd:qvm-ram-{0x4000_0000:x} "
        (path, *_) = [
            path for path in Path(f"/proc/{pid}/fd").iterdir() if str(path.readlink()).startswith(name)
        ]
        with path.open("r+b") as file:
            self.map = mmap.mmap(file.fileno(), _MEMORY)

    def clear(self) -> None:
        """Nothing of the device's is there any more."""
        self.map[_CANARY] = bytes(SIZE - 64)

    def written(self) -> bool:
        """Whether the device has written since."""
        return any(self.map[_CANARY])
