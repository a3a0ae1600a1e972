"""`doctor`: each finding provoked by what it is about, with a remedy; one that fails or hangs stops no other."""

import base64
import hashlib
import json
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from coordinator import Coordinator, answer_nonsense, coordinator, free_port
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from proxies import proxy
from typer.testing import CliRunner

from fl_client import doctor as of_site
from fl_client import enrol, standing
from fl_client.cli import app as fl_client
from fl_client.policy import Pause
from fl_client.site import SiteFile
from fl_server import consortium
from fl_server import doctor as of_server
from fl_server.cli import app as fl_server
from fl_server.research import app as fl_study
from fl_server.settings import ServerFile
from models.study import read
from privacy import calls, console, crash, doctor, keys, reach
from privacy.doctor import Check, Examination, Finding
from privacy.errors import IsocenterError, Unreachable
from privacy.reach import Way

ROOT = Path(__file__).resolve().parent.parent
PATIENT = "Doe^Jane 1943-02-01"


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
    monkeypatch.setattr(
        of_site.readiness.sandbox, "require", lambda folder: None
    )  # a process; tests/test_client_sandbox.py
    for name in doctor.PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def examined(checks: list[Check]) -> dict[str, Finding]:
    found = Examination(checks).run(lambda done, left: None, 60.0)
    assert [each.subject for each in found] == [subject for subject, _ in checks]
    for each in found:
        assert each.sentence.isprintable() and bool(each.remedy) == (each.state != "ok"), each
    return {each.subject: each for each in found}


def look(subject: str, checks: list[Check]) -> Finding:
    return examined([check for check in checks if check[0] == subject])[subject]


# The engine ------------------------------------------------------------------------------------------------------------


def test_a_check_that_hangs_or_fails_stops_no_other_and_all_end_in_time() -> None:
    never, said = threading.Event(), list[tuple[int, list[str]]]()

    def fails() -> str:
        raise RuntimeError(PATIENT)

    checks: list[Check] = [("hangs", lambda: str(never.wait())), ("fails", fails), ("good", lambda: "well")]
    began = time.monotonic()
    found = Examination(checks).run(lambda done, left: said.append((done, left)), 1.0)
    assert time.monotonic() - began < 10  # a bound and no figure
    never.set()
    assert [each.state for each in found] == ["trouble", "trouble", "ok"]
    assert "did not end within 1 s" in found[0].sentence and found[2].sentence == "well."
    assert "RuntimeError" in found[1].sentence and PATIENT not in str(
        found
    )  # of an error nobody foresaw, the class alone
    assert said[-1][1] == ["hangs"]


def test_a_finding_is_one_line_whatever_was_met() -> None:
    def hostile() -> str:
        raise IsocenterError("\x1b[2Jall\nis \u202ewell", remedy="do")

    found = doctor.finding("x", hostile)
    assert found.sentence.isprintable() and found.sentence.endswith(".")


# This machine ----------------------------------------------------------------------------------------------------------


VERSIONS = st.lists(st.integers(0, 30), min_size=1, max_size=4).map(lambda each: ".".join(map(str, each)))
SIGNS = st.sampled_from(["==", "!=", ">=", "<=", "<", ">"])


@given(VERSIONS, st.lists(st.tuples(SIGNS, VERSIONS), min_size=0, max_size=3))
def test_versions_are_compared_as_packaging_does(version: str, wanted: list[tuple[str, str]]) -> None:
    text = ",".join(f"{sign}{other}" for sign, other in wanted)
    assert doctor.satisfies(version, text) == SpecifierSet(text).contains(version)


@given(VERSIONS, VERSIONS, st.sampled_from(["==", "!="]))
def test_stars_and_compatible_releases_too(version: str, other: str, sign: str) -> None:
    assert doctor.satisfies(version, f"{sign}{other}.*") == SpecifierSet(f"{sign}{other}.*").contains(version)
    if "." in other:
        assert doctor.satisfies(version, f"~={other}") == SpecifierSet(f"~={other}").contains(version)


def test_every_line_of_our_own_requirements_is_understood() -> None:
    for line in metadata.requires("isocenter") or []:
        parts = doctor._REQUIREMENT.fullmatch(line)
        assert parts is not None, line
        assert {f"{sign}{text}{star}" for sign, text, star in doctor._PART.findall(parts[2])} == {
            str(each) for each in SpecifierSet(parts[2])
        }


def test_a_missing_and_a_wrong_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.finding("packages", doctor.packages).state == "ok"
    asked = ["numpy>=999", "no-such-thing>=1", "httpx>=0.27", 'also-not-there; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: asked)
    found = doctor.finding("packages", doctor.packages)
    assert found.state == "trouble" and "not >=999" in found.sentence and "no-such-thing is missing" in found.sentence
    assert "httpx" not in found.sentence and "also-not-there" not in found.sentence and "pip install" in found.remedy


def test_a_python_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.finding("python", doctor.python).state == "ok"
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.2")
    found = doctor.finding("python", doctor.python)
    assert found.state == "trouble" and "3.9.2" in found.sentence and "-m venv" in found.remedy


def test_a_file_that_is_not_what_was_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another package leaves it behind that also has a `models`: same place, other bytes than RECORD says."""
    info = tmp_path / "isocenter-0.1.0.dist-info"
    info.mkdir()
    (tmp_path / "models").mkdir()
    rows = []
    for name in ("models/labels.py", "models/study.py"):
        (tmp_path / name).write_text(f"# {name}\n")
        digest = base64.urlsafe_b64encode(hashlib.sha256((tmp_path / name).read_bytes()).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},10")
    (info / "RECORD").write_text("\n".join([*rows, "README,,"]))
    monkeypatch.setattr(metadata, "files", lambda name: metadata.Distribution.at(info).files)
    assert "2 files as they were installed" in doctor.finding("installation", doctor.installation).sentence
    (tmp_path / "models/labels.py").write_text("theirs\n")
    found = doctor.finding("installation", doctor.installation)
    assert found.state == "trouble" and "1 files" in found.sentence and "models/labels.py" in found.sentence


def test_what_was_found_in_our_place_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "SHADOWS", {"models": "/srv/other/models.py"})
    found = doctor.finding("installation", doctor.installation)
    assert found.state == "trouble" and "/srv/other/models.py" in found.sentence and "PYTHONPATH" in found.remedy


def test_a_models_py_in_the_working_folder_is_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models.py").write_text("X = 1\n")
    monkeypatch.chdir(tmp_path)
    found = doctor.finding("installation", doctor.installation)
    assert found.state == "advice" and "models.py" in found.sentence and "python -m" in found.remedy


@pytest.mark.parametrize("program", ["fl_client", "fl_server", "fl_study"])
@pytest.mark.parametrize("shape", ["models.py", "privacy/__init__.py", "models/__init__.py"])
def test_a_shadow_on_the_path_is_named_before_anything_of_ours_is_loaded(
    tmp_path: Path, program: str, shape: str
) -> None:
    """In a process as the console scripts start it. Every command refuses, and `doctor` reports it beside all else."""
    if program != "fl_client" and shape != "models.py":
        pytest.skip("the same for all three")
    there = tmp_path / shape
    there.parent.mkdir(exist_ok=True)
    there.write_text("raise SystemExit('theirs was run')\n")

    def ran(*words: str) -> subprocess.CompletedProcess[str]:
        code = f"import sys; from isocenter import {program}; sys.argv = [{program!r}, *{list(words)!r}]; {program}()"
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        command = [sys.executable, "-P", "-c", code]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120, check=False
        )

    refused = ran("studies", "--home", str(tmp_path))
    assert refused.returncode == 1 and "Traceback" not in refused.stderr and "theirs was run" not in refused.stderr
    assert str(there) in refused.stderr and "PYTHONPATH" in refused.stderr
    told = ran("doctor", "--json", "--home", str(tmp_path))
    assert told.returncode == 1 and "theirs was run" not in told.stderr, told.stderr
    found = {each["subject"]: each for each in json.loads(told.stdout)["findings"]}
    assert found["installation"]["state"] == "trouble" and str(there) in found["installation"]["sentence"]
    assert found["packages"]["state"] == "ok" and "disk" in found


def test_a_full_disk_and_a_narrow_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, state in ((10**9, "trouble"), (5 * 10**9, "advice"), (10**12, "ok")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert doctor.finding("disk", lambda: doctor.disk([tmp_path, tmp_path / "not" / "there"])).state == state


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    total, free = doctor.memory_bytes()
    assert 0 < free <= total
    for there, state in (
        ((10**9, 10**9), "trouble"),
        ((3 * 10**9, 3 * 10**9), "advice"),
        ((64 * 10**9, 10**9), "advice"),
    ):
        monkeypatch.setattr(doctor, "memory_bytes", lambda there=there: there)
        assert doctor.finding("memory", doctor.memory).state == state


def test_a_clock_that_nobody_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer, state in ((doctor.ADJTIMEX_ERROR, "advice"), (0, "ok"), (-1, "ok")):
        kernel = SimpleNamespace(adjtimex=lambda given, answer=answer: answer)
        monkeypatch.setattr(doctor.ctypes, "CDLL", lambda name, kernel=kernel: kernel)
        assert doctor.finding("system clock", doctor.system_clock).state == state


def test_keys_that_others_may_use(home: Path) -> None:
    checks = doctor.of_machine(home)
    assert look("permissions", checks).state == "ok"
    (home / "keys").chmod(0o777)
    assert "others may write" in look("permissions", checks).sentence
    (home / "keys").chmod(0o700)
    (home / "keys" / "site.key").chmod(0o644)
    found = look("permissions", checks)
    assert found.state == "trouble" and "site.key" in found.sentence and "chmod 600" in found.remedy
    if os.geteuid() == 0:
        (home / "keys" / "site.key").chmod(0o600)
        os.chown(home / "keys" / "site.pem", 12345, 12345)
        assert look("permissions", checks).state == "advice"


def test_open_crash_reports_are_counted(home: Path) -> None:
    assert look("crash reports", doctor.of_machine(home)).state == "ok"
    crash.Crashes(home, "node").note(ValueError(PATIENT))
    found = look("crash reports", doctor.of_machine(home))
    assert found.state == "advice" and found.sentence.startswith("1 reports") and PATIENT not in str(found)


# The way ---------------------------------------------------------------------------------------------------------------


class Authority:
    """An authority of somebody's, and a TLS server with a certificate of it on loopback."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.made = keys.make_ca(ec.generate_private_key(ec.SECP256R1()), name)

    @contextmanager
    def serving(self, host: str = "127.0.0.1", days: int = 10) -> Iterator[int]:
        key = ec.generate_private_key(ec.SECP256R1())
        shown = keys.issue(self.made, keys.make_csr(key, "server"), "server", "server", days, host)
        (self.folder / "tls.pem").write_bytes(keys.certificate_pem(shown))
        (self.folder / "tls.key").unlink(missing_ok=True)
        keys.copy_key(key, self.folder / "tls.key")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "tls.pem", self.folder / "tls.key")
        with listening(lambda link: context.wrap_socket(link, server_side=True).close()) as port:
            yield port


@contextmanager
def listening(serve: Callable[[socket.socket], object]) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def take() -> None:
            while True:
                try:
                    link, _ = server.accept()
                except OSError:
                    return
                try:
                    serve(link)
                except OSError:
                    link.close()

        threading.Thread(target=take, daemon=True).start()
        yield int(server.getsockname()[1])


def cut_off(link: socket.socket) -> None:
    """Answer the first byte with a reset, as a firewall does that has seen enough."""
    link.recv(1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    link.close()


def door(port: int, authority: Authority, way: Way | None = None, host: str = "127.0.0.1") -> Finding:
    return doctor.finding("door", lambda: doctor.door(f"{host}:{port}", way, authority.made.certificate))


def test_tls_that_is_opened_on_the_way_names_who_opens_it(tmp_path: Path) -> None:
    ours, box = Authority(tmp_path, "ours"), Authority(tmp_path, "st-mary-firewall")
    with ours.serving() as port:
        assert door(port, ours).state == "ok"
    with box.serving() as port:
        found = door(port, ours)
        assert found.state == "trouble" and "st-mary-firewall consortium authority" in found.sentence
        assert "exempted from inspection" in found.remedy
        with proxy(elsewhere=f"127.0.0.1:{port}") as out:  # a proxy that does it
            found = door(9440, ours, Way("127.0.0.1", out.port))
            assert "st-mary-firewall" in found.sentence and out.asked == ["CONNECT 127.0.0.1:9440"]


def test_a_hostile_issuer_writes_nothing_on_the_screen(tmp_path: Path) -> None:
    """A certificate of the box's own making: its names are text from the network."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    evil = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, "\x1b[2J\u202eok\nok      gateway  all is well" + "x" * 20)]
    )
    shown = SimpleNamespace(issuer=evil)
    said = str(doctor.foreign("a:1", shown))  # type: ignore[arg-type]
    assert said.isprintable() and len(said) < 400


def test_an_ended_certificate_and_one_for_another_host(tmp_path: Path) -> None:
    ours = Authority(tmp_path, "ours")
    with ours.serving(days=0) as port:
        time.sleep(1.1)  # it ends with the second in which it was made
        found = door(port, ours)
        assert found.state == "trouble" and "valid from" in found.sentence and "date is wrong" in found.remedy
    with ours.serving(host="coordinator.example.org") as port:
        found = door(port, ours)
        assert "made out to coordinator.example.org" in found.sentence


def test_every_wall_is_told_from_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NETWORK_S", 0.5)
    ours = Authority(tmp_path, "ours")
    said = {}
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer_nonsense, args=(server,), daemon=True).start()
        said["plain HTTP"] = door(server.getsockname()[1], ours)
    with listening(cut_off) as port:
        said["cut"] = door(port, ours)
    said["refused"] = door(free_port(), ours)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:  # its queue is full: the kernel drops the next ones
        waiting = []
        for _ in range(3):
            each = socket.socket()
            each.setblocking(False)
            each.connect_ex(full.getsockname())
            waiting.append(each)
        said["swallowed"] = door(full.getsockname()[1], ours)
        for each in waiting:
            each.close()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        said["silent"] = door(silent.getsockname()[1], ours)
    said["no name"] = door(1, ours, host="no-such-host.invalid")
    words = {
        "plain HTTP": "speaks plain text",
        "cut": "cut in the middle of the handshake",
        "refused": "connection refused",
        "swallowed": "did not answer within",
        "silent": "did not answer within",
        "no name": "cannot be resolved",
    }
    for what, word in words.items():
        assert said[what].state == "trouble" and word in said[what].sentence, (what, said[what])
    assert len({each.remedy for each in said.values()}) == len(said)  # each wall has its own way out
    assert "drops" in said["swallowed"].remedy and "no TLS came" in said["silent"].remedy


def test_what_the_proxy_finding_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NETWORK_S", 1.0)

    def look_at(way: Way | None, target: str | None = None, **environment: str) -> Finding:
        return doctor.finding("proxy", lambda: doctor.proxy(way, target, "site.yaml", environment))

    assert look_at(None).state == "ok"
    found = look_at(None, HTTPS_PROXY=f"http://me:{PATIENT}@proxy:1")
    assert found.state == "advice" and "HTTPS_PROXY is set" in found.sentence and PATIENT not in str(found)
    with socket.create_server(("127.0.0.1", 0)) as far:
        target = f"127.0.0.1:{far.getsockname()[1]}"
        with proxy() as out:
            way = Way("127.0.0.1", out.port)
            assert look_at(way, target).state == "ok" and out.asked == [f"CONNECT {target}"]
            assert look_at(way, None).state == "ok"
        for answer, word in ((407, "(407)"), (403, "(403)"), (502, "(502)"), (0, "did not answer in time")):
            with proxy(answer=answer) as out:
                found = look_at(Way("127.0.0.1", out.port), target)
                assert found.state == "trouble" and word in found.sentence


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
    assert look("gpu", of_site.checks(home)).sentence == "2 GPUs for training."
    path.write_text(text)
    assert look("gpu", of_site.checks(home)).state == "ok"


def test_a_process_that_is_not_confined_has_its_remedy(
    served: Coordinator, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fl_client import sandbox

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
