"""The coordinator's Flower ServerApp: `main` tells one whole run.

The same function runs in production (Grid over the SuperLink), in simulation and in tests (Grid in memory).
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_server import strategies, sums
from fl_server.first import first_model
from fl_server.roster import Home
from fl_server.run import (
    ENDED,
    Counted,
    Float32,
    Round,
    Run,
    Test,
    give_up,
    holding,
    list_runs,
    read_facts,
    score_sheet,
)
from fl_server.sums import Nodes, Task, Total
from models import questions
from models.contributions import read_figures, read_number
from models.questions import Counting
from privacy import journal, keys, tracing
from privacy.errors import CertificateRevoked, DiskUnusable, DocumentError, IsocenterError, MessageMalformed, RunStopped
from privacy.wire import COHORT, EvaluateOrder, TrainOrder

app = ServerApp()
log = logging.getLogger("isocenter.coordinator")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carry the run named in the context from where it stands to its end; every failure ends as a named state.

    But for a disk that cannot be written: nothing can be said there, so the run stays as it is, and goes on when there is room.
    """
    home = Home.open(Path(str(context.run_config["home"])))
    folder = home.runs / str(context.run_config["run"])
    try:
        run = Run.open(folder)
    except DocumentError as error:
        give_up(folder, error.code)
        raise
    run.start()
    try:
        with tracing.without_sites(run.study.privacy != "none"), traced(run):
            carry_on(home, run, grid)
    except DiskUnusable:
        raise
    except RunStopped:
        run.stop()
    except IsocenterError as error:
        # The researcher reads this sentence; where the coordinator keeps its files is nobody else's business.
        run.fail(error.code, str(error).replace(str(home.root), "HOME"))
    except Exception:
        run.fail("internal", "the coordinator's program failed; its log has the details")
        note_end(home, run.facts)
        raise
    note_end(home, run.facts)


def carry_on(home: Home, run: Run, grid: Grid) -> None:
    """Every round that is not committed yet, then the test of the model that was selected."""
    desk = Desk(home, run, grid)
    if isinstance(run.study.task, Counting):
        run.conclude(desk.count(run.study.task))
        return
    strategy = strategies.build(run.study)
    if run.model is None:
        run.model = first_model(home.root, run.study)
    for number in run.remaining():
        began = time.monotonic()
        with tracing.span("round", round=number, attempt=run.attempt):
            total = desk.train(strategies.sent(run.study, run.model, run.state), number)
            desk.score(total, number)
            model, state = strategy.step(run.model, desk.combine(total), run.state)
            run.commit(desk.summary(number, began, total), model, state)
    rounds = len(run.history)
    desk.score(desk.evaluate(run.model, max(1, rounds), "validation"), rounds + 1)
    run.save()
    run.finish(desk.test(run.best if run.best is not None else run.model))


def note_end(home: Home, facts: Mapping[str, Any]) -> None:
    """The journal's line about the end of the run whose run.json holds `facts`."""
    told = {name: str(facts[key]) for name, key in (("run", "run_id"), ("digest", "digest"), ("state", "state"))}
    home.journal.append("run-ended", rounds=int(facts["round"]), **told)


def note_missing_ends(home: Home) -> None:
    """See to it that the journal tells of every run that has ended: a process may die between a run's end and its line."""
    for run_id in _without_end(home):
        with holding(home.runs / run_id) as free:  # whoever carries it out is about to write that line
            if free and run_id in _without_end(home):
                note_end(home, read_facts(home.runs / run_id))


def _without_end(home: Home) -> list[str]:
    """Runs that have ended since they were launched or resumed last, and of whose end the journal says nothing."""
    last = {
        str(entry["facts"]["run"]): entry["kind"]
        for entry in journal.entries(home.journal.path)
        if entry["kind"] in ("launched", "run-resumed", "run-ended")
    }
    ended = [str(facts["run_id"]) for facts in list_runs(home.runs) if facts["state"] in ENDED]
    return [run_id for run_id in ended if last.get(run_id) != "run-ended"]


@contextlib.contextmanager
def traced(run: Run) -> Iterator[None]:
    """The span of a run, where somebody asked for spans."""
    rounds = run.study.training.rounds if not isinstance(run.study.task, Counting) else 0
    with tracing.span(
        "run", run=run.run_id, protection=run.study.protection, rounds=rounds, attempt=run.attempt
    ) as tell:
        yield
        tell(outcome=str(run.facts["state"]), committed=len(run.history))


class Desk:
    """What one run asks of which sites. A sum over the training sites brings two things at once: how the ordered model does on
    their validation splits, and what they learned from it. So a round takes one sum, and a model's score comes with the next.
    """

    def __init__(self, home: Home, run: Run, grid: Grid) -> None:
        self.run, self.summing, self.roster = run, sums.build(grid, run, home), home.roster

    def _consenting(self, *named: Sequence[str]) -> list[Nodes]:
        """Of each list of sites those that approved, at the launch or since, and hold to it.

        Asked before each sum: who withdrew, was revoked, or has another key than the study names since, gets no further order.
        """
        study, (sites, decisions) = self.run.study, self.roster.standing(self.run.study.digest)
        admitted = {site.name: keys.point_hex(site.public_key) for site in sites if not site.revoked}
        declined = {site for site, decision in decisions.items() if decision == "declined"}
        self._take_in([site for site, decision in decisions.items() if decision == "approved"])
        keep = {s for s in self.run.facts["sites"] if s in admitted and admitted[s] == study.roster.get(s)} - declined
        nodes = {site.name: site.node_id for site in sites if site.node_id is not None and site.name in keep}
        return [{name: nodes[name] for name in names if name in nodes} for names in named]

    def _take_in(self, approved: list[str]) -> None:
        """Sites that the study names and that approved while the run was under way have a part in it from now on."""
        late = [site for site in approved if site in self.run.study.all_sites and site not in self.run.facts["sites"]]
        if late:
            self.run.take_in(late)
            self.summing.tell("joined", round=len(self.run.history) + 1, sites=late)

    def train(self, model: Float32, number: int) -> Total:
        """One round's sum: validation of `model` (`strategies.sent` gives it) and the mean of what the sites learned from it."""
        if self.run.scale is None:
            self.run.scale = sums.first_scale(self.run.study)
        quorum = self.run.study.participation.quorum
        study = self.run.study  # after the last round, the sites of one more validate its model
        trainers, afterwards = self._consenting(study.asked(number), study.asked(number + 1))
        return self.summing.carry_out(Task(TrainOrder, model, number, self.run.scale, trainers, quorum, afterwards))

    def combine(self, total: Total) -> Float32:
        """The update that the next model is made of: the mean, or what a robust strategy makes of each site's own."""
        combination = strategies.combination(self.run.study)
        if combination is None:
            return total.mean.update
        combined = combination.combine(total.updates)
        if combined.left_out:
            self.summing.tell("left_out", round=len(self.run.history) + 1, sites=combined.left_out)
        return combined.update

    def evaluate(self, model: Float32, number: int, split: str) -> Total:
        """The summed scores of `model` on one split: the training sites' validation, or everybody's test."""
        study, last = self.run.study, split == "test"
        testers, trainers = self._consenting(study.tested, study.asked(len(self.run.history) + 1))
        sites, afterwards = (testers, None) if last else (trainers, testers)
        # Under masks no sum of fewer sites than the quorum is opened; unmasked, one site's scores are better than none.
        least = study.participation.quorum if study.protection == "masked" else 1
        task = Task(EvaluateOrder, model, number, 0, sites, least, afterwards, {"split": split})
        return self.summing.carry_out(task)

    def count(self, task: Counting) -> Counted:
        """The answers to the study's questions in one sum over the sites; the order carries a model of one zero."""
        began, study = time.monotonic(), self.run.study
        blank, quorum = np.zeros(1, np.float32), study.participation.quorum
        total = self.summing.carry_out(
            Task(EvaluateOrder, blank, 1, 0, self._consenting(study.all_sites)[0], quorum, None, {"split": COHORT})
        )
        answers = questions.read(task, total.mean.answers)
        missing = self.absent(total, study.all_sites)
        return Counted(total.contributors, missing, answers, time.monotonic() - began)

    def score(self, total: Total, number: int) -> None:
        """Note the validation of the model that the sites of round `number` were sent."""
        self.run.score(self._sheet(total), self.absent(total, self.run.study.asked(number)))

    def test(self, model: Float32) -> Test:
        """The test evaluation of the selected model: everybody's sum, and what each site releases of its own."""
        total = self.evaluate(model, max(1, self.run.best_round), "test")
        released = {site: self._released(total, rows) for site, rows in sorted(total.figures.items())}
        sheet, study = self._sheet(total), self.run.study
        groups = total.mean.groups.kept(study).to_json(study) if total.mean.groups is not None else []
        table: list[list[int]] = total.mean.grades.tolist() if total.mean.grades is not None else []
        absent = self.absent(total, study.tested)
        return Test(sheet, absent, released, groups, table, total.mean.ingested, self._number(total))

    def _number(self, total: Total) -> dict[str, Any] | None:
        """Where the target is a number: the summed errors, and what each site says of itself unless it contradicts itself."""
        if total.mean.errors is None:
            return None
        sites: dict[str, Any] = {}
        for site, rows in sorted(total.figures.items()):
            try:
                found = read_number(self.run.study, rows)
            except MessageMalformed:
                found = None
            most = int(total.mean.errors[0])
            sites[site] = found if found and found["images"] <= most else None
        return {"sums": total.mean.errors.tolist(), "sites": sites}

    def _sheet(self, total: Total) -> dict[str, Any]:
        """What of an opened evaluation is kept."""
        sheet = total.mean.sheet
        if sheet.overlaps is not None:
            sheet = replace(sheet, overlaps=sheet.overlaps.kept(self.run.study))
        return score_sheet(total.contributors, sheet)

    def _released(self, total: Total, rows: Float32) -> list[dict[str, Any] | None]:
        """What one site says of itself, target by target; nothing where it contradicts itself or the sum it is in."""
        study, pooled = self.run.study, total.mean.sheet.histogram
        try:
            found = read_figures(study, rows)
        except MessageMalformed:
            return [None] * len(study.task.targets)
        if study.segments:
            return [figure if figure and figure["cases"] <= total.mean.sheet.images else None for figure in found]
        return [
            figure
            if figure and figure["negatives"] <= pooled.negatives(n) and figure["positives"] <= pooled.positives(n)
            else None
            for n, figure in enumerate(found)
        ]

    def absent(self, total: Total, named: Sequence[str]) -> dict[str, str]:
        """Who of `named` is not in `total`, and why."""
        told = {name: "not-consenting" for name in named if name not in total.contributors} | total.missing
        revoked = self.roster.revoked() if told else set()
        return {name: CertificateRevoked.code if name in revoked else why for name, why in told.items()}

    def summary(self, number: int, began: float, total: Total) -> Round:
        before = self.run.scale or 0
        self.run.scale = sums.next_scale(self.run.study, total, before)
        asked, sampled = self.run.study.asked(number), self.run.study.participation.sample is not None
        # How long a private step takes says how many patients were drawn, and the loss is a figure about them.
        public = self.run.study.privacy == "none"
        return Round(
            round=number,
            attempt=self.run.attempt,
            seconds=time.monotonic() - began,
            contributors=total.contributors,
            missing=self.absent(total, asked),
            cases=total.mean.cases,
            train_loss=total.mean.loss if public else None,
            site_seconds=total.seconds if public else {},
            clipped=total.clipped,
            scale=before,
            asked=asked if sampled else [],
        )
