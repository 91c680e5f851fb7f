"""The virtio block device (virtio 1.4, 5.2): glue between the queue, the parser and the disk."""

from __future__ import annotations

from collections.abc import Mapping

from qvm_virtio_blk import spec
from qvm_virtio_blk.backend import Backend
from qvm_virtio_blk.image import open_disk
from qvm_virtio_blk.options import BlkOptions, identity
from qvm_virtio_blk.request import Request, RequestError, parse
from qvm_virtio_blk.stats import Stats
from qvmcore.api import GuestEnd, Phase, VdevContext, VirtioVdev, Virtqueue

QUEUE_SIZE = 256
#: Data segments of a request: the queue without the header's and the status's descriptor.
SEG_MAX = QUEUE_SIZE - 2
#: Seconds the last flush may take: the host may have gigabytes of dirty pages for a slow disk.
FLUSH_DEADLINE = 30.0


class VirtioBlk(VirtioVdev):
    """A disk. Requests are served in the order the driver offers them."""

    vdev_type = "virtio-blk"
    summary = "a disk backed by a raw image, a block device or memory"
    Options = BlkOptions
    device_id = spec.DEVICE_ID
    queue_sizes = (QUEUE_SIZE,)

    def __init__(self, ctx: VdevContext, options: BlkOptions) -> None:
        super().__init__(ctx, options)
        self._disk = options.disk
        self._backend: Backend | None = None
        self._id = identity(options, ctx.name)
        self._seg_max = QUEUE_SIZE
        self._default_writeback = self._writeback = options.cache == "writeback"
        self._durable = not self._writeback
        self._stats = Stats(ctx.log)

    def on_configured(self) -> None:
        """Open and lock the disk; its last flush comes before it is released."""
        self._backend = open_disk(self._disk, self.ctx.base_dir, self.options.block_size)
        self.ctx.on_terminate(self._last_flush, phase=Phase.FLUSH, deadline=FLUSH_DEADLINE)

    def device_features(self) -> int:
        """5.2.3. A read-only disk has nothing to flush and no cache to switch."""
        features = spec.F_SEG_MAX | spec.F_BLK_SIZE | spec.F_TOPOLOGY
        if self._disk.readonly:
            return features | spec.F_RO
        return features | spec.F_FLUSH | spec.F_CONFIG_WCE

    def config_space(self) -> bytes:
        """struct virtio_blk_config (5.2.4)."""
        options: BlkOptions = self.options
        capacity = self._backend.size // spec.SECTOR if self._backend is not None else 0
        return spec.CONFIG.pack(
            capacity, 0, SEG_MAX, 0, 0, 0, options.block_size,
            options.physical_block_exponent, 0,
            options.min_io_size // options.block_size, options.opt_io_size // options.block_size,
            self._writeback, 0, 1,
        )  # fmt: skip

    def config_write(self, offset: int, data: bytes) -> None:
        """Only ``writeback`` may be written (5.2.6.1): 0 makes every write durable, 1 not."""
        legal = offset == spec.CONFIG_WRITEBACK_OFFSET and data in (b"\0", b"\1")
        if legal and self.virtio.features & spec.F_CONFIG_WCE:
            self._writeback = data == b"\1"
            self._durable = not self._writeback

    def on_activate(self, features: int) -> None:
        """A driver that cannot flush gets durable writes (5.2.5.2, 5.2.6.2)."""
        self._seg_max = SEG_MAX if features & spec.F_SEG_MAX else QUEUE_SIZE
        if not features & spec.F_FLUSH:
            self._writeback = False
            self.virtio.config_changed()
        self._durable = not self._writeback

    def on_deactivate(self) -> None:
        """The next driver starts with the configured cache mode."""
        self._writeback = self._default_writeback

    def handle_queue(self, index: int, queue: Virtqueue) -> None:
        """Serve everything offered. The hot path: one pass, no allocation but the request."""
        backend = self._backend
        assert backend is not None
        capacity, seg_max = backend.size, self._seg_max
        read, push = backend.read, queue.push
        reads = moved = 0
        try:
            for chain in queue:
                written = 1
                try:
                    request = parse(chain, capacity, seg_max)
                    kind, offset, length, views = request
                    if kind == spec.T_IN:
                        read(offset, length, views)
                        reads += 1
                        moved += length
                        written = length + 1
                    else:
                        written = self._serve(backend, request)
                    status = spec.S_OK
                except RequestError as error:
                    status, written = error.status, 1
                    self._stats.failed(self.ctx.name, error.why)
                except OSError as error:
                    status, written = spec.S_IOERR, 1
                    self._stats.failed(self.ctx.name, f"host: {error.strerror or error}")
                last = chain.writers[-1]
                last[len(last) - 1] = status
                # "written" counts from the first byte on: a status behind untouched room is not in it.
                push(chain, written if written == chain.writable else 0)
        finally:
            self._stats.reads += reads
            self._stats.bytes_read += moved

    def _serve(self, backend: Backend, request: Request) -> int:
        """Everything but a read; returns the bytes written into the chain, the status included."""
        kind, offset, length, views = request
        if kind == spec.T_OUT:
            if self._disk.readonly:
                raise RequestError(spec.S_IOERR, "write to a read-only disk")
            backend.write(offset, length, views, durable=self._durable)
            self._stats.writes += 1
            self._stats.bytes_written += length
            return 1
        if kind == spec.T_FLUSH:
            if not self._disk.readonly:
                backend.flush()
            self._stats.flushes += 1
            return 1
        done = 0
        for view in views:
            view[:] = self._id[done : done + len(view)]
            done += len(view)
        return done + 1

    def _last_flush(self, end: GuestEnd) -> None:
        if self._backend is not None and not self._disk.readonly:
            self._backend.flush()

    def on_terminate(self, end: GuestEnd) -> None:
        """Close the disk, which also unlocks it."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def status(self) -> Mapping[str, object]:
        """Counters since the start, beside those of the queue."""
        return {
            **super().status(),
            "hostdev": self.options.hostdev,
            "readonly": self._disk.readonly,
            "writeback": self._writeback,
            **self._stats.report(),
        }
