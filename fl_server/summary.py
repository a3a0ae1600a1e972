"""What a report says, in a few lines for a terminal of 80 columns: every target, and no figure that a site did not release."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from fl_server import outlines
from privacy import screen
from privacy.screen import Screen

console = Screen()


def say(page: Path, as_json: bool) -> None:
    """Print the figures of the report `page`, or metrics.json beside it as it is."""
    text = (page.parent / "metrics.json").read_text(encoding="utf-8")
    if as_json:
        print(text)
        return
    metrics = json.loads(text)
    images, patients = metrics["pooled"]["images"], metrics["pooled"]["patients"]
    console.print(f"Held-out test, {images} images of {patients} patients, {metrics['label']}:", highlight=False)
    if "dice" in metrics["pooled"]:
        screen.show(_of_outlines(metrics), console)
    elif metrics["number"]:
        screen.show(_of_number(metrics["number"]), console)
    elif len(metrics["pooled"]["targets"]) == 1:
        screen.show(_of_sites(metrics), console)
    else:
        screen.show(_of_targets(metrics), console)
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)


def _of_sites(metrics: dict[str, Any]) -> Table:
    """One target: the tested sites together, and each."""
    table = screen.table("", "AUROC", "95 % interval", "positives", "negatives")
    for name, row in {"pooled": metrics["pooled"], **metrics["sites"]}.items():
        least = "" if name == "pooled" else ">= "  # sites release tens, rounded down
        classes = ("-" if row[key] is None else f"{least}{row[key]}" for key in ("positives", "negatives"))
        table.add_row(name, *_estimate(row), *classes)
    return table


def _of_targets(metrics: dict[str, Any]) -> Table:
    """Several targets: each over the tested sites together, and between which figures of single sites it lies."""
    heads = ("target", "AUROC", "95 % interval", "pos. / neg.", "sites that told")
    table = screen.table(*heads)
    for target, row in metrics["pooled"]["targets"].items():
        own = [site["targets"][target]["auroc"] for site in metrics["sites"].values()]
        told = [value for value in own if value is not None]
        span = f"{len(told)}/{len(own)}: {min(told):.2f} to {max(told):.2f}" if told else f"0/{len(own)}"
        table.add_row(target, *_estimate(row), f"{row['positives']} / {row['negatives']}", span)
    return table


def _estimate(row: dict[str, Any]) -> tuple[str, str]:
    value = f"{row['auroc']:.3f}" if row["auroc"] is not None else "-"
    return value, "{:.3f} to {:.3f}".format(*row["interval"]) if row["interval"] else row.get("why", "-")


def _of_number(number: dict[str, Any]) -> Table:
    """A target that is a number: the tested sites together, and each."""
    heads = ("", "mean abs. error", "bias", "concordance", "images")
    table = screen.table(
        *heads,
        title=f"{number['target']}, {number['unit']}",
    )
    for name, row in {"pooled": number["pooled"], **number["sites"]}.items():
        if row["mae"] is None:
            table.add_row(name, "-", row["why"], "", "")
            continue
        cells = (_with_ends(row, key, digits) for key, digits in (("mae", 2), ("bias", 2), ("concordance", 2)))
        table.add_row(name, *cells, f"{'' if name == 'pooled' else '>= '}{row['images']}")
    return table


def _with_ends(row: dict[str, Any], key: str, digits: int) -> str:
    if row[key] is None:
        return "-"
    ends = row["intervals"][key]
    shown = f" ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})" if ends else ""
    return f"{row[key]:.{digits}f}{shown}"


def _of_outlines(metrics: dict[str, Any]) -> Table:
    """Structures that are outlined: each over the tested sites together, and of each site."""
    heads = ("structure", "test of", "cases", "Dice", "surface Dice", "HD95 mm", "missed / invented")
    table = screen.table(*heads)
    for row in outlines.rows(metrics):
        table.add_row(*row)
    return table
