"""Packages, modules and an apt made of nothing, so that the tests need no network and no Debian mirror."""

from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path

RELEASE = "6.1.0-1-test"


def kernel_module(**info: str | list[str]) -> bytes:
    """An ELF64 relocatable with a .modinfo section."""
    pairs = [(key, v) for key, value in info.items() for v in ([value] if isinstance(value, str) else value)]
    modinfo = b"".join(f"{key}={value}\0".encode() for key, value in pairs)
    names = b"\0.modinfo\0.shstrtab\0"
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\2\1\1" + bytes(9), 1, 183, 1, 0, 0, 64 + len(modinfo) + len(names), 0, 64, 0, 0, 64, 3, 2,
    )  # fmt: skip

    def section(name: int, kind: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, offset, size, 0, 0, 1, 0)

    table = bytes(64) + section(1, 1, 64, len(modinfo)) + section(10, 3, 64 + len(modinfo), len(names))
    return header + modinfo + names + table


def make_deb(path: Path, files: dict[str, bytes], *, package: str = "test") -> Path:
    """A .deb by hand (an ar archive of two tars), so that unsound ones can be made as well."""

    def tar(members: dict[str, bytes]) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz", format=tarfile.GNU_FORMAT) as archive:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return stream.getvalue()

    control = f"Package: {package}\nVersion: 1\nArchitecture: arm64\nMaintainer: x\nDescription: x\n".encode()
    content = b"!<arch>\n"
    for name, data in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.gz", tar({"./control": control})),
        ("data.tar.gz", tar(files)),
    ):
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        content += data + b"\n" * (len(data) % 2)
    path.write_bytes(content)
    return path


def kernel_files() -> dict[str, bytes]:
    """The content of a small kernel package."""
    base = f"./lib/modules/{RELEASE}"
    drivers = f"{base}/kernel/drivers"
    return {
        f"./boot/vmlinuz-{RELEASE}": b"kernel",
        f"{base}/modules.builtin": b"kernel/fs/ext4/ext4.ko\nkernel/drivers/gpio/gpio-pl061.ko\n",
        f"{drivers}/virtio.ko": kernel_module(depends="", name="virtio"),
        f"{drivers}/virtio_ring.ko": kernel_module(depends="virtio", name="virtio_ring"),
        f"{drivers}/virtio_blk.ko": kernel_module(
            depends="virtio_ring,virtio",
            alias=["virtio:d00000002v*"],
            softdep="pre: virtio-helper post: later",
        ),
        f"{drivers}/virtio-helper.ko": kernel_module(depends=""),
        f"{drivers}/later.ko": kernel_module(depends=""),
        f"{drivers}/virtio-rng.ko": kernel_module(depends="virtio", alias=["virtio:d00000004v*"]),
    }


FAKE_APT_GET = r"""#!/bin/sh
log=%(root)s/calls
echo "$*" >>$log
case "$*" in
    *indextargets*)
        case "$*" in *broken.list*) echo "E: Malformed entry 1 in list file broken.list"; exit 100 ;; esac
        parts=$(sed -n 's/^Dir::Etc::sourceparts "\(.*\)";/\1/p' "$2")
        case "$*" in *sourceparts=*) exit 0 ;; esac
        [ -e "$parts/broken.list" ] && { echo "E: Malformed entry 1 in list file"; exit 100; }
        exit 0 ;;
    *update*)
        [ -e %(root)s/no-network ] || { echo "Hit:1 somewhere"; exit 0; }
        echo "E: Failed to fetch somewhere  Could not resolve it"; exit 100 ;;
    *--print-uris*)
        for f in %(root)s/mirror/*.deb; do
            echo "'$f' ${f##*/} $(stat -c %%s $f) SHA256:$(sha256sum <$f | cut -c1-64)"
        done ;;
esac
"""

FAKE_APT_HELPER = r"""#!/bin/sh
echo "helper $*" >>%(root)s/calls
while [ "$1" != download-file ]; do shift; done
shift
while [ "$1" ]; do
    [ -e %(root)s/cut-off ] && { head -c 100 "$1" >"$2"
        echo "E: Failed to fetch x  Connection reset"; exit 100; }
    cp "$1" "$2"
    shift 3
done
"""

FAKE_APT_CACHE = r"""#!/bin/sh
echo "cache $*" >>%(root)s/calls
[ -e %(root)s/no-network ] && exit 100
echo "Package: linux-image-cloud-arm64"
echo "Depends: linux-image-6.1.0-1-test (= 1) | other, base"
"""

FAKE_APT_CONFIG = r"""#!/bin/sh
[ "$2" = METHODS ] && { echo "METHODS='%(root)s/bin/methods'"; exit; }
[ "$1" = shell ] && { echo "FILE='%(root)s/etc/sources.list'"; echo "PARTS='%(root)s/etc/parts/'"; exit; }
echo 'Acquire::IndexTargets::deb::Packages "";'
echo 'Acquire::IndexTargets::deb::DEP-11 "";'
"""


class FakeApt:
    """Stand-ins for the apt tools; ``root`` holds their switches, their mirror and their log."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("bin", "mirror", "etc/parts"):
            (root / name).mkdir(parents=True)
        (root / "etc/sources.list").write_text("deb x y main\n")
        for name, text in (
            ("apt-get", FAKE_APT_GET),
            ("apt-cache", FAKE_APT_CACHE),
            ("apt-config", FAKE_APT_CONFIG),
            ("apt-helper", FAKE_APT_HELPER),
        ):
            tool = root / "bin" / name
            tool.write_text(text % {"root": root})
            tool.chmod(0o755)
        mirror = root / "mirror"
        make_deb(mirror / "linux-image-6.1.0-1-test_1%3a2_arm64.deb", kernel_files())
        make_deb(mirror / "busybox-static_1_arm64.deb", {"./bin/busybox": b"\x7fELF busybox"})

    def calls(self) -> list[str]:
        """What was called so far."""
        log = self.root / "calls"
        return log.read_text().splitlines() if log.exists() else []

    def switch(self, name: str, on: bool) -> None:
        """``no-network`` or ``cut-off``."""
        (self.root / name).touch() if on else (self.root / name).unlink()
