"""The command ``qvm guest``. Everything heavy is imported by the sub-command that needs it."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.group()
def guest() -> None:
    """Get guests to run: a Linux kernel and a small initramfs, from this machine's own apt sources."""


@guest.command("list")
def list_recipes() -> None:
    """Which guests can be built."""
    from qvm_guests.recipes import RECIPES

    width = max(map(len, RECIPES))
    for recipe in RECIPES.values():
        click.echo(f"{recipe.name:{width}}  {recipe.summary}")


@guest.command()
@click.argument("recipe")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--refresh", is_flag=True, help="Look for newer packages, even if the cache is complete.")
@click.option(
    "--sources",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="An apt sources file (.list or .sources) to use instead of this machine's.",
)
@click.option(
    "--module", "modules", multiple=True, metavar="NAME", help="A further kernel module; repeatable."
)
def build(
    recipe: str, directory: Path, refresh: bool, sources: Path | None, modules: tuple[str, ...]
) -> None:
    """Build the guest RECIPE in DIRECTORY (see: qvm guest list)."""
    from qvm_guests import build as builder
    from qvm_guests.progress import for_terminal
    from qvm_guests.recipes import find

    chosen = find(recipe)
    directory = directory.absolute()
    with for_terminal() as progress:
        builder.build(chosen, directory, progress, refresh=refresh, sources=sources, modules=modules)
    for name in (builder.KERNEL, builder.INITRAMFS, builder.MANIFEST):
        click.echo(directory / name)
    click.echo(f"\n# a VM file for it:\n{builder.snippet(chosen, directory)}", nl=False)


@guest.command()
@click.argument("directory", type=click.Path(path_type=Path))
def show(directory: Path) -> None:
    """What the guest in DIRECTORY is made of."""
    from qvm_guests.build import manifest

    click.echo(json.dumps(manifest(directory), indent=2))


@guest.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--size", default="64M", show_default=True, help="Size of the disk, e.g. 64M.")
@click.option(
    "--file", "files", multiple=True, metavar="NAME=PATH", help="Put the file PATH on the disk as NAME."
)
def disk(image: Path, size: str, files: tuple[str, ...]) -> None:
    """Make a small ext4 disk IMAGE, with files on it. Needs no root."""
    from qvm_guests import disk as disks

    disks.make(image, disks.parse_size(size), dict(map(disks.parse_file, files)))
    click.echo(image)
