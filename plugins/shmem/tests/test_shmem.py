"""Two guests, one memory: the factory as guests see it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from qvm_shmem import region
from qvm_shmem.device import MAX_ATTACHED, Shmem
from qvm_shmem.options import APERTURE
from qvm_shmem.spec import EVERYONE, PAGE, SIGNATURE, Status
from shmem_guest import Guest

from qvmcore.api import ConfigError, HostError, IntrSpec
from qvmcore.testing.fakes import plug

Boot = Callable[..., Guest]
STATUS, IDX, NOTIFY, DETACH = 0x0, 0x4, 0x8, 0xC
BAR1, MSIX = 0x14, 0x11


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "regions"


@pytest.fixture
def boot(directory: Path) -> Iterator[Boot]:
    """``boot(**options)``: a guest with a shmem vdev on the shared directory."""
    with ExitStack() as stack:

        def make(**options: Any) -> Guest:
            return Guest(stack.enter_context(plug(Shmem, {"directory": str(directory), **options})))

        yield make


def test_the_factory_page_has_qnx_layout(boot: Boot) -> None:
    guest = boot()
    assert guest.device.read(0, 8) == SIGNATURE
    assert SIGNATURE.to_bytes(8, "little") == b"QVMG2GSM"
    assert guest.attach(b"moo", 3) == guest.device.ctx.address(1)
    assert [guest.device.read(offset) for offset in (0x10, 0x14, 0x18)] == [0, 0, 3]
    assert guest.device.read(0x1C, 4) == int.from_bytes(b"moo\0", "little")
    guest.device.ctx.intr = IntrSpec("gic", 43)
    assert guest.device.read(0x10) == 43


def test_a_region_starts_zeroed_and_two_guests_see_one_memory(boot: Boot) -> None:
    one, two = boot(), boot()
    mine, theirs = one.attach(b"moo", 2), two.attach(b"moo", 2)
    assert one.load(mine + PAGE, 8) == 0
    for size, value in ((1, 0x11), (2, 0x2222), (4, 0x44444444), (8, 0x8888888888888888)):
        one.store(mine + PAGE + 8 * size, value, size)
        assert two.load(theirs + PAGE + 8 * size, size) == value
    one.store(mine + PAGE + 4093, 0x0123456789ABCDEF, 8)
    assert two.load(theirs + PAGE + 4093, 8) == 0x0123456789ABCDEF, "unaligned, across pages"


def test_other_names_are_other_memory(boot: Boot) -> None:
    one, two = boot(), boot()
    a, b = one.attach(b"a"), two.attach(b"b")
    one.store(a + PAGE, 1)
    assert two.load(b + PAGE) == 0


def test_one_guest_can_have_several_regions_and_reuses_their_place(boot: Boot) -> None:
    guest = boot()
    first, second, third = (guest.attach(name, 4) for name in (b"a", b"b", b"c"))
    assert (second - first, third - second) == (5 * PAGE, 5 * PAGE)
    guest.store(second + PAGE, 7)
    guest.store(second + DETACH, 0)
    assert guest.load(second + PAGE) == 0xFFFFFFFF, "nothing is there any more"
    assert guest.attach(b"d", 4) == second
    assert guest.load(second + PAGE) == 0
    assert guest.attach(b"e", 8) == third + 5 * PAGE


def test_the_size_is_that_of_the_existing_region(boot: Boot) -> None:
    one, two = boot(), boot()
    one.attach(b"moo", 5)
    assert two.attach(b"moo", 1)
    assert two.device.read(0x18) == 5


def test_find_attaches_only_to_what_exists(boot: Boot) -> None:
    one, two = boot(), boot()
    assert two.find(b"moo") == 0 and two.status is Status.DOES_NOT_EXIST
    one.attach(b"moo", 3)
    assert two.find(b"moo") and two.status is Status.OK
    assert two.device.read(0x18) == 3


def test_a_notification_interrupts_and_names_its_sender(boot: Boot) -> None:
    guests = [boot() for _ in range(3)]
    controls = [guest.attach(b"moo") for guest in guests]
    assert [g.load(c + IDX) for g, c in zip(guests, controls, strict=True)] == [0, 1, 2]
    assert guests[0].load(controls[0] + STATUS) == 0b111 << 16
    guests[2].store(controls[2] + NOTIFY, 0b001)
    assert guests[0].device.irq.wait(1)
    assert guests[0].device.irq.level
    assert guests[0].load(controls[0] + STATUS) == 0b111 << 16 | 0b100
    assert not guests[0].device.irq.level
    assert guests[0].load(controls[0] + STATUS) == 0b111 << 16, "a read clears it"
    for guest in guests[1:]:
        guest.device.settle()
        assert guest.device.irq.count == 0


def test_everyone_is_everyone_else(boot: Boot) -> None:
    guests = [boot() for _ in range(3)]
    controls = [guest.attach(b"moo") for guest in guests]
    guests[1].store(controls[1] + NOTIFY, EVERYONE)
    for guest in (guests[0], guests[2]):
        assert guest.device.irq.wait(1)
    guests[1].device.settle()
    assert guests[1].device.irq.count == 0


def test_each_notification_rises_anew_and_none_is_lost(boot: Boot) -> None:
    guests = [boot() for _ in range(3)]
    controls = [guest.attach(b"moo") for guest in guests]
    for sender in (1, 2):
        guests[sender].store(controls[sender] + NOTIFY, 1)
        assert guests[0].device.irq.wait(sender), "a message-signalled interrupt needs its own edge"
    assert guests[0].load(controls[0] + STATUS) & 0xFFFF == 0b110


def test_each_notification_is_a_message_with_msix(boot: Boot) -> None:
    one, two = boot(), boot()
    one.attach(b"moo")
    control = two.attach(b"moo")
    function, bus = one.device.device, one.device.pci
    assert function is not None and bus is not None
    msix = next(at for at, kind in function.capabilities() if kind == MSIX)
    table = function.bars[function.read(msix + 4) & 7][0]
    for offset, value in ((0, 0x0802_0040), (4, 0), (8, 80), (12, 0)):
        one.store(table + offset, value)
    function.write(msix + 2, 1 << 15, 2)
    for count in (1, 2):
        two.store(control + NOTIFY, 1)
        assert one.device.irq.wait(count), "though the guest has not read the status since"
    assert bus.messages == [(0x0802_0040, 80)] * 2


def test_a_notification_is_told_once(boot: Boot) -> None:
    guests = [boot() for _ in range(3)]
    controls = [guest.attach(b"moo") for guest in guests]
    for count, sender in enumerate((1, 2, 1), 1):
        guests[sender].store(controls[sender] + NOTIFY, 1)
        assert guests[0].device.irq.wait(count)
        assert guests[0].load(controls[0] + STATUS) & 0xFFFF == 1 << sender


def test_a_new_client_hears_nothing_of_the_time_before(boot: Boot) -> None:
    one, two, three = boot(), boot(), boot()
    one.store(one.attach(b"moo") + NOTIFY, EVERYONE)
    control = two.attach(b"moo")
    three.store(three.attach(b"moo") + NOTIFY, 0b010)
    assert two.device.irq.wait(1)
    assert two.load(control + STATUS) & 0xFFFF == 0b100


def test_a_notification_that_arrives_while_the_guest_detaches_is_nobodys(boot: Boot) -> None:
    guest = boot()
    control = guest.attach(b"moo")
    attachment = guest.device.vdev._attached[0]
    guest.store(control + DETACH, 1)
    guest.device.vdev._notification(attachment)
    assert guest.device.irq.count == 0


def test_what_is_half_behind_the_region_is_not_there(boot: Boot) -> None:
    guest = boot()
    end = guest.attach(b"moo") + 2 * PAGE
    guest.attach(b"next")
    for size in (2, 4, 8):
        guest.store(end - 1, 0, size)
        assert guest.load(end - 1, size) == (1 << 8 * size) - 1


def test_a_client_that_never_looks_holds_nobody_up(boot: Boot) -> None:
    one, two = boot(), boot()
    assert one.attach(b"moo") and two.attach(b"moo")
    assert two.device.ctx.stop_worker()
    for _ in range(70_000):
        one.device.vdev._attached[0].region.notify(2)
    assert two.device.vdev._attached[0].region.collect() == 1


def test_the_address_follows_the_bar(boot: Boot) -> None:
    guest = boot()
    before = guest.attach(b"moo")
    guest.store(before + PAGE, 42)
    assert guest.device.device is not None
    guest.device.device.write(BAR1, before + 4 * APERTURE)
    after = guest.device.read(0x08, 8)
    assert after == before + 4 * APERTURE
    assert guest.load(after + PAGE) == 42


def test_without_a_placed_aperture_there_is_no_region(boot: Boot, directory: Path) -> None:
    guest = boot()
    guest.device.ctx.address = lambda window: None  # type: ignore[method-assign]
    assert guest.attach(b"moo") == 0 and guest.status is Status.UNKNOWN_FAILURE
    assert not list(directory.glob("*.data"))


def test_detach_and_reset_make_room_for_another_client(boot: Boot) -> None:
    one, two = boot(), boot()
    mine, theirs = one.attach(b"moo"), two.attach(b"moo")
    one.store(mine + DETACH, 0)
    assert two.load(theirs + STATUS) >> 16 == 0b10
    assert one.load(one.attach(b"moo") + IDX) == 0
    two.device.vdev.on_reset()
    assert one.load(mine + STATUS) >> 16 == 0b01
    assert two.device.read(0x08, 8) == 0 and two.load(theirs + STATUS) == 0xFFFFFFFF


def test_the_last_one_removes_the_region(boot: Boot, directory: Path) -> None:
    one, two = boot(), boot()
    for guest in (one, two):
        guest.store(guest.attach(b"moo") + PAGE, 1)
    one.device.terminate()
    assert (directory / "moo.data").exists()
    two.device.terminate()
    assert sorted(path.name for path in directory.iterdir()) == [".lock"]


def test_create_keeps_a_region_while_the_vm_lives(boot: Boot, directory: Path) -> None:
    one, two = boot(create=[{"name": "pool", "size": "5K"}]), boot()
    assert two.find(b"pool") and two.device.read(0x18) == 2
    two.store(two.device.read(0x08, 8) + PAGE, 99)
    two.device.vdev.on_reset()
    assert one.load(one.find(b"pool") + PAGE) == 99
    one.device.terminate()
    assert not (directory / "pool.data").exists()


def test_seventeenth_client_is_refused(boot: Boot) -> None:
    one, two = boot(), boot()
    for _ in range(16):
        assert one.attach(b"moo")
    assert two.attach(b"moo") == 0 and two.status is Status.CLIENT_MAX
    assert two.attach(b"other")


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        (b"a", True),
        (b"x" * 31, True),
        (b"spaces and %2F, too", True),
        (b"..", True),
        (b".", True),
        (b"", False),
        (b"x" * 32, False),
        (b"../../etc/passwd", False),
        (b"a/b", False),
        (b"\xff\xfe", False),
        (b"new\nline", False),
        (b"\x7f", False),
    ],
)
def test_names(boot: Boot, directory: Path, name: bytes, legal: bool) -> None:
    guest = boot()
    assert bool(guest.attach(name)) == legal
    assert guest.status is (Status.OK if legal else Status.ILLEGAL_NAME)
    assert all(path.parent == directory for path in directory.parent.rglob("*.data"))


@pytest.mark.parametrize(
    ("rules", "may", "may_not"),
    [
        ({"allow": ["test*", "pluto"]}, [b"test1", b"pluto"], [b"moo", b"plutonium"]),
        ({"deny": ["live*"]}, [b"moo"], [b"live", b"lively"]),
        ({}, [b"moo"], []),
    ],
)
def test_allow_and_deny(boot: Boot, rules: dict[str, Any], may: list[bytes], may_not: list[bytes]) -> None:
    guest = boot(**rules)
    assert all(guest.attach(name) for name in may)
    for name in may_not:
        assert guest.attach(name) == 0 and guest.status is Status.NO_PERMISSION


def test_subst_separates_and_joins(boot: Boot) -> None:
    one, two, three = boot(subst=[",one-"]), boot(subst=["cam,one-cam", ",two-"]), boot()
    one.store(one.attach(b"cam0") + PAGE, 1)
    assert two.load(two.find(b"cam0") + PAGE) == 1
    assert three.load(three.find(b"one-cam0") + PAGE) == 1
    one.attach(b"moo")
    assert two.find(b"moo") == 0


@pytest.mark.parametrize("pages", [APERTURE // PAGE, 0x7FFFFFFF, 0xFFFFFFFF])
def test_sizes_that_do_not_fit(boot: Boot, directory: Path, pages: int) -> None:
    guest = boot()
    assert guest.attach(b"big", pages) == 0 and guest.status is Status.NO_MEMORY
    assert not list(directory.glob("*.data"))
    assert guest.attach(b"empty", 0) == 0 and guest.status is Status.UNKNOWN_FAILURE


def test_the_aperture_can_be_full_and_is_whole_again(boot: Boot, directory: Path) -> None:
    guest = boot()
    control = guest.attach(b"all", APERTURE // PAGE - 1)
    assert control
    guest.store(control + APERTURE - 4, 0xAA)
    assert guest.load(control + APERTURE - 4) == 0xAA
    assert guest.attach(b"more") == 0 and guest.status is Status.NO_MEMORY
    assert not (directory / "more.data").exists(), "nothing is left of the attempt"
    guest.store(control + DETACH, 1)
    assert guest.attach(b"more")


def test_a_guest_has_at_most_so_many_regions(boot: Boot) -> None:
    guest = boot()
    for number in range(MAX_ATTACHED):
        assert guest.attach(b"r%d" % number)
    assert guest.attach(b"one more") == 0 and guest.status is Status.NO_MEMORY


def test_a_host_without_memory_refuses_and_leaves_nothing(
    boot: Boot, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = boot()

    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(region.os, "posix_fallocate", full)
    assert guest.attach(b"moo") == 0 and guest.status is Status.NO_MEMORY
    assert sorted(path.name for path in directory.iterdir()) == [".lock"]
    with pytest.raises(HostError, match=r"cannot create the shared memory 'a' of 4096 bytes.*No space left"):
        boot(create=[{"name": "a", "size": "4K"}])


def test_a_process_that_sits_on_the_lock_only_makes_the_attempt_fail(
    boot: Boot, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = boot()
    monkeypatch.setattr(region, "LOCK_SECONDS", 0.01)
    with region.Store(directory).locked():
        assert guest.attach(b"moo") == 0 and guest.status is Status.UNKNOWN_FAILURE
    assert guest.attach(b"moo")


def test_a_directory_that_vanishes_fails_attempts_only(boot: Boot, directory: Path) -> None:
    guest = boot()
    control = guest.attach(b"moo")
    shutil.rmtree(directory)
    guest.store(control + PAGE, 5)
    assert guest.load(control + PAGE) == 5
    assert guest.attach(b"other") == 0 and guest.status is Status.UNKNOWN_FAILURE
    guest.store(control + NOTIFY, EVERYONE)
    guest.store(control + DETACH, 1)
    assert not guest.device.ctx.faults
    assert {result.verdict for result in guest.device.terminate()} == {"ok"}


def test_a_lock_that_cannot_be_opened_refuses_the_start(boot: Boot, directory: Path) -> None:
    directory.mkdir(mode=0o700)
    (directory / ".lock").mkdir()
    with pytest.raises(HostError, match=r"cannot use .*regions: Is a directory"):
        boot()


def test_a_directory_others_can_write_to_is_refused(boot: Boot, directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(HostError, match="only this user can write"):
        boot()


#: Another VM, with two regions, that is killed.
DOOMED = """
import os, sys
from qvm_shmem.device import Shmem
from qvmcore.testing.fakes import plug
from shmem_guest import Guest
guest = Guest(plug(Shmem, {"directory": sys.argv[1]}))
assert guest.attach(b"moo") and guest.attach(b"alone")
os.kill(os.getpid(), 9)
"""


def test_a_killed_vm_leaves_nothing_that_matters(boot: Boot, directory: Path) -> None:
    one = boot()
    control = one.attach(b"moo")
    child = subprocess.run([sys.executable, "-c", DOOMED, str(directory)], cwd=Path(__file__).parent)
    assert child.returncode == -9
    assert (directory / "moo.1").exists() and (directory / "alone.data").exists()
    assert one.load(control + STATUS) >> 16 == 0b01, "its client number is free"
    one.store(control + NOTIFY, EVERYONE)
    assert one.find(b"alone") == 0 and one.status is Status.DOES_NOT_EXIST
    assert one.load(one.attach(b"moo") + IDX) == 1
    (directory / "alone2.held").touch()
    (directory / "alone2.data").touch()
    boot()
    assert not list(directory.glob("alone*")), "a start sweeps up"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allow": ["a"], "deny": ["b"]}, "use one of them"),
        ({"subst": ["x"]}, "expected 'ORIGINAL,PREFIX'"),
        ({"create": [{"name": "a/b", "size": "4K"}]}, "'a/b' cannot be a name"),
        ({"create": [{"name": "a", "size": "17M"}]}, "16"),
        ({"create": [{"name": "a"}]}, "missing key 'size'"),
        ({"subst": [",dir/"], "create": [{"name": "a", "size": "4K"}]}, "'a' cannot be a name"),
    ],
)
def test_wrong_options(boot: Boot, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        boot(**options)


def test_subst_to_an_impossible_name_is_an_illegal_name(boot: Boot) -> None:
    guest = boot(subst=["dir/,x", ",a/"])
    for name in (b"moo", b"dir/moo"):
        assert guest.attach(name) == 0 and guest.status is Status.ILLEGAL_NAME
