"""The coordinator's Flower ServerApp: `main` tells one whole run.

The same function runs in production (Grid over the SuperLink), in simulation and in tests (Grid in memory).
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_server import strategies
from fl_server.roster import Home
from fl_server.rounds import Gathering, choose
from fl_server.run import Float32, Round, Run, score_sheet
from models.study import Study
from privacy.errors import IsocenterError, QuorumLost
from privacy.wire import EvaluateOrder, EvaluateReport, Order, TrainOrder, TrainReport

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carry the run named in the context from where it stands to its end; every failure ends as a named state."""
    home = Home.open(Path(str(context.run_config["home"])))
    run = Run.open(home.runs / str(context.run_config["run"]))
    run.start()
    try:
        desk = Desk(home, run, grid)
        strategy = strategies.build(run.study)
        if run.model is None:
            run.model = first_model(run)
        for number in run.remaining():
            began = time.monotonic()
            training = desk.ask(TrainOrder, run.model, number, desk.trainers)
            model, state = strategy.step(run.model, desk.updates(training), run.state)
            scores = desk.evaluate(model, number, "validation")
            run.commit(desk.summary(number, began, training, scores), model, state)
        if run.best is None:
            raise QuorumLost("no round was committed")
        test = desk.evaluate(run.best, max(1, run.best_round), "test")
        run.finish({site: score_sheet(report) for site, report in test.items()}, desk.evaluation_missing)
    except IsocenterError as error:
        # The researcher reads this sentence; where the coordinator keeps its files is nobody else's business.
        run.fail(error.code, str(error).replace(str(home.root), "HOME"))
    except Exception:
        run.fail("internal", "the coordinator's program failed; its log has the details")
        raise


class Desk:
    """Where orders of one run leave and reports arrive."""

    def __init__(self, home: Home, run: Run, grid: Grid) -> None:
        self.run, self.grid, self.key = run, grid, home.coordinator_key
        part = run.study.participation
        nodes = {site.name: site.node_id for site in home.roster.sites() if site.node_id is not None}
        consenting = set(run.facts["sites"])
        self.trainers = {name: nodes[name] for name in part.sites if name in nodes and name in consenting}
        self.evaluators = {name: nodes[name] for name in run.study.all_sites if name in nodes and name in consenting}
        self.arrived: dict[str, TrainReport] = {}
        self.offline: dict[str, str] = {}
        self.evaluation_missing: dict[str, str] = {}

    def ask(self, kind: type[Order], model: Float32, number: int, sites: dict[str, int], **more: Any) -> Gathering:
        """Send one signed order to those of `sites` that are online; who is not is noted as offline."""
        needed = self.run.study.participation.quorum if kind is TrainOrder else 1
        timeout_s = timeout_of(self.run.study)
        ready = choose(self.grid, sites, needed, timeout_s, self.run.event, frozenset(self.offline))
        self.offline = {name: "offline" for name in sites if name not in ready}
        order = kind(
            study=self.run.study.digest,
            run=self.run.run_id,
            round=number,
            attempt=self.run.attempt,
            model=model,
            issued=int(time.time()),
            signature=b"",
            **more,
        ).signed(self.key)
        self.run.event("asked", stage=order.kind, round=number, sites=list(ready))
        return Gathering(self.grid, order, ready, timeout_s, self.run.event)

    def updates(self, training: Gathering) -> Iterator[tuple[Float32, int]]:
        """(update, cases) as they arrive, not kept after the strategy has added them; QuorumLost at the end if too few."""
        self.arrived = {}
        for site, report in training.reports():
            if isinstance(report, TrainReport):
                yield report.update, report.cases
                self.run.ingested[site] = report.ingested
                self.arrived[site] = report
        self._require_quorum(training)  # here, so that a strategy never makes a model of too few updates, or of none

    def _require_quorum(self, training: Gathering) -> None:
        training.missing |= self.offline
        if len(self.arrived) < self.run.study.participation.quorum:
            reasons = ", ".join(f"{site}: {reason}" for site, reason in sorted(training.missing.items()))
            raise QuorumLost(
                f"{len(self.arrived)} of {self.run.study.participation.quorum} needed sites reported ({reasons})"
            )

    def evaluate(self, model: Float32, number: int, split: str) -> dict[str, EvaluateReport]:
        asked = self.ask(EvaluateOrder, model, number, self.evaluators, split=split)
        found = {site: report for site, report in asked.reports() if isinstance(report, EvaluateReport)}
        self.run.ingested |= {site: report.ingested for site, report in found.items()}
        silent = {name: "not-consenting" for name in self.run.study.all_sites if name not in self.evaluators}
        self.evaluation_missing = asked.missing | self.offline | silent
        return found

    def summary(self, number: int, began: float, training: Gathering, scores: dict[str, EvaluateReport]) -> Round:
        refused = {name: "not-consenting" for name in self.run.study.participation.sites if name not in self.trainers}
        arrived = dict(sorted(self.arrived.items()))
        return Round(
            round=number,
            seconds=time.monotonic() - began,
            contributors=list(arrived),
            missing=training.missing | refused,
            cases={site: report.cases for site, report in arrived.items()},
            train_loss={site: report.loss for site, report in arrived.items()},
            site_seconds={site: report.seconds for site, report in arrived.items()},
            validation={site: score_sheet(report) for site, report in sorted(scores.items())},
            validation_missing=self.evaluation_missing,
        )


def timeout_of(study: Study) -> float:
    """Seconds after which a stage of a round goes on without the sites that have not reported."""
    return float(study.participation.round_timeout_s)


def first_model(run: Run) -> Float32:
    """The initial weights, from the study's network and seed. Imported late: only the first round of a run needs torch."""
    from models import networks

    return networks.to_vector(networks.build(run.study))
