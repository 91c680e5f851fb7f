#!/usr/bin/env python3
"""What an exit costs: from a guest instruction through our bus to a vdev and back, against bare C.

    python tests/bench/kvm_exits.py [--runs 5] [--count 20000] [--json]

The same guest, 32-bit code without paging, does the same accesses on both sides, alternately in one
run: once under a minimal C program (compiled here) that answers KVM_RUN's exits itself, once in a
whole machine from a VM description, where a vdev's ``mmio_read`` or ``mmio_write`` answers. Time is
taken at marks the guest sets, so its own loop is in both; it is the CPU time of the vCPU's thread, on
which all of a round trip happens, so other load on the machine hardly counts. Needs /dev/kvm, gcc and
binutils.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qvmcore.api import Engine, NoOptions, Vdev, VdevContext, Window
from qvmcore.errors import EngineError
from qvmcore.plugins import PluginHost
from qvmcore.testing.host import machine
from qvmcore.types import IntrSpec, LoadSpec, MemorySpec, VdevSpec

ORIGIN, PORT, DEVICE, MARK = 0x10_0000, 0x300, 0xC000_0000, 0xE9
KINDS = ("port write", "port read", "memory write", "memory read")
TARGET_US = 6.0

GUEST = """
        .code32
        movl    $0x200000, %esp
        movl    $0xc0000000, %ebx
        movw    $0x300, %dx
        .macro  measure instruction:vararg
        movl    $COUNT, %ecx
        outb    %al, $0xe9
1:      \\instruction
        loop    1b
        outb    %al, $0xe9
        .endm
        measure outl %eax, %dx
        measure inl %dx, %eax
        measure movl %eax, (%ebx)
        measure movl (%ebx), %eax
        outb    %al, $0xf4
2:      hlt
        jmp     2b
"""

BARE = r"""
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#define TRY(call) do { if ((call) < 0) { perror(#call); exit(1); } } while (0)

static long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static struct kvm_segment flat(int selector, int type)
{
    struct kvm_segment s = {.limit = 0xffffffff, .selector = selector, .type = type,
                            .present = 1, .db = 1, .s = 1, .g = 1};
    return s;
}

int main(int argc, char **argv)
{
    size_t size = 16 << 20;
    int kvm = open("/dev/kvm", O_RDWR), vm, cpu;
    TRY(kvm);
    TRY(vm = ioctl(kvm, KVM_CREATE_VM, 0));
    unsigned long long identity = 0xfffbc000;
    TRY(ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity));
    TRY(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000));
    TRY(ioctl(vm, KVM_CREATE_IRQCHIP, 0));
    char *ram = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region slot = {.memory_size = size, .userspace_addr = (unsigned long)ram};
    TRY(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot));
    FILE *code = fopen(argv[1], "rb");
    if (!code || !fread(ram + ORIGIN, 1, 4096, code))
        return 1;
    TRY(cpu = ioctl(vm, KVM_CREATE_VCPU, 0));
    int pages;
    TRY(pages = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
    struct kvm_run *run = mmap(0, pages, PROT_READ | PROT_WRITE, MAP_SHARED, cpu, 0);
    struct kvm_sregs sregs;
    struct kvm_regs regs = {.rip = ORIGIN, .rflags = 2};
    TRY(ioctl(cpu, KVM_GET_SREGS, &sregs));
    sregs.cs = flat(0x10, 11);
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat(0x18, 3);
    sregs.cr0 = 0x11;
    TRY(ioctl(cpu, KVM_SET_SREGS, &sregs));
    TRY(ioctl(cpu, KVM_SET_REGS, &regs));
    unsigned value = 0;
    for (;;) {
        TRY(ioctl(cpu, KVM_RUN, 0));
        if (run->exit_reason == KVM_EXIT_IO) {
            char *data = (char *)run + run->io.data_offset;
            if (run->io.port == 0xe9)
                printf("%lld\n", now());
            else if (run->io.port == 0xf4)
                return 0;
            else if (run->io.direction == KVM_EXIT_IO_OUT)
                memcpy(&value, data, run->io.size);
            else
                memcpy(data, &value, run->io.size);
        } else if (run->exit_reason == KVM_EXIT_MMIO) {
            if (run->mmio.is_write)
                memcpy(&value, run->mmio.data, run->mmio.len);
            else
                memcpy(run->mmio.data, &value, run->mmio.len);
        } else {
            fprintf(stderr, "exit %u\n", run->exit_reason);
            return 1;
        }
    }
}
"""


class Register(Vdev):
    """One register: what every device is at heart."""

    vdev_type = "register"
    Options = NoOptions
    windows = (Window(0x1000, access=frozenset({4})),)

    def __init__(self, ctx: VdevContext, options: NoOptions) -> None:
        super().__init__(ctx, options)
        self.value = 0

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        return self.value

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        self.value = value


class PortRegister(Register):
    """The same at ports."""

    vdev_type = "port-register"
    windows = (Window(4, access=frozenset({4})),)


class Marks(Vdev):
    """Takes the time of each mark; ends the VM when the guest is through."""

    vdev_type = "marks"
    Options = NoOptions
    windows = (Window(16, access=frozenset({1})),)
    taken: list[int]

    def __init__(self, ctx: VdevContext, options: NoOptions) -> None:
        super().__init__(ctx, options)
        self.taken = []

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self.taken.append(time.thread_time_ns())
        else:
            self.ctx.request_shutdown("through", code=0)


def per_access(marks: list[int], count: int) -> list[float]:
    """Microseconds of each kind from the marks in ns."""
    if len(marks) != 2 * len(KINDS):
        sys.exit(f"the guest set {len(marks)} marks, not {2 * len(KINDS)}")
    return [(end - begin) / count / 1000 for begin, end in zip(marks[::2], marks[1::2], strict=True)]


def bare(program: Path, image: Path, count: int) -> list[float]:
    """The C program's figures."""
    done = subprocess.run([program, image], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the C program failed: {done.stderr}")
    return per_access([int(line) for line in done.stdout.split()], count)


def ours(engine: Engine, image: Path, folder: Path, count: int) -> list[float]:
    """A machine's figures."""
    vm = machine(
        [Register, PortRegister, Marks, PluginHost().vdev_class("acpi-pm")],
        engine,
        folder,
        board="x86_64-pc",
        memory=(MemorySpec(0, 16 << 20),),
        load=LoadSpec(image, format="raw", address=ORIGIN, mode="protected32"),
        vdevs=(
            VdevSpec("register", "register", NoOptions(), DEVICE),
            VdevSpec("port-register", "port-register", NoOptions(), PORT, space="io"),
            VdevSpec("marks", "marks", NoOptions(), MARK, space="io"),
            VdevSpec("acpi-pm", "pm0", NoOptions(), 0x600, IntrSpec("ioapic", 9), space="io"),
        ),
    )
    outcome = vm.run()
    marks = vm.slots[2].vdev
    if outcome.code or not isinstance(marks, Marks):
        sys.exit(f"the machine failed: {outcome.end}")
    return per_access(marks.taken, count)


def build(folder: Path, count: int) -> tuple[Path, Path]:
    """The C program and the guest's image."""
    for tool in ("gcc", "as", "objcopy"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is not installed: apt-get install gcc binutils libc6-dev linux-libc-dev")
    (folder / "bare.c").write_text(BARE)
    (folder / "guest.s").write_text(GUEST)
    program, image = folder / "bare", folder / "guest.bin"
    for command in (
        ["gcc", "-O2", f"-DORIGIN={ORIGIN:#x}", "-o", program, folder / "bare.c"],
        ["as", "--32", f"--defsym=COUNT={count}", "-o", folder / "guest.o", folder / "guest.s"],
        ["objcopy", "-O", "binary", "-j", ".text", folder / "guest.o", image],
    ):
        subprocess.run(command, check=True)
    return program, image


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--count", type=int, default=20_000, help="accesses of each kind in a run")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    engine = PluginHost().engine("kvm")
    if reason := engine.unusable("x86_64"):
        sys.exit(f"no figures without KVM: {reason}")
    samples: dict[str, list[list[float]]] = {"bare": [], "ours": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program, image = build(folder, arguments.count)
        for _ in range(arguments.runs):
            samples["bare"].append(bare(program, image, arguments.count))
            try:
                samples["ours"].append(ours(engine, image, folder, arguments.count))
            except EngineError as error:
                sys.exit(f"the machine does not start: {error}")
    rows = {}
    for index, kind in enumerate(KINDS):
        c, qvm = (statistics.median(run[index] for run in samples[who]) for who in ("bare", "ours"))
        rows[kind] = {"c_us": c, "qvm_us": qvm, "added_us": qvm - c, "ratio": qvm / c}
    if arguments.json:
        print(json.dumps({kind: {k: round(v, 3) for k, v in row.items()} for kind, row in rows.items()}))
        return
    print(f"exit round trip in us, medians of {arguments.runs} runs of {arguments.count} (4 bytes each)")
    print(f"{'':14} {'bare C':>8} {'qvm':>8} {'added':>8} {'ratio':>6}   (target: <= {TARGET_US:g} us added)")
    for kind, row in rows.items():
        print(f"{kind:14} {row['c_us']:8.2f} {row['qvm_us']:8.2f} {row['added_us']:8.2f} {row['ratio']:6.2f}")


if __name__ == "__main__":
    main()
