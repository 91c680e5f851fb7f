"""What a VM file may say of a card, and what it is told when it says something else."""

from __future__ import annotations

from pathlib import Path

import pytest
from qvm_virtio_net.device import VirtioNet
from qvm_virtio_net.mac import format_mac, parse_mac
from qvm_virtio_net.options import NetOptions

from qvmcore.api import ConfigError, HostError
from qvmcore.options import describe_options
from qvmcore.testing.fakes import plug


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({}, "expected exactly one of peer"),
        ({"none": True, "tap": "tap0"}, "found tap and none"),
        ({"none": True, "mac": "hello"}, "no Ethernet address"),
        ({"none": True, "mac": "01:00:5e:00:00:01"}, "multicast address"),
        ({"none": True, "mac": "00:00:00:00:00:00"}, "all zero"),
        ({"none": True, "mtu": 67}, "from 68 to 65535"),
        ({"none": True, "mtu": 65536}, "from 68 to 65535"),
        ({"none": True, "queues": 2}, "needs a tap interface"),
        ({"tap": "tap0", "queues": 9}, "from 1 to 8"),
        ({"tap": "a/b"}, "no interface name"),
        ({"tap": "x" * 16}, "no interface name"),
        ({"tap": "tap%d"}, "no interface name"),
        ({"peer": "lan 0"}, "a path has a '/'"),
        ({"peer": "./links/"}, "is a folder"),
        ({"peer": "./a\0b"}, "zero byte"),
        ({"none": True, "passt_options": ["-q"]}, "needs user = true"),
        ({"none": True, "pcap_limit": "1K"}, "of at least 4K"),
        ({"none": True, "pear": "lan0"}, "did you mean 'peer'"),
    ],
)
def test_a_wrong_option_is_explained(table: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        plug(VirtioNet, table)


@pytest.mark.parametrize("text", ["52:54:00:12:34:56", "52-54-00-12-34-56", "525400123456"])
def test_an_address_in_three_spellings(text: str) -> None:
    assert format_mac(parse_mac(text)) == "52:54:00:12:34:56"


def test_options_are_listed_with_words() -> None:
    assert all(option.help for option in describe_options(NetOptions))


def test_passt_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="apt-get install passt"):
        plug(VirtioNet, user=True)
