"""Test kit for vdev authors, in the wheel: fakes, a guest-side virtio driver, conformance, abuse.

::

    from qvmcore.testing.fakes import plug            # a device on a bus, without an engine
    from qvmcore.testing.driver import MmioDriver     # what a guest's virtio driver does
    from qvmcore.testing.pci_driver import PciDriver  # the same over PCI; device.driver() gives either
    from qvmcore.testing.conformance import VirtioConformance
    from qvmcore.testing.abuse import VirtioAbuse     # a Hypothesis state machine as a hostile guest

Nothing of the core imports this package. It needs the extra ``qvmcore[testing]``.
"""
