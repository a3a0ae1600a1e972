"""`fl-server weights`: the files that studies may start from."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fl_server import weights
from fl_server.roster import Home

app = typer.Typer(help="Keep the files of weights that studies start from.", no_args_is_help=True)

HomeOption = Annotated[
    Path, typer.Option("--home", "-H", help="Folder of the consortium. Default: the current folder.")
]


@app.command()
def add(
    file: Annotated[Path, typer.Argument(help="A safetensors file, or a .pt or .pth of tensors alone.")],
    home: HomeOption = Path(),
) -> None:
    """Keep a copy of a file of weights; studies name it by the SHA-256 that is printed."""
    opened = Home.open(home)
    kept = weights.add(opened.root, file)
    opened.journal.append("weights-added", sha256=kept.sha256, bytes=kept.bytes)
    # The hash alone on stdout, so that it can be piped.
    typer.echo(kept.sha256)
    typer.echo(f"Studies start from it with network: {{initial: {{sha256: {kept.sha256}}}}}", err=True)


@app.command("list")
def list_(
    home: HomeOption = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """List the files of weights by hash and size."""
    found = weights.held(Home.open(home).root)
    if as_json:
        typer.echo(json.dumps({"weights": [kept._asdict() for kept in found]}, indent=2))
        return
    for kept in found:
        typer.echo(f"{kept.sha256}  {kept.bytes / 2**20:.1f} MiB")
    if not found:
        typer.echo("No weights yet: fl-server weights add FILE")
