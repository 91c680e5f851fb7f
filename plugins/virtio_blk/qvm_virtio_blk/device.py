"""The virtio block device (virtio 1.4, 5.2): glue between the queues, the parser and the disk."""

from __future__ import annotations

from collections.abc import Mapping

from qvm_virtio_blk import spec
from qvm_virtio_blk.backend import Backend, ClosedBackend
from qvm_virtio_blk.image import open_disk
from qvm_virtio_blk.late import LateOpen
from qvm_virtio_blk.link import locate
from qvm_virtio_blk.nbd import NbdDisk
from qvm_virtio_blk.options import BlkOptions, identity
from qvm_virtio_blk.request import (
    MAX_DISCARD_SECTORS,
    MAX_DISCARD_SEG,
    MAX_ZEROES_SECTORS,
    MAX_ZEROES_SEG,
    Request,
    RequestError,
    parse,
    where,
)
from qvm_virtio_blk.session import Session, answer, fill, reason
from qvm_virtio_blk.stats import Stats
from qvmcore.api import GuestEnd, Phase, VdevContext, VirtioVdev, Virtqueue

#: One request holds a MiB of single pages, in a chain that is not longer than its queue (2.7.5.3.1).
QUEUE_SIZE = 512
#: Data segments of a request: the queue without the header's and the status's descriptor.
SEG_MAX = QUEUE_SIZE - 2
#: Seconds the last flush may take: the host may have gigabytes of dirty pages for a slow disk.
FLUSH_DEADLINE = 30.0
#: Seconds until a new size of the image is noticed when the guest makes no request meanwhile.
SIZE_PERIOD = 1.0


class VirtioBlk(VirtioVdev):
    """A disk. Requests of a queue are served in the order the driver offers them."""

    vdev_type = "virtio-blk"
    summary = "a disk backed by a raw image, a block device, an NBD server or memory"
    Options = BlkOptions
    device_id = spec.DEVICE_ID
    queue_sizes: tuple[int, ...] = (QUEUE_SIZE,)

    def __init__(self, ctx: VdevContext, options: BlkOptions) -> None:
        self.queue_sizes = (QUEUE_SIZE,) * options.queues
        super().__init__(ctx, options)
        self._disk = options.disk
        # A server answers in its own order: one slow answer must not hold back those that are there.
        self.in_order = not self._disk.nbd
        self._backend: Backend = ClosedBackend()
        self._remote: NbdDisk | None = None
        self._late: LateOpen | None = None
        self._default_writeback = self._writeback = options.cache == "writeback"
        self._stats = Stats(ctx.log)
        self._session = Session(ctx.name, identity(options, ctx.name), self._disk.readonly, self._stats)
        #: Queues that exist: only the first one unless MQ was negotiated (5.2.2).
        self._queues = 1

    def on_configured(self) -> None:
        """Open the disk, or prepare for that; its last flush comes before it is released."""
        options, worker = self.options, self.ctx.worker
        if self._disk.nbd:
            self._remote = remote = NbdDisk(
                locate(self._disk.nbd, self.ctx.base_dir), self._session, block_size=options.block_size,
                timeout=options.nbd_timeout, worker=worker, changed=self.virtio.config_changed,
                kick=self.virtio.kick, log=self.ctx.log,
            )  # fmt: skip
            now, attempt = remote.link.connect_now, remote.link.attempt
        else:
            now, attempt = self._open, self._open_late
        if options.delayed is None:
            now()
        else:
            seconds = None if options.delayed == "forever" else float(options.delayed)
            self._late = LateOpen(worker, attempt, seconds, self.ctx.log)
        self.ctx.on_terminate(self._last_flush, phase=Phase.FLUSH, deadline=FLUSH_DEADLINE)

    def _open(self) -> None:
        options = self.options
        self._backend = open_disk(
            self._disk, self.ctx.base_dir, options.block_size, options.dio, self.ctx.log
        )

    def _open_late(self) -> bool:
        self._open()
        self.virtio.config_changed()
        return True

    def on_starting(self) -> None:
        """From here on a file or block device may change its size; a server tells by itself."""
        if self._remote is None and not self._disk.memory:
            self.ctx.worker.call_later(SIZE_PERIOD, self._watch_size)

    def device_features(self) -> int:
        """5.2.3. A read-only disk has nothing to flush, no cache to switch and nothing to discard."""
        features = spec.F_SEG_MAX | spec.F_BLK_SIZE | spec.F_TOPOLOGY
        if self.options.queues > 1:
            features |= spec.F_MQ
        if self._disk.readonly:
            return features | spec.F_RO
        features |= spec.F_FLUSH | spec.F_CONFIG_WCE | spec.F_WRITE_ZEROES
        # A late disk may turn out not to make holes; then discards change nothing, as they may.
        if self._late is not None or self._store.can_discard:
            features |= spec.F_DISCARD
        return features

    @property
    def _store(self) -> Backend | NbdDisk:
        return self._backend if self._remote is None else self._remote

    def refuse_features(self, features: int) -> str:
        """The driver is there: a late disk is opened now, so that it is there when it is measured."""
        if self._late is not None:
            self._late.touch()
        return ""

    def config_space(self) -> bytes:
        """struct virtio_blk_config (5.2.4)."""
        options: BlkOptions = self.options
        store = self._store
        writable = not self._disk.readonly
        discard = bool(self.device_features() & spec.F_DISCARD)
        granularity = max(options.block_size, store.granularity)
        return spec.CONFIG.pack(
            store.size // spec.SECTOR, 0, SEG_MAX, 0, 0, 0, options.block_size,
            options.physical_block_exponent, 0,
            options.min_io_size // options.block_size, options.opt_io_size // options.block_size,
            self._writeback, 0, options.queues,
            discard * MAX_DISCARD_SECTORS, discard * MAX_DISCARD_SEG,
            discard * granularity // spec.SECTOR,
            writable * MAX_ZEROES_SECTORS, writable * MAX_ZEROES_SEG, discard and store.can_discard,
        )  # fmt: skip

    def config_write(self, offset: int, data: bytes) -> None:
        """Only ``writeback`` may be written (5.2.6.1): 0 makes every write durable, 1 not."""
        legal = offset == spec.CONFIG_WRITEBACK_OFFSET and data in (b"\0", b"\1")
        if legal and self.virtio.features & spec.F_CONFIG_WCE:
            self._writeback = data == b"\1"
            self._session.durable = not self._writeback

    def on_activate(self, features: int) -> None:
        """A driver that cannot flush gets durable writes (5.2.5.2, 5.2.6.2)."""
        session = self._session
        session.features = features
        session.seg_max = SEG_MAX if features & spec.F_SEG_MAX else QUEUE_SIZE
        self._queues = self.options.queues if features & spec.F_MQ else 1
        if not features & spec.F_FLUSH:
            self._writeback = False
            self.virtio.config_changed()
        session.durable = not self._writeback

    def on_deactivate(self) -> None:
        """The next driver starts with the configured cache mode."""
        self._writeback = self._default_writeback
        if self._remote is not None:
            self._remote.drop()

    def handle_queue(self, index: int, queue: Virtqueue) -> None:
        """Serve everything offered. The hot path: one pass, no allocation but the request."""
        if index >= self._queues:
            return
        if self._remote is not None:
            self._remote.serve(index, queue)
            return
        backend, session = self._backend, self._session
        capacity, seg_max, features = backend.size, session.seg_max, session.features
        read, push = backend.read, queue.push
        measured = False
        reads = moved = 0
        try:
            for chain in queue:
                written = 1
                try:
                    request = parse(chain, capacity, seg_max, features)
                    if request.kind == spec.T_IN:
                        length = request.length
                        read(request.offset, length, request.views)
                        reads += 1
                        moved += length
                        written = length + 1
                    else:
                        if not measured:
                            # A write behind the end of a file that has shrunk would have it grow again.
                            measured = True
                            self._check_size(backend)
                        written = self._serve(backend, request)
                    status = spec.S_OK
                except (RequestError, OSError) as error:
                    status = self._failed(error)
                    self._check_size(backend)  # it may have been about what is there now, or no more
                # As answer() does, without the call.
                last = chain.writers[-1]
                last[len(last) - 1] = status
                push(chain, written if written == chain.writable else 0)
        finally:
            self._stats.reads += reads
            self._stats.bytes_read += moved

    def serve_now(self, index: int, queue: Virtqueue) -> bool:
        """Reads from and writes into the host's page cache. Everything else, errors too, is the worker's."""
        backend, session, stats = self._backend, self._session, self._stats
        if index >= self._queues or not backend.quick:
            return False
        may_write = not (session.readonly or session.durable)
        measured = False
        capacity, seg_max, features = backend.size, session.seg_max, session.features
        for chain in queue:
            done = 0
            try:
                kind, offset, length, views, _ = parse(chain, capacity, seg_max, features)
                if kind == spec.T_IN:
                    if backend.read_now(offset, length, views):
                        done = length + 1
                        stats.reads += 1
                        stats.bytes_read += length
                elif kind == spec.T_OUT and may_write:
                    if not measured:
                        measured = True
                        self._check_size(backend)
                    if offset + length <= backend.size and backend.write_now(offset, length, views):
                        done = 1
                        stats.count(kind, length)
            except (RequestError, OSError):
                pass  # the worker meets it again, and says so
            except BaseException:
                queue.unpop(chain)
                raise
            if not done:
                queue.unpop(chain)
                return False
            answer(queue, chain, spec.S_OK, done)
        return True

    def _failed(self, error: RequestError | OSError) -> int:
        """The status of a request that failed, which is counted."""
        session = self._session
        if isinstance(error, RequestError):
            self._stats.failed(session.name, error.why)
            return error.status
        self._stats.failed(session.name, reason(error))
        return spec.S_IOERR

    def _serve(self, backend: Backend, request: Request) -> int:
        """Everything but a read; returns the bytes written into the chain, the status included.

        The disk may be smaller now than when the request was parsed.
        """
        kind, offset, length, views, segments = request
        session = self._session
        if kind == spec.T_GET_ID:
            fill(views, session.identity)
            return length + 1
        if kind == spec.T_OUT:
            if session.readonly:
                raise RequestError(spec.S_IOERR, "write to a read-only disk")
            if offset + length > backend.size:
                raise RequestError(spec.S_IOERR, where(offset, length, backend.size))
            backend.write(offset, length, views, durable=session.durable)
        elif kind == spec.T_FLUSH:
            if not session.readonly:
                backend.flush()
        else:
            # The parser lets these pass only when they were negotiated, so the disk is writable.
            for at, size, _ in segments:
                if at + size > backend.size:
                    raise RequestError(spec.S_IOERR, where(at, size, backend.size))
            for at, size, unmap in segments:
                if kind == spec.T_DISCARD:
                    backend.discard(at, size)
                else:
                    backend.write_zeroes(at, size, unmap)
            if session.durable:
                backend.flush()
        self._stats.count(kind, length)
        return 1

    def _watch_size(self) -> None:
        """Polled: inotify says nothing about block devices and network file systems."""
        self._check_size(self._backend)
        self.ctx.worker.call_later(SIZE_PERIOD, self._watch_size)

    def _check_size(self, backend: Backend) -> None:
        """Tell the driver when the disk has another size now (5.2.6.2), counted in whole blocks."""
        try:
            size = backend.measure()
        except OSError as error:
            self._stats.failed(self.ctx.name, f"host: the size of the disk: {error.strerror}")
            return
        size -= size % self.options.block_size
        if size != backend.size:
            self.ctx.log.info("resized from %d to %d bytes", backend.size, size)
            backend.size = size
            self.virtio.config_changed()

    def _last_flush(self, end: GuestEnd) -> None:
        if self._disk.readonly:
            return
        if self._remote is not None:
            self._remote.last_flush(FLUSH_DEADLINE - 1)
        elif not isinstance(self._backend, ClosedBackend):
            self._backend.flush()

    def on_terminate(self, end: GuestEnd) -> None:
        """Close the disk, which also unlocks it."""
        backend, self._backend = self._backend, ClosedBackend()
        backend.close()
        if self._remote is not None:
            self._remote.close()

    def status(self) -> Mapping[str, object]:
        """Counters since the start, beside those of the queue."""
        remote = self._remote.report() if self._remote is not None else {}
        return {
            **super().status(),
            "hostdev": self.options.hostdev,
            "readonly": self._disk.readonly,
            "writeback": self._writeback,
            "size": self._store.size,
            **remote,
            **self._stats.report(),
        }
