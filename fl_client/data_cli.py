"""`fl-client ingest` and `fl-client quarantine`: a hospital's images become a checked cache, and what is left out has a name."""

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fl_client.site import Site, SiteFile
from models.study import read
from privacy import screen
from privacy.deidentify import guarded
from privacy.errors import DataError, DocumentError

console = screen.Screen()

Home = Annotated[Path, typer.Option("--home", "-H", help="The site's folder, with site.yaml and keys.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


def ingest(
    home: Home = Path(),
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=0, max=256, help="Processes that read at once; 0: one for each core.")
    ] = 0,
    again: Annotated[
        bool, typer.Option("--again", help="Read every file again, also those whose size and date did not change.")
    ] = False,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune", help="Afterwards remove prepared images of studies; the next order prepares them again."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read the images named in site.yaml into the site's cache; run it again at any time, it only reads what is new."""
    from fl_client import ingest as reading

    settings = read(SiteFile, SiteFile.path(home))
    source, state = Site.source_of(settings, home), Site.state_of(home)
    if again:
        reading.distrust(state)
    with guarded(home), _Bars() as bars:
        report = reading.ingest(source, home, state, bars.show, jobs or os.cpu_count() or 1)
    freed = reading.prune(state) if prune else None
    if as_json:
        print(json.dumps(report.to_json() | ({} if freed is None else {"pruned_bytes": freed})))
    else:
        show_ingested(report)
        if freed is not None:
            screen.say(f"{freed / 2**20:.1f} MiB of prepared images removed.")
    if report.unfit:
        raise DataError(report.unfit, remedy="See `fl-client quarantine`, mend the source, and ingest again.")


class _Bars:
    """Progress on standard error: a bar for each stage, with what it does in a second."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
        )
        told = screen.Screen(stderr=True)
        self._bars = Progress(*columns, TimeRemainingColumn(), console=told, disable=not told.is_terminal)
        self._stages: dict[str, tuple[Any, int, float]] = {}

    def __enter__(self) -> "_Bars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, stage: str, done: int, total: int) -> None:
        if stage not in self._stages:  # what was known before counts as done, and not as speed
            self._stages[stage] = (self._bars.add_task(stage, total=total, speed=""), done, time.monotonic())
        task, before, began = self._stages[stage]
        passed = time.monotonic() - began
        speed = f"{(done - before) / passed:.0f}/s" if passed > 1 else ""
        self._bars.update(task, completed=done, total=total, speed=speed)


def show_ingested(report: Any) -> None:
    """What was taken, and what was left out by reason."""
    volumes = f", {report.volumes} of them CT volumes," if report.volumes else ""
    console.print(
        f"{report.taken} images{volumes} of {report.patients} patients taken from {report.found} files.",
        highlight=False,
    )
    if report.reasons:
        table = screen.table("left out", "files", "why")
        for reason, count in sorted(report.reasons.items(), key=lambda item: (-item[1], item[0])):
            table.add_row(str(reason), str(count), reason.explanation)
        screen.show(table, console)
        if any(reason.remedy for reason in report.reasons):
            screen.say("Which files, and what to do: fl-client quarantine")
    if report.label_problem:
        screen.say(f"Labels: {report.label_problem}", "red")
    if report.labels is not None:
        _show_labels(report.labels)
    if report.masks is not None:
        held = ", ".join(f"{name} in {count}" for name, count in sorted(report.masks.present.items()))
        screen.say(f"Masks: {report.masks.taken} of {report.masks.found} files taken; {held}.")
        for reason, count in report.masks.reasons.items():
            screen.say(f"  {reason}: {_files(count)}: {reason.explanation}")


def _show_labels(counted: Any) -> None:
    screen.say(f"Labels: {counted.labelled} of these images have one, {counted.unlabelled} do not.")
    for target, words in sorted(counted.unmapped.items()):
        # Where a wrong column is mapped these are names; a person at the screen may see them, a file that is kept may not.
        if not console.is_terminal:
            rows = f"{sum(words.values())} rows say {len(words)} words"
            text = f"  {target}: {rows} that site.yaml does not map; they count as missing. A terminal shows them."
            screen.say(text)
            continue
        for word, count in sorted(words.items()):
            text = f"  {target}: {count} rows say {word!r}, which site.yaml does not map; they count as missing"
            screen.say(text)


def quarantine(
    home: Home = Path(),
    reason: Annotated[str | None, typer.Option(help="Only files left out for this reason.")] = None,
    files: Annotated[
        bool, typer.Option("--files", help="List the files too. Names of files may name patients: keep the list here.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What ingestion left out, by reason, with what to do about it; with --files, which files these are."""
    from fl_client.index import Index
    from fl_client.masks import Masks
    from fl_client.sources import Reason

    state = Site.state_of(home)
    of_masks = {f"masks: {name}": why for name, why in Masks.open(state).left_out.items()}
    found = Index.open(state).left_out() | of_masks
    if reason is not None:
        if reason not in list(Reason):
            known = ", ".join(sorted({str(one) for one in found.values()})) or "none, nothing is left out"
            raise DataError(f"{reason!r} is no reason", remedy=f"Reasons here: {known}.")
        found = {name: why for name, why in found.items() if why == reason}
    counts = Counter(found.values()).most_common()
    if as_json:
        rows = [
            {
                "reason": str(why),
                "files": count,
                "explanation": why.explanation,
                "remedy": why.remedy,
                "damage": why.damage,
            }
            for why, count in counts
        ]
        listed = {"names": [{"file": name, "reason": str(why)} for name, why in found.items()]} if files else {}
        print(json.dumps({"left_out": rows} | listed))
        return
    if not found:
        console.print("Nothing is left out." if reason is None else "No file is left out for this reason.")
        return
    for why, count in counts:
        screen.say(f"{why}, {_files(count)}: {why.explanation}", "bold")
        if why.remedy:
            screen.say(f"  → {why.remedy}")
        for name in (name for name, other in found.items() if files and other is why):
            screen.say(f"  {name}")


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def phantom(  # noqa: PLR0913, PLR0917  each parameter is one option
    folder: Annotated[Path, typer.Argument(help="Where the made-up hospital goes; it must be empty or new.")],
    name: Annotated[str, typer.Option(help="Name of the site, part of the made-up identifiers.")] = "phantom",
    vendor: Annotated[
        str,
        typer.Option(help="Whose devices are imitated: aurora, boreal, cirrus, dorado; of CT aurora, boreal, cirrus."),
    ] = "aurora",
    patients: Annotated[int, typer.Option(min=10, max=5000, help="Number of made-up patients.")] = 120,
    seed: Annotated[int, typer.Option(min=0, help="Another seed makes other patients.")] = 1,
    ct: Annotated[bool, typer.Option("--ct", help="Chest CT series instead of radiographs.")] = False,
    outlined: Annotated[
        bool, typer.Option("--masks", help="With masks of lungs and opacities; bodies lie and are shaped differently.")
    ] = False,
) -> None:
    """Make a hospital of synthetic radiographs or CT, to try everything without a patient's data."""
    from fl_client.phantom import VENDORS, make_hospital
    from fl_client.phantom_ct import SCANNERS, make_ct_hospital

    scanners = {scanner.manufacturer.split()[0].casefold(): scanner for scanner in SCANNERS}
    known = list(scanners if ct else VENDORS)
    if vendor not in known:
        raise DocumentError(f"there is no vendor {vendor!r}; there are {', '.join(known)}", remedy="Use one of these.")
    if folder.exists() and any(folder.iterdir()):
        raise DocumentError(f"{folder} is not empty", remedy="Choose a new folder; nothing was written.")
    with screen.busy("making patients"):
        if ct:
            labels = make_ct_hospital(folder, name, patients, seed, scanners[vendor], outlined=outlined)
        else:
            labels = make_hospital(folder, name, patients, seed, VENDORS[vendor], outlined=outlined)
    screen.say(f"Made {patients} phantom patients in {folder}. For site.yaml:")
    typer.echo(data_section(folder, labels, outlined=outlined))  # not broken between words: it is copied


def data_section(folder: Path, labels: dict[str, Any], *, outlined: bool = False) -> str:
    """The `data:` section of a site.yaml for a phantom hospital."""
    import yaml

    table = {**labels, "table": str((folder / labels["table"]).resolve())}
    data = {"folder": str((folder / "dicom").resolve()), "format": "dicom", "labels": table}
    if outlined:
        from fl_client.phantom import STRUCTURES

        data["masks"] = {"folder": str((folder / "masks").resolve()), "structures": STRUCTURES}
    section = {"data": data}
    return yaml.safe_dump(section, sort_keys=False, allow_unicode=True, default_style=None)
