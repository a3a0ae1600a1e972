"""What parties told of themselves last: their versions, and of a site whether it is ready. A table of the roster.

Only numbers in range and enumerated words are ever read back, whatever a damaged or meddled database holds.
"""

import sqlite3
from dataclasses import dataclass

from privacy.greeting import Readiness, Skew, Versions, own, skew

TABLE = """
CREATE TABLE IF NOT EXISTS told (
    name TEXT PRIMARY KEY, wire INTEGER, major INTEGER, minor INTEGER, patch INTEGER, told TEXT,
    ready INTEGER, reasons TEXT, looked TEXT);
"""


@dataclass(frozen=True)
class Told:
    """What one party told last. `at` and `looked`: when it told its versions, and whether it is ready; UTC."""

    versions: Versions | None = None
    at: str | None = None
    readiness: Readiness | None = None
    looked: str | None = None

    def ready_words(self) -> str:
        """ready, not ready: images, labels; or not told."""
        if self.readiness is None:
            return "not told"
        return "ready" if self.readiness.ready else f"not ready: {', '.join(self.readiness.reasons)}"

    def skew(self, name: str) -> Skew | None:
        """Who of `name` and this coordinator has to upgrade; None as long as it told nothing."""
        return None if self.versions is None else skew(own(), self.versions, "this coordinator", name)


def note(db: sqlite3.Connection, name: str, versions: Versions | None, readiness: Readiness | None, now: str) -> None:
    """Write down what `name` tells; None of either leaves what stands there."""
    db.execute("INSERT OR IGNORE INTO told (name) VALUES (?)", (name,))
    if versions is not None:
        given = (*versions.numbers, now, name)
        db.execute("UPDATE told SET wire = ?, major = ?, minor = ?, patch = ?, told = ? WHERE name = ?", given)
    if readiness is not None:
        row = (readiness.ready, " ".join(readiness.reasons), now, name)
        db.execute("UPDATE told SET ready = ?, reasons = ?, looked = ? WHERE name = ?", row)


def read(db: sqlite3.Connection) -> dict[str, Told]:
    """Everything that is known, by name."""
    rows = db.execute("SELECT name, wire, major, minor, patch, told, ready, reasons, looked FROM told ORDER BY name")
    found = {}
    for name, *numbers, told, ready, reasons, looked in rows:
        versions = Versions.of(*numbers)
        readiness = None if ready is None else Readiness.of(str(reasons or "").split())
        found[name] = Told(versions, told if versions else None, readiness, looked)
    return found


def forget(db: sqlite3.Connection, name: str) -> None:
    """What was told under a name counts no more: it has another key."""
    db.execute("DELETE FROM told WHERE name = ?", (name,))
