"""PC vdevs: ser8250 (UART), mc146818 (clock and CMOS memory) and acpi-pm (power management)."""

from qvmcore.api import Vdev, hookimpl


@hookimpl
def qvm_vdev_types() -> list[type[Vdev]]:
    """All three types; their modules are imported here, not when the package is."""
    from qvm_pc.acpi_pm import AcpiPm
    from qvm_pc.mc146818 import Mc146818
    from qvm_pc.ser8250 import Ser8250

    return [AcpiPm, Mc146818, Ser8250]
