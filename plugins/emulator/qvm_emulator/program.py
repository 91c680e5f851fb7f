"""A freestanding aarch64 guest that exercises what the engine must get right.

Used by the self-test at start-up and by the tests in both modes. It is entered at EL1 with x0 = the
address of a block of 64-bit words (:class:`Slot`), turns the MMU on, and goes through: a system call,
a data abort, code patched through another mapping, WFI with both timers, MMIO, and a loop of loads and
stores during which the host interrupts it. Then it powers off.

The listing below is what runs: each line is offset, instruction word, and its disassembly.
"""

from __future__ import annotations

import enum
import struct

#: Where the listing is linked to run, and how much memory the guest expects there.
BASE = 0x4000_0000
SIZE = 0x1_0000
SLOTS = BASE + 0x4000
TABLE = BASE + 0x8000

# Page table: 1 GiB blocks. 0: devices; 1: memory; 2: the same memory again, not executable; 3: nothing.
_VALID_BLOCK = 1 << 10 | 3 << 8 | 1
_NORMAL = 1 << 2
_NEVER_EXECUTE = 3 << 53
PAGE_TABLE = struct.pack(
    "<4Q",
    1 << 10 | 1 | _NEVER_EXECUTE,
    BASE | _VALID_BLOCK | _NORMAL,
    BASE | _VALID_BLOCK | _NORMAL | _NEVER_EXECUTE,
    0,
)


class Slot(enum.IntEnum):
    """Offsets of the words the guest and its host exchange."""

    TABLE = 0
    GICD = 8
    GICC = 16
    LOOPS = 24  # length of the counting loop
    PATCHES = 32  # how often code is patched
    DEVICE = 40  # a device on the bus; nothing is mapped 4 KiB above it
    LAST_CALL = 48  # PSCI function at the end; 0 = SYSTEM_OFF
    STAGE = 64  # what has been finished: 1 .. 6
    SVC_ESR = 72
    ABORT_ESR = 80
    ABORT_FAR = 88
    STALE = 104  # patches whose old code ran
    COUNT = 112
    IRQS = 120
    VIRTUAL_TIMER_IRQS = 128
    TICKS = 136  # counter ticks for ten sleeps of TIMER_TICKS
    MMIO_READ = 144
    UNMAPPED_READ = 152
    DEVICE_IRQS = 160
    PHYSICAL_TIMER_IRQS = 168


#: What the guest must have seen.
SVC_ESR = 0x5600_0123
ABORT_ESR = 0x9600_0005
ABORT_FAR = 0xC000_1238
SLEEPS, TIMER_TICKS = 10, 12_500
#: The stage during which the host may interrupt and kick the guest.
COUNTING = 5

_LISTING = """
_start:
000 aa0003f3  mov x19, x0
004 10003fe1  adr x1, 800 <vectors>
008 d518c001  msr vbar_el1, x1
00c 91200261  add x1, x19, #0x800
010 9100003f  mov sp, x1
014 58007c61  ldr x1, fa0 <dead+0x1c>
018 d518a201  msr mair_el1, x1
01c 58007c61  ldr x1, fa8 <dead+0x24>
020 d5182041  msr tcr_el1, x1
024 f9400261  ldr x1, [x19]
028 d5182001  msr ttbr0_el1, x1
02c d5033fdf  isb
030 d508871f  tlbi vmalle1
034 d5033f9f  dsb sy
038 d5033fdf  isb
03c d5381001  mrs x1, sctlr_el1
040 d28200a2  mov x2, #0x1005
044 aa020021  orr x1, x1, x2
048 d5181001  msr sctlr_el1, x1
04c d5033fdf  isb
050 d2800021  mov x1, #0x1
054 f9002261  str x1, [x19, #64]
058 d4002461  svc #0x123
05c f9002674  str x20, [x19, #72]
060 58007a81  ldr x1, fb0 <dead+0x2c>
064 f9400022  ldr x2, [x1]
068 f9002a74  str x20, [x19, #80]
06c f9002e75  str x21, [x19, #88]
070 d2800041  mov x1, #0x2
074 f9002261  str x1, [x19, #64]
078 f9401276  ldr x22, [x19, #32]
07c d2800017  mov x23, #0x0
080 10000e18  adr x24, 240 <patched>
084 580079b9  ldr x25, fb8 <dead+0x34>
088 8b180339  add x25, x25, x24
08c d280001a  mov x26, #0x0
090 18007821  ldr w1, f94 <dead+0x10>
094 92403f42  and x2, x26, #0xffff
098 2a021421  orr w1, w1, w2, lsl #5
09c b9000321  str w1, [x25]
0a0 d50b7b39  dc cvau, x25
0a4 d5033b9f  dsb ish
0a8 f240035f  tst x26, #0x1
0ac 9a980323  csel x3, x25, x24, eq
0b0 92401344  and x4, x26, #0x1f
0b4 f1007c9f  cmp x4, #0x1f
0b8 54000060  b.eq 0c4 <_start+0xc4>
0bc d50b7523  ic ivau, x3
0c0 14000002  b 0c8 <_start+0xc8>
0c4 d508711f  ic ialluis
0c8 d5033b9f  dsb ish
0cc d5033fdf  isb
0d0 92800000  mov x0, #0xffffffffffffffff
0d4 d63f0300  blr x24
0d8 eb02001f  cmp x0, x2
0dc 9a9706f7  cinc x23, x23, ne
0e0 9100075a  add x26, x26, #0x1
0e4 eb16035f  cmp x26, x22
0e8 54fffd41  b.ne 090 <_start+0x90>
0ec f9003677  str x23, [x19, #104]
0f0 d2800061  mov x1, #0x3
0f4 f9002261  str x1, [x19, #64]
0f8 f940067b  ldr x27, [x19, #8]
0fc f9400a7c  ldr x28, [x19, #16]
100 180074c1  ldr w1, f98 <dead+0x14>
104 b9010361  str w1, [x27, #256]
108 12800001  mov w1, #0xffffffff
10c b9010761  str w1, [x27, #260]
110 52800021  mov w1, #0x1
114 b9000361  str w1, [x27]
118 52801fe1  mov w1, #0xff
11c b9000781  str w1, [x28, #4]
120 52800021  mov w1, #0x1
124 b9000381  str w1, [x28]
128 d5033fdf  isb
12c d53be045  mrs x5, cntvct_el0
130 d2800146  mov x6, #0xa
134 58007461  ldr x1, fc0 <dead+0x3c>
138 d51be301  msr cntv_tval_el0, x1
13c d2800021  mov x1, #0x1
140 d51be321  msr cntv_ctl_el0, x1
144 d5033fdf  isb
148 f9404267  ldr x7, [x19, #128]
14c d503207f  wfi
150 d50342ff  msr daifclr, #0x2
154 d5033fdf  isb
158 d50342df  msr daifset, #0x2
15c f9404268  ldr x8, [x19, #128]
160 eb0800ff  cmp x7, x8
164 54ffff40  b.eq 14c <_start+0x14c>
168 f10004c6  subs x6, x6, #0x1
16c 54fffe41  b.ne 134 <_start+0x134>
170 d53be046  mrs x6, cntvct_el0
174 cb0500c6  sub x6, x6, x5
178 f9004666  str x6, [x19, #136]
17c d53be021  mrs x1, cntpct_el0
180 58007242  ldr x2, fc8 <dead+0x44>
184 8b020021  add x1, x1, x2
188 d51be241  msr cntp_cval_el0, x1
18c d2800021  mov x1, #0x1
190 d51be221  msr cntp_ctl_el0, x1
194 d5033fdf  isb
198 d503207f  wfi
19c d50342ff  msr daifclr, #0x2
1a0 d5033fdf  isb
1a4 d50342df  msr daifset, #0x2
1a8 f9405668  ldr x8, [x19, #168]
1ac b4ffff68  cbz x8, 198 <_start+0x198>
1b0 d2800081  mov x1, #0x4
1b4 f9002261  str x1, [x19, #64]
1b8 f9401669  ldr x9, [x19, #40]
1bc 52800b41  mov w1, #0x5a
1c0 b9000121  str w1, [x9]
1c4 b9400521  ldr w1, [x9, #4]
1c8 f9004a61  str x1, [x19, #144]
1cc 91400529  add x9, x9, #0x1, lsl #12
1d0 f9400121  ldr x1, [x9]
1d4 f9004e61  str x1, [x19, #152]
1d8 39000121  strb w1, [x9]
1dc d28000a1  mov x1, #0x5
1e0 f9002261  str x1, [x19, #64]
1e4 d5033f9f  dsb sy
1e8 f9400e6a  ldr x10, [x19, #24]
1ec 9101c26b  add x11, x19, #0x70
1f0 d50342ff  msr daifclr, #0x2
1f4 f940016c  ldr x12, [x11]
1f8 9100058c  add x12, x12, #0x1
1fc f900016c  str x12, [x11]
200 f940016d  ldr x13, [x11]
204 eb0a01bf  cmp x13, x10
208 54ffff63  b.cc 1f4 <_start+0x1f4>
20c f940526d  ldr x13, [x19, #160]
210 b4ffffed  cbz x13, 20c <_start+0x20c>
214 d50342df  msr daifset, #0x2
218 d28000c1  mov x1, #0x6
21c f9002261  str x1, [x19, #64]
220 58006d80  ldr x0, fd0 <dead+0x4c>
224 f9401a61  ldr x1, [x19, #48]
228 b4000041  cbz x1, 230 <_start+0x230>
22c aa0103e0  mov x0, x1
230 d4000002  hvc #0x0
234 d503207f  wfi
238 17ffffff  b 234 <_start+0x234>
patched:
240 d2800000  mov x0, #0x0
244 d65f03c0  ret
sync:
248 d5385214  mrs x20, esr_el1
24c d5386015  mrs x21, far_el1
250 d35afe90  lsr x16, x20, #26
254 f100561f  cmp x16, #0x15
258 54000080  b.eq 268 <sync+0x20>
25c d5384030  mrs x16, elr_el1
260 91001210  add x16, x16, #0x4
264 d5184030  msr elr_el1, x16
268 d69f03e0  eret
irq:
26c a9be07e0  stp x0, x1, [sp, #-32]!
270 f9000be2  str x2, [sp, #16]
274 b9400f80  ldr w0, [x28, #12]
278 12002401  and w1, w0, #0x3ff
27c 710ff03f  cmp w1, #0x3fc
280 540002a2  b.cs 2d4 <irq+0x68>
284 f9403e62  ldr x2, [x19, #120]
288 91000442  add x2, x2, #0x1
28c f9003e62  str x2, [x19, #120]
290 71006c3f  cmp w1, #0x1b
294 540000e0  b.eq 2b0 <irq+0x44>
298 7100783f  cmp w1, #0x1e
29c 54000140  b.eq 2c4 <irq+0x58>
2a0 f9405262  ldr x2, [x19, #160]
2a4 91000442  add x2, x2, #0x1
2a8 f9005262  str x2, [x19, #160]
2ac 14000009  b 2d0 <irq+0x64>
2b0 d51be33f  msr cntv_ctl_el0, xzr
2b4 f9404262  ldr x2, [x19, #128]
2b8 91000442  add x2, x2, #0x1
2bc f9004262  str x2, [x19, #128]
2c0 14000004  b 2d0 <irq+0x64>
2c4 d51be23f  msr cntp_ctl_el0, xzr
2c8 d2800022  mov x2, #0x1
2cc f9005662  str x2, [x19, #168]
2d0 b9001380  str w0, [x28, #16]
2d4 f9400be2  ldr x2, [sp, #16]
2d8 a8c207e0  ldp x0, x1, [sp], #32
2dc d69f03e0  eret
vectors:
800 140001e1  b f84 <dead>
880 140001c1  b f84 <dead>
900 140001a1  b f84 <dead>
980 14000181  b f84 <dead>
a00 17fffe12  b 248 <sync>
a80 17fffdfb  b 26c <irq>
b00 14000121  b f84 <dead>
b80 14000101  b f84 <dead>
c00 140000e1  b f84 <dead>
c80 140000c1  b f84 <dead>
d00 140000a1  b f84 <dead>
d80 14000081  b f84 <dead>
e00 14000061  b f84 <dead>
e80 14000041  b f84 <dead>
f00 14000021  b f84 <dead>
f80 14000001  b f84 <dead>
dead:
f84 d5385214  mrs x20, esr_el1
f88 d5386015  mrs x21, far_el1
f8c d5384036  mrs x22, elr_el1
f90 14000000  b f90 <dead+0xc>
f94 d2800000  .word 0xd2800000
f98 48000000  .word 0x48000000
fa0 0000ff00  .word 0x0000ff00
fa8 80803519  .word 0x80803519
fb0 c0001238  .word 0xc0001238
fb8 40000000  .word 0x40000000
fc0 000030d4  .word 0x000030d4
fc8 0000186a  .word 0x0000186a
fd0 84000008  .word 0x84000008
"""


def image() -> bytes:
    """The program as bytes to be placed at :data:`BASE`."""
    code = bytearray(0x1000)
    for line in _LISTING.splitlines():
        words = line.split(None, 2)
        if len(words) == 3:
            struct.pack_into("<I", code, int(words[0], 16), int(words[1], 16))
    return bytes(code)
