"""The engine conformance suite fails engines that break its contracts, each at the test that names it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip(
    "qvm_emulator", reason="the suite is tried on the emulated engine, which is not installed"
)

MODULE = """
import os, threading, time
from qvm_emulator.engine import EmulatedEngine
from qvmcore.api import GuestEnd, NullIrq, Reason
from qvmcore.testing.access_server import AccessServer
from qvmcore.testing.engine_conformance import EngineConformance
from qvmcore.testing.guest_archs import Aarch64

AccessServer.patience = 1.0


class Guest:
    def __init__(self, real, config):
        self.real, self.config = real, config

    def __getattr__(self, name):
        return getattr(self.real, name)

{fault}


class Broken(EmulatedEngine):
    def create_guest(self, config):
        return Guest(super().create_guest(config), config)


class TestBroken(EngineConformance):
    engine, arch, widest = Broken(), Aarch64(), 4
"""

#: What is wrong, as methods of the guest, and the test that says so.
FAULTS = {
    "an interrupt is lost": (
        "def irq_line(self, intr): self.real.irq_line(intr); return NullIrq()",
        "test_each_pulse_of_an_edge_line_is_one_interrupt",
    ),
    "a line nobody has": (
        "def irq_line(self, intr): return NullIrq()",
        "test_a_line_no_controller_has_is_refused",
    ),
    "a message is lost": ("def signal_msi(self, *message): pass", "test_each_message_is_one_interrupt"),
    "a foreign message arrives": (
        "def signal_msi(self, a, d): self.real.signal_msi(0x0802_0040, d)",
        "test_a_message_to_elsewhere_is_dropped",
    ),
    "an eventfd that is not listened to": (
        "def listen(self, fd, address, data): return lambda: None",
        "test_an_eventfd_it_listens_to_is_one_interrupt_for_each_signal",
    ),
    "pause does not": (
        "def pause(self, timeout): return True",
        "test_a_paused_guest_stands_still_and_goes_on",
    ),
    "no resume": ("def resume(self): pass", "test_a_paused_guest_stands_still_and_goes_on"),
    "registers without names": ("def registers(self): return [{'pc': 0}]", "test_registers_have_their_names"),
    "a status nobody can print": (
        "def status(self): return {'lock': threading.Lock()}",
        "test_status_is_json_at_any_time",
    ),
    "stop is an end": (
        "def stop(self, t): self.config.on_end(GuestEnd(Reason.GUEST_CRASH)); return self.real.stop(t)",
        "test_stop_is_idempotent_and_no_end",
    ),
    "it ends twice": (
        "def stop(self, t): [self.config.on_end(e) for e in self.config.on_end.__self__.ends[:1]]; "
        "return self.real.stop(t)",
        "test_a_guest_that_ends_by_itself_says_so_once",
    ),
    "a descriptor is lost": (
        "def start(self, entry): os.dup(1); self.real.start(entry)",
        "test_many_lives_leave_neither_descriptor_nor_thread",
    ),
    "a thread is left": (
        "def close(self): threading.Thread(target=time.sleep, args=(9,), daemon=True).start(); "
        "self.real.close()",
        "test_many_lives_leave_neither_descriptor_nor_thread",
    ),
    "doorbells said to be fast": ("fast_doorbells = True", "test_a_doorbell_rings_once_for_each_store"),
    "a second start": (
        "def start(self, entry): self.real._threads or self.real.start(entry)",
        "test_it_starts_once",
    ),
    "stop waits for ever": (
        "def stop(self, t): return self.real.stop(3.0)",
        "test_a_hung_handler_does_not_hang_stop",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_engine_fails_where_it_is_broken(name: str, tmp_path: Path) -> None:
    fault, test = FAULTS[name]
    path = tmp_path / "test_broken.py"
    path.write_text(MODULE.format(fault=f"    {fault}"))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        test,
        "--rootdir",
        tmp_path,
    ]
    done = subprocess.run([*command, path], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"FAILED test_broken.py::TestBroken::{test}" in done.stdout, done.stdout
