"""VERSION, the first message: which version, and what each side can take."""

from __future__ import annotations

import json
from typing import Any

from qvm_vfio_user import spec
from qvm_vfio_user.wire import FDS_MAX, TRANSFER_MAX
from qvmcore.api import ClientError

#: DMA maps a client may have at a time: each one with a descriptor keeps two open here.
MAPS_MAX = 256


class Proposal:
    """What a client proposes, checked. Raises ClientError for what the protocol does not know.

    ``minor`` is its minor version, ``write_multiple`` whether it can send REGION_WRITE_MULTI. What else
    it says limits messages this server never sends.
    """

    def __init__(self, payload: bytes) -> None:
        major, self.minor = spec.VERSION.unpack_from(payload)
        if major != spec.MAJOR:
            raise ClientError(f"VERSION proposes {major}.{self.minor}; this server speaks {spec.MAJOR}.x")
        capabilities = _capabilities(payload[spec.VERSION.size :])
        for name in ("max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes"):
            value = capabilities.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ClientError(f"VERSION has {name} = {value!r:.40}; expected a number")
        multiple = capabilities.get("write_multiple", False)
        if not isinstance(multiple, bool):
            raise ClientError(f"VERSION has write_multiple = {multiple!r:.40}; expected true or false")
        self.write_multiple = multiple

    def answer(self, room: int) -> bytes:
        """The payload of the reply, at most ``room`` bytes: QEMU takes no more than it sent.

        Where there is no room for what is said, the client goes by the protocol's defaults.
        """
        version = spec.VERSION.pack(spec.MAJOR, min(self.minor, spec.MINOR))
        capabilities: dict[str, int] = {
            "max_msg_fds": FDS_MAX,
            "max_data_xfer_size": TRANSFER_MAX,
            "max_dma_maps": MAPS_MAX,
        }
        if self.write_multiple:
            capabilities["write_multiple"] = True
        while capabilities:
            text = json.dumps({"capabilities": capabilities}, separators=(",", ":")).encode() + b"\0"
            if len(version) + len(text) <= room:
                return version + text
            capabilities.popitem()
        return version + b"{}\0" if len(version) + 3 <= room else version


def _capabilities(data: bytes) -> dict[str, Any]:
    """The capabilities in the version data, which may be absent."""
    if not data:
        return {}
    if not data.endswith(b"\0"):
        raise ClientError("the version data do not end in a zero byte")
    try:
        text = json.loads(data[:-1].decode())
    except (ValueError, RecursionError) as error:
        raise ClientError(f"the version data are no JSON: {str(error)[:80]}") from error
    found = text.get("capabilities", {}) if isinstance(text, dict) else None
    if not isinstance(found, dict):
        raise ClientError("the version data are not an object with an object 'capabilities'")
    return found
