"""`fl-client evaluate`: a released model on this site's own test patients."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fl_client.site import Site
from models.catalogue_cli import Trust
from models.registry import Package
from privacy import screen
from privacy.deidentify import guarded


def evaluate(
    package: Annotated[Path, typer.Argument(help="A released model, NAME-VERSION.isocenter; see `fl-client pull`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for metrics.json and MELODY's tables.")],
    study: Annotated[
        str | None,
        typer.Option(metavar="DIGEST|FILE", help="Test on the test patients of this study. Default: the model's own."),
    ] = None,
    home: Annotated[Path, typer.Option("--home", "-H", help="The site's folder, with site.yaml and keys.")] = Path(),
    trust: Trust = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print metrics.json instead of a table.")] = False,
) -> None:
    """Test a released model on your own patients, for your eyes only: nothing leaves this site.

    Patients by whom the model was trained or chosen here are left out. If your site had no part in the study, all your labelled
    patients are tested. Intervals count patients, not images.
    """
    from fl_client import evaluating
    from fl_client.preview import study_of

    site, found = Site.open(home), Package.open(package, trust)
    divided = study_of(home, study) if study is not None else None
    with guarded(home), screen.bars() as tell:
        made = evaluating.evaluate(site, found, divided, out, partial(tell, "scoring"))
    if as_json:
        typer.echo(json.dumps(made.figures, indent=1))
        return
    _show(made.figures)
    typer.echo(f"Written: {out} ({', '.join(made.files)}). It stays at the hospital.")


def _show(figures: dict[str, Any]) -> None:
    model, kind = figures["model"], "all labelled" if figures["split"] == "external" else figures["split"]
    typer.echo(
        f"{model['name']} {model['version']} on {figures['images']} images of {figures['patients']} {kind} patients here; "
        "intervals of 95 % count patients."
    )
    table = screen.table("target", "figure", "value", "95 %", "positive", "negative")
    for name, entry in figures["targets"].items():
        classes = (str(entry["positives"]), str(entry["negatives"]))
        if entry["auroc"] is None:
            table.add_row(name, "AUROC", entry["why"], "", *classes)
            continue
        table.add_row(name, "AUROC", f"{entry['auroc']:.3f}", _ends(entry["interval"], 3), *classes)
        table.add_row("", "  by bootstrap", "", _ends(entry["bootstrap_interval"], 3), "", "")
        for rule, at in entry["operating"].items():
            for rate in ("sensitivity", "specificity"):
                if at[rate]["value"] is not None:
                    shown = f"{rate}, {rule} at {at['threshold']:.3f}"
                    table.add_row("", shown, f"{at[rate]['value']:.2f}", _ends(at[rate]["interval"], 2), "", "")
    if figures["grades"] and figures["grades"]["kappa"] is not None:
        found = figures["grades"]
        table.add_row("grade", "weighted kappa", f"{found['kappa']:.3f}", _ends(found["interval"], 3), "", "")
        table.add_row("", "mean absolute error", f"{found['mae']:.2f}", "", "", "")
    screen.show(table)


def _ends(interval: Any, decimals: int) -> str:
    return "-" if interval is None else f"{interval[0]:.{decimals}f} to {interval[1]:.{decimals}f}"
