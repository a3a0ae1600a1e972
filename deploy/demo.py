"""The demo behind `make demo`: a coordinator, three phantom hospitals and a researcher, as separate processes with real TLS.

It runs the same commands a consortium would, prints each of them, writes everything below ./demo, and ends what it started
even when it is interrupted. Only the standard library is used here; the commands come from the environment beside it.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

DEMO = Path("demo")
BIN = Path(sys.executable).parent
HOSPITALS = {"alpine": "aurora", "bayside": "boreal", "central": "cirrus"}
"""Site -> whose devices it has. The vendors differ in polarity, bit depth, spacing, contrast, and in what misleads a model."""
PATIENTS = 150
READY_S = 60.0
running: list[subprocess.Popen[str]] = []


def main() -> None:
    began = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    if DEMO.exists():
        shutil.rmtree(DEMO)
    (DEMO / "logs").mkdir(parents=True)
    try:
        found_consortium()
        for name, vendor in HOSPITALS.items():
            open_hospital(name, vendor)
        digest = write_and_submit_study()
        for name in HOSPITALS:
            say(f"{name} reads the study and approves it")
            command("fl-client", "approve", digest, "--yes", "--home", f"demo/sites/{name}")
            start(f"node-{name}", "fl-client", "start", "--home", f"demo/sites/{name}", until="waits for orders")
        say("the researcher launches the run")
        command("fl-study", "run", digest, "--home", "demo/researcher", show=True)
        command("fl-study", "report", digest, "--home", "demo/researcher", "--out", "demo/report", show=True)
        say("for comparison: each hospital alone, with the same images, splits and number of rounds")
        sites = [part for name in HOSPITALS for part in ("--site", f"{name}=demo/sites/{name}")]
        command("fl-study", "simulate", "demo/study.yaml", *sites, "--compare", "--out", "demo/comparison", show=True)
    except KeyboardInterrupt:
        print("\ninterrupted; ending what was started", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        stop_all()
    summary(time.monotonic() - began)


def found_consortium() -> None:
    say("the coordinator founds a consortium and opens its doors")
    gateway, service = free_port(), free_port()
    ports = ("--gateway-port", str(gateway), "--service-port", str(service))
    command("fl-server", "init", "demo/coordinator", "--name", "demo", "--host", "127.0.0.1", *ports)
    start("coordinator", "fl-server", "start", "--home", "demo/coordinator", until="is ready")


def open_hospital(name: str, vendor: str) -> None:
    say(f"hospital {name} (devices of {vendor}) joins and reads its images")
    home, hospital = DEMO / "sites" / name, DEMO / "hospitals" / name
    made = ("--name", name, "--vendor", vendor, "--patients", str(PATIENTS), "--seed", str(len(running)))
    section = command("fl-client", "phantom", str(hospital), *made)
    command("fl-client", "join", invite(name), "--home", str(home), shown_as="fl-client join LINE --home " + str(home))
    text = (home / "site.yaml").read_text(encoding="utf-8")
    text = text.replace("permit_plain: false", "permit_plain: true").replace("cpu_threads: 0", "cpu_threads: 1")
    (home / "site.yaml").write_text(text + "\n" + section[section.index("data:") :], encoding="utf-8")
    command("fl-client", "ingest", "--home", str(home), show=True)
    command("fl-client", "check", "--home", str(home))


def write_and_submit_study() -> str:
    say("a researcher joins, writes a study and submits it")
    line = invite("researcher", "--researcher")
    command("fl-study", "join", line, "--home", "demo/researcher", shown_as="fl-study join LINE --home demo/researcher")
    command("fl-study", "new", "demo/study.yaml", "--template", "phantoms")
    command("fl-study", "check", "demo/study.yaml", show=True)
    submitted = command("fl-study", "submit", "demo/study.yaml", "--home", "demo/researcher")
    found = re.search(r"[0-9a-f]{64}", submitted)
    return found.group() if found else fail("fl-study submit printed no digest")


def invite(name: str, *more: str) -> str:
    output = command("fl-server", "invite", name, *more, "--home", "demo/coordinator")
    found = re.search(r"isocenter-join:\S+", output)
    return found.group() if found else fail("fl-server invite printed no line")


def command(*words: str, show: bool = False, shown_as: str = "") -> str:
    """Run one command to its end, printing it (and its output if `show`); its standard output."""
    print(f"$ {shown_as or ' '.join(words)}", flush=True)
    done = subprocess.run([str(BIN / words[0]), *words[1:]], stdout=subprocess.PIPE, text=True, check=False)
    if show:
        print(done.stdout, end="", flush=True)
    if done.returncode != 0:
        print("" if show else done.stdout, end="")
        fail(f"{words[0]} {words[1]} ended with exit code {done.returncode}")
    return done.stdout


def start(label: str, *words: str, until: str) -> None:
    """Start a long-lived command, its output in demo/logs, and wait until it prints `until`."""
    print(f"$ {' '.join(words)} &", flush=True)
    path = DEMO / "logs" / f"{label}.log"
    with path.open("w") as log:
        process = subprocess.Popen(
            [str(BIN / words[0]), *words[1:]], stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    running.append(process)
    end = time.monotonic() + READY_S
    while until not in path.read_text():
        if process.poll() is not None or time.monotonic() > end:
            fail(f"{label} did not get ready; see {path}")
        time.sleep(0.05)


def stop_all() -> None:
    for process in reversed(running):
        if process.poll() is None:
            process.terminate()
    for process in reversed(running):
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def summary(seconds: float) -> None:
    metrics = json.loads((DEMO / "report" / "metrics.json").read_text())
    matrix = json.loads((DEMO / "comparison" / "comparison.json").read_text())
    own = [matrix[name][name] for name in HOSPITALS]
    away = [matrix[name][other] for name in HOSPITALS for other in HOSPITALS if other != name]
    federated = [metrics["sites"][name]["auroc"] for name in HOSPITALS]
    print(
        f"\nFederated model, {metrics['label']}: test AUROC {metrics['pooled']['auroc']:.3f} pooled over 3 hospitals"
        f"\n  per hospital:             {', '.join(f'{n} {v:.3f}' for n, v in zip(HOSPITALS, federated, strict=True))}"
        f"\n  models trained alone:     {sum(own) / len(own):.3f} at home, {sum(away) / len(away):.3f} at the other hospitals"
        f"\n  what left the hospitals:  model updates and histograms; {metrics['ingested_images']} images stayed"
        f"\n  done in {seconds:.0f} s; open   demo/report/report.html"
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def say(sentence: str) -> None:
    print(f"\n# {sentence}", flush=True)


def fail(reason: str) -> NoReturn:
    print(f"the demo failed: {reason}", file=sys.stderr)
    raise SystemExit(1)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
