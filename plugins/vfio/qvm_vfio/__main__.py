"""``python -m qvm_vfio list | bind NAME | unbind NAME``: give functions to vfio-pci, and back; as root."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qvm_vfio.errors import VfioError
from qvm_vfio.kernel import Kernel
from qvm_vfio.sysfs import PciFunction, address

USAGE = "usage: python -m qvm_vfio list | bind 0000:03:00.0 | unbind 0000:03:00.0"


def main(words: Sequence[str], kernel: Kernel | None = None) -> int:
    """The command; its exit code."""
    kernel = kernel or Kernel()
    try:
        if list(words) == ["list"]:
            for path in sorted((kernel.sys / "bus/pci/devices").glob("*")):
                function = PciFunction(kernel, path.name)
                group = "-" if function.group is None else function.group
                resets = ",".join(function.resets) or "-"
                print(f"{function.name}  group {group}  driver {function.driver or '-'}  resets {resets}")
        elif len(words) == 2 and words[0] in ("bind", "unbind"):
            function = PciFunction(kernel, address(words[1]))
            function.bind("vfio-pci" if words[0] == "bind" else "")
            print(f"{function.name}: {function.driver or 'no driver'}, IOMMU group {function.group}")
        else:
            print(USAGE, file=sys.stderr)
            return 2
    except VfioError as error:
        print(f"qvm_vfio: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
