"""ARM PrimeCell vdevs: pl011 (UART) and pl061 (GPIO with the power button)."""

from qvmcore.api import Vdev, hookimpl


@hookimpl
def qvm_vdev_types() -> list[type[Vdev]]:
    """Both types; their modules are imported here, not when the package is."""
    from qvm_primecell.pl011 import Pl011
    from qvm_primecell.pl061 import Pl061

    return [Pl011, Pl061]
