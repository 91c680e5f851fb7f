"""``qvm completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

#: Variable through which the script asks qvm for completions; the name is click's rule.
_VARIABLE = "_QVM_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that completes commands, options, vdev types and files.

    \b
    bash   echo 'eval "$(qvm completion bash)"' >> ~/.bashrc
    zsh    echo 'eval "$(qvm completion zsh)"' >> ~/.zshrc
    fish   qvm completion fish > ~/.config/fish/completions/qvm.fish
    """
    from qvmcore.cli.root import qvm

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"this version of click cannot complete for {shell}")
    # source() would start a shell to look at its version; the script is the same for all we support.
    maker = kind(qvm, {}, "qvm", _VARIABLE)
    click.echo(maker.source_template % maker.source_vars())
