"""`fl-server publish`, `models` and `withdraw`: released models for the sites and researchers of the consortium."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fl_server import published
from fl_server.roster import Home
from privacy import screen

HomeOption = Annotated[
    Path, typer.Option("--home", "-H", help="Folder of the consortium. Default: the current folder.")
]


def add_to(app: typer.Typer, panel: str) -> None:
    """Give `app` the commands, in the panel of its help."""
    for command in (publish, models, withdraw):
        app.command(rich_help_panel=panel)(command)


def publish(
    package: Annotated[Path, typer.Argument(help="A released model, NAME-VERSION.isocenter, of a run of yours.")],
    home: HomeOption = Path(),
) -> None:
    """Check a released model, and let every enrolled site and researcher pull it."""
    with screen.busy("checking the model"):
        notice = published.publish(Home.open(home), package)
    typer.echo(f"Published {notice.name} {notice.version}, released by {notice.researcher}, SHA-256 {notice.sha256}")
    typer.echo(f"Sites get it with: fl-client pull {notice.name}@{notice.version}; researchers with fl-study pull.")


def models(
    home: HomeOption = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """List the models that were published here, the withdrawn ones too."""
    found = published.entries(Home.open(home))
    if as_json:
        rows = [{**asdict(entry.notice), "withdrawn": entry.withdrawn} for entry in found]
        typer.echo(json.dumps({"models": rows}, indent=2))
        return
    table = screen.table("model", "version", "released by", "published", "MiB", "SHA-256")
    for entry in found:
        notice = entry.notice
        when = f"withdrawn {entry.withdrawn[:10]}" if entry.withdrawn else notice.published[:10]
        size = f"{notice.size / 2**20:.1f}"
        table.add_row(notice.name, notice.version, notice.researcher, when, size, notice.sha256[:12])
    if found:
        screen.show(table)
    else:
        typer.echo("No model yet: fl-server publish PACKAGE")


def withdraw(
    model: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="See `fl-server models`.")],
    home: HomeOption = Path(),
) -> None:
    """Let nobody pull a model any more. Who has it keeps it, and its version is never used again."""
    notice = published.withdraw(Home.open(home), model)
    typer.echo(f"Withdrawn: {notice.name} {notice.version}. Tell those who have it; they can go on using their copy.")
