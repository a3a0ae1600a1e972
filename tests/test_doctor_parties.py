"""`doctor` of a site, a coordinator and a researcher: joined, before joining, and with each part of it broken."""

import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from coordinator import Coordinator, coordinator
from examining import PATIENT, Authority, examined, look
from proxies import proxy
from typer.testing import CliRunner

from fl_client import doctor as of_site
from fl_client import enrol, sandbox, standing
from fl_client.cli import app as fl_client
from fl_client.policy import Pause
from fl_client.site import SiteFile
from fl_server import consortium
from fl_server import doctor as of_server
from fl_server.cli import app as fl_server
from fl_server.research import app as fl_study
from fl_server.settings import ServerFile
from models.study import read
from privacy import calls, doctor, keys, reach
from privacy.doctor import Finding
from privacy.errors import IsocenterError, Unreachable


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    with coordinator(tmp_path_factory.mktemp("served")) as made:
        yield made


@pytest.fixture(scope="module")
def joined(served: Coordinator) -> Path:
    home = served.folder / "north"
    enrol.join(str(served.home.invite("north", "site")), home)
    return home


@pytest.fixture
def home(joined: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    shutil.copytree(joined, tmp_path / "north")
    return tmp_path / "north"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "require", lambda folder: None)  # a process; tests/test_client_sandbox.py
    for name in doctor.PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)


# A site ----------------------------------------------------------------------------------------------------------------


def test_a_joined_site_is_looked_at_whole(served: Coordinator, home: Path) -> None:
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    found = examined(of_site.checks(home))
    assert {
        each: found[each].state for each in ("membership", "certificate", "service", "greeting", "clock", "versions")
    } == {**dict.fromkeys(("membership", "certificate", "service", "greeting", "clock", "versions"), "ok")}
    assert (
        found["dns"].state == "ok" and "connection refused" in found["gateway"].sentence
    )  # only the service runs here
    assert found["data"].state == "advice" and "fl-client check" in found["data"].remedy
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before


def test_the_exit_code_and_the_document(served: Coordinator, home: Path) -> None:
    done = CliRunner().invoke(fl_client, ["doctor", "--json", "--home", str(home)])
    facts = json.loads(done.stdout)
    assert done.exit_code == 1 and facts["trouble"] and facts["version"] == doctor.VERSION  # there is no gateway
    assert {frozenset(each) for each in facts["findings"]} == {frozenset(("subject", "state", "sentence", "remedy"))}
    shown = CliRunner().invoke(fl_client, ["doctor", "--home", str(home)])
    assert shown.exit_code == 1 and "trouble gateway" in shown.stdout and "1 in trouble" in shown.stdout
    quiet = CliRunner().invoke(fl_study, ["doctor", "--json", "--home", str(home / "nobody")])
    assert quiet.exit_code == 0 and not json.loads(quiet.stdout)["trouble"]  # advice is no trouble


def test_before_joining_the_invitation_is_tried_and_stays_unused(served: Coordinator, tmp_path: Path) -> None:
    line = str(served.home.invite("early", "site"))
    found = examined(of_site.checks(tmp_path))
    assert found["membership"].state == "advice" and "has not joined" in found["membership"].sentence
    assert "service" not in found and found["confinement"].state == "ok"
    found = examined(of_site.checks(tmp_path, line))
    assert found["service"].state == "ok" and found["dns"].state == "ok"
    with proxy() as out:
        found = examined(of_site.checks(tmp_path, line, reach.Proxy(url=out.url)))
        assert found["service"].state == found["proxy"].state == "ok"
        assert calls.InvitationLine.parse(line).token.encode() not in bytes(out.up)
    box = Authority(tmp_path, "some-firewall")
    with box.serving() as port:
        parts = line.split(":")
        away = ":".join([*parts[:3], str(port), *parts[4:]])
        found = examined(of_site.checks(tmp_path, away))
        assert found["service"].state == "trouble" and "some-firewall" in found["service"].sentence
    assert not (tmp_path / "keys").exists()
    enrol.join(line, tmp_path / "early")


@pytest.mark.parametrize("ahead", [0.0, 60.0, -60.0, 600.0, -600.0])
def test_a_clock_is_compared_with_the_coordinators(
    served: Coordinator, home: Path, ahead: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time

    class Shifted:
        def __getattr__(self, name: str) -> Any:
            return getattr(time, name)

        @staticmethod
        def time() -> float:
            return real() + ahead

    monkeypatch.setattr(consortium, "time", Shifted())
    found = examined([each for each in of_site.checks(home) if each[0] in ("clock", "greeting")])
    assert found["clock"].state == ("ok" if not ahead else "advice" if abs(ahead) == 60 else "trouble")
    assert found["greeting"].state == "ok"  # who it is was believed in any case
    if ahead:
        assert ("behind" if ahead > 0 else "ahead of") in found["clock"].sentence
        assert f"{abs(ahead):.0f}"[:2] in found["clock"].sentence or "59" in found["clock"].sentence
        assert "timedatectl" in found["clock"].remedy


def test_versions_that_do_not_fit(served: Coordinator, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = doctor.own()
    for other, state in (
        (here, "ok"),
        (doctor.Versions(here.wire, here.major, here.minor, here.patch + 1), "advice"),
        (doctor.Versions(here.wire + 1, here.major, here.minor + 1, 0), "trouble"),
    ):
        monkeypatch.setattr(consortium, "own", lambda other=other: other)
        found = look("versions", of_site.checks(home))
        assert found.state == state and (state == "ok" or "upgrade" in found.remedy)


def test_a_revoked_site_hears_it_and_the_rest_goes_on(served: Coordinator, tmp_path: Path) -> None:
    enrol.join(str(served.home.invite("gone", "site")), tmp_path / "gone")
    served.home.revoke("gone")
    found = examined(of_site.checks(tmp_path / "gone"))
    assert found["greeting"].state == "trouble" and "revoked" in found["greeting"].sentence
    assert found["clock"].state == found["versions"].state == "advice" and found["service"].state == "ok"


def test_a_certificate_that_has_ended_or_is_about_to(
    served: Coordinator, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = keys.Authority(
        keys.load_key(served.home.root / "keys" / "ca.key"), keys.load_certificate(served.home.ca_pem)
    )
    request = keys.make_csr(keys.load_key(home / "keys" / "site.key"), "north")

    def issued(days: int) -> Finding:
        keys.write_public(
            home / "keys" / "site.pem", keys.certificate_pem(keys.issue(authority, request, "north", "site", days))
        )
        time.sleep(1.1 if not days else 0)
        return look("certificate", of_site.checks(home))

    found = issued(0)
    assert found.state == "trouble" and "fl-server invite" in found.remedy
    assert issued(10).state == "ok"  # a short life of which little is over is renewed in time
    with monkeypatch.context() as later:
        later.setattr(keys, "renewal_due", lambda held: True)
        found = issued(10)
        assert found.state == "advice" and "due for renewal" in found.sentence and "fl-client start" in found.remedy
    assert issued(300).state == "ok"


BROKEN = {
    "no keys": lambda home: shutil.rmtree(home / "keys"),
    "no authority": lambda home: (home / "keys" / "ca.pem").unlink(),
    "no certificate": lambda home: (home / "keys" / "site.pem").unlink(),
    "half a certificate": lambda home: (home / "keys" / "site.pem").write_text("-----BEGIN CERTIFICATE-----\nMII"),
    "another key": lambda home: ((home / "keys" / "site.key").unlink(), keys.make_key(home / "keys" / "site.key")),
    "garbage for an enrolment": lambda home: (home / "keys" / "enrolment.json").write_text("[" * 5000),
    "no site.yaml": lambda home: SiteFile.path(home).unlink(),
    "yaml that is none": lambda home: SiteFile.path(home).write_text("a: ["),
    "yaml with a patient": lambda home: SiteFile.path(home).write_text(
        f"version: 1\nsite: north\n{PATIENT}: {PATIENT}\n"
    ),
    "labels with a patient": lambda home: SiteFile.path(home).write_text(
        "version: 1\nsite: north\ndata:\n  folder: /x\n  labels:\n    table: t.csv\n    key: a\n    matches: accession\n"
        f'    targets:\n      opacity: {{column: c, words: {{"{PATIENT}": 7}}}}\n'
    ),
    "a file for a folder": lambda home: (
        shutil.rmtree(home / "state", ignore_errors=True),
        (home / "state").write_text(""),
    ),
    "a journal of noise": lambda home: (home / "journal.jsonl").write_text(f"{PATIENT}\n"),
    "a password file that is missing": lambda home: SiteFile.path(home).write_text(
        SiteFile.path(home)
        .read_text()
        .replace("policy:", '  proxy: {url: "http://127.0.0.1:1", user: "a", password_file: "b"}\npolicy:', 1)
    ),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_whatever_is_broken_the_rest_is_looked_at_and_no_patient_is_named(
    served: Coordinator, home: Path, damage: Callable[[Path], object]
) -> None:
    damage(home)
    done = CliRunner().invoke(fl_client, ["doctor", "--json", "--home", str(home)])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    found = {each["subject"]: each for each in json.loads(done.stdout)["findings"]}
    assert {"python", "packages", "disk", "proxy", "membership"} <= found.keys() and len(found) >= 11
    assert "Doe" not in done.output and "1943" not in done.output
    assert any(each["state"] != "ok" for each in found.values())


def test_data_and_pause_come_from_what_was_left_behind(served: Coordinator, home: Path) -> None:
    standing.note(home, ["labels", "budget"])
    found = look("data", of_site.checks(home))
    assert (found.state == "trouble" and "labels, budget" in found.sentence) or "budget, labels" in found.sentence
    standing.note(home, [])
    assert look("data", of_site.checks(home)).state == "ok"
    Pause(0.0, None).store(home)
    found = look("pause", of_site.checks(home))
    assert found.state == "advice" and "fl-client resume" in found.remedy


def test_memory_and_gpu_against_what_site_yaml_asks_for(
    served: Coordinator, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = SiteFile.path(home)
    text = path.read_text()
    path.write_text(text.replace("memory_gb: 0 ", "memory_gb: 99999 ").replace("gpu: false", "gpu: true"))
    monkeypatch.setattr(of_site, "GPU_TRY", "print(0)")
    assert look("memory", of_site.checks(home)).state == "advice"
    found = look("gpu", of_site.checks(home))
    assert found.state == "advice" and "nvidia-smi" in found.remedy
    monkeypatch.setattr(of_site, "GPU_TRY", "print(2)")
    assert (
        look("gpu", of_site.checks(home)).sentence
        == "2 GPUs can be seen; this version trains on the processor all the same."
    )
    path.write_text(text)
    assert look("gpu", of_site.checks(home)).state == "ok"


def test_a_process_that_is_not_confined_has_its_remedy(
    served: Coordinator, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_to_all(folder: Path) -> None:
        gaps = sandbox.Shield(keys_hidden=False, filtered=False).gaps
        raise IsocenterError(gaps[0], remedy=" ".join(gaps[1:]))

    monkeypatch.setattr(sandbox, "require", open_to_all)
    found = look("confinement", of_site.checks(home))
    assert (
        found.state == "trouble" and "seccomp" in found.remedy and "user namespaces" in found.remedy.replace("\n", " ")
    )


# A coordinator ---------------------------------------------------------------------------------------------------------


def test_the_coordinators_ports_are_free_ours_or_somebody_elses(served: Coordinator, joined: Path) -> None:
    found = examined(of_server.of_coordinator(served.home.root))
    assert found["service port"].state == found["service"].state == "ok"
    assert found["gateway port"].state == "advice" and "fl-server start" in found["gateway port"].remedy
    assert found["gateway"].state == "advice" and "keys" in found and found["keys"].state == "ok"
    assert found["sites"].state == "ok" and found["journal"].state == "ok" and found["certificate"].state == "ok"
    port = read(ServerFile, served.home.root / "server.yaml").gateway_port
    with socket.create_server(("127.0.0.1", port)):
        found = examined(of_server.of_coordinator(served.home.root))
        assert found["gateway port"].state == "trouble" and "another program" in found["gateway port"].sentence
        assert f":{port}" in found["gateway port"].remedy


def test_a_coordinator_that_is_half_there(served: Coordinator, tmp_path: Path) -> None:
    found = examined(of_server.of_coordinator(tmp_path))
    assert found["server.yaml"].state == "trouble" and "fl-server init" in found["server.yaml"].remedy
    root = tmp_path / "copy"
    shutil.copytree(served.home.root, root)
    (root / "keys" / "aggregator.key").unlink()
    (root / "keys" / "tls.pem").write_bytes(served.home.ca_pem)
    (root / "roster.sqlite").unlink()
    (root / "keys" / "coordinator.key").chmod(0o644)
    found = examined(of_server.of_coordinator(root))
    assert found["permissions"].state == found["keys"].state == found["sites"].state == "trouble"
    assert not (root / "keys" / "aggregator.key").exists()  # looking makes nothing
    (root / "server.yaml").write_text((root / "server.yaml").read_text().replace("127.0.0.1", "no-such.invalid", 1))
    assert "cannot be resolved" in look("dns", of_server.of_coordinator(root)).sentence
    done = CliRunner().invoke(fl_server, ["doctor", "--json", "--home", str(root)])
    assert done.exit_code == 1 and json.loads(done.stdout)["trouble"]


def test_a_coordinator_that_nobody_can_reach_from_outside(served: Coordinator, tmp_path: Path) -> None:
    settings = served.home.settings.model_copy(update={"host": "10.9.8.7"})
    found = doctor.finding("dns", lambda: of_server._name(settings))
    assert found.state == "advice" and "only this machine" in found.sentence and "`listen`" in found.remedy
    wrong = served.home.settings.model_copy(update={"listen": "192.0.2.7"})
    found = doctor.finding("port", lambda: of_server._port(served.home.root, wrong, 9440))
    assert found.state == "trouble" and "cannot be listened on" in found.sentence


# A researcher ----------------------------------------------------------------------------------------------------------


def test_a_researcher_is_looked_at(served: Coordinator, tmp_path: Path) -> None:
    line = str(served.home.invite("rosa", "researcher"))
    home = tmp_path / "rosa"
    found = examined(of_server.of_researcher(home, line))
    assert found["service"].state == "ok" and found["membership"].state == "advice"
    with proxy() as out:
        assert CliRunner().invoke(fl_study, ["join", line, "--home", str(home), "--proxy", out.url]).exit_code == 0
        found = examined(of_server.of_researcher(home))
        assert {each.state for each in found.values()} <= {"ok", "advice"}, found
        assert all(found[each].state == "ok" for each in ("proxy", "service", "greeting", "clock", "certificate"))
        assert set(out.asked) == {f"CONNECT {served.address}"}
    found = examined(of_server.of_researcher(home))
    assert "proxy cannot be reached" in found["proxy"].sentence and found["greeting"].state == "trouble"
    with pytest.raises(Unreachable):
        doctor.Greeting(lambda: (_ for _ in ()).throw(Unreachable("x")), "us").ask()
