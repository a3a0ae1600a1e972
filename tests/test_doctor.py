"""`doctor`: each finding provoked by what it is about, with a remedy; one that fails or hangs stops no other."""

import base64
import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from coordinator import answer_nonsense, free_port
from examining import PATIENT, Authority, listening, look
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from proxies import proxy

from privacy import console, crash, doctor, keys
from privacy.doctor import Check, Examination, Finding
from privacy.errors import IsocenterError
from privacy.reach import Way

ROOT = Path(__file__).resolve().parent.parent


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


@pytest.mark.parametrize(("lacks", "looks"), [("numpy", True), ("cryptography", False)])
def test_a_missing_package_is_a_sentence_and_doctor_looks_as_far_as_it_gets(
    lacks: str, looks: bool, tmp_path: Path
) -> None:
    def ran(*words: str) -> subprocess.CompletedProcess[str]:
        code = f"import sys; sys.modules[{lacks!r}] = None; from isocenter import fl_client; sys.argv = ['x', *{list(words)!r}]; "
        command = [sys.executable, "-c", f"{code}fl_client()"]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)

    told = ran("doctor", "--json", "--home", str(tmp_path))
    assert told.returncode == 1 and "Traceback" not in told.stderr
    if lacks != "nibabel":  # which no command needs before it reads volumes
        assert lacks in told.stderr and "pip install" in told.stderr
        refused = ran("studies", "--home", str(tmp_path))
        assert refused.returncode == 1 and lacks in refused.stderr and "Traceback" not in refused.stderr
    assert bool(told.stdout) == looks
    assert not looks or {"python", "packages", "disk"} <= {
        each["subject"] for each in json.loads(told.stdout)["findings"]
    }


def test_a_package_that_only_the_node_needs_is_missed_by_doctor(tmp_path: Path) -> None:
    code = "import sys; sys.modules['httpx'] = None; from isocenter import fl_client; "
    words = f"sys.argv = ['x', 'doctor', '--json', '--home', {str(tmp_path)!r}]; fl_client()"
    told = subprocess.run(
        [sys.executable, "-c", code + words], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert told.returncode == 1 and "Traceback" not in told.stderr
    (found,) = [each for each in json.loads(told.stdout)["findings"] if each["subject"] == "node program"]
    assert found["state"] == "trouble" and "httpx" in found["sentence"] and "pip install" in found["remedy"]


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


def test_keys_that_others_may_use(tmp_path: Path) -> None:
    home, checks = tmp_path, doctor.of_machine(tmp_path)
    assert look("permissions", checks).sentence == "there are no keys yet."
    (home / "keys").mkdir(mode=0o700)
    keys.make_key(home / "keys" / "site.key")
    keys.write_public(home / "keys" / "site.pem", b"x")
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


def test_open_crash_reports_are_counted(tmp_path: Path) -> None:
    home = tmp_path
    assert look("crash reports", doctor.of_machine(home)).state == "ok"
    crash.Crashes(home, "node").note(ValueError(PATIENT))
    found = look("crash reports", doctor.of_machine(home))
    assert found.state == "advice" and found.sentence.startswith("1 reports") and PATIENT not in str(found)


# The way ---------------------------------------------------------------------------------------------------------------


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
