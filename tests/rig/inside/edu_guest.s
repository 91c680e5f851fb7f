// A guest that drives QEMU's edu device: 64-bit Arm on the board arm64-virt. EL1, MMU off. It runs where it
// is loaded, and its order is the word at 8. What it finds it says on the UART, and it ends by PSCI.
//
// From its start: 0x10000 words of the handler, 0x20000 stack, 0x30000 what the device reads, 0x41000 what
// it writes, in the middle of three pages of a known content.
//
// x19 = words: 0 interrupts seen and not waited for, 8 their number, 16 those without a cause, 24 the line
// x20 = UART, x21 = GIC CPU interface, x22 = BAR 0, x23 = configuration space of the function
// x26 = what the device reads, x27 = what it writes
        .equ    UART, 0x09000000
        .equ    GPIO, 0x09030000
        .equ    GICD, 0x08000000
        .equ    GICC, 0x08010000
        .equ    FRAME, 0x08020000       // of GICv2m
        .equ    MESSAGE, 120
        .equ    ECAM, 0x10000000
        .equ    PLACE, 0x28000000       // where it puts BAR 0
        .equ    NOWHERE, 0x30000000     // no memory
        .equ    BUTTON, 39
        .equ    ID, 0x11e81234
        .equ    SIZE, 2048              // bytes of a transfer
        .equ    BUFFER, 0x40000         // in the device
        .equ    COMPUTED, 0x001         // causes of an interrupt
        .equ    MOVED, 0x100
        .equ    KNOWN, 0xa5a5a5a5

        .macro  say text
        bl      say
        .asciz  "\text"
        .balign 4
        .endm
        .macro  tell text, register
        say     "\text "
        mov     w0, \register
        bl      hex
        .endm
        .macro  read text, width, register, offset
        \width  \register, [x22, \offset]
        mov     w9, w0
        tell    "\text", w9
        .endm

start:  b       main
        .org    8
order:  .quad   0

say:    ldrb    w1, [x30], #1           // the text behind the call
        cbz     w1, 1f
        str     w1, [x20]
        b       say
1:      add     x30, x30, #3
        and     x30, x30, #~3
        ret

hex:    mov     w1, #8                  // w0, and the end of the line
1:      ror     w0, w0, #28
        and     w2, w0, #15
        add     w2, w2, #'0'
        cmp     w2, #'9'
        b.ls    2f
        add     w2, w2, #'a' - '9' - 1
2:      str     w2, [x20]
        subs    w1, w1, #1
        b.ne    1b
        mov     w2, #'\n'
        str     w2, [x20]
        ret

await:  msr     daifset, #2             // until the cause in x0 was seen
        ldr     x1, [x19]
        tst     x1, x0
        b.ne    1f
        wfi
        msr     daifclr, #2
        b       await
1:      bic     x1, x1, x0
        str     x1, [x19]
        msr     daifclr, #2
        ret

move:   str     w0, [x22, #0x80]        // from w0 to w1 by command w2; until it is done
        str     w1, [x22, #0x88]
        mov     w0, #SIZE
        str     w0, [x22, #0x90]
        str     w2, [x22, #0x98]
        mov     w0, #MOVED
        tbnz    w2, #2, await
1:      ldr     w0, [x22, #0x98]
        tbnz    w0, #0, 1b
        ret

compute:
        mov     x28, x30
        mov     w0, #0x80
        str     w0, [x22, #0x20]        // with an interrupt
        mov     w0, #10
        str     w0, [x22, #8]
        mov     x0, #COMPUTED
        bl      await
        read    "factorial", ldr, w0, #8
        ret     x28

load:   mov     x28, x30                // a pattern into the device
        ldr     w1, =0x03020100
        ldr     w2, =0x04040404
        mov     w3, #SIZE / 4
        mov     x0, x26
1:      str     w1, [x0], #4
        add     w1, w1, w2
        eor     w1, w1, w3, lsl #16
        subs    w3, w3, #1
        b.ne    1b
        mov     w0, w26
        mov     w1, #BUFFER
        mov     w2, #1
        bl      move
        ret     x28

off:    ldr     w0, =0x84000008
        hvc     #0
        b       off
        .ltorg

        .org    0x800
vectors:
        .org    0xa00
        mrs     x9, esr_el1
        mrs     x10, far_el1
        tell    "fault", w9
        tell    "at", w10
        b       off
        .org    0xa80
        stp     x0, x1, [sp, #-32]!
        str     x2, [sp, #16]
        ldr     w0, [x21, #12]
        and     w1, w0, #0x3ff
        cmp     w1, #1020
        b.hs    3f
        cmp     w1, #BUTTON
        b.eq    4f
        ldr     w2, [x22, #0x24]
        cbz     w2, 1f
        str     w2, [x22, #0x64]
        str     x1, [x19, #24]
        ldr     x1, [x19]
        orr     x1, x1, x2
        str     x1, [x19]
        ldr     x1, [x19, #8]
        add     x1, x1, #1
        str     x1, [x19, #8]
        b       2f
1:      ldr     x1, [x19, #16]          // it was quiet before its level was seen
        add     x1, x1, #1
        str     x1, [x19, #16]
2:      str     w0, [x21, #16]
3:      ldr     x2, [sp, #16]
        ldp     x0, x1, [sp], #32
        eret
4:      say     "button\n"
        b       off

main:   adr     x0, start
        add     x19, x0, #0x10, lsl #12
        add     x1, x0, #0x20, lsl #12
        mov     sp, x1
        add     x26, x0, #0x30, lsl #12
        add     x27, x0, #0x41, lsl #12
        ldr     x20, =UART
        ldr     x21, =GICC
        adr     x0, vectors
        msr     vbar_el1, x0
        isb
        ldr     x0, =GICD
        mov     w1, #0xf8               // INTA to INTD and the button: 35 to 39
        str     w1, [x0, #0x104]
        mov     w1, #1
        str     w1, [x0]
        mov     w2, #0xff
        str     w2, [x21, #4]
        str     w1, [x21]
        ldr     x0, =GPIO
        mov     w1, #8                  // line 3, a rising edge
        str     w1, [x0, #0x40c]
        str     w1, [x0, #0x410]

        ldr     x23, =ECAM              // find the function
        ldr     w1, =ID
        mov     w9, #0
1:      ldr     w0, [x23]
        cmp     w0, w1
        b.eq    2f
        add     x23, x23, #8, lsl #12
        add     w9, w9, #1
        cmp     w9, #32
        b.ne    1b
        say     "no edu\n"
        b       off
2:      tell    "device", w9
        strh    wzr, [x23, #4]          // the size of its BAR, and another place for it
        mov     w0, #-1
        str     w0, [x23, #0x10]
        ldr     w9, [x23, #0x10]
        and     w9, w9, #~15
        neg     w9, w9
        tell    "size", w9
        bl      place
        read    "id", ldr, w0, #0
        msr     daifclr, #2
        ldr     x0, order
        cmp     x0, #1
        b.eq    loop
        cmp     x0, #2
        b.eq    abuse
        b.hi    message

// order 0: everything once, as a driver does it
once:   ldr     w0, =0x12345678
        str     w0, [x22, #4]
        read    "inverted", ldr, w0, #4
        bl      compute
        sub     x0, x27, #1, lsl #12
        ldr     w1, =KNOWN
        mov     w2, #0x3000 / 4
1:      str     w1, [x0], #4
        subs    w2, w2, #1
        b.ne    1b
        bl      load
        mov     w0, #BUFFER
        mov     w1, w27
        mov     w2, #7                  // to memory, with an interrupt
        bl      move
        mov     x0, x26                 // what has come
        mov     x1, x27
        mov     w2, #SIZE / 4
        mov     w9, #0
1:      ldr     w3, [x0], #4
        ldr     w4, [x1], #4
        cmp     w3, w4
        cinc    w9, w9, eq
        subs    w2, w2, #1
        b.ne    1b
        tell    "moved", w9
        sub     x0, x27, #1, lsl #12    // and what is around it
        ldr     w1, =KNOWN
        mov     w2, #0x3000 / 4
        mov     w9, #0
1:      ldr     w3, [x0], #4
        cmp     w3, w1
        cinc    w9, w9, eq
        subs    w2, w2, #1
        b.ne    1b
        tell    "around", w9
        ldr     w1, =KNOWN
        str     w1, [x27]
        mov     w0, #2                  // without bus mastering it does not come
        strh    w0, [x23, #4]
        mov     w0, #BUFFER
        mov     w1, w27
        mov     w2, #3
        bl      move
        ldr     w9, [x27]
        tell    "unmastered", w9
        ldr     w9, [x19, #8]
        tell    "interrupts", w9
        ldr     w9, [x19, #24]
        tell    "line", w9
        say     "end\n"
        b       off

// order 1: transfers to memory without end
loop:   bl      load
        ldr     w25, [x26]
        mov     w24, #0
1:      str     wzr, [x27]
        mov     w0, #BUFFER
        mov     w1, w27
        mov     w2, #7
        bl      move
        ldr     w0, [x27]
        cmp     w0, w25
        b.ne    2f
        add     w24, w24, #1
        cmp     w24, #2
        b.ne    1b
        say     "looping\n"
        b       1b
2:      say     "lost\n"
        b       off

// order 2: what no driver does
abuse:  read    "byte", ldrb, w0, #0
        read    "half", ldrh, w0, #0
        read    "wide", ldr, x0, #0
        mov     x11, #-1
        strb    w11, [x22, #1]          // the first register is read-only
        strh    w11, [x22, #2]
        str     x11, [x22, #-8]         // before it, and behind the last one
        add     x10, x22, #0x100, lsl #12
        str     x11, [x10]
        ldr     w9, [x10]
        tell    "behind", w9
        ldr     x9, [x10, #-4]
        tell    "across", w9
        ldr     w9, [x10, #-4]
        tell    "last", w9
        ldr     x9, [x23]
        tell    "wide config", w9
        str     x11, [x23, #0x10]
        strh    wzr, [x23, #4]          // decoding off
        read    "closed", ldr, w0, #0
        mov     w0, #-1                 // all of its configuration space: ones, then zeros
1:      mov     x1, #0
2:      str     w0, [x23, x1]
        add     x1, x1, #4
        cmp     x1, #1, lsl #12
        b.ne    2b
        add     w0, w0, #1
        cbz     w0, 1b
        ldr     w9, [x23]
        tell    "still", w9
        bl      place
        bl      load                    // a transfer to where nothing is
        mov     w0, #BUFFER
        ldr     w1, =NOWHERE
        mov     w2, #3
        bl      move
        read    "id", ldr, w0, #0
        bl      compute
        say     "alive\n"
        b       off

// order 3: as 0, interrupts by MSI
message:
        ldr     x0, =GICD
        mov     w1, #1 << (MESSAGE % 32)
        str     w1, [x0, #0x100 + MESSAGE / 32 * 4]
        ldrb    w0, [x23, #0x34]
1:      cbz     w0, 3f
        add     x1, x23, x0
        ldrb    w2, [x1]
        cmp     w2, #5
        b.eq    2f
        ldrb    w0, [x1, #1]
        b       1b
2:      ldr     w0, =FRAME + 0x40
        str     w0, [x1, #4]
        mov     w0, #MESSAGE
        ldrh    w2, [x1, #2]
        add     x3, x1, #8              // data is here, or behind the upper half of the address
        tbz     w2, #7, 4f
        str     wzr, [x3], #4
4:      strh    w0, [x3]
        orr     w2, w2, #1
        strh    w2, [x1, #2]
        b       once
3:      say     "no MSI\n"
        b       off

place:  ldr     x22, =PLACE             // BAR 0, then memory and bus mastering
        str     w22, [x23, #0x10]
        mov     w0, #6
        strh    w0, [x23, #4]
        ret
        .ltorg
