"""Character devices of the host for serial-like vdevs: one call, :func:`open_chardev`.

A library, not a plugin: virtio-console and the UARTs depend on it.
"""

from qvm_chardev.device import CharDevice, EscapeActions, Wiring
from qvm_chardev.open import open_chardev
from qvm_chardev.spec import CharSpec, Kind, parse_spec

__all__ = ["CharDevice", "CharSpec", "EscapeActions", "Kind", "Wiring", "open_chardev", "parse_spec"]
