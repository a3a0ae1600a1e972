"""What a log may show: numbers and enumerated words; everything else is a token, and the text is in a file of mode 0600."""

import ast
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from privacy import keys
from privacy.deidentify import FILE_BYTES_MAX, OURS, guard
from privacy.errors import CohortTooSmall, DataError

ROOT = Path(__file__).resolve().parent.parent
MARK = "ZZTEST^MARIA"


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[list[str]]:
    """Every message that a handler gets while the guard of `tmp_path` stands."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(logging.Formatter("%(name)s %(message)s").format(record))

    undo, listener = guard(tmp_path), Listener()
    logging.getLogger().addHandler(listener)
    try:
        yield lines
    finally:
        undo()
        logging.getLogger().removeHandler(listener)


def private(home: Path) -> str:
    return (home / "private" / "private.log").read_text()


def test_numbers_codes_digests_and_runs_are_shown_as_they_are(shown: list[str], tmp_path: Path) -> None:
    log, run = logging.getLogger("isocenter.site"), "opacity-20261126-114408-0a1b2c"
    log.warning("%d of %.1f, %s, %s, %s, %s", 3, 2.5, CohortTooSmall.code, "ab" * 32, run, ValueError)
    assert shown == [f"isocenter.site 3 of 2.5, {CohortTooSmall.code}, {'ab' * 32}, {run}, ValueError"]
    assert not (tmp_path / "private" / "private.log").exists()


@pytest.mark.parametrize("value", [MARK, "maria", "12345678", "1.2.840.1", Path("/data/MRN-1"), b"x", ["MRN"], None])
def test_whatever_is_no_number_and_no_enumerated_word_is_a_token(
    shown: list[str], tmp_path: Path, value: object
) -> None:
    logging.getLogger("fl_client.x").error("refused: %s (%s)", "cohort-too-small", value)
    token = keys.token(keys.token_key(tmp_path / "private" / "token.key"), str(value))
    assert str(value) not in shown[0] and f"cohort-too-small ({token})" in shown[0]
    entry = re.search(r"entry ([0-9a-f]{16})", shown[0])
    assert entry and f"{entry[1]} fl_client.x ERROR refused: cohort-too-small ({value})" in private(tmp_path)


def test_a_number_of_dicom_does_not_bring_its_spelling(shown: list[str]) -> None:
    class Spelled(float):
        def __str__(self) -> str:
            return MARK

        __repr__ = __str__
        __format__ = lambda self, spec: MARK  # noqa: E731

    logging.getLogger("isocenter").error("%s", Spelled(2))
    assert shown == ["isocenter 2.0"]


@pytest.mark.parametrize("name", ["pydicom", "monai.data", "py.warnings", "flwr", "asyncio", MARK, "isocentric"])
def test_other_libraries_get_one_sentence_even_on_handlers_of_their_own(
    shown: list[str], tmp_path: Path, name: str
) -> None:
    logger, own = logging.getLogger(name), []

    class Own(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            own.append(self.format(record))

    handler, propagate = Own(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        logger.error(f"Invalid value for VR DA: {MARK!r} %s", MARK, extra={"more": 1}, stack_info=True)
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
    assert len(own) == 1 and "a message of" in own[0] and MARK not in own[0] and "\n" not in own[0]
    assert private(tmp_path).count(f"Invalid value for VR DA: {MARK!r}") == 1


def test_errors_keep_their_class_and_lose_their_text(shown: list[str], tmp_path: Path) -> None:
    log = logging.getLogger("isocenter.site")
    try:
        raise DataError(MARK) from KeyError(MARK)
    except DataError as error:
        log.warning("refused: %s (%s)", error.code, error)
        log.exception("refused: internal")
    assert all("DataError" in line and MARK not in line and "\n" not in line for line in shown) and len(shown) == 2
    assert "Traceback" in private(tmp_path) and f"KeyError: '{MARK}'" in private(tmp_path)


def test_a_class_made_while_the_program_ran_is_not_named(shown: list[str]) -> None:
    log, made = logging.getLogger("isocenter"), type(MARK, (ValueError,), {})
    log.error("%s and %s", made, made())
    try:
        raise made(MARK)
    except ValueError:
        log.exception("it failed")
    assert len(shown) == 2 and MARK not in "".join(shown) and "a class" in shown[0]


def test_what_cannot_be_formatted_or_shown_breaks_nothing(shown: list[str], tmp_path: Path) -> None:
    class Bad:
        def __str__(self) -> str:
            raise RuntimeError(MARK)

    log = logging.getLogger("isocenter")
    log.error("%d", MARK)
    log.error("%s", Bad())
    log.error("%(a)s", {"a": MARK})
    log.error("%s")
    assert len(shown) == 4 and MARK not in "".join(shown)


def test_tokens_are_the_same_at_one_site_and_others_at_another(tmp_path: Path) -> None:
    one, other = keys.token_key(tmp_path / "a"), keys.token_key(tmp_path / "b")
    assert keys.token_key(tmp_path / "a") == one and keys.token(one, MARK) == keys.token(one, MARK)
    assert keys.token(one, MARK) != keys.token(other, MARK) and re.fullmatch("[0-9a-f]{16}", keys.token(one, MARK))
    # RFC 2104 by hand: the oracle knows no HMAC.
    import hashlib

    block = one + bytes(32)
    inner = hashlib.sha256(bytes(b ^ 0x36 for b in block) + keys.LOG_TOKEN + b"\n" + MARK.encode()).digest()
    assert hashlib.sha256(bytes(b ^ 0x5C for b in block) + inner).hexdigest()[:16] == keys.token(one, MARK)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


def test_the_private_log_is_for_this_user_alone_turned_over_and_follows_no_link(
    shown: list[str], tmp_path: Path
) -> None:
    log, path = logging.getLogger("pydicom"), tmp_path / "private" / "private.log"
    log.error("first")
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    with path.open("ab") as file:
        file.truncate(FILE_BYTES_MAX)
    log.error("second")
    log.error("x" * 10**6)
    assert "second" in private(tmp_path) and path.stat().st_size < 100_000
    assert {p.name for p in path.parent.iterdir()} == {"private.log", "private.log.1", "token.key"}
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    log.error("third")
    assert "not kept" in shown[-1] and not (tmp_path / "elsewhere").exists()


def test_a_guard_stands_once_and_is_undone(tmp_path: Path) -> None:
    before = logging.getLogRecordFactory(), sys.excepthook, logging.getLogger().handlers[:]
    undo = guard(tmp_path)
    factory = logging.getLogRecordFactory()
    guard(tmp_path)()
    assert logging.getLogRecordFactory() is factory
    undo()
    assert (logging.getLogRecordFactory(), sys.excepthook, logging.getLogger().handlers) == before


PROCESS = """
import os, sys, threading, warnings
from pathlib import Path
from privacy.deidentify import guard
guard(Path(sys.argv[1]), native=sys.argv[2] == "native")
warnings.warn("ZZTEST in a warning")
class Unraisable:
    def __del__(self): raise ValueError("ZZTEST in a destructor")
Unraisable()
thread = threading.Thread(target=lambda: {}["ZZTEST in a thread"])
thread.start(); thread.join()
if sys.argv[2] == "native":
    os.write(1, b"ZZTEST by a decoder\\n"); os.write(2, b"ZZTEST by a decoder\\n"); print("ZZTEST printed")
raise KeyError("ZZTEST at the end")
"""


@pytest.mark.parametrize("mode", ["native", "plain"])
def test_warnings_threads_destructors_decoders_and_the_last_error(tmp_path: Path, mode: str) -> None:
    words = [sys.executable, "-c", PROCESS, str(tmp_path), mode]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 1 and "ZZTEST" not in done.stdout + done.stderr
    assert done.stderr.count("private.log, entry") == 4
    for where in ("in a warning", "in a destructor", "in a thread", "at the end"):
        assert f"ZZTEST {where}" in private(tmp_path)
    if mode == "native":
        native = tmp_path / "private" / "native.log"
        assert native.read_text().count("ZZTEST by a decoder") == 2 and "ZZTEST printed" in native.read_text()
        assert native.stat().st_mode & 0o777 == 0o600


def test_every_template_of_ours_is_a_constant() -> None:
    """An f-string would carry its values past the guard."""
    found = 0
    for package in ("fl_client", "fl_server", "models", "privacy"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and re.fullmatch(
                    r"_?log(ging)?\.(debug|info|warning|error|exception|critical)", ast.unparse(node.func)
                ):
                    first, found = node.args[0], found + 1
                    assert isinstance(first, ast.Constant) and isinstance(first.value, str), f"{path}:{node.lineno}"
    assert found > 20 and "isocenter" in OURS
