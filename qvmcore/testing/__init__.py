"""Test kit for vdev authors, in the wheel: fakes, a guest-side virtio driver, conformance, abuse.

::

    from qvmcore.testing.fakes import plug            # a device on a bus, without an engine
    from qvmcore.testing.driver import MmioDriver     # what a guest's virtio driver does
    from qvmcore.testing.pci_driver import PciDriver  # the same over PCI; device.driver() gives either
    from qvmcore.testing.conformance import VirtioConformance
    from qvmcore.testing.abuse import VirtioAbuse     # a Hypothesis state machine as a hostile guest
    from qvmcore.testing.engine_conformance import EngineConformance   # for the author of an engine
    from qvmcore.testing.engine_driven import EngineDriven   # the suites of vdevs by a real vCPU

Nothing of the core imports this package. It needs the extra ``qvmcore[testing]``.
"""
