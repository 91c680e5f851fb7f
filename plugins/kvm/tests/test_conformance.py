"""The contract of an engine, kept by KVM on this machine's own /dev/kvm."""

from __future__ import annotations

from qvm_kvm.engine import KvmEngine

from qvmcore.testing.engine_conformance import EngineConformance
from qvmcore.testing.guest_archs import X86_64


class TestKvm(EngineConformance):
    engine = KvmEngine()
    arch = X86_64()
