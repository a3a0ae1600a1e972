"""`fl-study release`, `models`, `pull`, `verify`, `predict` and `export`: a model from its run to those who use it."""

import csv
import json
import pkgutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fl_server import researcher
from models import catalogue_cli
from models.registry import Package
from privacy import calls, keys, screen
from privacy.errors import DocumentError, StudyConflict
from privacy.heads import SignedHead

SCORE = "fl_client.scoring:score"  # only the hospital's half reads DICOM, so it is looked up by its name
OUTLINE = "fl_client.outlining:outline"

PackageFile = Annotated[Path, typer.Argument(metavar="PACKAGE", help="A released model, NAME-VERSION.isocenter.")]
Trust = catalogue_cli.Trust
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of lines.")]
Home = Annotated[Path, typer.Option("--home", "-H", help="Folder with your keys; made by `fl-study join`.")]


def add_to(app: typer.Typer, run_id_of: Callable[[calls.Caller, str], str], panel: str) -> None:
    """Give `app` the commands, in the panel of its help; `run_id_of`: what turns the words of a user into a run."""

    @app.command(rich_help_panel=panel)
    def release(
        run_id: Annotated[
            str, typer.Argument(help="A finished run, or a study's digest or file (its latest finished run).")
        ],
        home: Home = Path(),
        attack_file: Annotated[
            Path | None, typer.Option("--attack", help="attack.json of `fl-study attack`; needed for a private study.")
        ] = None,
        version: Annotated[str, typer.Option("--version", help="Version of the model, such as 1.2.0.")] = "1.0.0",
        head: Annotated[
            list[Path] | None,
            typer.Option("--head", help="File with another signed journal head to tie it to; repeat."),
        ] = None,
        out: Annotated[Path, typer.Option("--out", "-o", help="The package, or an existing folder for it.")] = Path(),
    ) -> None:
        """Write the model of a finished run as a signed package, unless an attack found more than the study claims.

        It is tied to the coordinator's journal by the signed head that the coordinator gives now. For others to pull it, the
        coordinator publishes it: `fl-server publish PACKAGE`.
        """
        from fl_server import release as released

        attack = _read_attack(attack_file) if attack_file else None
        coordinator = keys.load_public((home / "keys" / "coordinator.pem").read_bytes())
        with (
            screen.busy("packing the model"),
            researcher.open_caller(home) as caller,
            tempfile.TemporaryDirectory() as scratch,
        ):
            caller.results(run_id_of(caller, run_id), Path(scratch))
            present = caller.head()
            present.verify([coordinator])
            heads = [present, *(_head(file) for file in head or [])]
            wanted = released.Wanted(version, attack, heads, keys.point_hex(coordinator))
            content = released.package(Path(scratch), wanted, keys.load_key(home / "keys" / "researcher.key"))
        package = Package.read(content)
        path = out / package.file_name if out.is_dir() else out
        _free(path)
        keys.write_public(path, content)
        _line(f"Released {path}, SHA-256 {package.sha256}")
        _line(f"Signed by {keys.grouped(package.signer)}: tell this fingerprint to those who use it.")

    catalogue_cli.add_to(app, researcher.open_caller, panel=panel)
    for command in (verify, predict, export):
        app.command(rich_help_panel=panel)(command)


def verify(package: PackageFile, trust: Trust = None, as_json: AsJson = False) -> None:
    """Check all of a package, and say what was checked."""
    from models import exporting

    with screen.busy("checking the package"):
        found = Package.open(package, trust)
        exporting.network(found)  # the weights are those of the study's network
    if as_json:
        print(json.dumps(found.facts()))
        return
    facts = found.manifest
    _line(f"{facts['name']} {facts['version']}, study {facts['digest']}, run {facts['run_id']}")
    _line(f"{len(found.files)} files as signed; the weights are finite, and of the study's network.")
    for head in found.heads:
        _line(
            f"Tied to the journal of {head.party} at line {head.lines}: `journal verify --head {head.head}` finds it there."
        )
    whom = "whom you trust" if found.trusted else "who was not checked: compare the fingerprint, then use --trust"
    _line(f"Signed by {keys.grouped(found.signer)}, {whom}.")


def predict(
    package: PackageFile,
    folder: Annotated[Path, typer.Argument(help="Folder with DICOM radiographs or CT series, at any depth.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Table of scores, or of sizes beside OUT_seg with DICOM SEG; a new file."),
    ] = Path("scores.csv"),
    trust: Trust = None,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Confined processes that read files.")] = 1,
    covariates: Annotated[
        Path | None,
        typer.Option(
            help="Table of a model that takes covariates: sop_instance_uid (CT: series_instance_uid), a column for each."
        ),
    ] = None,
) -> None:
    """Score or outline the radiographs or CT volumes of a folder, prepared as in training; what is left out is counted."""
    found = Package.open(package, trust)
    _free(out)
    if found.study.segments:
        _outline(found, folder, out, jobs, covariates)
        return
    with screen.bars() as tell:
        scored = pkgutil.resolve_name(SCORE)(found, folder, jobs, tell, covariates)
    with out.open("x", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", scored.uid, *found.study.task.targets])
        table.writerows([row.file, row.uid, *(f"{score:.8f}" for score in row.scores)] for row in scored.rows)
    out.chmod(0o600)  # scores of patients
    _line(f"{len(scored.rows)} scored: {out}")
    for reason, count in sorted(scored.left_out.items()):
        _line(f"files left out, {reason}: {count}")
    if scored.misread:
        _line(f"{scored.misread} cells of {covariates} were not understood and count as missing.")


def _outline(package: Package, folder: Path, out: Path, jobs: int, covariates: Path | None) -> None:
    """A DICOM SEG for each image below `folder`, and a table of sizes."""
    if covariates is not None:
        raise StudyConflict("this model takes images alone", remedy="Leave --covariates out.")
    segmentations = out.with_name(f"{out.stem}_seg")
    _free(segmentations)
    with screen.bars() as tell:
        outlined = pkgutil.resolve_name(OUTLINE)(package, folder, segmentations, jobs, partial(tell, "outlining"))
    unit = "cm2" if package.study.images.volume is None else "ml"
    with out.open("x", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        sizes = [f"{name}_{unit}" for name in package.study.task.targets]
        table.writerow(["file", "series_instance_uid", "sop_instance_uid", "segmentation", *sizes])
        for *names, found in outlined.rows:
            table.writerow([*names, *("" if size is None else f"{size:.3f}" for size in found)])
    out.chmod(0o600)  # figures of patients
    _line(f"{len(outlined.rows)} outlined: {segmentations}, sizes in {out}")
    for reason, count in sorted(outlined.left_out.items()):
        _line(f"files left out, {reason}: {count}")


def export(
    package: PackageFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="What to write; it must not exist.")],
    kind: Annotated[Literal["bundle", "pt2", "onnx"], typer.Option("--to", help="The form to write.")] = "bundle",
    trust: Trust = None,
) -> None:
    """Write a package's model as a MONAI bundle, for torch.export, or as ONNX."""
    from models import exporting

    with screen.busy("writing the model"):
        exporting.export(Package.open(package, trust), kind, out)
    _line(f"Wrote {out}.")


def _head(file: Path) -> SignedHead:
    try:
        return SignedHead.read(file.read_bytes().strip())
    except OSError:
        raise DocumentError(f"{file}: no signed head can be read there", remedy="Give the file of a head.") from None


def _read_attack(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError):
        raise DocumentError(
            f"{file}: no attack.json can be read there", remedy="Run `fl-study attack` first."
        ) from None


def _free(path: Path) -> None:
    if path.exists():
        raise DocumentError(f"{path} exists already", remedy="Choose another name; nothing was overwritten.")


def _line(sentence: str) -> None:
    screen.say(sentence)
