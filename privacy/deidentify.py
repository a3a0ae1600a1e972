"""Nothing of a patient in any log or message: what a process of ours may show of a log record, and where the rest is kept.

Libraries quote what they read. pydicom's warnings hold values of headers, MONAI's errors hold paths, a KeyError holds the key,
and a traceback holds all of them. So once `guard` was called, every record of any logger of the process is made safe as it is
made, before any handler of anybody sees it:

    of our own loggers    the constant template; of its arguments numbers, enumerated words, digests and classes, and a
                          token in place of everything else
    of any other logger   one fixed sentence, whatever the library wrote; warnings and uncaught errors are records too
    tracebacks            the class of the error

An error that nobody foresaw also leaves a report without identifiers (`privacy.crash`).

The whole text is in HOME/private/private.log (0600, turned over by size), under the token that the screen shows. A token is a
keyed hash (`privacy.keys.token`): the same text has the same token wherever it appears at one site, another one at another
site, and nobody without the site's key can tell from it what was hashed.

Not covered: what a program prints itself, which in our packages only the commands do; and fields that a library adds to its
record for a handler of its own.
"""

import contextlib
import enum
import fcntl
import logging
import numbers
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privacy import errors, keys
from privacy.crash import Crashes, is_defined
from privacy.logs import FileHandler

OURS = frozenset(("isocenter", "fl_client", "fl_server", "models", "privacy"))
FOLDER, FILE, NATIVE_FILE = "private", "private.log", "native.log"
FILE_BYTES_MAX = 8 * 1024 * 1024  # of each file; private.log also has one before it
ENTRY_CHARACTERS_MAX = 64 * 1024  # a traceback through torch is about 10,000
WATCH_S = 5.0
REPORTED = frozenset(("train-report", "evaluate-report", "keys-report", "unmask-report", "refusal"))  # of privacy.wire
ENGINES = frozenset(("vmap", "loop", "loop-bf16"))
_DIGEST = re.compile(r"[0-9a-f]{64}")
_RUN = re.compile(r"[a-z][a-z0-9-]{0,63}-[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")  # made by the coordinator, of a study's name
_LIBRARY = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}")


def guard(
    home: Path, *, level: int = logging.WARNING, native: bool = False, file: FileHandler | None = None
) -> Callable[[], None]:
    """Make every log record of this process safe from now on, and show those of `level` or above on standard error.

    `file`: gets the records of our own loggers from INFO on, and of others from WARNING on (`privacy.logs`).

    `native`: what compiled code writes to standard output and error goes to HOME/private/native.log; our log still goes where
    standard error went. Calling it again changes nothing. Returns what undoes it. Raises OSError if HOME cannot be written.
    """
    made = logging.getLogRecordFactory()
    if isinstance(made, _Factory):
        return lambda: None
    store = _Store.open(home / FOLDER)
    screen = os.fdopen(os.dup(2), "w") if native else sys.stderr
    handler = logging.StreamHandler(screen)
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    root, before = logging.getLogger(), (sys.excepthook, threading.excepthook, sys.unraisablehook)
    root_before = (root.level, root.handlers[:])
    crashes = Crashes(home, file.process if file else "command")
    logging.setLogRecordFactory(_Factory(store, made, crashes))
    root.handlers = [handler] if file is None else [handler, file]
    root.setLevel(min(level, logging.WARNING))
    ours = {logging.getLogger(name): logging.getLogger(name).level for name in OURS}
    for logger in ours if file is not None else ():
        logger.setLevel(min(level, logging.INFO))
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, trace: _uncaught((kind, error, trace))
    threading.excepthook = lambda hook: _uncaught((hook.exc_type, hook.exc_value, hook.exc_traceback))
    sys.unraisablehook = lambda hook: _uncaught((hook.exc_type, hook.exc_value, hook.exc_traceback))
    if native:
        _redirect(home / FOLDER / NATIVE_FILE)

    def undo() -> None:
        logging.setLogRecordFactory(made)
        logging.captureWarnings(False)
        root.setLevel(root_before[0])
        root.handlers = root_before[1]
        for logger, its_level in ours.items():
            logger.setLevel(its_level)
        sys.excepthook, threading.excepthook, sys.unraisablehook = before

    return undo


@contextlib.contextmanager
def guarded(home: Path, *, level: int = logging.WARNING, file: FileHandler | None = None) -> Iterator[None]:
    """`guard` for as long as it is entered. An error that nobody foresaw leaves it as exit code 1, its text in private.log."""
    undo = guard(home, level=level, file=file)
    try:
        yield
    except (errors.IsocenterError, OSError):
        raise
    except Exception as error:
        _uncaught((type(error), error, error.__traceback__))
        raise SystemExit(1) from None
    finally:
        undo()


@dataclass(frozen=True)
class _Store:
    """HOME/private: the whole texts of what was not shown, and the key of the tokens."""

    folder: Path
    key: bytes

    @classmethod
    def open(cls, folder: Path) -> "_Store":
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        return cls(folder, keys.token_key(folder / "token.key"))

    def token(self, text: str) -> str:
        return keys.token(self.key, text)

    def keep(self, text: str) -> str:
        """Write `text` down; the token that stands before it, or "not kept" where the disk does not take it."""
        text = text[:ENTRY_CHARACTERS_MAX]
        token = self.token(text)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        try:
            self._write(f"{stamp} {token} {text}\n".encode("utf-8", "backslashreplace"))
        except OSError:  # a log must not stop what it is about
            return "not kept"
        return token

    def _write(self, line: bytes) -> None:
        path = self.folder / FILE
        lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # node and worker write here
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(path, flags, 0o600)
            try:
                if os.fstat(file).st_size + len(line) > FILE_BYTES_MAX:
                    path.replace(path.with_name(f"{FILE}.1"))
                    os.close(file)
                    file = os.open(path, flags, 0o600)
                os.write(file, line)
            finally:
                os.close(file)
        finally:
            os.close(lock)


class _Factory:
    """Makes the records of all loggers of the process, each of them safe."""

    def __init__(self, store: _Store, made: Callable[..., logging.LogRecord], crashes: Crashes) -> None:
        self.store, self.made, self.crashes = store, made, crashes
        kinds, todo = set(), [errors.IsocenterError]
        while todo:
            kinds.add(kind := todo.pop())
            todo += kind.__subclasses__()
        self.words = errors.public_codes() | ENGINES | REPORTED | {kind.remedy for kind in kinds}

    def __call__(self, *given: Any, **named: Any) -> logging.LogRecord:
        record = self.made(*given, **named)
        library = str(record.name).split(".", maxsplit=1)[0]
        text = self._ours(record) if library in OURS else None
        if library in OURS and record.levelno >= logging.ERROR and record.exc_info and record.exc_info[1]:
            self.crashes.note(record.exc_info[1])
        if text is None:
            name = library if _LIBRARY.fullmatch(library) else "a library"
            text = f"a message of {name} was kept in {FILE}, entry {self.store.keep(_whole(record))}"
            record.name = name
        record.msg, record.args = text, ()
        record.exc_info = record.exc_text = record.stack_info = None
        record.safe = True
        return record

    def _ours(self, record: logging.LogRecord) -> str | None:
        """The safe text; None if the record is not made as ours are."""
        if not isinstance(record.msg, str) or not isinstance(record.args, tuple | None):
            return None
        given = record.args or ()
        shown = [self._shown(argument) for argument in given]
        hidden = any(argument is None for argument in shown) or bool(record.exc_info)
        tokens = [self._token(a) if s is None else s for a, s in zip(given, shown, strict=True)]
        try:
            text = record.msg % tuple(tokens) if tokens else record.msg
        except (TypeError, ValueError):
            return None
        if not hidden:
            return text
        kind = record.exc_info[0] if record.exc_info else None
        named = f"{_named(kind)}; " if kind else ""
        return f"{text} [{named}{FILE}, entry {self.store.keep(_whole(record))}]"

    def _shown(self, argument: object) -> object | None:
        """The argument as it may be shown, None if it may not. Numbers are made plain: a DICOM number keeps its spelling."""
        if isinstance(argument, numbers.Integral):
            return int(argument)
        if isinstance(argument, numbers.Real):
            return float(argument)
        if isinstance(argument, type):
            return _named(argument)
        if isinstance(argument, enum.Enum):
            return str(argument.name)
        if type(argument) is str and (
            argument in self.words or _DIGEST.fullmatch(argument) or _RUN.fullmatch(argument)
        ):
            return argument
        return None

    def _token(self, argument: object) -> str:
        token = self.store.token(_text_of(argument))
        return f"{_named(type(argument))} {token}" if isinstance(argument, BaseException) else token


def _named(kind: type) -> str:
    """The name of a class that a program defines; one that was made while it ran may be named after an input."""
    return kind.__name__ if is_defined(kind) else "a class"


def _uncaught(error: Any) -> None:
    logging.getLogger("isocenter").critical("an error that nobody foresaw", exc_info=error)


def _whole(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except Exception:  # any error of a library's own __str__
        text = f"{_text_of(record.msg)} {_text_of(record.args)}"
    tokens = f"{record.name} {record.levelname} {text}"
    if record.exc_info and record.exc_info[1] is not None:
        tokens += "\n" + "".join(traceback.format_exception(record.exc_info[1]))
    return tokens + (f"\n{record.stack_info}" if record.stack_info else "")


def _text_of(thing: object) -> str:
    try:
        return str(thing)
    except Exception:  # any error of a library's own __str__
        return type(thing).__name__


def _redirect(path: Path) -> None:
    """Standard output and error of this process into `path`, which starts anew when it grows too large."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)

    def watch() -> None:
        while True:
            if os.fstat(2).st_size > FILE_BYTES_MAX:
                os.ftruncate(2, 0)
            time.sleep(WATCH_S)

    threading.Thread(target=watch, name="native-log", daemon=True).start()
