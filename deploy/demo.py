"""The demo behind `make demo`: a coordinator, three phantom hospitals and a researcher, as separate processes with real TLS.

It runs the same commands a consortium would and prints each of them, writes everything below ./demo, and ends what it
started even when it is interrupted.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from stage import BIN, Stage, StageError

from fl_server import matrix

DEMO = Path("demo")
HOSPITALS = {"alpine": "aurora", "bayside": "boreal", "central": "cirrus"}
"""Site -> whose devices it has. The vendors differ in polarity, bit depth, spacing, contrast, and in what misleads a model."""
PATIENTS = 150


def main() -> None:
    began = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    if DEMO.exists():
        shutil.rmtree(DEMO)
    stage = Stage(DEMO, lambda text: print(text, flush=True))
    try:
        play(stage)
    except KeyboardInterrupt:
        print("\ninterrupted; ending what was started", file=sys.stderr)
        raise SystemExit(130) from None
    except StageError as error:
        print(f"the demo failed: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        stage.stop()
    summary(time.monotonic() - began)


def play(stage: Stage) -> None:
    say("the coordinator founds a consortium and opens its doors")
    stage.found()
    stage.serve()
    for name, vendor in HOSPITALS.items():
        say(f"hospital {name} (devices of {vendor}) joins and reads its images")
        print(stage.open_hospital(name, vendor, PATIENTS), end="")
    say("a researcher joins, writes a study and submits it")
    stage.join_researcher()
    stage.command("fl-study", "new", "demo/study.yaml", "--template", "phantoms")
    print(stage.command("fl-study", "check", "demo/study.yaml"), end="")
    digest = stage.submit(DEMO / "study.yaml")
    for number, name in enumerate(HOSPITALS):
        say(f"{name} reads the study in plain words, approves it, and starts its node")
        shown = stage.approve(name, digest)
        print(shown if number == 0 else shown.splitlines()[-1])
        stage.node(name)
    say("the researcher launches the run and writes the report")
    live(stage, "fl-study", "run", digest, "--home", "demo/researcher")
    print(stage.study("report", digest, "--out", "demo/report"), end="")
    say("for comparison: each hospital alone, with the same images, splits and number of rounds")
    sites = [part for name in HOSPITALS for part in ("--site", f"{name}=demo/sites/{name}")]
    live(stage, "fl-study", "simulate", "demo/study.yaml", *sites, "--compare", "--out", "demo/comparison")


def live(stage: Stage, *words: str) -> None:
    """Run a command that shows its own progress on this terminal."""
    stage.show("$ " + " ".join(words))
    if subprocess.run([str(BIN / words[0]), *words[1:]], check=False).returncode != 0:
        raise StageError(f"{words[0]} {words[1]} failed; see above")


def summary(seconds: float) -> None:
    metrics = json.loads((DEMO / "report" / "metrics.json").read_text())
    compared = matrix.read(json.loads((DEMO / "comparison" / "comparison.json").read_text()))
    alone = {row.site: dict(zip(compared.sites, row.cells, strict=True)) for row in matrix.rows(compared) if row.site}
    own = _mean(alone[name][name] for name in HOSPITALS)
    away = _mean(alone[name][other] for name in HOSPITALS for other in HOSPITALS if other != name)
    federated = ", ".join(f"{name} {_figure(metrics['sites'][name]['auroc'])}" for name in HOSPITALS)
    print(
        f"\nFederated model ({metrics['label']}): test AUROC {metrics['pooled']['auroc']:.3f} pooled over 3 hospitals"
        f"\n  at each hospital:       {federated}"
        f"\n  models trained alone:   {_figure(own)} at home, {_figure(away)} elsewhere"
        f"\n  what left a hospital:   its part of masked sums, its test figures; all {metrics['ingested_images']} images stayed"
        f"\n  done in {seconds:.0f} s:           open demo/report/report.html"
    )


def _mean(cells: Iterable[matrix.Cell | None]) -> float | None:
    """Over the hospitals that released theirs."""
    released = [cell.auroc for cell in cells if cell is not None]
    return sum(released) / len(released) if released else None


def _figure(value: float | None) -> str:
    return "not released" if value is None else f"{value:.3f}"


def say(sentence: str) -> None:
    print(f"\n# {sentence}", flush=True)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
