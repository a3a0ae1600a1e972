"""`fl-client check --page`: one self-contained HTML page about a site's data, for people at that site only.

It holds thumbnails of patients, so it says so on top, is readable by its owner alone (0600), and asks nobody else for anything:
no script, no foreign host, and a Content-Security-Policy that forbids both. Beside the thumbnails nothing of it names a patient:
sentences that may quote a path, an address or a column stay on the terminal, and texts of headers are cleaned and escaped.
"""

import stat
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from fl_client.contact_sheet import LOOKUP, Sheet, make_sheet
from fl_client.facts import CONTRADICTING, Facts, Tally, patient_of
from fl_client.preview import WHY, Preview, size
from fl_client.readiness import Inspection, attempt, of
from fl_client.site import Site
from privacy import keys
from privacy.errors import DocumentError

WIDTH = (
    340  # of a plot's coordinates; about the width of a telephone, so that text in it is never smaller than intended
)
COLUMNS_HIGH, TOP, BOTTOM = 170, 18, 140
COLUMN_WIDE = 60.0
ROW_HIGH = 32
NAMED_COLUMNS_MAX = 10  # columns with a name and a number each; of more, only some ends are named
TICK_EVERY = 5


@dataclass(frozen=True)
class Bar:
    """One bar of a plot, in its coordinates, with its words."""

    name: str
    count: int
    share: str
    x: float
    y: float
    width: float
    height: float
    named: bool


@dataclass(frozen=True)
class Plot:
    """A bar chart that is also a table: `bars` stand upright or, with `rows`, lie below their names."""

    name: str
    title: str
    what: str
    unit: str
    missing: str
    bars: list[Bar]
    rows: bool
    height: float

    @property
    def summary(self) -> str:
        """The plot in one sentence, for whoever cannot see it."""
        if not self.bars:
            return "Nothing is known."
        first = max(self.bars, key=lambda bar: bar.count)
        return f"{len(self.bars)} bars; the highest is {first.name} with {first.count} {self.unit}. {self.missing}"


def check_place(path: Path) -> str | None:
    """A warning about the folder of `path`, None if it is private. Raises DocumentError where no page may be written."""
    if path.is_dir():
        raise DocumentError(f"{path} is a folder", remedy="Name a file in it, such as readiness.html.")
    try:
        mode = path.resolve().parent.stat().st_mode
    except OSError as error:
        raise DocumentError(
            f"{path}: no page can be written there ({error.strerror})", remedy="Make the folder."
        ) from None
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise DocumentError(
            f"everybody on this machine may write to the folder of {path}, and could exchange the page",
            remedy="Choose a folder of your own, such as the site's.",
        )
    if mode & (stat.S_IROTH | stat.S_IXOTH):
        return (
            "Others on this machine can open the folder of this page. They cannot read the page itself; do not change its "
            "rights, and keep it out of folders that are shared or copied to elsewhere."
        )
    return None


def write_page(path: Path, looked: Inspection, *, thumbnails: bool) -> None:
    """Replace `path` (0600) by the page, in one step. What cannot be told is missing on it, with a sentence in its place."""
    facts, preview = attempt(lambda: looked.facts), attempt(lambda: looked.preview)
    sheet = attempt(lambda: _sheet(looked, thumbnails)) if facts and facts.images else None
    keys.write_private(path, _render(looked, facts, preview, sheet).encode("utf-8", "replace"))


def _sheet(looked: Inspection, thumbnails: bool) -> Sheet:
    labels = attempt(lambda: looked.labels)
    rows = [(patient_of(image, labels), image) for image in looked.index.images()]
    return make_sheet(looked.index, looked.home, rows, thumbnails=thumbnails)


def _render(looked: Inspection, facts: Facts | None, preview: Preview | None, sheet: Sheet | None) -> str:
    shelf = jinja2.Environment(
        loader=jinja2.PackageLoader("fl_client"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shelf.filters["number"] = lambda value: f"{value:,}".replace(",", "\u202f")
    shelf.filters["share"] = lambda value: _share(value, 1)
    settings = attempt(lambda: Site.settings_of(looked.home))
    return shelf.get_template("readiness.html").render(
        site=settings.site if settings else "this site",
        made=datetime.now(UTC),
        ready=looked.ready,
        findings=looked.findings,
        facts=facts,
        plots={plot.name: plot for plot in _plots(facts, sheet)},
        gaps=_gaps(facts) if facts else [],
        left_out=_left_out(facts) if facts else [],
        asked=looked.study,
        preview=preview,
        why=WHY,
        preview_size=size(preview.grid_bytes) if preview else "",
        sheet=sheet,
        pictures=bool(sheet and (sheet.groups or sheet.odd)),
        lookup=LOOKUP,
    )


def _plots(facts: Facts | None, sheet: Sheet | None) -> Iterable[Plot]:
    if facts is not None:
        yield plot("ages", "Age", "years, at the first image", facts.ages)
        sexes = "the images of some patients contradict each other" if CONTRADICTING in facts.sexes.counts else ""
        yield plot("sexes", "Sex", sexes or "of each patient", facts.sexes, rows=True)
        yield plot("per_patient", "Images per patient", "after repeated images were left out", facts.per_patient)
        yield plot("races", "Race", "as the label table says", facts.races, rows=True)
        yield plot("ethnicities", "Ethnicity", "as the label table says", facts.ethnicities, rows=True)
        yield plot("vendors", "Manufacturer", "as the header says", facts.vendors, rows=True)
        yield plot("views", "View", "frontal: PA or AP", facts.views, rows=True)
        yield plot("modalities", "Modality", "CR and DX are radiographs", facts.modalities, rows=True)
        yield plot("spacings", "Pixel spacing", "mm between columns", facts.spacings, rows=True)
        if facts.slices.total:
            yield plot("slices", "Slice spacing", "mm between slices of a CT", facts.slices, rows=True)
    if sheet is not None:
        yield plot("brightness", "Brightness", "mean grey value, 0 black to 1 white", sheet.brightness)
        yield plot("contrast", "Contrast", "standard deviation of the grey values", sheet.contrast)


def plot(name: str, title: str, what: str, tally: Tally, *, rows: bool = False) -> Plot:
    """`tally` as bars: columns up to the highest, rows as shares of all that is known."""
    most = (tally.known if rows else max(tally.counts.values(), default=0)) or 1
    bars = []
    for place, (word, count) in enumerate(tally.counts.items()):
        length = count / most
        if rows:
            box = (0.0, place * ROW_HIGH + 17.0, max(length * WIDTH, 2.0 if count else 0.0), 8.0)
        else:
            step, high = (
                min(WIDTH / len(tally.counts), COLUMN_WIDE),
                max(length * (BOTTOM - TOP), 1.5 if count else 0.0),
            )
            box = (place * step + step * 0.08, BOTTOM - high, step * 0.84, high)
        named = rows or len(tally.counts) <= NAMED_COLUMNS_MAX or place % TICK_EVERY == 0
        x, y, width, height = (round(number, 2) for number in box)
        bars.append(Bar(word, count, _share(count, tally.known), x, y, width, height, named))
    missing = (
        f"Unknown for {of(tally.missing, tally.total, tally.of)}."
        if tally.missing
        else f"Known for all {tally.total} {tally.of}."
    )
    return Plot(name, title, what, tally.of, missing, bars, rows, len(bars) * ROW_HIGH if rows else COLUMNS_HIGH)


def _share(count: float, whole: float) -> str:
    share = 100 * count / whole if whole else 0.0
    return f"{share:.0f} %" if share >= 1 or not count else "< 1 %"


def _gaps(facts: Facts) -> list[dict[str, Any]]:
    """One row for each thing that can be missing, with how often it is."""
    rows = [(f"label: {name}", "images", target.missing, facts.images) for name, target in facts.targets.items()]
    rows += [("any label", "patients", facts.patients_unlabelled, facts.patients)]
    named = {"age": facts.ages, "sex": facts.sexes, "race": facts.races, "ethnicity": facts.ethnicities}
    named |= {"manufacturer": facts.vendors}
    named |= {"view": facts.views} if facts.views.total else {}
    named |= {"modality": facts.modalities, "pixel spacing": facts.spacings}
    named |= {"slice spacing": facts.slices} if facts.slices.total else {}
    rows += [(name, tally.of, tally.missing, tally.total) for name, tally in named.items()]
    return [
        {"what": what, "unit": unit, "missing": missing, "whole": whole, "share": missing / whole if whole else 0.0}
        for what, unit, missing, whole in rows
    ]


def _left_out(facts: Facts) -> list[dict[str, Any]]:
    return [
        {"why": reason.explanation, "count": count, "damage": reason.damage, "remedy": reason.remedy}
        for reason, count in facts.left_out.items()
    ]
