"""`fl-client fetch`: copy the studies that site.yaml selects out of the hospital's archive into its own folder."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from fl_client.archive import Dicomweb, Dimse, Reason
from fl_client.site import Site, SiteFile
from privacy import screen
from privacy.deidentify import guarded
from privacy.errors import DataError

if TYPE_CHECKING:
    from fl_client.archive import Archive
    from fl_client.fetching import Counts, Progress, Result

Home = Annotated[Path, typer.Option("--home", "-H", help="The site's folder, with site.yaml and keys.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of sentences.")]

LEFT, FAILED = 3, 4  # exit codes beside 0, 1 (an error) and 2 (a wrong option)


def fetch(  # noqa: PLR0913, PLR0917  each parameter is one option
    home: Home = Path(),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only ask how many studies there are; copy nothing.")
    ] = False,
    status: Annotated[bool, typer.Option("--status", help="Only show how far it has come; nobody is asked.")] = False,
    ask_again: Annotated[
        bool, typer.Option("--ask-again", help="Ask everything again, also what was answered in the last 12 hours.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try studies again that were given up.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Outside data.archive.hours wait for them, instead of stopping.")
    ] = False,
    show_not_found: Annotated[
        bool,
        typer.Option(
            "--show-not-found",
            help="List accession numbers that the archive does not know. They belong to patients: keep the list here.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy the studies that `data.archive` of site.yaml selects from the hospital's archive into data.folder.

    It can be interrupted and repeated: nothing is copied twice, nothing stays half written. Exit code 0: everything selected is
    here; 3: something is left for another run; 4: some studies could not be copied; 1: it could not work at all.
    """
    from fl_client import fetching

    settings, folder = archive_of(home)
    if status:
        _show_status(home, settings, show_not_found, as_json)
        return
    if isinstance(settings, Dimse) and settings.tls is None:
        _tell(
            "WARNING: data.archive has no tls: images and names cross your network readably, and nobody proves who they are."
        )
    choice = fetching.Choice(dry_run, ask_again, retry_failed, wait)
    with guarded(home), _Bar() as bar:
        archive = _open(settings, home)
        try:
            result = fetching.Run(settings, home, folder, archive, choice, progress=bar.show).fetch()
        finally:
            archive.close()
    if as_json:
        typer.echo(json.dumps(result.to_json()))
    else:
        _show(result, dry_run)
        if show_not_found and result.not_found_file is not None:
            typer.echo(result.not_found_file.read_text(encoding="utf-8"), nl=False)
    raise typer.Exit(exit_code(result, dry_run))


def archive_of(home: Path) -> tuple[Dicomweb | Dimse, Path]:
    """What site.yaml says of the archive, and the folder where images arrive. Raises DataError."""
    source = Site.source_of(Site.settings_of(home), home)
    settings = source.archive
    if settings is None:
        raise DataError(
            f"{SiteFile.path(home)} names no archive",
            remedy="Fill in `data.archive` (docs/archive.md shows how), or copy images into data.folder yourself.",
        )
    if source.format != "dicom" or source.patients != "header":
        raise DataError(
            "data.archive needs `format: dicom` and `patients: header`, because what is fetched lies below hashed names",
            remedy="Correct the data section of site.yaml.",
        )
    return settings, home / source.folder


def exit_code(result: "Result", dry_run: bool) -> int:
    """0, 1, LEFT or FAILED, as the command's help says. A study without images to copy is no failure."""
    from fl_client.fetching import Stop

    if result.stop is Stop.ARCHIVE:
        return 1
    if dry_run and result.stop is Stop.DONE:
        return 0
    if result.counts.wanted or result.stop is not Stop.DONE:
        return LEFT
    return FAILED if any(reason is not Reason.NO_IMAGES for reason in result.counts.failed) else 0


def _open(settings: Dicomweb | Dimse, home: Path) -> "Archive":
    if isinstance(settings, Dicomweb):
        from fl_client.dicomweb import Server

        return Server(settings, home)
    from fl_client.dimse import Peer

    return Peer(settings, home)


class _Bar:
    """Progress on standard error: a bar for each stage, with images and megabytes in a second."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
        )
        told = screen.Screen(stderr=True)
        self._bars = Bars(*columns, TimeRemainingColumn(), console=told, disable=not told.is_terminal)
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> "_Bar":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, progress: "Progress") -> None:
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bars.add_task(progress.stage, total=progress.total, told="")
        told = ""
        if progress.images:
            speed = f", {progress.received / progress.seconds / 2**20:.1f} MiB/s" if progress.seconds > 1 else ""
            told = f"{progress.images} images, {progress.received / 2**20:.0f} MiB{speed}"
        task = self._bars.tasks[self._tasks[progress.stage]].id
        self._bars.update(task, completed=progress.done, total=progress.total, told=told)


def _show(result: "Result", dry_run: bool) -> None:
    if dry_run:
        total = sum(result.by_modality.values())
        _say(f"{total} studies are selected. Nothing was copied.")
        _show_modalities(result.by_modality)
    else:
        speed = f", {result.received / result.seconds / 2**20:.1f} MiB/s" if result.seconds > 1 else ""
        _say(
            f"Copied now: {result.images} images of {result.studies} studies, {result.received / 2**20:.1f} MiB{speed}."
        )
        _show_counts(result.counts)
    if result.malformed_numbers:
        _say(f"{result.malformed_numbers} lines of the list are no accession numbers and were not asked for.")
    if result.foreign_answers:
        _say(f"{result.foreign_answers} answers were not what was asked for, and were ignored.")
    if result.not_found_file is not None:
        missing = result.counts.numbers[1]
        _say(f"{missing} accession numbers are not in the archive; {result.not_found_file} lists them.")
    if result.problem is not None:
        _say(f"The archive: {result.problem.explanation}. {result.problem.remedy}")
    _say(result.stop.sentence)
    if not dry_run and result.images:
        _say("Next: fl-client ingest")


def _show_counts(counts: "Counts") -> None:
    _say(f"Of this selection {counts.done} studies ({counts.instances} images) are here, {counts.wanted} are wanted.")
    if counts.failed:
        table = screen.table("not copied", "studies", "why", "what to do")
        for reason, count in sorted(counts.failed.items(), key=lambda item: -item[1]):
            table.add_row(str(reason), str(count), reason.explanation, reason.remedy)
        screen.show(table)
        if any(reason is not Reason.NO_IMAGES for reason in counts.failed):
            _say("To try them again: fl-client fetch --retry-failed")


def _show_modalities(found: dict[str, int]) -> None:
    if found:
        table = screen.table("modalities", "studies")
        for words, count in sorted(found.items(), key=lambda item: -item[1]):
            table.add_row(words, str(count))
        screen.show(table)


def _show_status(home: Path, settings: Dicomweb | Dimse, show_not_found: bool, as_json: bool) -> None:
    from fl_client.fetching import Plan, counts_json, selection_of

    with Plan.read(Plan.path(home), selection_of(settings.select)) as plan:
        counts = None if plan is None else plan.counts()
        found = {} if plan is None else plan.by_modality()
        missing = [] if plan is None or not show_not_found else plan.not_found()
    if as_json:
        listed = {"not_found": missing} if show_not_found else {}
        typer.echo(json.dumps({"begun": counts is not None} | (counts_json(counts) if counts else {}) | listed))
        return
    if counts is None:
        _say("Nothing was fetched yet.")
        return
    _show_counts(counts)
    _show_modalities(found)
    if counts.numbers[0]:
        _say(f"{counts.numbers[0]} accession numbers were asked for; {counts.numbers[1]} are not in the archive.")
    for number in missing:
        typer.echo(number)


def _say(sentence: str) -> None:
    screen.say(sentence)


def _tell(sentence: str) -> None:
    """For a person, beside what a command prints for programs."""
    typer.echo(sentence, err=True)
