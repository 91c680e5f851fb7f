"""A real build from the machine's apt sources, with the user's own cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from qvm_guests import build as builder
from qvm_guests.progress import Progress
from qvm_guests.recipes import RECIPES

from qvmcore.api import HostError


@pytest.mark.network
@pytest.mark.timeout(600)
def test_real_build(tmp_path: Path) -> None:
    recipe = RECIPES["debian-arm64"]
    try:
        builder.build(recipe, tmp_path / "guest", Progress())
    except HostError as error:
        pytest.skip(f"no build on this machine: {error}")
    manifest = builder.manifest(tmp_path / "guest")
    have = {*manifest["modules"], *manifest["modules_built_in"]}
    assert {"virtio_mmio", "virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "ext4"} <= have
    assert (tmp_path / "guest" / builder.INITRAMFS).stat().st_size < 6 << 20
    # The magic of an arm64 Image, or of a compressed one.
    kernel = (tmp_path / "guest" / builder.KERNEL).read_bytes()
    assert kernel[0x38:0x3C] == b"ARM\x64" or kernel[:2] in (b"\x1f\x8b", b"MZ")
