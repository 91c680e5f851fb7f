"""Options of shmem: what a ``[[vdev]]`` table may say, and which names a guest may use. Opens nothing."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated

import msgspec
from msgspec import Meta

from qvm_shmem.spec import MAX_NAME, PAGE
from qvmcore.api import HostPath, Size

#: Bytes of guest-physical space for the regions of one vdev, their control pages included.
APERTURE = 16 << 20
#: Longest name on the host: a file name of 255 bytes with every character escaped, and a suffix.
_MAX_HOST_NAME = 80


class Precreated(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A region that exists from the start of the VM to its end."""

    name: Annotated[str, Meta(description="as the guest says it")]
    size: Annotated[Size, Meta(ge=1, le=APERTURE - PAGE, description="bytes; rounded up to pages")]

    @property
    def pages(self) -> int:
        """The size in pages of 4 KiB."""
        return -(-self.size // PAGE)


class ShmemOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which regions the guest may have, and where they are on the host."""

    allow: Annotated[
        list[str], Meta(description="shell patterns of names the guest may use; all others it may not")
    ] = []
    deny: Annotated[list[str], Meta(description="shell patterns of names the guest may not use")] = []
    create: Annotated[list[Precreated], Meta(description="regions that exist from the start")] = []
    subst: Annotated[
        list[str], Meta(description="'ORIGINAL,PREFIX': what begins with ORIGINAL has PREFIX on the host")
    ] = []
    directory: Annotated[
        HostPath | None, Meta(description="where the regions are; default: /dev/shm/qvm-shmem-UID")
    ] = None

    def __post_init__(self) -> None:
        if self.allow and self.deny:
            raise ValueError(
                "allow and deny: use one of them; allow denies all other names, deny allows them"
            )
        for rule in self.subst:
            if "," not in rule:
                raise ValueError(f"subst {rule!r}: expected 'ORIGINAL,PREFIX' or ',PREFIX' for every name")
        for region in self.create:
            if not is_legal(region.name) or self.host_name(region.name) is None:
                raise ValueError(
                    f"create: {region.name!r} cannot be a name: 1 to {MAX_NAME - 1} printable ASCII "
                    "characters, no '/'"
                )

    def may_use(self, name: str) -> bool:
        """Whether the guest may create or attach to a region, by the guest's name for it."""
        if self.allow:
            return any(fnmatchcase(name, pattern) for pattern in self.allow)
        return not any(fnmatchcase(name, pattern) for pattern in self.deny)

    def host_name(self, name: str) -> str | None:
        """The host's name of a region, by the first rule that fits; None when it cannot be one."""
        for rule in self.subst:
            original, _, prefix = rule.partition(",")
            if name.startswith(original):
                name = prefix + name[len(original) :]
                break
        legal = 0 < len(name) <= _MAX_HOST_NAME and name.isascii() and name.isprintable()
        return name if legal and "/" not in name else None


def is_legal(name: str) -> bool:
    """Whether a guest's name fits the register with its final zero, and is plain text."""
    return 0 < len(name) < MAX_NAME and name.isascii() and name.isprintable() and "/" not in name
