"""The ledger: what was charged stays charged, to every person whom it happened to, and no order exceeds a cap.

ε is compared with dp-accounting called directly on the events of single patients. Damage is in test_privacy_ledger_damage.py,
processes that are killed in test_privacy_ledger_kills.py, and who is the same person in test_privacy_persons.py.
"""

import hashlib
import itertools
import json
import math
import shutil
import sqlite3
import stat
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_cast import (
    DELTA,
    EVENT,
    OTHER,
    WIDE,
    charged,
    entries,
    epsilon_of,
    forge,
    kept,
    opened,
    order,
    patient,
    patients,
    study,
)

from privacy import ledger as ledger_module
from privacy.accounting import PrivacyEvent
from privacy.errors import (
    BudgetExceeded,
    ClockSetBack,
    LedgerDamaged,
    MessageMalformed,
    PrivacyError,
)
from privacy.journal import Journal, verify
from privacy.ledger import Charge, Ledger, Spending

DAY_S = 86400


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return opened(tmp_path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The ledger's clock, to be set by hand: `clock.now`, seconds since 1970."""
    found = SimpleNamespace(now=1.8e9)
    monkeypatch.setattr(
        ledger_module,
        "time",
        SimpleNamespace(time=lambda: found.now, time_ns=time.time_ns, monotonic=time.monotonic, sleep=time.sleep),
    )
    return found


# --- what is charged


def test_entries_are_what_the_module_documents(ledger: Ledger, tmp_path: Path) -> None:
    """Oracle: the chain recomputed from the documentation alone, and the journal's lines beside it."""
    hold = ledger.reserve(order(1), patients(1, 2), WIDE)
    ledger.commit(hold)
    ledger.unbounded(study("open"), "run-2")
    previous = "0" * 64
    heads = []
    rows = sqlite3.connect(ledger.path).execute("SELECT seq, body, hash FROM entries ORDER BY seq").fetchall()
    for number, (seq, body, own) in enumerate(rows, start=1):
        text = f"{seq} {previous} {body}"
        assert seq == number
        assert own == hashlib.sha256(b"isocenter/v1/ledger\n" + text.encode()).hexdigest()
        previous = own
        heads.append((seq, own))
    notes = [json.loads(line)["facts"] for line in (tmp_path / "journal.jsonl").read_bytes().splitlines()]
    assert [(note["seq"], note["head"]) for note in notes] == heads
    assert [entry["kind"] for entry in entries(ledger.path)] == ["reserve", "commit", "unbounded"]
    assert [note["entry"] for note in notes] == ["reserve", "commit", "unbounded"]


def test_nothing_about_patients_is_in_the_journal(ledger: Ledger, tmp_path: Path) -> None:
    ledger.reserve(order(1), patients(1, 2), WIDE)
    text = (tmp_path / "journal.jsonl").read_text()
    cohort = str(entries(ledger.path)[0]["cohort"])
    assert not any(identity in text for identity in (*patient(1), *patient(2), cohort))


def test_an_empty_ledger_has_spent_nothing(ledger: Ledger) -> None:
    assert ledger.spendings(DELTA) == {"total": Spending(0.0, 0.0, 0, 0)}
    assert ledger.timeline(DELTA) == []
    assert ledger.unprotected() == []
    assert ledger.rounds(study("covid")) == 0
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600


def test_a_hold_is_charged_at_once_and_spent_when_it_is_committed(ledger: Ledger) -> None:
    first = ledger.reserve(order(1), patients(1, 2), WIDE)
    assert ledger.spendings(DELTA)["total"] == Spending(0.0, pytest.approx(epsilon_of([EVENT]), abs=1e-6), 1, 1)
    ledger.commit(first)
    ledger.reserve(order(2), patients(1, 2), WIDE)
    found = ledger.spendings(DELTA)
    assert found[study("covid")] == found["total"]
    assert found["total"].spent == pytest.approx(epsilon_of([EVENT]), abs=1e-6)
    assert found["total"].charged == pytest.approx(epsilon_of([EVENT, EVENT]), abs=1e-6)
    assert (found["total"].rounds, found["total"].open) == (2, 1)


def test_pitfall_2_a_failed_round_is_spent(ledger: Ledger) -> None:
    """Nobody knows what of it left: a round that was begun and never committed counts like one that was."""
    for attempt in range(3):
        ledger.reserve(order(1, attempt=attempt), patients(1), WIDE)
    assert charged(ledger) == pytest.approx(epsilon_of([EVENT] * 3), abs=1e-6)
    assert ledger.rounds(study("covid")) == 3


def test_pitfall_2_a_new_run_a_new_round_and_a_restart_make_no_new_accountant(tmp_path: Path) -> None:
    for run, number in itertools.product(("run-1", "run-2"), (1, 2)):
        fresh = opened(tmp_path)
        fresh.commit(fresh.reserve(order(number, run=run), patients(1), WIDE))
    assert charged(opened(tmp_path)) == pytest.approx(epsilon_of([EVENT] * 4), abs=1e-6)


def test_studies_compose_for_those_who_were_in_both(ledger: Ledger) -> None:
    ledger.reserve(order(1, "covid", EVENT), patients(1, 2), WIDE)
    ledger.reserve(order(1, "fractures", OTHER), patients(2, 3), WIDE)
    found = ledger.spendings(DELTA)
    assert found[study("covid")].charged == pytest.approx(epsilon_of([EVENT]), abs=1e-6)
    assert found[study("fractures")].charged == pytest.approx(epsilon_of([OTHER]), abs=1e-6)
    assert found["total"].charged == pytest.approx(epsilon_of([EVENT, OTHER]), abs=1e-6)
    apart = opened(ledger.path.parent / "other")
    apart.reserve(order(1, "covid", EVENT), patients(1, 2), WIDE)
    apart.reserve(order(1, "fractures", OTHER), patients(3), WIDE)
    assert charged(apart) == pytest.approx(max(epsilon_of([EVENT]), epsilon_of([OTHER])), abs=1e-6)


def test_the_same_order_is_charged_once_and_refused_the_second_time(ledger: Ledger) -> None:
    ledger.commit(ledger.reserve(order(1), patients(1), WIDE))
    with pytest.raises(PrivacyError, match="charged before"):
        ledger.reserve(order(1), patients(1), WIDE)
    with pytest.raises(PrivacyError, match="charged before"):
        ledger.reserve(order(1, event=OTHER), patients(7), WIDE)
    assert ledger.rounds(study("covid")) == 1
    for other in (order(2), order(1, attempt=2), order(1, run="run-2"), order(1, "fractures")):
        ledger.reserve(other, patients(1), WIDE)


def test_a_hold_is_committed_once_and_no_other_is(ledger: Ledger) -> None:
    hold = ledger.reserve(order(1), patients(1), WIDE)
    for foreign in (hold + 1, 0, -1, hold - 1):
        with pytest.raises(PrivacyError, match="no open hold"):
            ledger.commit(foreign)
    ledger.commit(hold)
    for again in (hold, hold + 1):  # the entry of the commit itself is no hold
        with pytest.raises(PrivacyError, match="no open hold"):
            ledger.commit(again)
    assert ledger.spendings(DELTA)["total"].open == 0


def test_a_run_without_privacy_is_noted_once_however_often_it_is_repeated(tmp_path: Path) -> None:
    for run in ("run-1", "run-2", "run-1", "run-1"):
        opened(tmp_path).unbounded(study("open"), run)
    ledger = opened(tmp_path)
    assert ledger.unprotected() == [(study("open"), "run-1"), (study("open"), "run-2")]
    assert ledger.spendings(DELTA) == {"total": Spending(0.0, 0.0, 0, 0)}
    assert verify(tmp_path / "journal.jsonl") == 2


@pytest.mark.parametrize(
    "wrong",
    [order(1, run="Two Words"), order(1, run=""), replace(order(1), study="Chest CT"), replace(order(1), sum=2**70)],
)
def test_an_order_that_the_journal_cannot_note_is_not_charged(ledger: Ledger, wrong: Charge) -> None:
    """Were it charged, its missing note would close the ledger for ever."""
    with pytest.raises(MessageMalformed):
        ledger.reserve(wrong, patients(1), WIDE)
    ledger.check(wrong, patients(1), WIDE)
    with pytest.raises(MessageMalformed):
        ledger.unbounded(study("open"), "Two Words")
    assert ledger.spendings(DELTA)["total"].rounds == 0


# --- caps


def test_each_cap_refuses_the_first_order_that_would_exceed_it(tmp_path: Path, clock: SimpleNamespace) -> None:
    three = epsilon_of([EVENT] * 3)
    for name, caps in {
        "over all time": kept(three + 1e-4),
        "of this study": kept(study=three + 1e-4),
        "in the last 365 days": kept(year=three + 1e-4),
    }.items():
        ledger = opened(tmp_path / name.replace(" ", "-"))
        for number in range(3):
            ledger.reserve(order(number), patients(1, 2), caps)
        before = entries(ledger.path)
        with pytest.raises(BudgetExceeded, match=rf"ε {name} would be .* permits {caps.total if name == 'x' else ''}"):
            ledger.reserve(order(3), patients(1, 2), caps)
        assert entries(ledger.path) == before
        assert charged(ledger) == pytest.approx(three, abs=1e-6)
        ledger.reserve(order(3), patients(3), caps)  # somebody else has a budget of his own


def test_the_refusal_says_what_is_spent_and_what_it_would_be(ledger: Ledger) -> None:
    ledger.reserve(order(1), patients(1), WIDE)
    said = [math.ceil(epsilon_of([EVENT] * n) * 100) / 100 for n in (1, 2)]
    with pytest.raises(BudgetExceeded) as caught:
        ledger.reserve(order(2), patients(1), kept(said[0]))
    assert f"would be {said[1]:.2f} at δ = 1e-05, and site.yaml permits {said[0]:g}; {said[0]:.2f} is spent" in str(
        caught.value
    )


def test_the_cap_of_a_study_lets_other_studies_be(ledger: Ledger) -> None:
    caps = kept(study=epsilon_of([EVENT]) + 1e-4)
    ledger.reserve(order(1, "covid"), patients(1), caps)
    ledger.reserve(order(1, "fractures"), patients(1), caps)
    with pytest.raises(BudgetExceeded, match="of this study"):
        ledger.reserve(order(2, "covid"), patients(1), caps)


def test_the_cap_of_a_year_counts_the_last_365_days(ledger: Ledger, clock: SimpleNamespace) -> None:
    caps = kept(year=epsilon_of([EVENT]) + 1e-4)
    ledger.reserve(order(1), patients(1), caps)
    for days in (1, 100, 263.9):
        clock.now += days * DAY_S
        with pytest.raises(BudgetExceeded, match="365 days"):
            ledger.reserve(order(2), patients(1), caps)
    clock.now += 0.2 * DAY_S
    ledger.reserve(order(2), patients(1), caps)
    since = ledger.spendings(DELTA, since=clock.now - 365 * DAY_S)
    assert since["total"].charged == pytest.approx(epsilon_of([EVENT]), abs=1e-6)
    assert charged(ledger) == pytest.approx(epsilon_of([EVENT, EVENT]), abs=1e-6)


def test_no_more_orders_than_the_study_has_are_charged_in_whatever_run(ledger: Ledger) -> None:
    caps = kept(orders=3)
    for number, run in enumerate(("run-1", "run-2", "run-1")):
        ledger.reserve(order(number, run=run), patients(1), caps)
    for late in (order(9), order(9, run="run-9"), order(9, attempt=9)):
        with pytest.raises(BudgetExceeded, match="3 orders of this study"):
            ledger.reserve(late, patients(1), caps)
    ledger.reserve(order(9, "fractures"), patients(1), caps)
    ledger.check(order(9), patients(1), caps)


def test_a_study_is_checked_as_a_whole_and_nothing_is_kept(ledger: Ledger) -> None:
    whole = order(0, event=replace(EVENT, steps=EVENT.steps * 10))
    caps = kept(total=epsilon_of([EVENT] * 10) + 1e-3)
    ledger.check(whole, patients(1), caps)
    assert entries(ledger.path) == []
    assert ledger.spendings(DELTA)["total"].rounds == 0
    ledger.reserve(order(1, "fractures", OTHER), patients(2), WIDE)
    ledger.check(whole, patients(1), caps)
    with pytest.raises(BudgetExceeded, match="over all time"):
        ledger.check(whole, patients(1, 2), caps)


def test_a_study_that_has_begun_is_checked_without_counting_its_rounds_twice(ledger: Ledger) -> None:
    whole = order(0, event=replace(EVENT, steps=EVENT.steps * 10))
    caps = kept(epsilon_of([EVENT] * 10) + 1e-3, study=epsilon_of([EVENT] * 10) + 1e-3)
    for number in range(5):
        ledger.reserve(order(number), patients(1), caps)
    ledger.check(whole, patients(1), caps)


def test_a_cap_that_is_no_number_permits_nothing(ledger: Ledger) -> None:
    for caps in (kept(math.nan), kept(study=math.nan), kept(year=math.nan), kept(0.0), kept(-1.0)):
        with pytest.raises(BudgetExceeded):
            ledger.reserve(order(1), patients(1), caps)
    with pytest.raises(PrivacyError):
        ledger.reserve(order(1), patients(1), replace(WIDE, delta=0.0))
    assert entries(ledger.path) == []


def test_an_event_that_uses_up_delta_is_no_damage(ledger: Ledger) -> None:
    used_up = replace(EVENT, delta_extra=DELTA)
    with pytest.raises(BudgetExceeded, match="∞"):
        ledger.reserve(order(1, event=used_up), patients(1), WIDE)
    ledger.reserve(order(1, event=used_up), patients(1), kept(math.inf, study=math.inf, year=math.inf))
    assert charged(ledger) == math.inf
    ledger.reserve(order(2), patients(2), WIDE)


# --- who is charged


def _renamed(number: int) -> set[str]:
    """The same images under another patient number."""
    return patient(number) - {hashlib.sha256(f"number {number}".encode()).hexdigest()} | {"ab" * 32}


@pytest.mark.parametrize(
    "again",
    [
        patients(1, 2),
        patients(2, 1),
        patients(1, 2, 3),
        patients(2),
        patients(3, 4, 2),
        [_renamed(2)],
        [patient(2, images=5)],
        [patient(2, images=0)],
    ],
    ids=[
        "the-same",
        "in-another-order",
        "one-more",
        "one-less",
        "one-old-one",
        "renumbered",
        "new-images",
        "no-images",
    ],
)
@pytest.mark.parametrize("name", ["covid", "fractures"])
def test_no_copy_of_a_cohort_refills_a_budget(ledger: Ledger, again: list[set[str]], name: str) -> None:
    caps = kept(epsilon_of([EVENT]) + 1e-4)
    ledger.reserve(order(1), patients(1, 2), caps)
    with pytest.raises(BudgetExceeded):
        ledger.reserve(order(2, name), again, caps)
    ledger.reserve(order(2, name), again, WIDE)
    assert charged(ledger) == pytest.approx(epsilon_of([EVENT, EVENT]), abs=1e-6)
    ledger.reserve(order(3, name), patients(7, 8), caps)


def test_two_patients_who_turn_out_to_be_one_have_spent_what_both_have(ledger: Ledger) -> None:
    ledger.reserve(order(1, "covid", EVENT), patients(1, 5), WIDE)
    ledger.reserve(order(1, "fractures", OTHER), patients(2, 6), WIDE)
    both = patient(1) | patient(2)
    needed = epsilon_of([EVENT, OTHER, EVENT])
    with pytest.raises(BudgetExceeded):
        ledger.reserve(order(2), [both, patient(9)], kept(needed - 1e-4))
    ledger.reserve(order(2), [both, patient(9)], kept(needed + 1e-4))
    assert charged(ledger) == pytest.approx(needed, abs=1e-6)
    # From now on each of the two is known to be the other one.
    caps = kept(epsilon_of([EVENT, OTHER, EVENT, EVENT]) - 1e-4)
    for number in (1, 2):
        with pytest.raises(BudgetExceeded):
            ledger.reserve(order(3), patients(number), caps)


def test_two_patients_of_one_cohort_who_turn_out_to_be_one_have_spent_more_than_each(ledger: Ledger) -> None:
    ledger.reserve(order(1), patients(1, 2, 3), WIDE)
    before = charged(ledger)
    ledger.reserve(order(1, "fractures", OTHER), [patient(1) | patient(2)], WIDE)
    assert charged(ledger) > epsilon_of([EVENT, EVENT, OTHER]) > before


def test_the_refusal_says_that_patients_share_a_number_or_an_image(ledger: Ledger) -> None:
    shared = [patient(1), patient(2) | patient(1)]
    with pytest.raises(BudgetExceeded, match="give them one number"):
        ledger.reserve(order(1), shared, kept(epsilon_of([EVENT]) + 1e-4))
    with pytest.raises(BudgetExceeded) as caught:
        ledger.reserve(order(1), patients(1, 2), kept(epsilon_of([EVENT]) - 1e-4))
    assert "one number" not in str(caught.value)


@pytest.mark.parametrize("nobody", [[], [set()], [patient(1), set()], [{"Smith"}]])
def test_a_charge_needs_patients_who_can_be_known_again(ledger: Ledger, nobody: list[set[str]]) -> None:
    with pytest.raises(PrivacyError):
        ledger.reserve(order(1), nobody, WIDE)
    assert entries(ledger.path) == []


def test_the_timeline_ends_with_what_is_charged_now(ledger: Ledger, clock: SimpleNamespace) -> None:
    for number in range(7):
        clock.now += 10
        ledger.commit(ledger.reserve(order(number, "covid" if number < 4 else "fractures"), patients(1), WIDE))
    whole = ledger.timeline(DELTA)
    assert [point[0] for point in whole] == [1.8e9 + 10 * n for n in range(1, 8)]
    assert [point[1] for point in whole] == [study("covid")] * 4 + [study("fractures")] * 3
    assert [point[2] for point in whole] == pytest.approx([epsilon_of([EVENT] * n) for n in range(1, 8)], abs=1e-6)
    few = ledger.timeline(DELTA, points=3)
    assert len(few) == 3
    assert few[-1] == whole[-1]
    assert set(few) <= set(whole)
    assert ledger.timeline(DELTA, points=1) == [whole[-1]]


# --- the clock


def test_a_clock_set_back_is_refused_and_synchronisation_is_not(ledger: Ledger, clock: SimpleNamespace) -> None:
    hold = ledger.reserve(order(1), patients(1), WIDE)
    clock.now -= 59
    ledger.reserve(order(2), patients(1), WIDE)
    clock.now -= 3600
    with pytest.raises(ClockSetBack, match=r"3\d{3} s before"):
        ledger.reserve(order(3), patients(1), WIDE)
    ledger.commit(hold)  # work that was done may be said to be done
    ledger.spendings(DELTA)
    clock.now += 3660
    ledger.reserve(order(3), patients(1), WIDE)


def test_a_clock_that_once_stood_in_the_future_does_not_close_the_site_for_ever(
    ledger: Ledger, clock: SimpleNamespace
) -> None:
    caps = kept(year=epsilon_of([EVENT, EVENT]) + 1e-4)
    now = clock.now
    clock.now += 3650 * DAY_S
    ledger.reserve(order(1), patients(1), caps)
    clock.now = now
    with pytest.raises(ClockSetBack) as caught:
        ledger.reserve(order(2), patients(1), caps)
    assert "fl-client budget --accept-clock" in caught.value.remedy
    ledger.accept_clock()
    ledger.reserve(order(2), patients(1), caps)
    clock.now += 366 * DAY_S
    ledger.reserve(order(3), patients(1), caps)
    with pytest.raises(BudgetExceeded):  # the one from the future counts until a year after the time that it bears
        ledger.reserve(order(4), patients(1), caps)
    clock.now -= DAY_S
    with pytest.raises(ClockSetBack):
        ledger.reserve(order(4), patients(1), caps)


def test_a_clock_in_order_needs_no_acceptance(ledger: Ledger, clock: SimpleNamespace) -> None:
    ledger.reserve(order(1), patients(1), WIDE)
    ledger.accept_clock()
    assert [entry["kind"] for entry in entries(ledger.path)] == ["reserve"]


def test_times_survive_a_rebuild(ledger: Ledger, clock: SimpleNamespace) -> None:
    """Or the cap of a year would hold back the site for what it did years ago."""
    for number in range(3):
        ledger.reserve(order(number), patients(1), WIDE)
        clock.now += 366 * DAY_S
    ledger.path.unlink()
    ledger.rebuild()
    times = [entry["time"] for entry in entries(ledger.path)]
    assert times == [1.8e9 + 366 * DAY_S * n for n in range(4)]
    ledger.reserve(order(9), patients(1), kept(year=epsilon_of([EVENT]) + 1e-4))


# --- sequences

_CAPS = kept(epsilon_of([EVENT] * 5) + 0.01, study=epsilon_of([EVENT] * 3) + 0.01, orders=4)
_COHORTS = [(1, 2), (2, 3), (3,), (4, 5, 1)]
_acts = st.one_of(
    st.tuples(
        st.just("reserve"), st.sampled_from(["covid", "fractures", "stroke"]), st.integers(0, 3), st.integers(1, 6)
    ),
    st.tuples(st.just("commit"), st.integers(0, 3)),
    st.tuples(st.sampled_from(["restart", "lose the note", "rebuild"])),
)


class Site:
    """The oracle: every patient's own list of (study, event), and dp-accounting on it."""

    def __init__(self) -> None:
        self.own: dict[int, list[tuple[str, PrivacyEvent]]] = {number: [] for number in (1, 2, 3, 4, 5, 99)}
        self.charges: list[Charge] = []

    def charge(self, asked: Charge, cohort: Iterable[int]) -> None:
        self.charges.append(asked)
        for number in cohort:
            self.own[number].append((asked.study, asked.event))

    def fits(self, asked: Charge, cohort: Iterable[int]) -> bool:
        after = [[*self.own[number], (asked.study, asked.event)] for number in cohort]
        return (
            asked.name not in [known.name for known in self.charges]
            and sum(known.study == asked.study for known in self.charges) < _CAPS.orders
            and all(epsilon_of(event for _, event in events) <= _CAPS.total for events in after)
            and all(epsilon_of(e for name, e in events if name == asked.study) <= _CAPS.per_study for events in after)
        )

    def forget_who_it_was(self) -> None:
        self.own = {number: [(known.study, known.event) for known in self.charges] for number in self.own}

    @property
    def worst(self) -> float:
        return max(epsilon_of(event for _, event in events) for events in self.own.values())


def open_holds(ledger: Ledger) -> list[int]:
    known = list(enumerate(entries(ledger.path), start=1))
    committed = {entry["hold"] for _, entry in known if entry["kind"] == "commit"}
    return [seq for seq, entry in known if entry["kind"] == "reserve" and seq not in committed]


@settings(max_examples=60, deadline=None)  # each act waits for the disk several times
@given(acts=st.lists(_acts, min_size=3, max_size=20))
def test_charged_never_decreases_and_no_order_exceeds_a_cap(
    tmp_path_factory: pytest.TempPathFactory, acts: list[tuple[Any, ...]]
) -> None:
    home = tmp_path_factory.mktemp("site")
    ledger, site, before, bound = opened(home), Site(), 0.0, _CAPS.total
    for act, *about in acts:
        if act == "reserve":
            name, cohort, number = about
            asked = order(number, name, EVENT if name == "covid" else OTHER)
            if site.fits(asked, _COHORTS[cohort]):
                assert ledger.reserve(asked, patients(*_COHORTS[cohort]), _CAPS) == open_holds(ledger)[-1]
                site.charge(asked, _COHORTS[cohort])
            else:
                with pytest.raises(PrivacyError):
                    ledger.reserve(asked, patients(*_COHORTS[cohort]), _CAPS)
        elif act == "commit" and about[0] < len(open_holds(ledger)):
            ledger.commit(open_holds(ledger)[about[0]])
        elif act == "lose the note" and entries(ledger.path)[-1:] and entries(ledger.path)[-1]["kind"] != "rebuilt":
            lines = ledger.journal.path.read_bytes().splitlines(keepends=True)
            ledger.journal.path.write_bytes(b"".join(lines[:-1]))
        elif act == "rebuild" and site.charges:
            ledger.path.unlink()
            assert ledger.rebuild() == len(site.charges)
            site.forget_who_it_was()  # so that somebody may be charged with more than any cap
            bound = max(bound, site.worst + 1e-6)
        ledger = opened(home)
        found = ledger.spendings(DELTA)["total"]
        assert before - 1e-9 <= found.charged <= bound
        assert found.spent <= found.charged
        assert (found.rounds, found.open) == (len(site.charges), len(open_holds(ledger)))
        assert found.charged == pytest.approx(site.worst, abs=1e-6)
        before = found.charged
    shutil.rmtree(home)


@pytest.mark.parametrize("after", ["forged", "swapped", "removed", "another journal", "no journal"])
def test_a_note_that_was_found_is_not_looked_for_again_until_anything_is_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    monkeypatch.setattr(ledger_module, "SETTLED_S", 0.0)
    ledger, looks, connect = opened(tmp_path), list[object](), sqlite3.connect
    ledger.reserve(order(1), patients(1), WIDE)
    older = ledger.path.read_bytes()
    ledger.unbounded(study("open"), "run-1")
    time.sleep(0.05)  # the clock of the file system ticks more slowly than this test runs
    ledger.unbounded(study("open"), "run-1")
    monkeypatch.setattr(sqlite3, "connect", lambda *told, **more: looks.append(told) or connect(*told, **more))
    ledger.unbounded(study("open"), "run-1")
    opened(tmp_path).unbounded(study("open"), "run-1")
    assert not looks
    ledger.unbounded(study("open"), "run-2")  # another run is another question
    assert looks
    if after == "forged":
        forge(ledger.path, lambda db: db.execute("UPDATE entries SET hash = 'x' WHERE seq = 1"))
    elif after == "swapped":
        (tmp_path / "copy").write_bytes(older)
        (tmp_path / "copy").replace(ledger.path)
    elif after == "removed":
        ledger.path.unlink()
    elif after == "another journal":
        ledger.journal.path.unlink()
        Journal(ledger.journal.path).append("settings", digest="ab" * 32)
    else:
        ledger.journal.path.unlink()
    with pytest.raises(LedgerDamaged):
        opened(tmp_path).unbounded(study("open"), "run-1")


def test_a_ledger_that_was_changed_a_moment_ago_is_looked_into_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two changes within one tick of the file system's clock bear the same time."""
    ledger, looks, connect = opened(tmp_path), list[object](), sqlite3.connect
    monkeypatch.setattr(ledger_module, "SETTLED_S", 3600.0)
    ledger.unbounded(study("open"), "run-1")
    monkeypatch.setattr(sqlite3, "connect", lambda *told, **more: looks.append(told) or connect(*told, **more))
    for _ in range(3):
        ledger.unbounded(study("open"), "run-1")
    assert len(looks) == 3
