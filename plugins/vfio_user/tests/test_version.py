"""VERSION: what a server may answer, and what a client may not say."""

from __future__ import annotations

import json
import struct

import pytest
from qvm_vfio_user.spec import Command
from qvm_vfio_user.version import Proposal
from qvm_vfio_user.wire import TEXT_MAX

from plugins.vfio_user.tests.vfio_bench import serving
from qvmcore.api import ClientError

#: What QEMU 11 sends.
QEMU = {
    "max_msg_fds": 8,
    "max_data_xfer_size": 1048576,
    "pgsizes": 4096,
    "max_dma_maps": 65535,
    "write_multiple": True,
}


def proposal(text: object = None, major: int = 0, minor: int = 1) -> bytes:
    """A VERSION's payload; ``text`` is JSON, or bytes as they are."""
    if text is not None and not isinstance(text, bytes):
        text = json.dumps(text).encode() + b"\0"
    return struct.pack("<HH", major, minor) + (text or b"")


def test_VERSION_says_what_the_server_takes() -> None:
    with serving() as bench:
        assert bench.client.version(QEMU, minor=0) == (0, 0)
        assert bench.client.capabilities == {
            "max_msg_fds": 16,
            "max_data_xfer_size": 65536,
            "max_dma_maps": 256,
            "write_multiple": True,
        }


@pytest.mark.parametrize("asked, answered", [(0, 0), (1, 1), (2, 1), (65535, 1)])
def test_VERSION_answers_no_higher_minor_than_was_proposed(asked: int, answered: int) -> None:
    assert struct.unpack_from("<HH", Proposal(proposal(minor=asked)).answer(1000)) == (0, answered)


@pytest.mark.parametrize("room", range(4, 140))
def test_VERSION_answers_no_more_bytes_than_came(room: int) -> None:
    """QEMU receives the answer where its request was."""
    answer = Proposal(proposal({"capabilities": QEMU})).answer(room)
    assert len(answer) <= room
    if len(answer) > 4:
        assert answer.endswith(b"\0") and isinstance(json.loads(answer[4:-1]), dict)
    assert (room < 7) == (len(answer) == 4)


def test_VERSION_offers_write_multiple_only_to_who_has_it() -> None:
    assert b"write_multiple" not in Proposal(proposal({"capabilities": {}})).answer(1000)
    assert b"write_multiple" not in Proposal(proposal({"capabilities": {"write_multiple": False}})).answer(
        999
    )
    assert b"write_multiple" in Proposal(proposal({"capabilities": {"write_multiple": True}})).answer(1000)


def test_VERSION_without_data_and_with_unknown_capabilities_is_taken() -> None:
    assert Proposal(proposal()).minor == 1
    assert Proposal(proposal({})).minor == 1
    assert Proposal(proposal({"capabilities": {"twin_socket": {"supported": True}, "x": [1]}})).minor == 1


@pytest.mark.parametrize(
    "payload",
    [
        proposal(major=1),
        proposal(b"{}"),
        proposal(b"{\0"),
        proposal(b"\xff\0"),
        proposal([]),
        proposal({"capabilities": []}),
        proposal(b"[" * (TEXT_MAX - 1) + b"\0"),
        proposal(b"9" * (TEXT_MAX - 1) + b"\0"),
        *(proposal({"capabilities": {"max_msg_fds": bad}}) for bad in (-1, 1.5, "1", True, None, [])),
        proposal({"capabilities": {"max_data_xfer_size": "big"}}),
        proposal({"capabilities": {"write_multiple": 1}}),
    ],
)
def test_VERSION_that_says_nonsense_ends_the_connection(payload: bytes) -> None:
    with pytest.raises(ClientError):
        Proposal(payload)
    with serving() as bench:
        assert bench.client.ask(Command.VERSION, payload).refused
        assert "VERSION" in bench.broken() or "version data" in bench.broken()


@pytest.mark.parametrize("command", [each for each in Command if each != Command.VERSION])
def test_nothing_comes_before_VERSION(command: Command) -> None:
    from qvm_vfio_user.wire import SHAPES

    with serving() as bench:
        shape = SHAPES.get(command)
        bench.client.post(command, bytes(shape.least if shape else 0))
        assert f"{command.name} came before VERSION" in bench.broken()
        assert not bench.served.used
