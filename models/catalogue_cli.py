"""`pull` and `models`, the same for a site and for a researcher."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from models import catalogue
from models.catalogue import Notice, Publisher
from models.registry import ENDING, Package, listing
from privacy import keys, screen
from privacy.errors import PackageRefused

MIB = 2**20

Home = Annotated[Path, typer.Option("--home", "-H", help="Your folder, with the keys that joining made.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of lines.")]
Trust = Annotated[
    list[str] | None,
    typer.Option("--trust", help="Fingerprint of a signer to accept; repeat. Default: anybody, which is said."),
]


class Note(Protocol):
    """Writes into the journal of the side that pulls."""

    def __call__(self, home: Path, kind: str, notice: Notice) -> None: ...


def add_to(
    app: typer.Typer,
    open_publisher: Callable[[Path], AbstractContextManager[Publisher]],
    note: Note = lambda home, kind, notice: None,
    panel: str = "Released models",
) -> None:
    """Give `app` the commands, in the panel of its help. `note` hears of a model before it is asked for
    and after it is in its place.
    """

    @app.command(rich_help_panel=panel)
    def models(
        home: Home = Path(),
        registry: Annotated[
            Path | None, typer.Option("--registry", help="A folder with packages, instead of what is published.")
        ] = None,
        trust: Trust = None,
        as_json: AsJson = False,
    ) -> None:
        """List the models that the coordinator publishes, or the packages of a folder, with versions and origin."""
        if registry is not None:
            _say_folder(registry, trust, as_json)
            return
        with open_publisher(home) as publisher:
            found = catalogue.published(publisher, _coordinator(home))
        if as_json:
            print(json.dumps([asdict(notice) for notice in found]))
            return
        for notice in found:
            size, origin = f"{notice.size / MIB:.1f} MiB", _origin(notice.parent)
            _line(
                f"{notice.name} {notice.version}  study {notice.digest[:12]}  run {notice.run_id}  {origin}  {size}  "
                f"released by {notice.researcher}, published {notice.published[:10]}"
            )
        if not found:
            _line("The coordinator publishes no model yet.")

    @app.command(rich_help_panel=panel)
    def pull(
        model: Annotated[
            str, typer.Argument(metavar="NAME[@VERSION]", help="See `models`; without version, the latest.")
        ],
        home: Home = Path(),
        out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the package.")] = Path(),
        max_mib: Annotated[int, typer.Option(min=1, max=16384, help="The largest package to take, in MiB.")] = 1024,
        as_json: AsJson = False,
    ) -> None:
        """Fetch a published model, check all of it, then put it in its place; a fetch that was cut goes on."""
        with open_publisher(home) as publisher:
            coordinator = _coordinator(home)
            notice = catalogue.find(publisher, coordinator, model)
            note(home, "model-asked", notice)
            with _bar(notice) as tell:
                path, package = catalogue.fetch(publisher, notice, coordinator, out, tell, max_mib * MIB)
        note(home, "model-pulled", notice)
        if as_json:
            print(json.dumps({"file": str(path), "researcher": notice.researcher, **package.facts()}))
            return
        _line(f"Pulled {path}, SHA-256 {package.sha256}")
        _line(f"Signed by researcher {notice.researcher}, published by your coordinator on {notice.published[:10]}.")


def _say_folder(folder: Path, trust: list[str] | None, as_json: bool) -> None:
    found = listing(folder, trust)
    if as_json:
        print(json.dumps([_entry(path, package) for path, package in found]))
        return
    for path, package in found:
        if isinstance(package, PackageRefused):
            _line(f"{path.name}: REFUSED, {package}")
            continue
        facts = package.manifest
        origin = _origin(facts["lineage"]["parent"])
        _line(f"{facts['name']} {facts['version']}  study {facts['digest'][:12]}  run {facts['run_id']}  {origin}")
    if not found:
        _line(f"No packages ({ENDING}) in {folder}.")


def _entry(path: Path, package: Package | PackageRefused) -> dict[str, Any]:
    if isinstance(package, PackageRefused):
        return {"file": path.name, "refused": str(package)}
    return {"file": path.name, **package.facts()}


def _origin(parent: str | None) -> str:
    return f"from {parent[:12]}" if parent else "from its seed"


def _coordinator(home: Path) -> keys.PublicKey:
    """The coordinator's key, as it was noted at joining."""
    return keys.load_public((home / "keys" / "coordinator.pem").read_bytes())


@contextmanager
def _bar(notice: Notice) -> Iterator[Callable[[int], None]]:
    """A bar over the bytes of a package, beside what a command prints for programs."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    told = screen.Screen(stderr=True)
    with Progress(*columns, console=told, disable=not told.is_terminal) as bars:
        task = bars.add_task(notice.file_name, total=notice.size)
        yield lambda done: bars.update(task, completed=done)


def _line(sentence: str) -> None:
    screen.say(sentence)
