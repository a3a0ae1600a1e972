"""The lines that a terminal shows of a report."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from fl_server import summary


def test_the_screen_shows_every_target_within_eighty_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = ["opacity", "effusion-of-either-side", "cardiomegaly"]
    rows = {
        name: {"auroc": 0.8 + n / 100, "interval": [0.71, 0.9], "positives": 1200 + n, "negatives": 34567}
        for n, name in enumerate(targets)
    }
    rows["cardiomegaly"] = dict.fromkeys(rows["opacity"]) | {"why": "one class", "positives": 0, "negatives": 35767}
    told = {name: {"auroc": 0.7 + n / 10 if n < 2 else None} for n, name in enumerate(targets)}
    silent = {name: {"auroc": None} for name in targets}
    metrics = {
        "number": None,
        "label": "complete",
        "pooled": {"images": 35767, "patients": 20000, "targets": rows},
        "sites": {"north": {"targets": told}, "south": {"targets": silent}},
    }
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    paper = io.StringIO()
    monkeypatch.setattr(summary, "console", Console(file=paper, width=80))
    summary.say(tmp_path / "report.html", as_json=False)
    lines = [line.rstrip() for line in paper.getvalue().splitlines()]
    assert all(len(line) <= 80 for line in lines[:-1])  # the last is a path
    shown = {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.split()[0] in targets}
    assert shown["opacity"] == "0.800 0.710 to 0.900 1200 / 34567 1/2: 0.70 to 0.70"
    assert shown["effusion-of-either-side"].endswith("1/2: 0.80 to 0.80")
    assert shown["cardiomegaly"] == "- one class 0 / 35767 0/2"
