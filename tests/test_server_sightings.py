"""Updates that are zero, frozen or exploding are flagged where single ones are seen, and honest ones are not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import Federation
from hospital import study

from fl_server.sightings import Sightings
from models import learning


def update(*values: float) -> Any:
    return np.array(values, np.float32)


def flags(seen: Sightings) -> dict[str, str]:
    return {odd["site"]: odd["why"] for odd in seen.judge()}


def test_zero_frozen_and_exploding_updates_are_told_apart() -> None:
    seen = Sightings()
    honest = {"north": update(1, 2, 2), "south": update(2, 1, 2), "east": update(2, 2, 1)}
    for site, its in honest.items():
        seen.see(site, 1, its)
    assert flags(seen) == {}
    seen.close(update(1, 1, 1))
    seen.see("north", 2, honest["north"])
    seen.see("south", 2, update(0, 0, 0))
    seen.see("east", 2, update(30, 30, 30))
    seen.see("west", 2, update(2, 2, 2))
    found = {odd.pop("site"): odd for odd in seen.judge()}
    assert found == {
        "north": {"round": 2, "why": "frozen", "norm": 3.0, "cosine": pytest.approx(5 / 27**0.5, abs=1e-3)},
        "south": {"round": 2, "why": "zero", "norm": 0.0},
        "east": {"round": 2, "why": "exploding", "norm": 52.0, "cosine": 1.0},
    }


def test_a_round_that_is_tried_again_learns_the_same_and_is_not_called_frozen() -> None:
    seen = Sightings()
    for _ in range(2):
        seen.see("north", 3, update(1, 2, 3))
        assert flags(seen) == {}


def test_a_large_update_of_one_of_two_is_not_judged_because_nobody_knows_which_is_right() -> None:
    seen = Sightings()
    seen.see("north", 1, update(1000))
    seen.see("south", 1, update(1))
    assert flags(seen) == {}


def test_a_site_that_learns_nothing_is_flagged_in_a_run_and_in_the_coordinators_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen optimizer: the site's program answers in good faith, with nothing in it."""
    federation = Federation(tmp_path, study())
    sizes = {len(federation.cohort(name, "train")): name for name in federation.hospitals}
    assert len(sizes) == 2
    learn = learning.learn

    def learn_nothing_at_south(net: Any, cohort: Any, *more: Any, **named: Any) -> Any:
        found = learn(net, cohort, *more, **named)
        if sizes[len(cohort)] == "south":
            found.delta[:] = 0
        return found

    monkeypatch.setattr(learning, "learn", learn_nothing_at_south)
    folder = federation.run()
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    told = [(e["site"], e["why"], e["round"]) for e in events if e["event"] == "flagged"]
    assert told == [("south", "zero", 1), ("south", "zero", 2)]
    lines = [json.loads(line) for line in (federation.home.root / "journal.jsonl").read_text().splitlines()]
    assert [line["facts"]["why"] for line in lines if line["kind"] == "update-flagged"] == ["zero", "zero"]
