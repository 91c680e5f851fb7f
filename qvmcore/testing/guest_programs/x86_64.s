# The access server of qvmcore.testing.access_server, 64-bit x86. Identity-mapped, interrupts off.
#
# rdi = the block of words both sides use, rsi = the mailbox window, rsp = the stack.
        .code64
start:  lidt    0x40(%rdi)
        sti
next:   movl    (%rsi), %eax            # waits in the host for an order: the offset of a routine
        lea     start(%rip), %rbx
        add     %rax, %rbx
        mov     0x00(%rdi), %rdx        # address
        mov     0x08(%rdi), %rcx        # value
        jmp     *%rbx
done:   mov     %rcx, 0x08(%rdi)
        jmp     next

interrupt:                              # the vector is on the stack
        push    %rax
        mov     8(%rsp), %rax
        incl    0x400(%rdi,%rax,4)
        mov     $0xfee000b0, %eax       # end of interrupt
        movl    $0, (%rax)
        pop     %rax
        add     $8, %rsp
        iretq

exception:                              # told to the host, then the next order
        pop     %rax
        or      $0x100, %eax
        mov     %rax, 0x10(%rdi)
        mov     0x28(%rdi), %rsp
        sti
        jmp     next

        .org    0x100                   # the routines, one every 32 bytes, in the order of Order
        movzbl  (%rdx), %ecx
        jmp     done
        .org    0x120
        movzwl  (%rdx), %ecx
        jmp     done
        .org    0x140
        movl    (%rdx), %ecx
        jmp     done
        .org    0x160
        mov     (%rdx), %rcx
        jmp     done
        .org    0x180
        movb    %cl, (%rdx)
        jmp     done
        .org    0x1a0
        movw    %cx, (%rdx)
        jmp     done
        .org    0x1c0
        movl    %ecx, (%rdx)
        jmp     done
        .org    0x1e0
        mov     %rcx, (%rdx)
        jmp     done
        .org    0x200                   # count until told to stop
        mov     0x20(%rdi), %rax
1:      inc     %rax
        mov     %rax, 0x20(%rdi)
        cmpq    $0, 0x18(%rdi)
        je      1b
        jmp     done
        .org    0x220                   # sleep until told to stop
1:      cli
        cmpq    $0, 0x18(%rdi)
        jne     2f
        sti
        hlt
        jmp     1b
2:      sti
        jmp     done
        .org    0x240                   # an exception without a table: triple fault
        lidt    0x50(%rdi)
        ud2
        .org    0x260
        in      %dx, %al
        movzbl  %al, %ecx
        jmp     done
        .org    0x280
        in      %dx, %ax
        movzwl  %ax, %ecx
        jmp     done
        .org    0x2a0
        in      %dx, %eax
        movl    %eax, %ecx
        jmp     done
        .org    0x2c0
        movl    %ecx, %eax
        out     %al, %dx
        jmp     done
        .org    0x2e0
        movl    %ecx, %eax
        out     %ax, %dx
        jmp     done
        .org    0x300
        movl    %ecx, %eax
        out     %eax, %dx
        jmp     done
