"""What was spent here of each patient's privacy, put for people: `fl-client budget`, in words, as JSON and as a picture.

Everything is asked of the ledger; nothing here decides. ε values do not add up, so each is a question of its own: of one study,
of the last 365 days, of all time, always of the patient to whom most happened.
"""

import datetime
import io
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fl_client.consent import consents
from fl_client.policy import Policy
from fl_client.site import Site
from privacy.ledger import YEAR_S, Spending


@dataclass(frozen=True)
class Row:
    """One study: ε of its most used patient (`spent` by finished rounds, `charged` with open holds), and its rounds."""

    digest: str
    title: str
    spent: float
    charged: float
    rounds: int
    rounds_most: int | None
    open: int


@dataclass(frozen=True)
class Budget:
    """The whole ledger, at the site's δ. `unprotected`: (study, run) of what trained without differential privacy."""

    delta: float
    rows: list[Row]
    year: float
    total: float
    caps: Mapping[str, float]
    unprotected: list[tuple[str, str]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"unit": "patient", "relation": "add or remove one patient"}

    def sentences(self) -> list[str]:
        """What a person has to know beside the table."""
        caps = self.caps
        found = [
            f"All studies together have charged an ε of {shown(self.total)} of {shown(caps['total'])} that site.yaml permits, "
            f"{shown(self.year)} of {shown(caps['year'])} in the last 365 days, at δ = {self.delta:g}.",
            "ε is that of the patient to whom most happened (one patient more or less, Poisson sampling), against everybody "
            "outside this site together. It does not add up: two studies of 4 are less than 8.",
        ]
        waiting = sum(row.open for row in self.rows)
        if waiting:
            found.append(
                f"{waiting} round{'s are' if waiting > 1 else ' is'} held: training was begun and its end was not noted, because "
                "the node was stopped. What left the site then is not known for certain, so it stays charged."
            )
        if self.unprotected:
            studies = len({study for study, _ in self.unprotected})
            found.append(
                f"{studies} stud{'ies' if studies > 1 else 'y'} trained here without differential privacy: no ε covers what "
                "their models reveal."
            )
        return found


def open_budget(home: Path) -> Budget:
    """The budget of the site in `home`; raises LedgerDamaged if the ledger is not whole."""
    site = Site.open(home)
    policy, ledger = site.settings.policy, site.ledger
    studies = {consent.offer.digest: consent.offer.study for consent in consents(home)}
    found = ledger.spendings(policy.delta)
    rows = [_row(digest, spending, studies) for digest, spending in found.items() if digest != "total"]
    recent = ledger.spendings(policy.delta, since=time.time() - YEAR_S)
    year, total = (part["total"].charged for part in (recent, found))
    return Budget(policy.delta, rows, year, total, _caps(policy), ledger.unprotected())


def _row(digest: str, spending: Spending, studies: Mapping[str, Any]) -> Row:
    study = studies.get(digest)
    title, most = (study.title, study.budgeted_rounds) if study else ("(its file is gone)", None)
    return Row(digest, title, spending.spent, spending.charged, spending.rounds, most, spending.open)


def _caps(policy: Policy) -> dict[str, float]:
    return {"study": policy.epsilon_per_study, "year": policy.epsilon_per_year, "total": policy.epsilon_total}


def shown(epsilon: float) -> str:
    """ε with two decimals, rounded up: never less than it is."""
    return f"{math.ceil(round(epsilon * 100, 6)) / 100:.2f}" if math.isfinite(epsilon) else "∞"


def draw(home: Path) -> bytes:
    """A PNG: ε charged over all studies, entry by entry, below the caps of site.yaml."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
    from matplotlib.figure import Figure

    site = Site.open(home)
    policy = site.settings.policy
    points = site.ledger.timeline(policy.delta)
    figure = Figure(figsize=(7.4, 3.6), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    times = [float(date2num(datetime.datetime.fromtimestamp(at, datetime.UTC))) for at, _, _ in points]
    values = [epsilon for _, _, epsilon in points]
    if times:
        axes.step([times[0], *times], [0.0, *values], where="post", color="#1b3a5c", linewidth=2)
        axes.plot(times[-1], values[-1], "o", color="#1b3a5c", markersize=5)
        axes.annotate(
            f"ε {shown(values[-1])}", (times[-1], values[-1]), xytext=(-6, 7), textcoords="offset points", ha="right"
        )
    else:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "nothing was charged yet", transform=axes.transAxes, ha="center", color="#666666")
    axes.axhline(policy.epsilon_total, color="#b3372e", linewidth=1.2, linestyle="--")
    axes.annotate(
        f"site.yaml permits {policy.epsilon_total:g}", (0, policy.epsilon_total), xycoords=("axes fraction", "data"),
        xytext=(4, -12), textcoords="offset points", fontsize=8, color="#b3372e",
    )  # fmt: skip
    axes.set_ylim(0, policy.epsilon_total * 1.06)
    axes.set_ylabel(f"ε of the most used patient, δ = {policy.delta:g}", fontsize=9)
    if times:
        locator = AutoDateLocator(minticks=3, maxticks=7)
        axes.xaxis_date()
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        axes.set_xlabel("UTC", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
