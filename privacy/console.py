"""The common entry of all three commands: errors become two lines on stderr and exit code 1, never a traceback."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from privacy import screen
from privacy.errors import DocumentError, IsocenterError
from privacy.reach import Proxy

SHADOWS: dict[str, str] = {}
"""What `isocenter` found at the beginning: package of ours -> where another one lies that the path names first."""
SHADOWED = (
    "Unset PYTHONPATH (`env -u PYTHONPATH fl-client ...`), install Isocenter into an environment of its own, and run it outside "
    "other projects' folders."
)
PACKAGES = ("fl_server", "fl_client", "models", "privacy")
ProxyUrl = Annotated[
    str | None,
    typer.Option(
        "--proxy", metavar="URL", help="HTTP proxy that leads out, http://host:port; no variable is looked at."
    ),
]
ProxyUser = Annotated[str | None, typer.Option("--proxy-user", metavar="NAME", help="Name that the proxy asks for.")]
ProxyPassword = Annotated[
    Path | None,
    typer.Option("--proxy-password-file", metavar="FILE", help="File of mode 0600 with the password that it asks for."),
]


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


def shadowed(others: Mapping[str, str]) -> IsocenterError:
    """What to say of packages of ours in whose place others would be loaded: name -> where the other lies."""
    found = ", ".join(f"{name!r} (found: {place})" for name, place in sorted(others.items()))
    return IsocenterError(f"not the packages of this installation of Isocenter: {found}", remedy=SHADOWED)


def proxy_of(url: str | None, user: str | None, password_file: Path | None) -> Proxy | None:
    """The proxy that a command's options name. Raises DocumentError, which never quotes what may hold a password."""
    if url is None and (user or password_file):
        raise DocumentError("--proxy-user and --proxy-password-file are of a proxy", remedy="Name it with --proxy URL.")
    if url is None:
        return None
    try:
        return Proxy(url=url, user=user or "", password_file=str(password_file.resolve()) if password_file else "")
    except ValidationError as error:
        said = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise DocumentError(f"--proxy: {said}", remedy="Correct the option and run the command again.") from None


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
            raise shadowed({name: origin or "nothing"})
