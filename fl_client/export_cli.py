"""`fl-client export dicom` and `fl-client export bih`: a person hands something over, after reading what it is."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fl_client.site import Site
from privacy import screen
from privacy.deidentify import guarded

if TYPE_CHECKING:
    from fl_client.export import Exported

Home = Annotated[Path, typer.Option("--home", "-H", help="The site's folder, with site.yaml and keys.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of sentences.")]
Out = Annotated[Path, typer.Argument(help="The new folder that is handed over.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask; what is handed over is still said.")]


app = typer.Typer(help="Hand something over, by your own decision; nobody else can.", no_args_is_help=True)


@app.command()
def dicom(  # noqa: PLR0913, PLR0917  each parameter is one option
    out: Out,
    home: Home = Path(),
    retain_characteristics: Annotated[
        bool, typer.Option("--retain-characteristics", help="Keep age (up to 89), sex, size, weight and ethnic group.")
    ] = False,
    dates: Annotated[
        Literal["removed", "shifted"],
        typer.Option(help="Remove dates, or set those of each patient back by 1 to 365 days."),
    ] = "removed",
    reviewed: Annotated[
        Path | None, typer.Option(help="A list of images that you looked at for burned-in text, one name a line.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="At most so many images; 0: all.")] = 0,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Write de-identified DICOM copies of your images (PS3.15 Annex E), with a manifest; pixels stay as they are."""
    from fl_client import export

    site = Site.open(home)
    kept = "age up to 89, sex, size, weight, ethnic group" if retain_characteristics else "nothing about the patient"
    _tell(f"Handed over: copies of {limit or 'all'} images of {site.name}, with keyed pseudonyms in place of numbers.")
    _tell(
        f"Kept of the headers: what the picture needs, and {kept}. Dates are {dates}. Maker and model of the device stay."
    )
    _tell("Pixels are not changed. Images with suspected text stay here until you list them with --reviewed.")
    _ask(yes)
    names = frozenset[str]() if reviewed is None else export.reviewed_in(reviewed)
    choice = export.Choice(retain_characteristics, dates, names, limit)
    with guarded(home), screen.bars() as tell:
        result = export.export_dicom(site, out, choice, partial(tell, "copying images"))
    waiting = export.note_review(site, result.to_review)
    _show(result, f"{result.images} images of {result.patients} patients are in {out}.", as_json)
    if waiting is not None:
        _tell(
            f"Look at the {len(result.to_review)} images that {waiting} names; list those that may go with --reviewed."
        )


@app.command()
def bih(  # noqa: PLR0913, PLR0917  each parameter is one option
    out: Out,
    collection: Annotated[str, typer.Option(help="Identifier of the collection.")],
    contributor: Annotated[str, typer.Option(help="Who contributes the metadata and hosts the images.")],
    license_: Annotated[str, typer.Option("--license", help="Licence of the images, or the address of an agreement.")],
    commons_name: Annotated[str, typer.Option(help="Short name of the platform; left out: the contributor.")] = "",
    commons_long_name: Annotated[str, typer.Option(help="Long name of the platform; left out: the short one.")] = "",
    url: Annotated[str, typer.Option(help="Where users find the images: an address or a DOI.")] = "",
    disease: Annotated[str, typer.Option(help="The disease that the collection is about.")] = "",
    primary_site: Annotated[str, typer.Option(help="The organ that the collection is about.")] = "",
    real_uids: Annotated[
        bool,
        typer.Option("--real-uids", help="Study and series UIDs as they are: only if the images are public already."),
    ] = False,
    home: Home = Path(),
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Write the metadata that makes your images known in MIDRC's imaging hub, one row per series; nothing is sent."""
    from fl_client import export

    site, name = Site.open(home), commons_name or contributor
    facts = export.Collection(
        collection, contributor, license_, name, commons_long_name or name, url, disease, primary_site, real_uids
    )
    uids = "the REAL study and series numbers" if real_uids else "pseudonyms of study and series numbers"
    _tell(f"Handed over: one row for each series of {site.name}, with {uids}, and pseudonyms of patients.")
    _tell("In it: modality, device maker, body part, age up to 89, sex; descriptions if said of 10 patients or more.")
    _ask(yes)
    with guarded(home), screen.bars() as tell:
        result = export.export_bih(site, out, facts, partial(tell, "reading headers"))
    _show(result, f"{result.rows} series of {result.patients} patients are described in {out}.", as_json)


def _ask(yes: bool) -> None:
    if not yes:
        typer.confirm("Do you want this to be written?", abort=True)


def _show(result: "Exported", sentence: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result.to_json()))
        return
    typer.echo(sentence)
    for reason, count in sorted(result.left_out.items(), key=_most_first):
        typer.echo(f"{count} stay here: {reason.explanation}.")


def _most_first(item: tuple[Any, int]) -> tuple[int, str]:
    return -item[1], str(item[0])


def _tell(sentence: str) -> None:
    """For a person, beside what a command prints for programs."""
    typer.echo(sentence, err=True)
