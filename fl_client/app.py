"""The hospital's Flower ClientApp: an order in, a report or a refusal out. The code is this installation's, never a bundle's.

It runs in the node's worker process, in simulation and in tests. Whatever goes wrong, the coordinator learns one public code.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from fl_client.cohort import Cohort
from fl_client.ingest import Index
from fl_client.site import Site
from models import learning, networks
from models.labels import LabelTable
from models.metrics import ScoreHistogram
from models.study import Study
from privacy.errors import CohortTooSmall, IsocenterError, MessageMalformed
from privacy.wire import EvaluateOrder, EvaluateReport, Order, Refusal, Report, TrainOrder, TrainReport, decode

Split = Literal["train", "validation", "test"]
Work = Callable[["Desk", Site, Message], Report]
log = logging.getLogger("isocenter.site")


@dataclass
class Desk:
    """What stays in memory between orders: networks and cohorts by study. A changed index or label table makes it forget."""

    nets: dict[str, nn.Module] = field(default_factory=dict)
    cohorts: dict[tuple[str, Split, tuple[int, ...]], Cohort] = field(default_factory=dict)

    def net(self, study: Study, order: Order) -> nn.Module:
        """The study's network with the ordered weights."""
        if study.digest not in self.nets:
            self.nets = {study.digest: networks.build(study)}
        networks.load_vector(self.nets[study.digest], order.model)
        return self.nets[study.digest]

    def cohort(self, site: Site, study: Study, split: Split) -> Cohort:
        """The site's images of `split`; CohortTooSmall if this split is smaller than the study's or the site's minimum."""
        source = site.source
        table = site.home / source.labels.table
        seen = tuple(p.stat().st_mtime_ns if p.exists() else 0 for p in (site.state / "index.sqlite", table))
        key = (study.digest, split, seen)
        if key not in self.cohorts:
            self.cohorts = {k: c for k, c in self.cohorts.items() if (k[0], k[2]) == (study.digest, seen)}
            labels = LabelTable.read(table, source.labels)
            pins = site.home / "studies" / f"{study.digest}.pins.json"
            cohort = Cohort.open(Index.open(site.state), labels, study, split, pins)
            least = site.settings.policy.minimum_patients
            if cohort.counts.patients < least:
                raise CohortTooSmall(
                    f"the {split} split has {cohort.counts.patients} patients; site.yaml asks for {least}"
                )
            self.cohorts[key] = cohort
        return self.cohorts[key]


def make_app() -> ClientApp:
    """A ClientApp with a desk of its own."""
    app, desk = ClientApp(), Desk()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, context, desk, carry_out_training)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(message, context, desk, carry_out_evaluation)

    return app


def answer(message: Message, context: Context, desk: Desk, work: Work) -> Message:
    """The reply to `message`: what `work` reports, or a Refusal with the public code of whatever it raised."""
    site = Site.open(Path(str(context.node_config["site"])))
    if threads := site.settings.resources.cpu_threads:
        torch.set_num_threads(threads)
    try:
        report = work(desk, site, message)
    except IsocenterError as error:
        log.warning("refused: %s (%s)", error.code, error)
        report = refusal(message, site, error.code)
    except Exception:
        log.exception("refused: internal")
        report = refusal(message, site, IsocenterError.code)
    site.note(report)
    return Message(report.to_records(), reply_to=message)


def refusal(message: Message, site: Site, code: str) -> Refusal:
    """A refusal of the order in `message`; raises MessageMalformed if it holds none, because there is nothing to refuse."""
    return Refusal.of(decode(message, TrainOrder, EvaluateOrder), site.name, code)


def carry_out_training(desk: Desk, site: Site, message: Message) -> TrainReport:
    began = time.monotonic()
    order = decode(message, TrainOrder)
    study = site.admit(order)
    # A site whose evaluation would be refused must not train either: its patients would count and its scores would not.
    splits: tuple[Split, ...] = ("validation", "test")
    for split in splits:
        desk.cohort(site, study, split)
    cohort = desk.cohort(site, study, "train")
    net = desk.net(study, order)
    update = learning.learn(net, cohort, study, round_number=order.round, stop=lambda: False)
    return TrainReport(
        study=order.study,
        run=order.run,
        round=order.round,
        attempt=order.attempt,
        site=site.name,
        cases=update.cases,
        loss=update.loss,
        seconds=time.monotonic() - began,
        ingested=cohort.ingested,
        update=update.delta,
    )


def carry_out_evaluation(desk: Desk, site: Site, message: Message) -> EvaluateReport:
    began = time.monotonic()
    order = decode(message, EvaluateOrder)
    study = site.admit(order)
    if order.split == "validation":
        cohort = desk.cohort(site, study, "validation")
    elif order.split == "test":
        cohort = desk.cohort(site, study, "test")
    else:
        raise MessageMalformed("no such split")
    scores = learning.predict(desk.net(study, order), cohort)
    histogram = ScoreHistogram.of(scores, cohort.targets.numpy(), cohort.known.numpy(), bins=study.evaluation.bins)
    return EvaluateReport(
        study=order.study,
        run=order.run,
        round=order.round,
        attempt=order.attempt,
        site=site.name,
        split=order.split,
        patients=cohort.counts.patients,
        images=cohort.counts.images,
        loss=learning.evaluation_loss(scores, cohort),
        seconds=time.monotonic() - began,
        ingested=cohort.ingested,
        counts=histogram.to_array(),
    )


app = make_app()
