"""Small ext4 images with files in them, made without root: mke2fs can fill an image from a directory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from qvm_guests import atomic
from qvmcore.api import HostError, QvmError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SMALLEST = 1 << 20


def parse_size(text: str) -> int:
    """``64M`` in bytes: a whole number with K, M or G (powers of 1024)."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip().upper())
    size = int(match[1]) * _UNITS[match[2]] if match else 0
    if size < _SMALLEST:
        raise QvmError(f"{text!r} is not a size of a disk", hint="give a number with K, M or G, from 1M")
    return size


def parse_file(text: str) -> tuple[str, Path]:
    """``NAME=PATH``: the name in the image and the file to copy."""
    name, separator, path = text.partition("=")
    parts = PurePosixPath(name).parts
    if not separator or not path or not parts or ".." in parts or name.startswith("/"):
        raise QvmError(
            f"{text!r} does not say which file goes where",
            hint="give NAME=PATH, with a NAME relative to the root of the disk",
        )
    return name, Path(path)


def make(image: Path, size: int, files: Mapping[str, Path]) -> None:
    """Write an ext4 image of ``size`` bytes that holds ``files``."""
    # The directories of the superuser are often not in the PATH of others, who may use the tool too.
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    tool = shutil.which("mke2fs", path=search)
    if tool is None:
        raise HostError("there is no mke2fs on this machine", hint="install the package e2fsprogs")
    with (
        atomic.host_errors("write", image),
        tempfile.TemporaryDirectory(prefix="qvm-disk-") as tree,
        atomic.replacing(image) as temporary,
    ):
        # mke2fs gives the root of the image the mode of the directory it copies.
        Path(tree).chmod(0o755)
        for name, source in files.items():
            target = Path(tree, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic.host_errors("read", source):
                shutil.copy(source, target)
        os.truncate(temporary, size)
        command = [tool, "-q", "-F", "-t", "ext4", "-E", "root_owner=0:0", "-d", tree, str(temporary)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            why = said[-1] if said else f"mke2fs ended with {done.returncode}"
            raise HostError(f"cannot make {image}: {why}", hint="a larger --size may help")
