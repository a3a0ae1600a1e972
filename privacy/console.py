"""The common entry of all three commands: errors become two lines on stderr and exit code 1, never a traceback."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import typer
from rich.console import Console

from privacy import screen
from privacy.errors import IsocenterError

PACKAGES = ("fl_server", "fl_client", "models", "privacy")


def run(app: typer.Typer) -> None:
    """Run a command line. Nothing phones home: this is called before anything imports Flower."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    try:
        require_one_installation()
        app()
    except IsocenterError as error:
        show(error)
        sys.exit(1)
    except OSError as error:  # a full disk, a folder without permission: expected, and not ours to explain further
        where = f"{error.filename}: " if error.filename else ""
        show(
            IsocenterError(f"{where}{error.strerror or error}", remedy="Check the path, its owner and the free space.")
        )
        sys.exit(1)


def begin(context: typer.Context, steps: Callable[[Path], Iterable[str]]) -> None:
    """Of a command without arguments: what to do next, as `steps` finds it in the current folder, above the list of commands."""
    if context.invoked_subcommand is not None:
        return
    for sentence in steps(Path()):
        screen.say(sentence, "bold")
    typer.echo(context.get_help(), nl=False)


def show(error: IsocenterError) -> None:
    """The message in red and the remedy, on stderr; no markup, so what a message quotes is shown as it is."""
    console = Console(stderr=True, highlight=False)
    console.print(str(error) or error.code, style="red", markup=False, soft_wrap=True)
    console.print(error.remedy, markup=False, soft_wrap=True)


def show_version(context: typer.Context, wanted: bool) -> None:
    """Callback of `--version`: name of the command and version of this installation, then stop."""
    if wanted:
        try:
            version = metadata.version("isocenter")
        except metadata.PackageNotFoundError:
            version = "(not installed: running from its source)"
        typer.echo(f"{context.find_root().info_name} {version}")
        raise typer.Exit


def require_one_installation() -> None:
    """Refuse to run when a package of ours comes from elsewhere: `models` is a name that other software uses too."""
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        origin = found.origin if found is not None else None
        if origin is None or Path(origin).resolve().parent.parent != home:
            raise IsocenterError(
                f"the package {name!r} is not the one of this installation of Isocenter (found: {origin or 'nothing'})",
                remedy="Install Isocenter into an environment of its own, and run it outside other projects' folders.",
            )
