"""The rig's machine: an x86-64 PC with AMD's virtualization, emulated by QEMU, whose Linux has KVM.

Its kernel is the guest's own (`qvm guest build debian-amd64`), started with the initramfs of that
guest plus kvm_amd; a script for it mounts the two disks and starts the tests (see ``inside/``).
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qvm_guests import build as guests
from qvm_guests import recipes
from qvm_guests.progress import Progress

from qvmcore.api import HostError
from tests.rig import image, payload

#: Memory of the machine in MiB: more than the largest of its guests has. Both use but a part of it.
MEMORY = 6144
#: QEMU takes 2.0 GiB at most with its translated code (measured: VmHWM); the rest is for the session.
NEEDED = 3072
#: With two, QEMU 7.2 runs them in parallel, and its emulation of SVM then loses the state of a CPU now and
#: then: guests triple-fault, or the kernel of the machine itself panics.
CPUS = 1
TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mke2fs": "e2fsprogs",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "tar": "tar",
    "setpriv": "util-linux",
}
MODULES = ("kvm_amd", "tun", "virtio_net", "vfio-pci", "vfio_iommu_type1", "uio_cif", "uio_pci_generic")

#: Runs in the initramfs; disks of the nvme driver are there from the start, it is built in. Which of them
#: gets which number is a race.
SCRIPT = """
modprobe -a kvm_amd tun virtio_net vfio-pci vfio_iommu_type1 uio_cif uio_pci_generic || exit
for serial in /sys/class/nvme/*/serial; do
  grep -q ^rig $serial && nvme=${serial%/serial} && nvme=/dev/${nvme##*/}
done
mount -t ext4 -o ro ${nvme}n1 /mnt || exit
mount -t ext4 -o ro ${nvme}n2 /mnt/code || exit
ln -s ${nvme}n1 /dev/rig-root
for name in dev proc sys; do mount --bind /$name /mnt/$name || exit; done
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /mnt/dev/pts
for name in tmp run root dev/shm; do mount -t tmpfs tmpfs /mnt/$name || exit; done
ip link set lo up
exec chroot /mnt /usr/bin/python3 /code/tests/rig/inside/start.py
"""


class UnusableError(Exception):
    """The rig cannot run here; the text says why and what to do."""


def missing(meminfo: str, find: Callable[[str], str | None]) -> str:
    """Why the rig cannot run on this machine, or an empty text. ``meminfo`` is /proc/meminfo's content."""
    lacking = [f"{tool} (Debian: {package})" for tool, package in TOOLS.items() if find(tool) is None]
    if lacking:
        return f"the rig needs {', '.join(lacking)}"
    available = next((int(line.split()[1]) for line in meminfo.splitlines() if "MemAvailable" in line), 0)
    if available >> 10 < NEEDED:
        return f"the rig needs {NEEDED} MiB of free memory, {available >> 10} MiB are available"
    return ""


def check() -> None:
    """Raise UnusableError when this machine lacks something."""
    why = missing(Path("/proc/meminfo").read_text(), lambda tool: shutil.which(tool, path=image.SBIN["PATH"]))
    if why:
        raise UnusableError(why)


class Machine:
    """One started machine. ``folder`` holds its disks, the console's log and the results."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self.folder = folder
        self.process = process
        self.console = folder / "console.log"
        self.results = folder / "results.jsonl"

    def tail(self, lines: int = 60) -> str:
        """The end of the console's log; of QEMU's own if the machine has not said anything."""
        for path in (self.console, self.folder / "qemu.log"):
            if path.exists() and (text := path.read_text(errors="replace")):
                return "\n".join(text.replace("\r", "").splitlines()[-lines:])
        return ""

    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None

    def stop(self) -> None:
        """Cut the power, if it still runs."""
        if self.alive():
            self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Cut the power and remove the folder."""
        self.stop()
        shutil.rmtree(self.folder)


def start(
    tests: Sequence[str], progress: Progress, *, timeout: int, environment: Mapping[str, str] | None = None
) -> Machine:
    """Make everything that is missing, start the machine and let it run ``tests`` (node ids).

    ``timeout`` is the limit of one test in seconds; ``environment`` is set for all of them. Raises
    UnusableError when this machine cannot have a rig.
    """
    check()
    folder = Path(tempfile.mkdtemp(prefix="qvm-rig-"))
    try:
        root, python = image.build(progress)
        recipe = recipes.find("debian-amd64")
        quiet = Quiet()
        guests.build(recipe, folder / "guest", quiet)
        guests.build(recipe, folder / "kernel", quiet, modules=MODULES)
        with tempfile.TemporaryDirectory(dir=folder) as tree:
            payload.assemble(Path(tree), folder / "guest", python)
            payload.choose(Path(tree), tests, environment or {}, timeout)
            image.make(folder / "code.img", Path(tree))
    except HostError as error:
        shutil.rmtree(folder)
        raise UnusableError(f"the rig cannot be made: {error}") from error
    except BaseException:
        shutil.rmtree(folder)
        raise
    progress.note(f"starting; the console's log is {folder / 'console.log'}")
    return launch(folder, root)


class Quiet(Progress):
    """Says nothing: making the two initramfs images from the cache takes seconds."""

    def note(self, text: str) -> None:
        """Drop the line."""


def to_pass(folder: Path) -> list[str]:
    """Functions that tests take from the machine, each in an IOMMU group of its own, with their disks.

    ``slow`` answers 20 requests a second: with a queue of them it writes to memory for a while. The e1000e
    receives what the machine sends to its other network device. The shared memory is a BAR with registers
    that remember what is written: a device for UIO. The two functions of the port ``rp4`` have one group. The
    first edu reaches 4 GiB, so it can be a guest's whose memory begins at one.

    ``line`` is for guests that use INTx. When a driver left completions behind, QEMU 7.2's drive counts them
    on after a reset, and INTA# is high for every later driver; drivers with MSI-X do not notice.
    """
    plain, slow = folder / "plain.img", folder / "slow.img"
    plain.write_bytes(b"")
    os.truncate(plain, 64 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-F", str(plain)], check=True, env=image.SBIN)
    slow.write_bytes(b"canary!!" * (1 << 18))
    return [
        "-drive", f"file={plain},if=none,id=plain,format=raw",
        "-drive", f"file={slow},if=none,id=slow,format=raw,throttling.iops-total=20",
        "-netdev", "hubport,id=net,hubid=0", "-netdev", "hubport,id=feed,hubid=0",
        "-device", "virtio-net-pci,netdev=feed",
        *(word for n in range(6) for word in ("-device", f"pcie-root-port,id=rp{n},chassis={n},slot={n}")),
        "-object", "memory-backend-ram,id=cells,size=1M,share=on", "-device", "ivshmem-plain,memdev=cells",
        "-device", "edu,bus=rp0,dma_mask=0xffffffff", "-device", "e1000e,bus=rp1,netdev=net",
        "-device", "edu,bus=rp4,addr=0.0,multifunction=on", "-device", "edu,bus=rp4,addr=0.1",
        "-device", "nvme,bus=rp2,serial=plain,drive=plain", "-device", "nvme,bus=rp3,serial=slow,drive=slow",
        "-blockdev", f"driver=null-co,node-name=zeros,size={64 << 20},read-zeroes=on",
        "-device", "nvme,bus=rp5,serial=line,drive=zeros",
    ]  # fmt: skip


def launch(folder: Path, root: Path) -> Machine:
    """Start QEMU on the files in ``folder``."""
    script = base64.b64encode(SCRIPT.encode()).decode()
    command = [
        # A machine does not outlive the session, however that ends.
        "setpriv", "--pdeathsig", "KILL",
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        # EPYC is a processor that TCG can emulate with nested paging; "max" is slower.
        "-machine", "q35", "-cpu", "EPYC,+svm", "-accel", "tcg,thread=multi",
        "-device", "intel-iommu,intremap=on",
        "-smp", str(CPUS), "-m", str(MEMORY),
        "-kernel", str(folder / "kernel/vmlinuz"), "-initrd", str(folder / "kernel/initramfs.cpio.gz"),
        "-append", f"console=ttyS0 panic=-1 quiet intel_iommu=on iommu=pt qvm.exec={script}",
        "-drive", f"file={root},if=none,id=root,format=raw,readonly=on",
        "-drive", f"file={folder / 'code.img'},if=none,id=code,format=raw,readonly=on",
        "-device", "nvme,id=nv,serial=rig", "-device", "nvme-ns,drive=root,bus=nv,nsid=1",
        "-device", "nvme-ns,drive=code,bus=nv,nsid=2",
        *to_pass(folder),
        "-serial", f"file:{folder / 'console.log'}", "-serial", f"file:{folder / 'results.jsonl'}",
    ]  # fmt: skip
    # QEMU names there what an EPYC has and its emulation has not.
    with (folder / "qemu.log").open("wb") as complaints:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=complaints, stderr=complaints, env=image.SBIN
        )
    return Machine(folder, process)
