"""`crash list` and `crash show`, the same for a site and for the coordinator."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from privacy import crash, screen
from privacy.errors import DocumentError

Home = Annotated[Path, typer.Option("--home", "-H", help="The folder of the site or of the consortium.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

app = typer.Typer(
    help="Read reports of errors that nobody foresaw; they hold nothing of a patient, and only you send them.",
    no_args_is_help=True,
)


@app.command("list")
def list_reports(home: Home = Path(), as_json: AsJson = False) -> None:
    """List the reports, the latest first: when, in which process, how often, and the class of the error."""
    found = [(name, report) for name in crash.names(home) if (report := crash.read(home, name)) is not None]
    if as_json:
        typer.echo(json.dumps({"reports": [_row(name, report) for name, report in found]}))
        return
    if not found:
        typer.echo("There is no report: no error that nobody foresaw was met here.")
        return
    table = screen.table("report", "last", "process", "times", "error")
    for name, report in found:
        row = _row(name, report)
        table.add_row(name, row["last"], row["process"], str(row["times"]), row["error"])
    screen.show(table)


@app.command()
def show(
    name: Annotated[str | None, typer.Argument(help="Name of a report; left out: the latest.")] = None,
    home: Home = Path(),
    as_json: AsJson = False,
) -> None:
    """Print one report as it stands, to read, and to send with `fl-client crash show > report.json` if you like."""
    wanted = name or next(iter(crash.names(home)), None)
    report = None if wanted is None else crash.read(home, wanted)
    if report is None:
        raise DocumentError("there is no such report here", remedy="List what there is with `crash list`.")
    typer.echo(json.dumps(report) if as_json else json.dumps(report, indent=1))


def _row(name: str, report: dict[str, Any]) -> dict[str, Any]:
    kinds = [str(each.get("class")) for each in report["errors"] if isinstance(each, dict)]
    return {
        "name": name,
        "first": report["first"],
        "last": str(report.get("last")),
        "process": str(report.get("process")),
        "times": report["counters"]["times"],
        "error": kinds[0] if kinds else "other",
    }
