"""The seed's own listing, read by a real guest that knows nothing of the VM file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

#: bus:device.function, vendor, device, class: the seed's `pci-tool -v` (notes: 1af4/1042 is mass storage).
SEED = [
    "0000:00:00.0 0x1c05 0x0002 0x060000",
    "0000:00:01.0 0x1af4 0x1042 0x018000",
    "0000:00:02.0 0x1af4 0x1041 0x028000",
    "0000:00:03.0 0x1c05 0x0001 0x058000",
    "0000:00:04.0 0x1af4 0x1043 0x078000",
]
SCRIPT = """
for d in /sys/bus/pci/devices/*; do
    echo "pci ${d##*/} $(cat $d/vendor) $(cat $d/device) $(cat $d/class)"
done
d=/sys/bus/pci/devices/0000:00:01.0
echo "subsystem $(cat $d/subsystem_vendor) $(cat $d/subsystem_device)"
echo "block $(ls $d/virtio*/block)"
ls /sys/class/misc/hw_random >/dev/null && echo rng $(cat /sys/class/misc/hw_random/rng_current)
ip -o link | grep -c eth0 | sed 's/^/eth /'
"""


def test_the_example_shows_the_seeds_listing(start: Callable[..., Any], files: Path, tmp_path: Path) -> None:
    example = (ROOT / "examples" / "linux-arm64-pci.toml").read_text()
    vdevs = example[example.index("[[vdev]]") :].replace("../.demo/disk.img", "memory:1M")
    (files / "vm.toml").write_text((files / "vm.toml").read_text().partition("[[vdev]]")[0])
    vdevs = vdevs.replace('type = "shmem"', f'type = "shmem"\ndirectory = "{tmp_path / "shm"}"')
    vm = start(SCRIPT, vdevs=vdevs)
    assert vm.wait() == 0, vm.text
    listing = [line[4:] for line in vm.text.splitlines() if line.startswith("pci ")]
    assert listing[: len(SEED)] == SEED
    assert listing[len(SEED) :] == ["0000:00:05.0 0x1af4 0x1044 0x00ff00"], "the entropy device behind them"
    assert "subsystem 0x1c05 0x0042" in vm.text
    assert "block vda" in vm.text
    assert "eth 1" in vm.text
