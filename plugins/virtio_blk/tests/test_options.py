"""Options: what a VM file may say, and what it is told when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from qvm_virtio_blk.options import BlkOptions, Disk, identity, parse_hostdev

from qvmcore.api import Size


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("disk.img", Disk(Path("disk.img"))),
        (" < disk.img ", Disk(Path("disk.img"), readonly=True)),
        ("</dev/vdb", Disk(Path("/dev/vdb"), readonly=True)),
        ("memory:16M", Disk(Path("memory:16M"), memory=16 << 20)),
        ("memory: 512", Disk(Path("memory: 512"), memory=512)),
        ("./memory:16M", Disk(Path("./memory:16M"))),
    ],
)
def test_hostdev(text: str, disk: Disk) -> None:
    assert parse_hostdev(text) == disk


@pytest.mark.parametrize(
    "text",
    ["", "<", "  ", ">disk.img", "memory:", "memory:0", "memory:1000", "memory:-1M", "memory:x", "a\0"],
)
def test_a_malformed_hostdev_is_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="hostdev"):
        parse_hostdev(text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_size": 256}, "block_size is"),
        ({"block_size": 4096, "hostdev": "memory:512"}, "multiple of block_size"),
        ({"physical_block_size": 3 << 9}, "physical_block_size is"),
        ({"block_size": 4096, "physical_block_size": 512}, "physical_block_size is"),
        ({"physical_block_size": 1 << 20}, "physical_block_size is"),
        ({"min_io_size": 100}, "min_io_size is"),
        ({"min_io_size": 1 << 30}, "min_io_size is"),
        ({"opt_io_size": 513}, "opt_io_size is"),
        ({"serial": "x" * 21}, "more than 20"),
        ({"serial": "größe"}, "ASCII"),
        ({"serial": "a\nb"}, "ASCII"),
    ],
)
def test_cross_checks(options: dict[str, object], said: str) -> None:
    sizes = {key: Size(value) if isinstance(value, int) else value for key, value in options.items()}
    with pytest.raises(ValueError, match=said):
        BlkOptions(**{"hostdev": "x", **sizes})  # type: ignore[arg-type]


def test_either_way_of_saying_read_only() -> None:
    assert BlkOptions(hostdev="<x").disk.readonly
    assert BlkOptions(hostdev="x", readonly=True).disk.readonly
    assert not BlkOptions(hostdev="x").disk.readonly


def test_identity_is_the_serial_or_the_name_cut_to_20_bytes() -> None:
    assert identity(BlkOptions(hostdev="x", serial="S1"), "disk0") == b"S1" + bytes(18)
    assert identity(BlkOptions(hostdev="x"), "virtio-blk_of_a_long_name") == b"virtio-blk_of_a_long"


@pytest.mark.parametrize(
    "uri",
    [
        "nbd://host",
        "nbd://host:10809/export",
        "nbds://[::1]/x",
        "nbd+unix:///?socket=/s",
        "nbd+unix:///e%20x?socket=s",
    ],
)
def test_an_nbd_server_is_named_by_its_uri(uri: str) -> None:
    assert parse_hostdev(uri) == Disk(Path(uri), nbd=uri)
    assert parse_hostdev(f"<{uri}").readonly


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("nbd:host:10809", "names no host"),
        ("nbd:///export", "names no host"),
        ("nbd+unix:///export", "names no socket"),
        ("nbd+unix://host/export?socket=/s", "names no socket"),
        ("nbd+unx:///?socket=/s", r"did you mean 'nbd\+unix'"),
        ("nbd://host:port/", "[Pp]ort"),
        ("https://host/disk.img", "expected nbd://HOST:PORT/EXPORT"),
    ],
)
def test_a_wrong_uri_is_told_how_it_should_be(uri: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_hostdev(uri)


def test_a_file_may_be_called_nbd() -> None:
    assert parse_hostdev("nbd") == Disk(Path("nbd"))
    assert parse_hostdev("nbd.img") == Disk(Path("nbd.img"))
