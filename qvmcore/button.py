"""The power button (floor 8): every vdev is told at once, and none can hold up the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from qvmcore.slot import VdevSlot

#: Seconds all on_button() methods together may take.
PATIENCE = 1.0


def press_button(slots: Iterable[VdevSlot]) -> bool:
    """Tell the vdevs that have not failed; whether one says that the guest will hear of it."""
    told: list[str] = []
    threads = []
    for slot in slots:
        if slot.faulted:
            continue
        thread = threading.Thread(target=_press, args=(slot, told), name=f"button-{slot.name}", daemon=True)
        thread.start()
        threads.append(thread)
    deadline = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return bool(told)


def _press(slot: VdevSlot, told: list[str]) -> None:
    try:
        if slot.vdev.on_button():
            told.append(slot.name)
    except Exception as error:
        slot.fault(error)
