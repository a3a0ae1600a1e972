"""The coordinator's figures for Prometheus: names of sites and runs as labels, and nothing about a patient.

Made anew for each scrape from what `fl_server.overview` sees. Losses, scores and ε are results of a study and are not among them.
"""

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from fl_server.overview import Overview

CONTENT_TYPE = CONTENT_TYPE_LATEST
STATES = ("queued", "running", "complete", "partial", "failed", "stopped")
JOURNAL = {"damaged": 0.0, "reading": 0.5, "whole": 1.0}


class Figures(Collector):
    """What the overview sees at this moment, as metrics."""

    def __init__(self, overview: Overview) -> None:
        self.overview = overview

    def collect(self) -> Iterator[Metric]:
        now, book = self.overview.look(), self.overview.book.known
        yield gauge("isocenter_serving", "1 if gateway and consortium service answer.", float(now.serving))
        yield gauge("isocenter_disk_free_bytes", "Free bytes of the file system with the runs.", now.disk.free)
        yield gauge("isocenter_disk_size_bytes", "Size of that file system.", now.disk.total)
        yield gauge("isocenter_journal_whole", "1 verified, 0 damaged, 0.5 still being read.", JOURNAL[book.state])
        yield gauge("isocenter_journal_lines", "Lines of the journal when it was verified last.", book.lines)
        waiting = sum(1 for row in now.studies if not row.ready and not row.runs)
        yield gauge("isocenter_studies_waiting", "Studies without enough approvals to be launched.", waiting)
        yield from self._sites()
        yield from self._runs()

    def _sites(self) -> Iterator[Metric]:
        now = self.overview.look()
        online = GaugeMetricFamily("isocenter_site_online", "1 if the node of a site is connected.", labels=["site"])
        seen = GaugeMetricFamily("isocenter_site_last_seen_timestamp_seconds", "Last sign of life.", labels=["site"])
        until = GaugeMetricFamily(
            "isocenter_certificate_end_timestamp_seconds", "End of a party's certificate.", labels=["party", "role"]
        )
        ready = GaugeMetricFamily("isocenter_site_ready", "1 if a site told last that it is ready.", labels=["site"])
        skew = GaugeMetricFamily(
            "isocenter_party_upgrade", "1: versions differ; 2: messages are not understood; 0: equal.", labels=["party"]
        )
        for row in [*now.sites, *now.researchers]:
            if row.revoked:
                continue
            if row.told.versions:
                found = row.told.skew(row.name)
                skew.add_metric([row.name], 0.0 if found is None else 1.0 + found.must)
            if row.role == "site" and row.told.readiness:
                ready.add_metric([row.name], float(row.told.readiness.ready))
            until.add_metric([row.name, row.role], row.until.timestamp())
            if row.role == "site":
                if row.online is not None:
                    online.add_metric([row.name], float(row.online))
                seen.add_metric([row.name], row.seen_s or 0.0)
        yield from (online, seen, until, ready, skew)

    def _runs(self) -> Iterator[Metric]:
        runs = self.overview.look().runs
        count = GaugeMetricFamily("isocenter_runs", "Runs by state.", labels=["state"])
        for state in STATES:
            count.add_metric([state], sum(run.state == state for run in runs))
        names = ["run"]
        done = GaugeMetricFamily("isocenter_run_rounds_done", "Committed rounds of a run under way.", labels=names)
        planned = GaugeMetricFamily("isocenter_run_rounds_planned", "Rounds of its study.", labels=names)
        seconds = GaugeMetricFamily("isocenter_run_round_seconds", "Seconds of its median round.", labels=names)
        waiting = GaugeMetricFamily("isocenter_run_waiting_sites", "Sites it waits for before a round.", labels=names)
        missing = CounterMetricFamily(
            "isocenter_run_site_missing", "How often a site was missing, by reason.", labels=["run", "site", "reason"]
        )
        voids = CounterMetricFamily("isocenter_run_notes", "Void sums, wrong shares, updates left out.", labels=names)
        for run in runs:
            if run.state not in ("queued", "running"):
                continue
            label = [str(run.facts["run_id"])]
            done.add_metric(label, run.done)
            planned.add_metric(label, run.planned)
            waiting.add_metric(label, len(run.waiting))
            voids.add_metric(label, len(run.notes))
            if run.median_seconds is not None:
                seconds.add_metric(label, run.median_seconds)
            for name, part in run.sites.items():
                for reason, times in part.refusals.items():
                    missing.add_metric([*label, name, reason], times)
        yield from (count, done, planned, seconds, waiting, missing, voids)


def gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    """One figure without labels."""
    return GaugeMetricFamily(name, meaning, value=value)


def exposition(overview: Overview) -> bytes:
    """Everything, in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(Figures(overview))
    return generate_latest(registry)
