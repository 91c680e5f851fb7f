"""Loading a guest (floor 8): kernel, initrd and the tables that describe the machine, by architecture.

:mod:`~qvmcore.load.arm64` and :mod:`~qvmcore.load.x86` each have one function that a board calls; what
they share is in ``common`` (files into guest memory), ``kinds`` (what a file is), ``elf`` and
``decompress``.
"""
