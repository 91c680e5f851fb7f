"""Numbers and layouts of the virtio block device (virtio 1.4, 5.2). No behaviour."""

from __future__ import annotations

import struct

DEVICE_ID = 2

#: The unit of ``sector``, of the capacity and of every data length, bytes; whatever blk_size says.
SECTOR = 512

# Feature bits (5.2.3).
F_SEG_MAX = 1 << 2
F_RO = 1 << 5
F_BLK_SIZE = 1 << 6
F_FLUSH = 1 << 9
F_TOPOLOGY = 1 << 10
F_CONFIG_WCE = 1 << 11
F_MQ = 1 << 12
F_DISCARD = 1 << 13
F_WRITE_ZEROES = 1 << 14

# Request types (5.2.6).
T_IN = 0
T_OUT = 1
T_FLUSH = 4
T_GET_ID = 8
T_DISCARD = 11
T_WRITE_ZEROES = 13

# Status bytes (5.2.6).
S_OK = 0
S_IOERR = 1
S_UNSUPP = 2

#: le32 type, le32 reserved, le64 sector.
HEADER = struct.Struct("<IIQ")

#: struct virtio_blk_discard_write_zeroes: le64 sector, le32 num_sectors, le32 flags.
SEGMENT = struct.Struct("<QII")
#: The one known flag of a segment: the range may be deallocated, T_WRITE_ZEROES only.
SEGMENT_UNMAP = 1

#: Length of the answer to T_GET_ID, bytes.
ID_BYTES = 20

#: struct virtio_blk_config up to unused1 (5.2.4): capacity in sectors, size_max, seg_max,
#: geometry (cylinders, heads, sectors), blk_size, physical_block_exp, alignment_offset,
#: min_io_size, opt_io_size (both in blocks of blk_size), writeback, unused, num_queues,
#: max_discard_sectors, max_discard_seg, discard_sector_alignment, max_write_zeroes_sectors,
#: max_write_zeroes_seg, write_zeroes_may_unmap, unused.
CONFIG = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")
CONFIG_WRITEBACK_OFFSET = 32
