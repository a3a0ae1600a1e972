"""What `fl-study simulate --compare` found: each model at each site. The document comparison.json, its rows, its picture.

    version   1
    study, digest      of the federated run
    targets, sites     names; `sites`: all that were tested, training sites first
    models             a list, in the order of KINDS; of each:
      kind, site       federated, centralised, personalised or local; `site`: where a local one was trained, else null
      note             what it is, in a sentence
      results.TARGET   {sites: {NAME: cell}, pooled: cell}

A cell is {auroc, low, high} of the test split with its 95 % interval, or null: a site that released nothing, one class
alone, or a model that does not exist there. Sites' cells are what they released;
pooled ones follow from the summed score histograms.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from fl_server import figures
from models.documents import Document, Name
from privacy.errors import MessageMalformed

Kind = Literal["federated", "centralised", "personalised", "local"]
KINDS: tuple[Kind, ...] = get_args(Kind)
POOLED = "all sites"
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Cell(Document):
    """AUROC of one model on one test split, with its 95 % interval; an interval may be missing."""

    auroc: Share
    low: Share | None
    high: Share | None


class Tested(Document):
    """One model and target: `sites` by name, and all of them together."""

    sites: dict[Name, Cell | None]
    pooled: Cell | None


class Model(Document):
    """One row of the matrix, for every target."""

    kind: Kind
    site: Name | None
    note: str
    results: dict[str, Tested]

    @property
    def name(self) -> str:
        """For people; two models never share it."""
        return f"{self.site} alone" if self.kind == "local" else self.kind


class Comparison(Document):
    """The document, version 1. Raises ValidationError where a model has other targets or sites than the whole."""

    version: Literal[1] = 1
    study: str
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    targets: Annotated[list[str], Field(min_length=1)]
    sites: Annotated[list[Name], Field(min_length=1)]
    models: Annotated[list[Model], Field(min_length=1)]

    @model_validator(mode="after")
    def _rectangular(self) -> "Comparison":
        named = [(model.kind, model.site) for model in self.models]
        if len(set(named)) != len(named):
            raise ValueError("a model stands twice in the comparison")
        for model in self.models:
            if (model.site is not None) != (model.kind == "local") or list(model.results) != self.targets:
                raise ValueError(f"{model.name}: another site or other targets than the comparison has")
            if any(list(tested.sites) != self.sites for tested in model.results.values()):
                raise ValueError(f"{model.name}: other sites than the comparison has")
        return self


@dataclass(frozen=True)
class Row:
    """One model and one target: `cells` belong to the comparison's sites, in order; `pooled` to all of them together."""

    model: str
    kind: Kind
    site: str | None
    target: str
    cells: list[Cell | None]
    pooled: Cell | None


def read(found: object) -> Comparison:
    """The comparison in the parsed JSON `found`; raises MessageMalformed, naming the place, for anything else."""
    try:
        return Comparison.model_validate_json(json.dumps(found, allow_nan=False), strict=True)
    except (ValueError, TypeError, RecursionError) as error:  # ValidationError is a ValueError
        why = error.errors()[0] if isinstance(error, ValidationError) else None
        where = ".".join(map(str, why["loc"])) if why else "it"
        said = why["msg"] if why else "is no JSON"
        raise MessageMalformed(f"comparison.json: {where}: {said}", remedy="Compare the study again.") from None


def rows(comparison: Comparison) -> list[Row]:
    """The matrix, target by target, models in the order of the document."""
    return [
        Row(model.name, model.kind, model.site, target, list(tested.sites.values()), tested.pooled)
        for target in comparison.targets
        for model in comparison.models
        for tested in (model.results[target],)
    ]


def draw(comparison: Comparison) -> bytes:
    """The heat map as PNG; where a model of one site meets that site, the cell has a frame."""
    panels: dict[str, dict[str, list[figures.Cell]]] = {target: {} for target in comparison.targets}
    for row in rows(comparison):
        cells = [_drawn(cell, site == row.site) for site, cell in zip(comparison.sites, row.cells, strict=True)]
        panels[row.target][row.model] = [*cells, _drawn(row.pooled, home=False)]
    return figures.png(figures.matrix(panels, [*comparison.sites, POOLED]))


def _drawn(cell: Cell | None, home: bool) -> figures.Cell:
    return figures.Cell(None) if cell is None else figures.Cell(cell.auroc, cell.low, cell.high, home)


def write(comparison: Comparison, folder: Path) -> None:
    """comparison.json and comparison.png in `folder`, which exists."""
    (folder / "comparison.png").write_bytes(draw(comparison))
    text = json.dumps(comparison.model_dump(mode="json"), indent=1, allow_nan=False)
    (folder / "comparison.json").write_text(text + "\n", encoding="utf-8")


def lines(comparison: Comparison, target: str) -> Iterable[list[str]]:
    """The matrix of one target for a terminal: name, a number for each site, and all together with the interval."""
    for row in rows(comparison):
        if row.target == target:
            yield [row.model, *(_short(cell) for cell in row.cells), _long(row.pooled)]


def _short(cell: Cell | None) -> str:
    return "-" if cell is None else f"{cell.auroc:.3f}"


def _long(cell: Cell | None) -> str:
    if cell is None or cell.low is None or cell.high is None:
        return _short(cell)
    return f"{cell.auroc:.3f} ({cell.low:.3f} to {cell.high:.3f})"


def cell(found: Mapping[str, Any] | None) -> Cell | None:
    """A released figure of the results document as a cell."""
    return None if found is None else Cell(auroc=found["auroc"], low=found["low"], high=found["high"])
