"""Patients, studies and orders for the tests of the ledger, and ε of one patient by dp-accounting itself."""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import lru_cache
from pathlib import Path

from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant

from privacy.accounting import COARSE, PrivacyEvent
from privacy.journal import Journal
from privacy.ledger import Caps, Charge, Ledger

DELTA = 1e-5
EVENT = PrivacyEvent(2.0, 0.1, 4)
OTHER = PrivacyEvent(1.5, 0.2, 3)
WIDE = Caps(total=100.0, per_study=100.0, per_year=100.0, delta=DELTA, orders=1000)


def study(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def patient(number: int, images: int = 2) -> set[str]:
    """By number and by images, as a cohort says it."""
    names = [f"number {number}", *(f"image {image} of {number}" for image in range(images))]
    return {hashlib.sha256(name.encode()).hexdigest() for name in names}


def patients(*numbers: int) -> list[set[str]]:
    return [patient(number) for number in numbers]


def order(
    number: int, name: str = "covid", event: PrivacyEvent = EVENT, run: str = "run-1", attempt: int = 1
) -> Charge:
    return Charge(study(name), run, attempt, number, event)


def kept(total: float = 100.0, *, study: float = 100.0, year: float = 100.0, orders: int = 1000) -> Caps:
    """Caps of which only some can be reached."""
    return Caps(total, study, year, DELTA, orders)


def opened(home: Path) -> Ledger:
    """As every command and every start of the node opens it."""
    return Ledger(home / "ledger.sqlite", Journal(home / "journal.jsonl"))


def epsilon_of(events: Iterable[PrivacyEvent]) -> float:
    """ε of one patient to whom `events` happened, one after another: dp-accounting called directly."""
    return _composed(tuple(sorted((event.noise_multiplier, event.sampling_rate, event.steps) for event in events)))


@lru_cache(maxsize=4096)
def _composed(events: tuple[tuple[float, float, int], ...]) -> float:
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, COARSE)
    for noise, rate, steps in events:
        accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise)), steps)
    return float(accountant.get_epsilon(DELTA))


def charged(ledger: Ledger) -> float:
    return ledger.spendings(DELTA)["total"].charged


def forge(path: Path, damage: Callable[[sqlite3.Connection], object]) -> None:
    """Change the file as somebody would who is not held up by its triggers."""
    with closing(sqlite3.connect(path)) as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        damage(connection)
        connection.commit()


def entries(path: Path) -> list[dict[str, object]]:
    with closing(sqlite3.connect(path)) as connection:
        if connection.execute("PRAGMA user_version").fetchone() == (0,):
            return []  # nothing was ever kept in it
        return [json.loads(body) for (body,) in connection.execute("SELECT body FROM entries ORDER BY seq")]
