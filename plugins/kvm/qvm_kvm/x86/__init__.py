"""What is x86-64 about the engine: structures, start modes, CPUID, interrupt controllers, registers."""
