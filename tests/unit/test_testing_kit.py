"""The kit fails what it must fail: every broken device below is caught by the check meant for it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase as HypothesisPhase
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from qvmcore.errors import ConfigError, GuestError, HostError
from qvmcore.memory import GuestMemory
from qvmcore.options import Size
from qvmcore.testing.abuse import VirtioAbuse
from qvmcore.testing.conformance import (
    MmioConformance,
    TerminationConformance,
    VdevConformance,
    VirtioConformance,
)
from qvmcore.testing.driver import GuestRam, MmioDriver, SplitDriver, VirtioDriver
from qvmcore.testing.fakes import FakeContext, FakeIrq, Plugged, plug
from qvmcore.testing.samples import Echo
from qvmcore.types import GuestEnd, MemorySpec, Reason, Window
from qvmcore.vdev import NoOptions, Vdev
from qvmcore.virtio.queue import Virtqueue

END = GuestEnd(Reason.GUEST_SHUTDOWN)


class Plain(Vdev):
    """Two words and an interrupt."""

    vdev_type = "plain"
    windows = (Window(0x10, access=frozenset({4})), Window(0x20))
    irqs = 1
    word = 0

    def mmio_read(self, window: int, offset: int, size: int) -> int:
        return self.word if window == 0 and offset == 0 else 0

    def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
        if window == 0 and offset == 0:
            self.word = value
            self.ctx.irq().pulse()

    def on_reset(self) -> None:
        self.word = 0


class TestPlain(VdevConformance, MmioConformance, TerminationConformance):
    """A plain vdev that does everything right."""

    vdev_class = Plain


# ---- fakes ----------------------------------------------------------------------------------------


def test_the_line_counts_edges_and_rises() -> None:
    line = FakeIrq()
    line.pulse()
    line.set(True)
    line.set(True)
    line.set(False)
    line.set(True)
    assert (line.pulses, line.rises, line.count, line.level) == (1, 2, 3, True)
    assert line.wait(3, timeout=0)
    assert not line.wait(4, timeout=0.01)


def test_the_line_can_be_waited_for_from_another_thread() -> None:
    line = FakeIrq()
    threading.Timer(0.05, line.pulse).start()
    assert line.wait(1, timeout=5)


def test_the_context_refuses_a_worker_too_early_and_records() -> None:
    ctx = FakeContext("x", GuestMemory(), irqs=2)
    with pytest.raises(RuntimeError, match="on_configured"):
        _ = ctx.worker
    ctx.request_shutdown("bye", code=40)
    ctx.press_power_button()
    ctx.fault(GuestError("the guest's fault"))
    assert (ctx.shutdowns, ctx.button_presses, ctx.faults) == ([("bye", 40)], 1, [])
    error = ValueError()
    ctx.fault(error)
    assert ctx.faults == [error]
    with pytest.raises(IndexError):
        ctx.irq(2)


def test_plug_places_windows_one_behind_the_other() -> None:
    with plug(Plain, base=0x1000) as device:
        device.write(0, 7)
        assert (device.read(0), device.read(0x10, 1), device.irq.pulses) == (7, 0, 1)
        assert [mapped.base for mapped in device.bus] == [0x1000, 0x1010]


def test_plug_converts_options_and_reports_every_problem() -> None:
    class SizedOptions(NoOptions, frozen=True):
        size: Size
        ram: int = 1

    class Sized(Plain):
        Options = SizedOptions

    with plug(Sized, {"ram": 3}, size="2M") as device:
        assert (device.vdev.options.size, device.vdev.options.ram) == (2 << 20, 3)
    with pytest.raises(ConfigError) as caught:
        plug(Sized, szie=1, ram_="x")
    assert len(caught.value.diagnostics) == 3


def test_plug_cleans_up_behind_a_failed_start() -> None:
    ended: list[Vdev] = []

    class Unlucky(Plain):
        def on_starting(self) -> None:
            self.ctx.worker.call(lambda: None)
            raise HostError("no such thing")

        def on_terminate(self, end: GuestEnd) -> None:
            ended.append(self)

    before = set(threading.enumerate())
    with pytest.raises(HostError):
        plug(Unlucky)
    assert len(ended) == 1
    assert set(threading.enumerate()) == before
    with plug(Unlucky, start=False) as device:
        assert device.vdev not in ended


@pytest.mark.parametrize("answer", [-1, 1 << 32, "text"])
def test_a_nonsensical_register_value_is_a_fault(answer: Any) -> None:
    class Wrong(Plain):
        def mmio_read(self, window: int, offset: int, size: int) -> int:
            value: int = answer
            return value

    with plug(Wrong) as device:
        assert device.read(0) == 0xFFFFFFFF
        assert len(device.ctx.faults) == 1
        device.write(0, 1)
        assert device.irq.count == 0


def test_settle_waits_for_work_that_makes_work() -> None:
    with plug(Plain) as device:
        done: list[int] = []
        worker = device.ctx.worker
        worker.call(lambda: worker.call(lambda: done.append(1)))
        device.settle()
        assert done == [1]


def assert_set(gate: threading.Event) -> None:
    assert gate.wait(30)


def test_settle_names_the_place_where_a_worker_hangs() -> None:
    with plug(Plain) as device:
        gate = threading.Event()
        device.ctx.worker.call(lambda: assert_set(gate))
        with pytest.raises(AssertionError, match=r"(?s)still busy after 0\.05 s.*wait"):
            device.settle(0.05)
        gate.set()


def test_the_pytest_plugin_offers_qvm_plug(qvm_plug: Any) -> None:
    device = qvm_plug(Plain)
    assert device.read(0) == 0


# ---- the driver -------------------------------------------------------------------------------------


def test_the_driver_notices_a_device_that_invents_used_elements() -> None:
    memory = GuestMemory.allocate([MemorySpec(0, 1 << 16)])
    ring = SplitDriver(GuestRam(memory), 4)
    ring.write16(ring.used + 2, 1)
    with pytest.raises(AssertionError, match="no chain in flight"):
        ring.reap()
    ring.write16(ring.used + 2, 9)
    with pytest.raises(AssertionError, match="ran 8 ahead"):
        ring.reap()


def test_the_driver_runs_out_of_descriptors_and_memory_in_words() -> None:
    memory = GuestMemory.allocate([MemorySpec(0, 1 << 12)])
    ring = SplitDriver(GuestRam(memory), 2)
    ring.add([b"a"], [1])
    with pytest.raises(MemoryError, match="no 1 free descriptors"):
        ring.add([b"b"])
    with pytest.raises(MemoryError, match="bytes left"):
        ring.ram.alloc(1 << 12)


# ---- conformance catches ---------------------------------------------------------------------------


def catches(kit: type[Any], vdev_class: type[Vdev], test: str, tmp_path: Path, *more: object) -> None:
    """The named check fails for this device."""
    suite = type("Suite", (kit,), {"vdev_class": vdev_class})()
    names = getattr(suite, test).__code__.co_varnames[: getattr(suite, test).__code__.co_argcount]
    with pytest.raises(AssertionError):
        if "tmp_path" in names:
            getattr(suite, test)(tmp_path)
        else:
            with plug(vdev_class) as device:
                arguments: list[object] = [device] if "device" in names else []
                arguments += [MmioDriver.of(device)] if "driver" in names else []
                getattr(suite, test)(*arguments, *more)
                assert device.ctx.faults == []


def test_shared_state_is_caught(tmp_path: Path) -> None:
    class Shared(Plain):
        words: list[int] = [0]

        def mmio_read(self, window: int, offset: int, size: int) -> int:
            return self.words[0]

        def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
            self.words[0] = value & 0xFF

    catches(VdevConformance, Shared, "test_instances_are_independent", tmp_path)


def test_a_forgotten_reset_is_caught(tmp_path: Path) -> None:
    class Forgetful(Plain):
        def on_reset(self) -> None:
            pass

    catches(VdevConformance, Forgetful, "test_reset_is_idempotent", tmp_path)


def test_an_own_thread_is_caught(tmp_path: Path) -> None:
    class Threaded(Plain):
        def on_configured(self) -> None:
            self.stop = threading.Event()
            threading.Thread(target=self.stop.wait, args=(1.0,), daemon=True).start()

    catches(TerminationConformance, Threaded, "test_the_end_succeeds_and_leaves_no_thread", tmp_path)


def test_a_failing_end_is_caught(tmp_path: Path) -> None:
    class Sticky(Plain):
        def on_terminate(self, end: GuestEnd) -> None:
            raise OSError("cannot close")

    catches(TerminationConformance, Sticky, "test_the_end_succeeds_and_leaves_no_thread", tmp_path)


def test_an_interrupt_after_the_end_is_caught(tmp_path: Path) -> None:
    class Late(Plain):
        def on_terminate(self, end: GuestEnd) -> None:
            threading.Timer(0.01, self.ctx.irq().pulse).start()

    catches(TerminationConformance, Late, "test_nothing_happens_after_the_end", tmp_path)


def test_a_register_that_raises_is_caught(tmp_path: Path) -> None:
    class Fragile(Plain):
        def mmio_write(self, window: int, offset: int, size: int, value: int) -> None:
            if value == 0x5A5A5A5A:
                raise KeyError(value)

    catches(MmioConformance, Fragile, "test_any_offset_and_size_is_harmless", tmp_path)


def test_a_reserved_feature_bit_is_caught(tmp_path: Path) -> None:
    class Greedy(Echo):
        def device_features(self) -> int:
            return 1 << 40

    catches(VirtioConformance, Greedy, "test_2_2_the_device_offers_only_bits_of_its_own", tmp_path)


def test_a_configuration_that_grows_is_caught(tmp_path: Path) -> None:
    class Growing(Echo):
        def config_space(self) -> bytes:
            return bytes(8 if self.virtio.features else 4)

    catches(VirtioConformance, Growing, "test_2_5_the_configuration_has_one_length", tmp_path)


def test_a_chain_of_the_wrong_kind_that_kills_the_worker_is_caught(tmp_path: Path) -> None:
    class Trusting(Echo):
        def handle_queue(self, index: int, queue: Virtqueue) -> None:
            for chain in queue:
                chain.writers[0][0] = chain.read(4)[3]
                queue.push(chain)

    test = "test_a_well_formed_chain_of_the_wrong_kind_is_survived"
    catches(VirtioConformance, Trusting, test, tmp_path, ([b"x"], []))


# ---- the hostile guest catches -----------------------------------------------------------------------


def caught_by_abuse(vdev_class: type[Echo]) -> None:
    class Machine(VirtioAbuse):
        def device(self) -> Plugged[Any]:
            return plug(vdev_class)

        def check_works(self, device: Plugged[Any], driver: VirtioDriver) -> None:
            request = driver.queues[0].submit([b"ping"], [8])
            device.settle()
            assert driver.queues[0].reap() == [request]

    quick = settings(
        Machine.TestCase.settings,
        max_examples=200,
        phases=[HypothesisPhase.generate],
        derandomize=True,
        database=None,
    )
    with pytest.raises(Exception):  # noqa: B017 - an AssertionError, or a group of several
        run_state_machine_as_test(Machine, settings=quick)


def test_writing_where_no_buffer_is_is_caught() -> None:
    class Wild(Echo):
        def handle_queue(self, index: int, queue: Virtqueue) -> None:
            for chain in queue:
                region = self.ctx.memory.regions[0]
                self.ctx.memory.write(region.end - 0x1000, b"overrun")
                queue.push(chain)

    caught_by_abuse(Wild)


def test_an_exception_on_odd_input_is_caught() -> None:
    class Naive(Echo):
        def handle_queue(self, index: int, queue: Virtqueue) -> None:
            for chain in queue:
                chain.writers[-1][0] = chain.readers[0][0]
                queue.push(chain)

    caught_by_abuse(Naive)


def test_state_that_survives_a_reset_is_caught() -> None:
    class Hoarder(Echo):
        def on_configured(self) -> None:
            super().on_configured()
            self.kept: list[Any] = []

        def handle_queue(self, index: int, queue: Virtqueue) -> None:
            for chain in queue:
                self.kept.append(chain)
                if len(self.kept) > 1:
                    return
                self.kept.remove(chain)
                self.kept.append(None)
                queue.push(chain)

    caught_by_abuse(Hoarder)
