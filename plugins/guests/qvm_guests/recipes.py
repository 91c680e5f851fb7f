"""The recipes: what goes into a guest, as data. A new distribution starts here."""

from __future__ import annotations

from dataclasses import dataclass

from qvmcore.api import QvmError, nearest

#: The devices a qvm board or plugin offers, the file system of the demo, and the power button.
#: A name that is built into a kernel, or that a kernel does not have, is skipped and reported.
MODULES = (
    "virtio_mmio",
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "ext4",
    "crc32c_generic",
    "gpio_pl061",
    "gpio_keys",
    "button",
    "evdev",
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One guest that ``qvm guest build`` can make."""

    name: str
    summary: str
    architecture: str  #: Debian's name of the guest architecture
    kernel: str  #: the kernel metapackage; its dependency is the image
    board: str  #: the qvm board the guest is for
    console: str  #: the serial console of that board
    busybox: str = "busybox-static"
    modules: tuple[str, ...] = MODULES


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "debian-arm64",
            "Debian's cloud kernel for arm64 and busybox; the smallest",
            "arm64",
            "linux-image-cloud-arm64",
            "arm64-virt",
            "ttyAMA0",
        ),
        Recipe(
            "debian-arm64-full",
            "Debian's general kernel for arm64 and busybox; has gpio_keys and many drivers (--module)",
            "arm64",
            "linux-image-arm64",
            "arm64-virt",
            "ttyAMA0",
        ),
        Recipe(
            "debian-amd64",
            "Debian's cloud kernel for x86-64 and busybox",
            "amd64",
            "linux-image-cloud-amd64",
            "x86_64-pc",
            "ttyS0",
        ),
    )
}


def find(name: str) -> Recipe:
    """The recipe called ``name``, or an error that names the nearest one."""
    try:
        return RECIPES[name]
    except KeyError:
        hint = nearest(name, RECIPES) or f"there are: {', '.join(RECIPES)}"
        raise QvmError(f"there is no guest recipe {name!r}", hint=hint) from None
