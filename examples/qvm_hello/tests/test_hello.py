"""The kit of qvmcore certifies the example, as README shows."""

from qvm_hello import SCRATCH, WRITES, Hello

from qvmcore.testing.conformance import MmioConformance, TerminationConformance, VdevConformance
from qvmcore.testing.fakes import plug


class TestHello(VdevConformance, MmioConformance, TerminationConformance):
    vdev_class = Hello


def test_a_write_is_kept_counted_and_interrupts() -> None:
    with plug(Hello) as hello:
        assert hello.read(0) == int.from_bytes(b"helo", "little")
        hello.write(SCRATCH, 0xCAFE)
        assert (hello.read(SCRATCH), hello.read(WRITES), hello.irq.pulses) == (0xCAFE, 1, 1)
