"""`fl-study release`, `models`, `verify`, `predict` and `export`: a model from its run to those who use it."""

import csv
import json
import pkgutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from models.registry import ENDING, Package, listing
from privacy import calls, keys
from privacy.errors import DocumentError, PackageRefused
from privacy.heads import SignedHead

console = Console()
SCORE = "fl_client.scoring:score"  # only the hospital's half reads DICOM, so it is looked up by its name
OUTLINE = "fl_client.outlining:outline"

PackageFile = Annotated[Path, typer.Argument(metavar="PACKAGE", help="A released model, NAME-VERSION.isocenter.")]
Trust = Annotated[
    list[str] | None,
    typer.Option("--trust", help="Fingerprint of a signer to accept; repeat. Default: anybody, which is said."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of lines.")]
Home = Annotated[Path, typer.Option("--home", "-H", help="Folder with your keys; made by `fl-study join`.")]


def add_to(app: typer.Typer, run_id_of: Callable[[calls.Caller, str], str]) -> None:
    """Give `app` the commands; `run_id_of`: what turns the words of a user into a run."""

    @app.command()
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
            list[Path] | None, typer.Option("--head", help="File with a signed journal head to tie it to; repeat.")
        ] = None,
        out: Annotated[Path, typer.Option("--out", "-o", help="The package, or an existing folder for it.")] = Path(),
    ) -> None:
        """Write the model of a finished run as a signed package, unless an attack found more than the study claims."""
        from fl_server import release as released

        attack = _read_attack(attack_file) if attack_file else None
        wanted = released.Wanted(version, attack, [_head(file) for file in head or []])
        with calls.Caller.open(home / "keys") as caller, tempfile.TemporaryDirectory() as scratch:
            caller.results(run_id_of(caller, run_id), Path(scratch))
            content = released.package(Path(scratch), wanted, keys.load_key(home / "keys" / "researcher.key"))
        package = Package.read(content)
        path = out / package.file_name if out.is_dir() else out
        _free(path)
        keys.write_public(path, content)
        _line(f"Released {path}, SHA-256 {package.sha256}")
        _line(f"Signed by {keys.grouped(package.signer)}: tell this fingerprint to those who use it.")

    for command in (models, verify, predict, export):
        app.command()(command)


def models(
    registry: Annotated[Path, typer.Option("--registry", help="Folder with packages.")] = Path(),
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """List the packages of a folder with their versions and where they come from."""
    found = listing(registry, trust)
    if as_json:
        print(json.dumps([_entry(path, package) for path, package in found]))
        return
    for path, package in found:
        if isinstance(package, PackageRefused):
            _line(f"{path.name}: REFUSED, {package}")
            continue
        facts = package.manifest
        parent = facts["lineage"]["parent"]
        origin = f"from {parent[:12]}" if parent else "from its seed"
        _line(f"{facts['name']} {facts['version']}  study {facts['digest'][:12]}  run {facts['run_id']}  {origin}")
    if not found:
        _line(f"No packages ({ENDING}) in {registry}.")


def verify(package: PackageFile, trust: Trust = None, as_json: AsJson = False) -> None:
    """Check all of a package, and say what was checked."""
    from models import exporting

    found = Package.open(package, trust)
    exporting.network(found)  # the weights are those of the study's network
    if as_json:
        print(json.dumps(found.facts()))
        return
    facts = found.manifest
    _line(f"{facts['name']} {facts['version']}, study {facts['digest']}, run {facts['run_id']}")
    _line(f"{len(found.files)} files as signed; the weights are finite, and of the study's network.")
    whom = "whom you trust" if found.trusted else "who was not checked: compare the fingerprint, then use --trust"
    _line(f"Signed by {keys.grouped(found.signer)}, {whom}.")


def predict(
    package: PackageFile,
    folder: Annotated[Path, typer.Argument(help="Folder with DICOM radiographs, at any depth; for outlines also CT.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Table of scores, or of sizes beside OUT_seg with DICOM SEG; a new file."),
    ] = Path("scores.csv"),
    trust: Trust = None,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Confined processes that read files.")] = 1,
) -> None:
    """Score or outline the images of a folder, prepared as in training; what is left out is counted by reason."""
    found = Package.open(package, trust)
    _free(out)
    if found.study.segments:
        _outline(found, folder, out, jobs)
        return
    with Progress(console=Console(stderr=True)) as bars:
        bar = bars.add_task("scoring", total=None)
        scored = pkgutil.resolve_name(SCORE)(
            found, folder, jobs, lambda done, total: bars.update(bar, completed=done, total=total)
        )
    with out.open("x", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "sop_instance_uid", *found.study.task.targets])
        table.writerows([name, uid, *(f"{score:.8f}" for score in scores)] for name, uid, scores in scored.rows)
    out.chmod(0o600)  # scores of patients
    _line(f"{len(scored.rows)} scored: {out}")
    for reason, count in sorted(scored.left_out.items()):
        _line(f"left out, {reason}: {count}")


def _outline(package: Package, folder: Path, out: Path, jobs: int) -> None:
    """A DICOM SEG for each image below `folder`, and a table of sizes."""
    segmentations = out.with_name(f"{out.stem}_seg")
    _free(segmentations)
    with Progress(console=Console(stderr=True)) as bars:
        bar = bars.add_task("outlining", total=None)
        outlined = pkgutil.resolve_name(OUTLINE)(
            package, folder, segmentations, jobs, lambda done, total: bars.update(bar, completed=done, total=total)
        )
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
        _line(f"left out, {reason}: {count}")


def export(
    package: PackageFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="What to write; it must not exist.")],
    kind: Annotated[Literal["bundle", "pt2", "onnx"], typer.Option("--to", help="The form to write.")] = "bundle",
    trust: Trust = None,
) -> None:
    """Write a package's model as a MONAI bundle, for torch.export, or as ONNX."""
    from models import exporting

    exporting.export(Package.open(package, trust), kind, out)
    _line(f"Wrote {out}.")


def _entry(path: Path, package: Package | PackageRefused) -> dict[str, Any]:
    if isinstance(package, PackageRefused):
        return {"file": path.name, "refused": str(package)}
    return {"file": path.name, **package.facts()}


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
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)
