"""Reports of errors that nobody foresaw, without anything of a patient: what a site may look at, and send to us if it likes.

A report holds versions, the classes of the error and of what it came from, the places in our own code (module and line), codes,
and counts. It holds no message, no value, no path, and no name that an input could have made: a class counts by the module it
is defined in, a place by a file of this installation. Nobody sends it but a person.

    HOME/crashes/crash-<12 hex>.json    one for each place and kind, however often it happens (0600)
"""

import functools
import json
import platform
import re
import resource
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from privacy import disk, errors, greeting, keys

FOLDER, VERSION = "crashes", 1
REPORTS_MAX = 50  # the one that happened longest ago gives way
AGAIN_S = 10.0  # between two writes of one report
CHAIN_MAX, FRAMES_MAX, BYTES_MAX = 8, 40, 64 * 1024
ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("cryptography", "flwr", "grpcio", "httpx", "monai", "numpy", "protobuf", "pydantic", "pydicom", "torch")
KNOWN = frozenset(
    (*sys.stdlib_module_names, "fl_client", "fl_server", "models", "privacy", "grpc", "google", *LIBRARIES)
)
"""Packages whose classes are named: they are defined by programs, and not by what programs read."""
_OURS = re.compile(r"(?:fl_server|fl_client|models|privacy)(?:/[a-z0-9_]{1,40}){1,3}\.py")
_NAME = re.compile(r"crash-[0-9a-f]{12}")
_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,120}")
_NUMBERS = re.compile(r"[0-9]{1,5}(?:\.[0-9]{1,5}){1,3}")
_BEGAN = time.monotonic()


def is_foreseen(error: BaseException) -> bool:
    """Whether somebody says what to do about it, or it is a person's Ctrl-C."""
    return isinstance(error, errors.IsocenterError | OSError) or not isinstance(error, Exception)


@dataclass
class Crashes:
    """Writes reports below `home`, for one process. From any thread; never raises."""

    home: Path
    process: str
    _times: dict[str, int] = field(default_factory=dict)
    _written: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, error: BaseException) -> None:
        """Write a report of `error` down, or count it in the one that is there; nothing for one that was foreseen."""
        if is_foreseen(error):
            return
        try:
            chain = [_described(each) for each in _chain(error)]
            name = f"crash-{keys.digest(json.dumps([self.process, chain]).encode())[:12]}"
            with self._lock:
                self._times[name] = self._times.get(name, 0) + 1
                now = time.monotonic()
                if now - self._written.get(name, -AGAIN_S) < AGAIN_S:
                    return
                self._written[name] = now
                self._write(name, chain, self._times.pop(name))
        except Exception:  # whatever it is, it must not come on top of what is reported
            return

    def _write(self, name: str, chain: list[dict[str, Any]], times: int) -> None:
        folder = self.home / FOLDER
        disk.make_folder(folder)
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        before = read(self.home, name)
        report = {
            "version": VERSION,
            "first": before["first"] if before else moment,
            "last": moment,
            "process": self.process,
            **_surroundings(),
            "errors": chain,
            "counters": {
                "times": times + (before["counters"]["times"] if before else 0),
                "uptime_s": round(time.monotonic() - _BEGAN),
                "threads": threading.active_count(),
                "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            },
        }
        disk.write_file(folder / f"{name}.json", json.dumps(report, indent=1).encode() + b"\n", 0o600)
        kept = sorted(folder.glob("crash-*.json"), key=lambda path: path.stat().st_mtime)
        for path in kept[:-REPORTS_MAX]:
            path.unlink(missing_ok=True)


def names(home: Path) -> list[str]:
    """The reports of this home, the one that happened last first."""
    found = [path for path in (home / FOLDER).glob("crash-*.json") if _NAME.fullmatch(path.stem)]
    return [path.stem for path in sorted(found, key=lambda path: (-path.stat().st_mtime, path.name))]


def read(home: Path, name: str) -> dict[str, Any] | None:
    """One report; None if there is none of that name, or it is damaged."""
    if not _NAME.fullmatch(name):
        return None
    try:
        with (home / FOLDER / f"{name}.json").open("rb") as file:
            found = json.loads(file.read(BYTES_MAX))
        whole = found["version"] == VERSION and isinstance(found["first"], str) and isinstance(found["errors"], list)
        return found if whole and type(found["counters"]["times"]) is int else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


# What stands in a report -----------------------------------------------------------------------------------------------


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it came from, as a traceback would show them; the latest first."""
    seen: list[BaseException] = []
    here: BaseException | None = error
    while here is not None and len(seen) < CHAIN_MAX and not any(here is each for each in seen):
        seen.append(here)
        yield here
        here = here.__cause__ or (None if here.__suppress_context__ else here.__context__)


def _described(error: BaseException) -> dict[str, Any]:
    """Class, places in our code, and a code where there is one."""
    found: dict[str, Any] = {
        "class": _class_name(type(error)),
        "frames": list(_frames(error.__traceback__))[-FRAMES_MAX:],
    }
    if isinstance(error, errors.IsocenterError) and is_defined(type(error)):
        found["code"] = error.code
    if isinstance(error, OSError) and type(error.errno) is int:
        found["errno"] = error.errno
    return found


def _class_name(kind: type) -> str:
    """Where a class is defined, and its name; "other" for one that no known module holds under that name."""
    module, name = str(kind.__module__), str(kind.__qualname__)
    if module.partition(".")[0] not in KNOWN or not is_defined(kind):
        return "other"
    return name if module == "builtins" else f"{module}.{name}"


def is_defined(kind: type) -> bool:
    """Whether a class stands under its name in the module that it names: then a program gave it the name, and no input did."""
    module, name = str(kind.__module__), str(kind.__qualname__)
    there: Any = sys.modules.get(module) if _CLASS.fullmatch(f"{module}.{name}") else None
    for part in name.split("."):
        there = getattr(there, part, None)
    return there is kind


def _frames(trace: TracebackType | None) -> Iterator[str]:
    """fl_client.cohort:123, of our own code only, from the outside in."""
    while trace is not None:
        if place := _module_of(trace.tb_frame.f_code.co_filename):
            yield f"{place}:{trace.tb_lineno}"
        trace = trace.tb_next


@functools.lru_cache(maxsize=1024)
def _module_of(filename: str) -> str | None:
    try:
        path = Path(filename).resolve()
        name = path.relative_to(ROOT).as_posix()
    except (ValueError, OSError, RuntimeError):
        return None
    return name.removesuffix(".py").replace("/", ".") if _OURS.fullmatch(name) and path.is_file() else None


def _surroundings() -> dict[str, Any]:
    """Versions and kind of machine: nothing that tells one hospital's machine from another's of its kind."""
    machine = platform.machine()
    return {
        "isocenter": {"version": greeting.own().release, "wire": greeting.own().wire},
        "python": platform.python_version_tuple()[0] + "." + platform.python_version_tuple()[1],
        "platform": sys.platform if sys.platform in ("linux", "darwin", "win32") else "other",
        "machine": machine if machine in ("x86_64", "aarch64", "arm64", "AMD64") else "other",
        "libraries": {name: _version_of(name) for name in LIBRARIES},
    }


def _version_of(name: str) -> str | None:
    try:
        found = _NUMBERS.match(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None
    return found[0] if found else None
