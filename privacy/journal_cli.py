"""`journal verify` and `journal show`, the same for a site and for the coordinator."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from privacy import heads, journal, keys, screen


@dataclass(frozen=True)
class Book:
    """One side's journal, and who may have signed what stands in it."""

    path: Path
    party: str
    own: Sequence[keys.PublicKey]
    others: Mapping[str, Sequence[keys.PublicKey]]


Home = Annotated[Path, typer.Option("--home", "-H", help="The folder with the journal and the keys.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def commands(open_book: Callable[[Path], Book]) -> typer.Typer:
    """The group of commands for the side whose journals `open_book` finds."""
    app = typer.Typer(help="Read the journal, and prove that no line of it was changed.", no_args_is_help=True)

    @app.command()
    def verify(
        home: Home = Path(),
        witness: Annotated[
            list[Path] | None,
            typer.Option("--witness", "-w", help="A copy of the other side's journal, which holds heads of this one."),
        ] = None,
        earlier: Annotated[
            list[Path] | None,
            typer.Option("--key", "-k", help="An earlier key of this side: its certificate or public key, as PEM."),
        ] = None,
        head: Annotated[str | None, typer.Option(help="A hash that you noted: its line must be there.")] = None,
        as_json: AsJson = False,
    ) -> None:
        """Check every line, every signature, and every head that somebody else holds; names the line that is wrong."""
        book = open_book(home)
        held = [found for path in witness or [] for found in heads.held_of(path, book.party)]
        own = [*book.own, *(_public(path) for path in earlier or [])]
        with screen.busy("checking each line"):
            found = heads.verify(book.path, book.party, own, book.others, held)
            journal.verify(book.path, head)
        if as_json:
            typer.echo(json.dumps({"whole": True, "head_found": head is not None, **asdict(found)}))
            return
        typer.echo(f"{found.lines} lines, each in its place and as it was written.")
        typer.echo(f"Signed heads: {found.signed} of this journal, {found.witnessed} of others, all genuine.")
        if held:
            typer.echo(
                f"Heads that the other side holds: {found.confirmed}, and this journal agrees up to line {found.confirmed_to}."
            )
        elif head is None:
            typer.echo(
                "Whoever has this machine could have written all of it anew: compare with the other side's journal "
                "(--witness), or with a hash noted earlier (--head)."
            )

    @app.command()
    def show(
        home: Home = Path(),
        last: Annotated[int, typer.Option(min=1, help="How many lines, from the end.")] = 20,
        kind: Annotated[str | None, typer.Option(help="Only lines of this kind, such as refusal.")] = None,
        as_json: AsJson = False,
    ) -> None:
        """Print lines of the journal, the latest last."""
        book = open_book(home)
        entries = [entry for entry in journal.entries(book.path) if kind in (None, entry["kind"])][-last:]
        if as_json:
            typer.echo(json.dumps({"lines": entries}))
            return
        table = screen.table("line", "time", "kind", "facts")
        for entry in entries:
            facts = ", ".join(f"{name} {_short(value)}" for name, value in entry["facts"].items())
            table.add_row(str(entry["n"]), entry["time"][:16].replace("T", " "), entry["kind"], facts)
        screen.show(table)

    return app


def _public(path: Path) -> keys.PublicKey:
    pem = path.read_bytes()
    return keys.public_key_of(keys.load_certificate(pem)) if b"CERTIFICATE" in pem else keys.load_public(pem)


def _short(value: object) -> str:
    """A fact as people read it: of digests and signatures the beginning, of lists the members."""
    if isinstance(value, list):
        return "/".join(map(str, value))
    text = str(value)
    return f"{text[:12]}..." if len(text) >= 64 else text
