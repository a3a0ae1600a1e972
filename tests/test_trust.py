"""Trust with real processes: a certificate that ends during a run, a revocation and a withdrawal in the middle of one."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fl_server.roster import Home
from privacy import keys
from privacy.journal import entries

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "deploy"))
from certificates import authority_of, certificate, put  # noqa: E402
from stage import Stage  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NAMES = ("north", "south", "east", "west")
OLD_DAYS = 30 / 86_400  # what is left of a certificate when its node starts: half a minute


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("trust") / "stage")
    try:
        made.found()
        made.serve()
        for name in NAMES:
            made.open_hospital(name, "aurora", 60, minimum_patients=5)
        made.join_researcher()
        yield made
    finally:
        made.stop()


def launched(stage: Stage, title: str, rounds: int) -> Path:
    """The folder of a run of a masked study that all four approved."""
    plan = (ROOT / "configs" / "studies" / "phantoms.yaml").read_text()
    plan = re.sub(r"(?m)^title: .*", f"title: {title}", plan)
    plan = re.sub(r"(?m)^  rounds: .*", f"  rounds: {rounds}", plan)
    plan = re.sub(r"(?m)^  sites: .*", f"  sites: [{', '.join(NAMES)}]", plan)
    plan = re.sub(r"(?m)^  quorum: .*", "  quorum: 3", plan)
    plan = re.sub(r"(?m)^  minimum_patients: .*", "  minimum_patients: 5", plan)
    path = stage.folder / f"{title}.yaml"
    path.write_text(plan)
    digest = stage.submit(path)
    for name in NAMES:
        stage.approve(name, digest)
    found = re.search(r"Run (\S+)", stage.study("run", digest, "--detach"))
    assert found is not None
    return stage.coordinator / "runs" / found.group(1).rstrip(".,")


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def wait_for(true: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())["rounds"]
    return found


def ended(folder: Path) -> bool:
    return facts(folder)["state"] in ("complete", "partial", "failed")


def kinds(journal: Path) -> list[str]:
    return [entry["kind"] for entry in entries(journal)]


def test_a_certificate_that_ends_during_a_run_was_renewed_and_the_run_is_complete(stage: Stage) -> None:
    home = Home.open(stage.coordinator)
    key = keys.load_key(stage.site("north") / "keys" / "site.key").public_key()
    old = certificate(authority_of(home), key, "north", "site", begun_days=20, left_days=OLD_DAYS)
    keys.write_public(stage.site("north") / "keys" / "site.pem", keys.certificate_pem(old))
    put(home.roster.path, "north", old)
    for name in NAMES:
        stage.node(name)
    folder = launched(stage, "renewal", 8)
    wait_for(lambda: ended(folder))
    end = old.not_valid_after_utc.timestamp()
    if time.time() < end:  # a fast machine: another run begins when the old certificate is over
        time.sleep(end - time.time() + 1)
        folder = launched(stage, "renewal-again", 2)
        wait_for(lambda: ended(folder))
    assert facts(folder)["state"] == "complete", facts(folder)["label"]
    assert all(entry["contributors"] == sorted(NAMES) for entry in rounds_of(folder))
    assert "renewed" in kinds(stage.site("north") / "journal.jsonl")
    assert "renewed" in kinds(stage.coordinator / "journal.jsonl")
    log = (stage.folder / "logs" / "node-north.log").read_text()
    assert log.count("is connected and waits for orders") == 1, "the node did not stay the same node"


def test_both_sides_journals_hold_each_others_heads_and_the_commands_verify_them(stage: Stage) -> None:
    copy = stage.folder / "coordinators-journal.jsonl"
    copy.write_bytes((stage.coordinator / "journal.jsonl").read_bytes())
    for name in NAMES:
        shown = stage.command("fl-client", "journal", "verify", "--witness", str(copy), "--home", str(stage.site(name)))
        assert "and this journal agrees up to line" in shown
    assert "genuine" in stage.command("fl-server", "journal", "verify", "--home", str(stage.coordinator))
    left = json.loads(stage.command("fl-client", "egress", "--json", "--home", str(stage.site("north"))))
    assert left["studies"][0]["rounds"] == 8
    assert {row["kind"] for row in left["left"]} >= {"joined", "approved", "train-report", "head-signed", "renewed"}


def test_a_withdrawal_in_the_middle_of_a_run_ends_that_sites_part_and_no_other(stage: Stage) -> None:
    folder = launched(stage, "withdrawal", 8)
    wait_for(lambda: facts(folder)["round"] >= 2)
    stage.command("fl-client", "decline", facts(folder)["digest"][:12], "--home", str(stage.site("east")))
    wait_for(lambda: ended(folder))
    assert facts(folder)["state"] == "partial"
    assert rounds_of(folder)[-1]["missing"] == {"east": "not-consenting"}


def test_a_revocation_in_the_middle_of_a_run_takes_seconds_and_the_run_goes_on(stage: Stage) -> None:
    folder = launched(stage, "revocation", 12)
    wait_for(lambda: facts(folder)["round"] >= 2)
    [node] = [p for p in stage.running if p.poll() is None and str(p.args[-1]).endswith("/west")]  # type: ignore[index]
    stage.command("fl-server", "revoke", "west", "--yes", "--home", str(stage.coordinator))
    began = time.monotonic()
    code = node.wait(timeout=60)  # the node itself sees that no retry can mend this
    assert code == 1
    log = (stage.folder / "logs" / "node-west.log").read_text()
    assert "revoked this site" in log and "Telephone the coordinator" in log
    print(f"revoked and ended after {time.monotonic() - began:.1f} s")
    refused = subprocess.run(
        [str(Path(sys.executable).parent / "fl-client"), "studies", "--home", str(stage.site("west"))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert refused.returncode == 1 and "was revoked" in refused.stderr
    wait_for(lambda: ended(folder))
    assert facts(folder)["state"] == "partial", facts(folder)["label"]
    assert rounds_of(folder)[-1]["missing"] == {"west": "certificate-revoked"}
    wait_for(lambda: "node-unregistered" in kinds(stage.coordinator / "journal.jsonl"), 30)
