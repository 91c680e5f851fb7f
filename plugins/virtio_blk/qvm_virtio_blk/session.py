"""What whoever serves requests needs to know of the disk and its driver, and how a chain is answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qvm_virtio_blk.stats import Stats
from qvmcore.api import Chain, Virtqueue


@dataclass(slots=True)
class Session:
    """Constant: ``name`` of the vdev, ``identity`` for GET_ID, ``readonly``, ``stats``.

    The driver's choice: ``features``, ``seg_max``, and ``durable``: writes are on stable storage when
    they complete. Written by vCPUs, read by the worker.
    """

    name: str
    identity: bytes
    readonly: bool
    stats: Stats
    features: int = 0
    seg_max: int = 0
    durable: bool = False


def answer(queue: Virtqueue, chain: Chain, status: int, written: int = 1) -> None:
    """Store the status and hand the chain back; ``written`` are the bytes filled, status included."""
    last = chain.writers[-1]
    last[len(last) - 1] = status
    # 2.7.8.2: counts from the first byte on, so a status behind untouched room is not in it.
    queue.push(chain, written if written == chain.writable else 0)


def fill(views: Sequence[memoryview], data: bytes | bytearray | memoryview) -> None:
    """Copy ``data`` into ``views``, which have just as much room."""
    done = 0
    for view in views:
        view[:] = data[done : done + len(view)]
        done += len(view)


def reason(error: OSError) -> str:
    """What the log says about a failed system call."""
    return f"host: {error.strerror or error}"
