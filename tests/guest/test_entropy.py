"""virtio-entropy in a real Linux guest: the commands its tutorial shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[2] / "plugins" / "virtio_entropy" / "README.md"

VDEV = """
[[vdev]]
type = "virtio-entropy"
name = "rng0"
loc = 0x1c0f0000
intr = "gic:43"
"""


def test_linux_takes_random_numbers_from_it(start: Callable[..., Any]) -> None:
    shown = re.findall(r"```console\n(.*?)```", README.read_text(), re.DOTALL)
    vm = start("".join(shown) + "cat /sys/class/misc/hw_random/rng_current", vdevs=VDEV)
    assert vm.wait() == 0
    lines = [line.strip() for line in vm.text.splitlines()]
    assert lines.count("virtio_rng.0") == 2
    assert "2048" in lines
