// The access server of qvmcore.testing.access_server, 64-bit Arm. EL1, MMU off, interrupts masked.
//
// x19 = the block of words both sides use, x20 = the mailbox window, x21 = the CPU interface of the
// GICv2. sp is taken from the block.
start:  ldr     x0, [x19, #0x28]
        mov     sp, x0
        adr     x1, vectors
        msr     vbar_el1, x1
        isb
        msr     daifclr, #2
next:   ldr     w0, [x20]               // waits in the host for an order: the offset of a routine
        adr     x1, start
        add     x1, x1, x0
        ldr     x2, [x19, #0x00]        // address
        ldr     x3, [x19, #0x08]        // value
        br      x1
done:   str     x3, [x19, #0x08]
        b       next

        .org    0x100                   // the routines, one every 32 bytes, in the order of Order
        ldrb    w3, [x2]
        b       done
        .org    0x120
        ldrh    w3, [x2]
        b       done
        .org    0x140
        ldr     w3, [x2]
        b       done
        .org    0x160
        ldr     x3, [x2]
        b       done
        .org    0x180
        strb    w3, [x2]
        b       done
        .org    0x1a0
        strh    w3, [x2]
        b       done
        .org    0x1c0
        str     w3, [x2]
        b       done
        .org    0x1e0
        str     x3, [x2]
        b       done
        .org    0x200                   // count until told to stop
        ldr     x4, [x19, #0x20]
1:      add     x4, x4, #1
        str     x4, [x19, #0x20]
        ldr     x5, [x19, #0x18]
        cbz     x5, 1b
        b       done
        .org    0x220                   // sleep until told to stop
1:      msr     daifset, #2
        ldr     x5, [x19, #0x18]
        cbnz    x5, 2f
        wfi
        msr     daifclr, #2
        b       1b
2:      msr     daifclr, #2
        b       done
        .org    0x240                   // PSCI SYSTEM_OFF
        mov     x0, #0x84000000
        add     x0, x0, #8
        hvc     #0
        b       .

        .org    0x800
vectors:
        .org    0xa00
exception:                              // told to the host, then the next order
        mrs     x0, esr_el1
        str     x0, [x19, #0x10]
        ldr     x0, [x19, #0x28]
        mov     sp, x0
        adr     x0, next
        msr     elr_el1, x0
        eret
        .org    0xa80
interrupt:
        stp     x0, x1, [sp, #-16]!
        stp     x2, x3, [sp, #-16]!
        ldr     w0, [x21, #0x0c]
        and     w1, w0, #0x3ff
        cmp     w1, #1020
        b.hs    1f
        add     x2, x19, x1, lsl #2
        ldr     w3, [x2, #0x400]
        add     w3, w3, #1
        str     w3, [x2, #0x400]
        str     w0, [x21, #0x10]
1:      ldp     x2, x3, [sp], #16
        ldp     x0, x1, [sp], #16
        eret
