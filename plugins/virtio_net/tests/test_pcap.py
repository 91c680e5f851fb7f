"""The capture: what is in the file, and that it harms nothing when it cannot go on."""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from qvm_virtio_net.pcap import Capture
from qvm_virtio_net.testing import MAC_A, Guest, ethernet

from qvmcore.api import HostError

Pair = Callable[..., tuple[Guest, Guest]]


def frames_of(path: Path) -> list[bytes]:
    """The frames of a capture, which must be whole to its last byte."""
    data = path.read_bytes()
    magic, major, minor, zone, _, snap, kind = struct.unpack_from("=IHHiIII", data)
    assert (magic, major, minor, zone, kind) == (0xA1B23C4D, 2, 4, 0, 1)
    frames, position = [], 24
    while position < len(data):
        seconds, nanoseconds, captured, length = struct.unpack_from("=IIII", data, position)
        assert seconds > 1 << 30 and nanoseconds < 1_000_000_000 and captured == length <= snap
        frames.append(data[position + 16 : position + 16 + captured])
        assert len(frames[-1]) == captured
        position += 16 + captured
    return frames


def test_both_directions_are_captured(pair: Pair, tmp_path: Path) -> None:
    one, two = pair(pcap="net.pcap")
    # Both cards write to the one file of this test; look at the second's, which truncated it last.
    two.offer(*[40] * 100)
    for number in range(3):
        one.send(ethernet(payload=bytes([number]) * 100))
        two.received()
    two.send(ethernet(MAC_A, payload=b"back"))
    one.device.close()
    captured = frames_of(tmp_path / "net.pcap")
    assert ethernet(payload=b"\2" * 100) in captured and ethernet(MAC_A, payload=b"back") in captured


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file of this process grows beyond ``size`` bytes, as on a full disk.

    No fixture: pytest reports a test before its fixtures end, perhaps into a file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_on_a_full_disk_it_ends_whole_with_one_line(tmp_path: Path) -> None:
    said: list[str] = []
    capture = Capture(tmp_path / "c", 1 << 20, said.append)
    with small_files(1000):
        for _ in range(50):
            capture.record([memoryview(bytes(14)), memoryview(bytes(100))])
    assert len(said) == 1 and "ends after 7 frames: File too large" in said[0]
    assert frames_of(tmp_path / "c") == [bytes(114)] * 7


def test_a_full_disk_harms_no_traffic(pair: Pair) -> None:
    one, two = pair(pcap="net.pcap")
    with small_files(100):
        two.offer(*[200] * 20)
        for number in range(20):
            one.send(ethernet(payload=bytes([number])))
        assert [frame[14] for _, frame, _ in two.received()] == list(range(20))


def test_it_ends_at_its_limit(tmp_path: Path) -> None:
    said: list[str] = []
    capture = Capture(tmp_path / "c", 4096, said.append)
    for _ in range(5):
        capture.record([memoryview(bytes(1484))])
    capture.close()
    assert len(said) == 1 and "pcap_limit" in said[0]
    assert frames_of(tmp_path / "c") == [bytes(1484)] * 2


def test_a_frame_in_a_thousand_pieces(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "c", 1 << 20, print)
    capture.record([memoryview(bytes([i & 0xFF])) for i in range(3000)])
    capture.close()
    assert frames_of(tmp_path / "c") == [bytes(i & 0xFF for i in range(3000))]


def test_an_impossible_file_is_refused_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot write the capture"):
        Capture(tmp_path / "missing" / "c", 4096, print)
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(HostError, match="is not a file"):
            Capture(tmp_path / "pipe", 4096, print)
    finally:
        os.close(reader)
