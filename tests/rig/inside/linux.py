"""Linux guests in the rig: the VM file, the disks, and a shell on the guest's serial console."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path
from typing import Any

from qvmcore import control
from tests.guest.conftest import BOOT_LIMIT, Vm

#: Where the rig has the kernel and the initramfs of `qvm guest build debian-amd64`.
GUEST = Path("/code/guest")
#: The machine's own root file system, which has fio; guests get it read-only.
TOOLS = "/dev/rig-root"

MACHINE = """
[system]
name = "{name}"
board = "x86_64-pc"
engine = "{engine}"
ram = "{ram}"
cpus = {cpus}

[load]
kernel = "{guest}/vmlinuz"
initrd = "{guest}/initramfs.cpio.gz"
cmdline = "{cmdline}"
"""


def machine(path: Path, vdevs: str = "", *, cmdline: str = "", **system: Any) -> Path:
    """Write a VM file; its console is the serial port, on stdio. ``system``: cpus, ram, engine."""
    system = {"cpus": 1, "ram": "256M", "engine": "kvm", **system}
    line = f"console=ttyS0 quiet {cmdline}".strip()
    path.write_text(MACHINE.format(name=path.stem, guest=GUEST, cmdline=line, **system) + vdevs)
    return path


def vdev(kind: str, name: str, **options: Any) -> str:
    """A ``[[vdev]]`` table; without ``loc`` it is on PCI."""
    lines = [f'type = "{kind}"', f'name = "{name}"']
    for key, value in options.items():
        shown = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
        lines.append(f"{key} = {shown}")
    return "\n[[vdev]]\n" + "\n".join(lines) + "\n"


def ext4(path: Path, size: int = 64 << 20) -> Path:
    """A disk image with a fresh file system."""
    path.write_bytes(b"")
    os.truncate(path, size)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-F", str(path)], check=True)
    return path


def fsck(path: Path) -> None:
    """The file system is clean, without any repair."""
    done = subprocess.run(["e2fsck", "-fn", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class Shell:
    """The shell of a guest that was booted without a script, on the console of ``vm``."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self._number = itertools.count(1)
        vm.expect("End it with: poweroff")
        # Not to be found in the echo of what is typed.
        vm.type("stty -echo; PS1=; echo sh'ell' is up\n")
        vm.expect("shell is up")

    def try_(self, command: str, limit: float = BOOT_LIMIT) -> tuple[int, str]:
        """Run a command; (exit status, what it printed)."""
        number = next(self._number)
        before = len(self.vm.text)
        self.vm.type(f"{command}\necho @{number}=$?\n")
        match = self.vm.expect(rf"@{number}=(\d+)\n", limit)
        return int(match[1]), self.vm.text[before : match.start()]

    def run(self, command: str, limit: float = BOOT_LIMIT) -> str:
        """Run a command that must succeed; what it printed."""
        status, said = self.try_(command, limit)
        assert status == 0, f"{command!r} in the guest ended with {status}:\n{said}"
        return said

    def disk(self, name: str) -> str:
        """The block device of the disk that is the vdev ``name``."""
        return self.run(
            f"for b in /sys/block/vd*; do [ $(cat $b/serial) = {name} ] && echo /dev/${{b##*/}}; done; true"
        ).strip()

    def links(self, pattern: str) -> list[str]:
        """Where the symbolic links lead that match ``pattern``."""
        return self.run(f"for n in {pattern}; do readlink -f $n; done").splitlines()

    def status(self) -> dict[str, Any]:
        """The report of ``qvm status``."""
        return control.ask(control.find(str(self.vm.process.pid)))
