"""``qvm serve`` (floor 9): the vdevs of a VM file, each behind a socket, for guests elsewhere.

The main thread waits for signals; everything else happens at the posts (``post``).
"""

from __future__ import annotations

import contextlib
import logging
import queue
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qvmcore.bind import DefaultBindings
from qvmcore.control import ControlServer
from qvmcore.errors import HostError
from qvmcore.inquiry import Inquiry, describe, status_lines
from qvmcore.plugins import PluginHost
from qvmcore.post import Acceptor, Post
from qvmcore.server import Server
from qvmcore.signals import SignalEvents
from qvmcore.types import MachineSpec, VdevSpec

log = logging.getLogger("qvm")

#: Seconds between two looks for hung register handlers.
WATCH_PERIOD = 1.0
#: Seconds the ends of all lives may take together; each step has its own, shorter deadline.
END_PATIENCE = 60.0
#: Seconds after which a thread that computes lets another one run.
SWITCH_INTERVAL = 0.0005


class Service:
    """The vdevs of one VM file, served. Use :meth:`run` once, on the main thread."""

    def __init__(
        self, spec: MachineSpec, host: PluginHost, server: Server, folder: Path, poll: float = 0.0
    ) -> None:
        self.spec = spec
        self._poll = poll
        self._host = host
        self._server = server
        self._folder = folder
        self._events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._inquiry = Inquiry()
        self._since = time.monotonic()
        self._state = "starting"
        self._posts: tuple[Post, ...] = ()

    @property
    def served(self) -> Sequence[tuple[VdevSpec, Path, Sequence[tuple[str, str]]]]:
        """Each vdev with its socket and the ways to attach it, once :meth:`run` has called ``ready``."""
        return [(post.vdev, post.doorway.path, post.attach_lines()) for post in self._posts]

    def run(self, ready: Callable[[], None]) -> bool:
        """Serve until a signal ends it; False when a vdev was not proven quiet at its end.

        ``ready()`` is called when every socket is there. Raises QvmError when one cannot be had.
        """
        sys.setswitchinterval(SWITCH_INTERVAL)
        _allow_descriptors()
        bindings = DefaultBindings()
        self._host.register(bindings)
        with SignalEvents(self._events.put), ControlServer(self.spec.name, self.report):
            posts: list[Post] = []
            acceptor = Acceptor()
            try:
                for vdev in self._servable():
                    posts.append(
                        Post(self.spec, vdev, self._host, bindings, self._server, self._folder, self._poll)
                    )
                self._posts = tuple(posts)
                for post in posts:
                    post.start()
                acceptor.start(posts)
                self._state = "serving"
                ready()
                self._wait()
            finally:
                # Also for KeyboardInterrupt and a failed start: nothing may be left.
                self._state = "ending"
                acceptor.stop()
                for post in posts:
                    post.ask_to_end()
                deadline = time.monotonic() + END_PATIENCE
                quiet = [post.end(deadline) for post in posts]
        return all(quiet)

    def report(self, name: str = "") -> dict[str, Any]:
        """What SIGUSR1 logs and ``qvm status`` shows; any thread."""
        lives = [post.life for post in self._posts] if self._state == "serving" else []
        answers = self._inquiry.ask(None, [life.slot for life in lives if life is not None])
        about = describe(self.spec, name, self._server.name, self._state, time.monotonic() - self._since)
        clients = {post.vdev.name: post.connected for post in self._posts}
        return about | answers | {"guest": {"status": {"clients": clients}, "problem": ""}}

    def _servable(self) -> list[VdevSpec]:
        chosen = []
        for vdev in self.spec.vdevs:
            cls = self._host.vdev_class(vdev.type).for_options(vdev.options)
            refusal = self._server.refusal(cls)
            if cls.physical:
                refusal = "it passes a physical device through, which needs a VM of our own"
            if refusal:
                log.warning("%s (%s) is not served: %s", vdev.name, vdev.type, refusal)
            else:
                chosen.append(vdev)
        if not chosen:
            raise HostError(
                f"there is nothing to serve over {self._server.name}",
                hint="the file needs a [[vdev]] that it can carry, e.g. a virtio-blk",
            )
        return chosen

    def _wait(self) -> None:
        while True:
            try:
                event = self._events.get(timeout=WATCH_PERIOD)
            except queue.Empty:
                for post in self._posts:
                    if post.life is not None:
                        post.life.slot.interrupt_if_hung()
                continue
            if event == "SIGUSR1":
                for line in status_lines(self.report()):
                    log.info("status: %s", line)
            elif event == "SIGUSR2":
                log.warning("SIGUSR2: the guests are somebody else's; there is nothing to dump")
            else:
                log.info("%s: ending", event)
                return


def _allow_descriptors() -> None:
    """As many as the administrator lets us have.

    Each client may bring hundreds; of the usual 1024 two of them leave none for anybody else.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
