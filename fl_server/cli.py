"""`fl-server`: the coordinator's commands."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fl_server import doctor_cli, next_step, published_cli, runs_cli, weights_cli
from fl_server.roster import Home, Party
from fl_server.settings import ServerFile
from fl_server.standings import Told
from models.study import parse
from privacy import console, crash_cli, heads, journal_cli, keys, logs, screen
from privacy.deidentify import guarded
from privacy.errors import RunError
from privacy.greeting import Versions, own
from privacy.journal_cli import Book

if TYPE_CHECKING:
    from fl_server.authority import Request

app = typer.Typer(
    name="fl-server",
    help="Found and run a consortium: invite hospitals and researchers, serve their training runs.",
    pretty_exceptions_enable=False,
)

FOUND, SERVE, WATCH = "Found and invite", "Serve and run", "Watch over it"
MODELS, OFFLINE = "Models", "With the authority's key offline"
"""Panels of the help, in the order of the work."""

HomeOption = Annotated[
    Path,
    typer.Option(
        "--home", "-H", help="Folder of the consortium, made by `fl-server init`. Default: the current folder."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=console.show_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """Found and run a consortium: invite hospitals and researchers, serve their training runs."""
    console.begin(context, next_step.coordinator)


@app.command(rich_help_panel=FOUND)
def init(
    home: Annotated[Path, typer.Argument(help="New or empty folder for the consortium's settings, keys and runs.")],
    name: Annotated[str, typer.Option(help="Name of the consortium: lower case, short, for ever.")] = "consortium",
    host: Annotated[str, typer.Option(help="DNS name or IPv4 address that the hospitals connect to.")] = "localhost",
    listen: Annotated[str, typer.Option(help="Address of this machine to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    gateway_port: Annotated[int, typer.Option(help="Port for training.")] = 9440,
    service_port: Annotated[int, typer.Option(help="Port for joining, studies and results.")] = 9441,
) -> None:
    """Found a consortium: create its authority, its keys, server.yaml and an empty roster."""
    text = json.dumps(
        {
            "version": 1,
            "name": name,
            "host": host,
            "listen": listen,
            "gateway_port": gateway_port,
            "service_port": service_port,
        }
    )
    founded = Home.found(home, parse(ServerFile, text, "the options of init"))
    typer.echo(f"Founded {name} in {home}. Back up its folder keys: with it, anyone could speak for the consortium.")
    typer.echo(f"Authority: {keys.grouped(founded.ca_fingerprint)}")
    typer.echo(f"Next: fl-server invite NAME --home {home}, then fl-server start --home {home}")


@app.command(rich_help_panel=FOUND)
def invite(
    name: Annotated[str, typer.Argument(help="Name of the hospital or researcher: lower case, short, for ever.")],
    researcher: Annotated[
        bool, typer.Option("--researcher", help="Invite a researcher instead of a hospital.")
    ] = False,
    home: HomeOption = Path(),
) -> None:
    """Print one line that lets one hospital (or researcher) join once, within the time of server.yaml."""
    opened = Home.open(home)
    line = opened.invite(name, "researcher" if researcher else "site")
    command = "fl-study" if researcher else "fl-client"
    # The line alone on stdout, so that it can be piped; what to do with it on stderr.
    typer.echo(str(line))
    typer.echo(
        f"Send this line to {name} over a channel you trust, for example encrypted mail. It works once, within "
        f"{opened.settings.invitation_hours} hours: {command} join LINE",
        err=True,
    )


@app.command(rich_help_panel=FOUND)
def sites(home: HomeOption = Path(), as_json: JsonOption = False) -> None:
    """List the enrolled hospitals and researchers, the open invitations, and the authority's fingerprint."""
    opened = Home.open(home)
    parties, waiting = [*opened.roster.sites(), *opened.roster.researchers()], opened.roster.invitations()
    told = opened.roster.told()
    if as_json:
        document = {
            "consortium": opened.settings.name,
            "fingerprint": opened.ca_fingerprint,
            "isocenter": _versions_json(own()),
            "sites": [_party_json(party, told) for party in parties if party.role == "site"],
            "researchers": [_party_json(party, told) for party in parties if party.role == "researcher"],
            "invitations": [{"name": each.name, "role": each.role, "expires": each.expires} for each in waiting],
        }
        typer.echo(json.dumps(document, indent=2))
        return
    table = screen.table("name", "role", "last seen", "certificate until", "version", "ready")
    for party in parties:
        until = f"revoked {party.revoked[:10]}" if party.revoked else _until(party)
        each, site = told.get(party.name, Told()), party.role == "site"
        said = (each.versions.release if each.versions else "not told", each.ready_words() if site else "")
        table.add_row(party.name, party.role, _minute(party.last_seen), until, *said)
    for open_one in waiting:
        table.add_row(open_one.name, open_one.role, "invited", f"(invitation) {open_one.expires[:10]}", "", "")
    _show(table, "Nobody is enrolled or invited yet: fl-server invite NAME")
    for party in parties:
        if not party.revoked and (skew := told.get(party.name, Told()).skew(party.name)):
            typer.echo(f"{skew.sentence} {skew.remedy}")
    typer.echo("Authority (sites compare this over the telephone):")
    grouped = keys.grouped(opened.ca_fingerprint)
    typer.echo(f"  {grouped[:39]}\n  {grouped[40:]}")


@app.command(rich_help_panel=FOUND)
def revoke(
    name: Annotated[str, typer.Argument(help="Name of the hospital or researcher.")],
    home: HomeOption = Path(),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Believe nothing of one hospital or researcher any more; a running coordinator refuses its connections in seconds."""
    opened = Home.open(home)
    role = opened.roster.role_of(name)
    if not yes:
        typer.confirm(f"Revoke the {role} {name}? Its key can never be used here again.", abort=True)
    opened.revoke(name)
    typer.echo(f"Revoked {name}. Runs go on without it. A new key for the same name: fl-server invite {name}")


@app.command(rich_help_panel=OFFLINE)
def offline(
    folder: Annotated[Path, typer.Argument(help="New folder, for example on a USB stick.")], home: HomeOption = Path()
) -> None:
    """Move the authority's key to another place; from then on each certificate is signed by hand with `fl-server sign`."""
    from fl_server import authority

    authority.move(Home.open(home), folder)
    typer.echo(
        f"The authority's key is in {folder} and no longer in {home / 'keys'}. Keep two copies of it, both locked away."
    )
    typer.echo(
        "To sign what waits: fl-server requests --out LIST here, fl-server sign LIST there, fl-server accept here."
    )


@app.command(rich_help_panel=OFFLINE)
def requests(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write them to this file, for `fl-server sign`.")
    ] = None,
    home: HomeOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """List the certificates that wait for the offline authority's signature."""
    from fl_server import authority

    opened = Home.open(home)
    waiting = authority.waiting(opened)
    if out is not None:
        keys.write_public(out, authority.signing_list(opened))
    if as_json:
        rows = [
            {"name": each.name, "role": each.role, "asked": each.asked, "key": each.fingerprint} for each in waiting
        ]
        typer.echo(json.dumps({"requests": rows}, indent=2))
        return
    _show(_requests_table(waiting), "Nothing waits for a signature.")
    if out is not None:
        typer.echo(f"Written to {out}. On the authority's machine: fl-server sign {out.name} --authority FOLDER")


@app.command(rich_help_panel=OFFLINE)
def sign(
    listed: Annotated[Path, typer.Argument(help="File of `fl-server requests --out`.")],
    authority_folder: Annotated[Path, typer.Option("--authority", "-a", help="Folder made by `fl-server offline`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the certificates go.")] = Path("certificates.json"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask; the requests are still shown.")] = False,
) -> None:
    """On the authority's machine, without a network: show what a coordinator asks for, and sign it."""
    from fl_server import authority

    wanted = authority.read_list(listed.read_bytes(), authority_folder)
    _show(_requests_table(wanted), "The list is empty.")
    if not wanted:
        return
    if not yes:
        typer.confirm("Sign these certificates?", abort=True)
    keys.write_public(out, authority.sign(wanted, authority_folder))
    typer.echo(f"Signed {len(wanted)}. Carry {out} back, and there: fl-server accept {out.name}")


@app.command(rich_help_panel=OFFLINE)
def accept(
    signed: Annotated[Path, typer.Argument(help="File of `fl-server sign`.")], home: HomeOption = Path()
) -> None:
    """Take in certificates that the offline authority signed; those who wait for them get them when they ask again."""
    from fl_server import authority

    parties, refused = authority.accept(Home.open(home), signed.read_bytes())
    for party in parties:
        typer.echo(f"{party.name} has a certificate until {_until(party)}.")
    for name, why in refused.items():
        typer.echo(f"{name} was left out: {why}", err=True)
    if refused or not parties:
        raise typer.Exit(1)


runs_cli.add_to(app, SERVE)
app.command("doctor", rich_help_panel=WATCH)(doctor_cli.coordinator)
published_cli.add_to(app, MODELS)


@app.command(rich_help_panel=SERVE)
def start(
    home: HomeOption = Path(),
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also print the coordinator's log.")] = False,
) -> None:
    """Serve the consortium until interrupted: the training gateway, the consortium service, and the runs."""
    opened = Home.open(home)
    from fl_server import link

    file = logs.handler(opened.root, "coordinator", opened.settings.log)
    with guarded(opened.root, level=logging.INFO if verbose else logging.WARNING, file=file):
        link.serve(opened)


@app.command(rich_help_panel=WATCH)
def notify(home: HomeOption = Path()) -> None:
    """Send a test notification to every target that server.yaml names; exit code 1 if one did not take it."""
    from fl_server.notify import trial

    settings, failed = Home.open(home).settings, False
    if not settings.notify:
        typer.echo("server.yaml names nobody to notify; see notify in docs/configuration.md.")
    for target in settings.notify:
        try:
            target.deliver(trial(settings.name))
            typer.echo(f"{target.name}: told")
        except RunError as error:
            failed = True
            typer.echo(f"{target.name}: {error}", err=True)
    if failed:
        raise typer.Exit(1)


@app.command(rich_help_panel=WATCH)
def dashboard(  # noqa: PLR0913, PLR0917  each parameter is one option
    home: HomeOption = Path(),
    listen: Annotated[
        str, typer.Option(help="Address of this machine; beyond loopback only with a login.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any.")] = 9442,
    host: Annotated[
        list[str] | None, typer.Option("--host", help="Another name under which browsers may ask for it; repeat.")
    ] = None,
    login: Annotated[
        bool, typer.Option("--login", help="Ask for the password, over TLS, on loopback as well.")
    ] = False,
    certificate: Annotated[
        Path | None, typer.Option(help="Certificate that browsers trust, PEM. Default: the consortium's own.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key, PEM, mode 0600.")] = None,
    set_password: Annotated[
        bool, typer.Option("--set-password", help="Ask for a new password, store its hash, stop.")
    ] = False,
) -> None:
    """Show sites, runs, studies, models and the journal in a browser, read only; /metrics on loopback is for Prometheus."""
    from fl_server import dashboard as screen
    from fl_server import door

    opened = Home.open(home)
    if set_password:
        given = typer.prompt("Password of the dashboard", hide_input=True, confirmation_prompt=True)
        door.set_password(opened.root / "keys" / screen.PASSWORD, given)
        typer.echo("The password is set. A dashboard that is running takes it from the next login on.")
        return
    where = screen.Address(listen, port, tuple(host or ()), certificate, key, login)
    with guarded(opened.root, file=logs.handler(opened.root, "dashboard", opened.settings.log)):
        screen.serve(opened, where, typer.echo)


def _book(home: Path) -> Book:
    """The coordinator's journal: its own heads carry its key, the sites' theirs, those of revoked keys included."""
    opened = Home.open(home)
    own = [opened.coordinator_key.public_key()]
    return Book(home / "journal.jsonl", heads.COORDINATOR, own, opened.roster.known_keys())


app.add_typer(journal_cli.commands(_book), name="journal", rich_help_panel=WATCH)
app.add_typer(crash_cli.app, name="crash", rich_help_panel=WATCH)
app.add_typer(weights_cli.app, name="weights", rich_help_panel=MODELS)


def _versions_json(versions: Versions | None) -> dict[str, Any] | None:
    return None if versions is None else {"version": versions.release, "wire": versions.wire}


def _party_json(party: Party, told: dict[str, Told]) -> dict[str, Any]:
    found = told.get(party.name, Told())
    skew, readiness = found.skew(party.name), found.readiness
    ready = None if readiness is None else {**asdict(readiness), "looked": found.looked}
    return {
        "name": party.name,
        "node_id": None if party.node_id is None else str(party.node_id),  # 64 bits: too long for some readers of JSON
        "joined": party.joined,
        "last_seen": party.last_seen,
        "certificate_until": party.certificate.not_valid_after_utc.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "revoked": party.revoked,
        "isocenter": _versions_json(found.versions),
        "skew": None if skew is None else {"upgrade": skew.who, "to": skew.to, "must": skew.must},
        **({"readiness": ready} if party.role == "site" else {}),
    }


def _until(party: Party) -> str:
    until = f"{party.certificate.not_valid_after_utc:%Y-%m-%d}"
    return f"{until} (ended)" if keys.ended(party.certificate) else until


def _requests_table(waiting: "list[Request]") -> Table:
    table = screen.table("name", "role", "asked", "days", "key (compare over the telephone)")
    for each in waiting:
        table.add_row(each.name, each.role, _minute(each.asked), str(each.days), each.fingerprint)
    return table


def _minute(moment: str | None) -> str:
    return moment[:16].replace("T", " ") if moment else "never"


def _show(table: Table, empty: str) -> None:
    if table.row_count:
        screen.show(table)
    else:
        typer.echo(empty)


def main() -> None:
    """Entry of the console script."""
    console.run(app)
