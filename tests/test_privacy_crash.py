"""Reports of errors that nobody foresaw: a patient's name leaves no trace in them, and a kill leaves a whole one or none."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hospital import Hospital
from typer.testing import CliRunner

from fl_client.cli import app as client
from fl_client.orders import answer
from fl_server.cli import app as server
from privacy import crash
from privacy.crash import Crashes
from privacy.deidentify import guard
from privacy.errors import DataError, PolicyForbids

ROOT = Path(__file__).resolve().parent.parent
MARK = "ZZTEST^MARIA"
FIELDS = {
    "version",
    "first",
    "last",
    "process",
    "isocenter",
    "python",
    "platform",
    "machine",
    "libraries",
    "errors",
    "counters",
}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    undo = guard(tmp_path)
    yield tmp_path
    undo()


def latest(home: Path) -> dict[str, Any]:
    report = crash.read(home, crash.names(home)[0])
    assert report is not None
    return report


def everything(home: Path) -> str:
    return "".join(f"{path.name}{path.read_text()}" for path in (home / "crashes").rglob("*"))


def test_an_error_in_a_node_leaves_a_report_without_its_message_values_and_paths(tmp_path: Path) -> None:
    """Through the real gate: work that fails with a patient's name in message, locals, class and file."""
    hospital = Hospital.open(tmp_path)
    undo = guard(hospital.home)
    try:
        from test_client_node import message

        def work(*_: Any) -> Any:
            patient = MARK
            source = f"class {'Zztest'}Maria(Exception): pass\ndef fail(x): raise ZztestMaria(x)\n"
            space: dict[str, Any] = {"__name__": "fl_client.zztest"}
            code = compile(source, str(ROOT / "fl_client" / "zztest_maria.py"), "exec")
            exec(code, space)  # noqa: S102
            try:
                space["fail"](f"/data/{patient}/1.dcm")
            except Exception as error:
                raise KeyError(patient, {patient: b"pixels"}) from error

        answer(message(hospital.order()), hospital.site, work)
    finally:
        undo()
    text, report = everything(hospital.home).lower(), latest(hospital.home)
    assert "zztest" not in text and "maria" not in text and str(tmp_path) not in text and str(ROOT) not in text
    assert set(report) == FIELDS and report["process"] == "command"
    assert [each["class"] for each in report["errors"]] == ["KeyError", "other"]
    line = next(
        n
        for n, text in enumerate((ROOT / "fl_client" / "orders.py").read_text().splitlines(), 1)
        if "work(site" in text
    )
    assert report["errors"][0]["frames"] == [f"fl_client.orders:{line}"] and report["errors"][1]["frames"] == []
    assert report["isocenter"]["wire"] >= 3 and report["libraries"]["torch"] is not None
    [path] = (hospital.home / "crashes").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700


def fail(error: BaseException) -> None:
    try:
        raise error
    except type(error):
        logging.getLogger("isocenter").exception("it failed")


@pytest.mark.parametrize("error", [DataError(MARK), PolicyForbids(MARK), OSError(28, MARK), KeyboardInterrupt()])
def test_what_was_foreseen_is_no_crash(home: Path, error: BaseException) -> None:
    fail(error)
    assert not (home / "crashes").exists()


def test_libraries_and_warnings_are_no_crash(home: Path) -> None:
    try:
        raise ValueError(MARK)
    except ValueError:
        logging.getLogger("pydicom").exception("theirs")
        logging.getLogger("isocenter").warning("and this is a warning", exc_info=True)
    assert not (home / "crashes").exists()


def test_codes_and_numbers_of_what_it_came_from_are_told(home: Path) -> None:
    try:
        try:
            try:
                raise OSError(13, MARK, MARK)
            except OSError as first:
                raise PolicyForbids(MARK) from first
        except PolicyForbids as second:
            raise RuntimeError(MARK) from second
    except RuntimeError:
        logging.getLogger("isocenter").exception("it failed")
    told = [{key: value for key, value in each.items() if key != "frames"} for each in latest(home)["errors"]]
    assert told == [
        {"class": "RuntimeError"},
        {"class": "privacy.errors.PolicyForbids", "code": "policy-forbids"},
        {"class": "PermissionError", "errno": 13},
    ]
    assert MARK not in everything(home)


def test_a_class_or_a_code_made_from_an_input_is_not_named(home: Path) -> None:
    made = type(MARK, (ValueError,), {})
    inside = type("Inside", (ValueError,), {"__module__": "fl_client.site", "__qualname__": f"Site.{MARK}"})
    coded = type("Coded", (DataError,), {"code": MARK, "__module__": MARK})
    for error in (made(), inside(), RuntimeError()):
        error.__cause__ = coded("x")
        fail(error)
    assert MARK not in everything(home) and len(crash.names(home)) == 2  # the first two look alike
    assert {each["class"] for name in crash.names(home) for each in crash.read(home, name)["errors"]} == {  # type: ignore[index]
        "other",
        "RuntimeError",
    }


def test_the_same_error_is_counted_and_there_are_not_more_than_a_few(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = Crashes(home, "node")
    for _ in range(5):
        noted.note(ValueError(MARK))  # the first is written, the others wait for AGAIN_S
    assert latest(home)["counters"]["times"] == 1
    monkeypatch.setattr(crash, "AGAIN_S", 0.0)
    noted.note(ValueError())
    Crashes(home, "node").note(ValueError())  # after a restart
    assert latest(home)["counters"]["times"] == 7 and len(crash.names(home)) == 1
    monkeypatch.setattr(crash, "REPORTS_MAX", 3)
    for number in range(6):
        kind = [ValueError, TypeError, KeyError, IndexError, ZeroDivisionError, AttributeError][number]
        noted.note(kind())
        time.sleep(0.002)
    assert len(crash.names(home)) == 3 and latest(home)["errors"][0]["class"] == "AttributeError"


def test_a_loop_of_causes_ends_and_a_disk_that_takes_nothing_breaks_nothing(home: Path) -> None:
    one, other = ValueError(), TypeError()
    one.__cause__, other.__cause__ = other, one
    fail(one)
    assert [each["class"] for each in latest(home)["errors"]] == ["ValueError", "TypeError"]
    (home / "crashes").rename(home / "aside")
    (home / "crashes").write_text("a file in its place")
    fail(RuntimeError())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', '{"version": 2}', "[" * 5000])
def test_a_damaged_report_is_passed_over_and_written_anew(home: Path, content: str) -> None:
    fail(ValueError())
    [path] = (home / "crashes").iterdir()
    path.write_text(content)
    assert crash.read(home, path.stem) is None and crash.read(home, "../x") is None
    Crashes(home, "command").note(ValueError())
    shown = CliRunner().invoke(client, ["crash", "list", "--home", str(home)])
    assert shown.exit_code == 0


@pytest.mark.parametrize("program", [client, server], ids=["fl-client", "fl-server"])
def test_people_list_and_read_reports(home: Path, program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    run, where = CliRunner(), ["--home", str(home)]
    assert "no error that nobody foresaw" in run.invoke(program, ["crash", "list", *where]).output
    fail(ValueError(MARK))
    [name] = crash.names(home)
    assert name in run.invoke(program, ["crash", "list", *where]).output
    [row] = json.loads(run.invoke(program, ["crash", "list", "--json", *where]).output)["reports"]
    assert (row["name"], row["error"], row["times"]) == (name, "ValueError", 1)
    for more in ([], [name]):
        assert json.loads(run.invoke(program, ["crash", "show", *more, *where]).output) == latest(home)
    assert json.loads(run.invoke(program, ["crash", "show", "--json", *where]).output) == latest(home)
    assert run.invoke(program, ["crash", "show", "crash-000000000000", *where]).exit_code != 0


KILLED = """
import os, signal, sys
from pathlib import Path
from privacy import disk
from privacy.crash import Crashes
point, calls = int(sys.argv[2]), 0
def counted(real):
    def call(*given, **named):
        global calls
        calls += 1
        if calls == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)
    return call
os.fsync = counted(os.fsync); Path.replace = counted(Path.replace); os.open = counted(os.open)
Crashes(Path(sys.argv[1]), "node").note(ValueError("x"))
"""


def test_killed_at_any_step_leaves_a_whole_report_or_none(tmp_path: Path) -> None:
    outcomes, command = [], [sys.executable, "-c", KILLED]
    running = []
    for point in range(1, 8):
        home = tmp_path / str(point)
        home.mkdir()
        running.append((home, subprocess.Popen([*command, str(home), str(point)], cwd=ROOT)))
    for home, process in running:
        code = process.wait(60)
        names = crash.names(home)
        assert all(crash.read(home, name) is not None for name in names) and code in (0, -9)
        outcomes.append(len(names))
    assert outcomes[0] == 0 and outcomes[-1] == 1 and os.name == "posix"
