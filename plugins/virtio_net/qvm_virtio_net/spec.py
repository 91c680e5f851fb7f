"""Numbers and layouts of the virtio network device (virtio 1.4, 5.1). No behaviour."""

from __future__ import annotations

import struct

DEVICE_ID = 1

# Feature bits (5.1.3).
F_CSUM = 1 << 0
F_GUEST_CSUM = 1 << 1
F_CTRL_GUEST_OFFLOADS = 1 << 2
F_MTU = 1 << 3
F_MAC = 1 << 5
F_GUEST_TSO4 = 1 << 7
F_GUEST_TSO6 = 1 << 8
F_HOST_TSO4 = 1 << 11
F_HOST_TSO6 = 1 << 12
F_MRG_RXBUF = 1 << 15
F_STATUS = 1 << 16
F_CTRL_VQ = 1 << 17
F_CTRL_RX = 1 << 18
F_CTRL_VLAN = 1 << 19
F_CTRL_RX_EXTRA = 1 << 20
F_GUEST_ANNOUNCE = 1 << 21
F_MQ = 1 << 22
F_CTRL_MAC_ADDR = 1 << 23

#: What a hostdev that carries the header of 5.1.9 makes possible.
OFFLOADS = F_CSUM | F_GUEST_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_GUEST_TSO4 | F_GUEST_TSO6
#: The part of a driver's features that CTRL_GUEST_OFFLOADS switches (5.1.9.5.9).
GUEST_OFFLOADS = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6

#: 5.1.3.1: feature -> the feature it needs, both with their names.
REQUIRES = (
    ("GUEST_TSO4", F_GUEST_TSO4, "GUEST_CSUM", F_GUEST_CSUM),
    ("GUEST_TSO6", F_GUEST_TSO6, "GUEST_CSUM", F_GUEST_CSUM),
    ("HOST_TSO4", F_HOST_TSO4, "CSUM", F_CSUM),
    ("HOST_TSO6", F_HOST_TSO6, "CSUM", F_CSUM),
    ("CTRL_RX", F_CTRL_RX, "CTRL_VQ", F_CTRL_VQ),
    ("CTRL_VLAN", F_CTRL_VLAN, "CTRL_VQ", F_CTRL_VQ),
    ("GUEST_ANNOUNCE", F_GUEST_ANNOUNCE, "CTRL_VQ", F_CTRL_VQ),
    ("MQ", F_MQ, "CTRL_VQ", F_CTRL_VQ),
    ("CTRL_MAC_ADDR", F_CTRL_MAC_ADDR, "CTRL_VQ", F_CTRL_VQ),
)

# Bits of ``status`` in the configuration (5.1.4).
S_LINK_UP = 1
S_ANNOUNCE = 2

#: struct virtio_net_config up to ``mtu`` (5.1.4): mac, status, max_virtqueue_pairs, mtu.
CONFIG = struct.Struct("<6sHHH")

#: struct virtio_net_hdr (5.1.9): flags, gso_type, hdr_len, gso_size, csum_start, csum_offset,
#: num_buffers. Always 12 bytes with VERSION_1.
HEADER = struct.Struct("<BBHHHHH")
HEADER_BYTES = HEADER.size
NUM_BUFFERS = struct.Struct("<H")
NUM_BUFFERS_OFFSET = 10

HDR_NEEDS_CSUM = 1
HDR_DATA_VALID = 2
GSO_NONE = 0
GSO_TCPV4 = 1
GSO_TCPV6 = 4

# Control queue (5.1.9.5): classes, commands and the answer.
CTRL_RX = 0
CTRL_RX_PROMISC, CTRL_RX_ALLMULTI, CTRL_RX_ALLUNI = 0, 1, 2
CTRL_RX_NOMULTI, CTRL_RX_NOUNI, CTRL_RX_NOBCAST = 3, 4, 5
CTRL_MAC = 1
CTRL_MAC_TABLE_SET, CTRL_MAC_ADDR_SET = 0, 1
CTRL_VLAN = 2
CTRL_VLAN_ADD, CTRL_VLAN_DEL = 0, 1
CTRL_ANNOUNCE = 3
CTRL_ANNOUNCE_ACK = 0
CTRL_MQ = 4
CTRL_MQ_VQ_PAIRS_SET = 0
CTRL_GUEST_OFFLOADS = 5
CTRL_GUEST_OFFLOADS_SET = 0
CTRL_OK = b"\0"
CTRL_ERR = b"\1"

#: Ethernet: two addresses and a type; a VLAN tag more.
ETHERNET_BYTES = 14
VLAN_BYTES = 4
#: The longest frame: what a driver has to have room for with TSO, less the header (5.1.9.3.1), which
#: is an IP packet of 64 KiB behind its Ethernet header and a VLAN tag.
FRAME_BYTES_MAX = 65535 + ETHERNET_BYTES + VLAN_BYTES
