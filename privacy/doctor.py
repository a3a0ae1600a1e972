"""What keeps this machine from its consortium, as findings that each say what to do: the part that every side shares.

Each check runs by itself, in a thread, with all others: one that fails or hangs says so and stops none, and all together end
within LIMIT_S. What is sent is handshakes and, where keys are there, the greeting; nothing is changed. A finding names hosts,
paths, versions and numbers of this machine, and nothing of a patient: it may be sent to the coordinator as it is.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import ssl
import stat
import sys
import threading
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Literal, TypeVar

from cryptography import x509

from privacy import calls, console, crash, keys, reach
from privacy.errors import ClockSkewed, IsocenterError, KeyFileUnsafe, TrustError, VersionSkew, WrongAuthority
from privacy.greeting import Versions, own, skew
from privacy.reach import Way

T = TypeVar("T")
State = Literal["ok", "advice", "trouble"]
VERSION = 1  # of the document
LIMIT_S = 14.0  # for all checks together
NETWORK_S = 4.0  # for one connection, one answer of a proxy, one handshake
CERTIFICATE_DAYS = 14
CLOCK_S = 30.0  # the coordinator refuses calls from 120 s on
MEMORY_LEAST, MEMORY_GOOD = 2 * 1024**3, 4 * 1024**3
DISK_LEAST, DISK_GOOD = 2 * 1024**3, 10 * 1024**3
PROXY_VARIABLES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy", "grpc_proxy")
ADJTIMEX_ERROR = 5  # of adjtimex(2): the clock is not synchronised
REINSTALL = "Install Isocenter anew in an environment of its own: `pip install --force-reinstall isocenter`."
_PART = re.compile(r"(===|~=|==|!=|<=|>=|<|>)\s*([0-9]+(?:\.[0-9]+)*)(\.\*)?")
_LEADING = re.compile(r"[0-9]+(?:\.[0-9]+)*")
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?\s*(?:;(.*))?")


@dataclass(frozen=True)
class Finding:
    """`advice`: it works, and somebody should look. `trouble`: it does not. Both have a remedy."""

    subject: str
    state: State
    sentence: str
    remedy: str = ""


class Advice(Exception):
    """What was looked at works, and somebody should look at it."""

    def __init__(self, sentence: str, remedy: str) -> None:
        super().__init__(sentence)
        self.remedy = remedy


Check = tuple[str, Callable[[], str]]
"""Subject, and a look that gives a sentence, or raises Advice or what is wrong."""


@dataclass
class Examination:
    """Findings in the order of their checks, each there once its check has ended or its time is over."""

    checks: Sequence[Check]
    found: dict[str, Finding] = field(default_factory=dict)
    over: threading.Condition = field(default_factory=threading.Condition)

    def run(self, tell: Callable[[int, list[str]], None], limit_s: float = LIMIT_S) -> list[Finding]:
        """All findings, after `limit_s` at most. `tell` hears how many there are, and what is still looked at."""
        for subject, look in self.checks:
            # Daemons: one that hangs in the operating system must not keep this process.
            threading.Thread(target=self._look, args=(subject, look), daemon=True).start()
        end = time.monotonic() + limit_s
        with self.over:
            while (left := end - time.monotonic()) > 0 and len(self.found) < len(self.checks):
                tell(len(self.found), [subject for subject, _ in self.checks if subject not in self.found])
                self.over.wait(min(left, 1.0))
            return [self.found.get(subject) or _late(subject, limit_s) for subject, _ in self.checks]

    def _look(self, subject: str, look: Callable[[], str]) -> None:
        found = finding(subject, look)
        with self.over:
            self.found[subject] = found
            self.over.notify()


def attempt(what: Callable[[], T]) -> T | None:
    """None where it cannot be told; the finding about it says why."""
    with contextlib.suppress(IsocenterError, OSError):
        return what()
    return None


def finding(subject: str, look: Callable[[], str]) -> Finding:
    """What `look` gives or raises; never raises itself."""
    try:
        return Finding(subject, "ok", _sentence(look()))
    except Advice as seen:
        return Finding(subject, "advice", _sentence(str(seen)), seen.remedy)
    except IsocenterError as error:
        return Finding(subject, "trouble", _sentence(str(error) or error.code), error.remedy)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        remedy = "Check the path, its owner, and the space on its disk."
        return Finding(subject, "trouble", _sentence(f"{where}{error.strerror or type(error).__name__}"), remedy)
    except Exception as error:  # a half broken installation is what this is for
        remedy = f"{REINSTALL} If it stays, report it with this output."
        return Finding(subject, "trouble", f"cannot be looked at ({type(error).__name__}).", remedy)


def _sentence(text: str) -> str:
    line = calls.printable(text)
    return line if line.endswith((".", "!", "?")) else f"{line}."


def _late(subject: str, limit_s: float) -> Finding:
    remedy = "Run it again when the machine is less busy; if it stays, the disk or the network under it hangs."
    return Finding(subject, "trouble", f"did not end within {limit_s:.0f} s.", remedy)


def to_json(findings: Sequence[Finding]) -> str:
    """The document of `--json`."""
    facts = {
        "version": VERSION,
        "isocenter": own().release,
        "trouble": any(each.state == "trouble" for each in findings),
        "findings": [asdict(each) for each in findings],
    }
    return json.dumps(facts, indent=1)


# This machine and its installation ------------------------------------------------------------------------------------


def of_machine(home: Path, others: Sequence[Path] = ()) -> list[Check]:
    """Checks that need nothing of a consortium; `others`: further folders whose disk counts."""
    return [
        ("python", python),
        ("packages", packages),
        ("installation", installation),
        ("system clock", system_clock),
        ("disk", lambda: disk([home, *others])),
        ("memory", memory),
        ("permissions", lambda: permissions(home)),
        ("logs", lambda: logs(home / "logs")),
        ("crash reports", lambda: crashes(home)),
    ]


def python() -> str:
    here = platform.python_version()
    try:
        wanted = str(metadata.metadata("isocenter").json.get("requires_python", ""))
    except metadata.PackageNotFoundError:
        raise Advice("Isocenter runs from its source and is not installed", "Install it: `pip install .`") from None
    if not satisfies(here, wanted):
        raise IsocenterError(
            f"Python {here}, and Isocenter needs {wanted}",
            remedy="Make its environment anew with such a Python: `python3.11 -m venv ENVIRONMENT`, and install it there.",
        )
    return f"Python {here} in {sys.prefix}"


def packages() -> str:
    """What is installed against what pyproject.toml asks for; extras are asked for by nobody."""
    try:
        wanted = metadata.requires("isocenter") or []
    except metadata.PackageNotFoundError:
        raise Advice(
            "Isocenter is not installed, so nothing says what it needs", "Install it: `pip install .`"
        ) from None
    wrong, count = list[str](), 0
    for line in wanted:
        parts = _REQUIREMENT.fullmatch(line.strip())
        if parts is None or "extra" in (parts[3] or ""):
            continue
        count += 1
        try:
            version = metadata.version(parts[1])
        except metadata.PackageNotFoundError:
            wrong.append(f"{parts[1]} is missing")
            continue
        if not satisfies(version, parts[2]):
            wrong.append(f"{parts[1]} is {version}, not {parts[2].strip()}")
    if wrong:
        raise IsocenterError(
            "; ".join(wrong), remedy=f"{REINSTALL} Another program in the same environment may have changed them."
        )
    return f"{count} packages in the versions that Isocenter {own().release} asks for"


def satisfies(version: str, wanted: str) -> bool:
    """Whether the numbers of a version fit a specifier such as ">=1.26,<2" (PEP 440 without pre-releases and local parts)."""
    leading = _LEADING.match(version)
    if leading is None:
        return False
    here = _numbers(leading[0])
    for sign, text, star in _PART.findall(wanted):
        there = _numbers(text)
        width = max(len(here), len(there))
        one, other = (numbers + (0,) * (width - len(numbers)) for numbers in (here, there))
        begins = here[: len(there)] + (0,) * (len(there) - len(here)) == there
        held = {
            "==": begins if star else one == other,
            "===": one == other,
            "!=": not begins if star else one != other,
            "~=": one >= other and here[: len(there) - 1] == there[:-1],
            ">=": one >= other,
            "<=": one <= other,
            ">": one > other,
            "<": one < other,
        }
        if not held[sign]:
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def installation() -> str:
    """Whether our packages are ours: none is shadowed, and each file is what was installed."""
    if console.SHADOWS:
        raise console.shadowed(console.SHADOWS)
    console.require_one_installation()
    root = Path(__file__).resolve().parent.parent
    if theirs := _foreign(Path.cwd(), root):
        raise Advice(
            f"the working folder holds {theirs[0]}, which is not Isocenter's",
            "Harmless for the installed commands. Started from here as `python -m`, Python takes this one: change the folder.",
        )
    try:
        there = metadata.files("isocenter") or []
    except metadata.PackageNotFoundError:
        there = []
    files = {str(each): each for each in there if each.parts[0] in console.PACKAGES and each.suffix == ".py"}
    recorded = {name: each.hash.value for name, each in files.items() if each.hash}
    changed = [name for name, digest in recorded.items() if _digest(Path(str(files[name].locate()))) != digest]
    if changed:
        raise IsocenterError(
            f"{len(changed)} files are not what was installed, such as {changed[0]}",
            remedy=f"Another package or a person wrote over them. {REINSTALL}",
        )
    return f"the packages of {root}{f', {len(recorded)} files as they were installed' if recorded else ''}"


def _foreign(folder: Path, root: Path) -> list[Path]:
    """Modules in `folder` with a name of ours that are not ours."""
    names = [folder / f"{name}{end}" for name in console.PACKAGES for end in (".py", "/__init__.py")]
    return [path for path in names if path.exists() and root not in path.resolve().parents]


def _digest(path: Path) -> str:
    """As RECORD writes it: SHA-256 in base64 without padding."""
    try:
        return urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
    except OSError:
        return ""


def system_clock() -> str:
    """What the kernel says of the clock; what it is compared with is the coordinator's."""
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    if sys.platform == "linux" and ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512)) == ADJTIMEX_ERROR:
        raise Advice(
            f"{now}; the kernel does not know of any time synchronisation",
            "If nothing else sets the clock (a virtual machine's host may), turn it on: `timedatectl set-ntp true`.",
        )
    return now


def disk(folders: Sequence[Path]) -> str:
    """Free space of each disk, once."""
    seen: dict[int, tuple[Path, int]] = {}
    for folder in folders:
        there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
        seen.setdefault(there.stat().st_dev, (there, shutil.disk_usage(there).free))
    said = "; ".join(f"{free / 1024**3:.1f} GiB free at {path}" for path, free in seen.values())
    least = min(free for _, free in seen.values())
    remedy = "Free at least 2 GiB there. A radiograph takes up to 2 MB of cache, a CT slice half a megabyte."
    if least < DISK_LEAST:
        raise IsocenterError(said, remedy=remedy)
    if least < DISK_GOOD:
        raise Advice(said, remedy)
    return said


def memory() -> str:
    total, free = memory_bytes()
    said = f"{total / 1024**3:.1f} GiB, {free / 1024**3:.1f} GiB of them available"
    remedy = "Isocenter asks for 4 GiB; large networks and volumes take more. Close other programs, or add memory."
    if total < MEMORY_LEAST:
        raise IsocenterError(said, remedy=remedy)
    if total < MEMORY_GOOD or free < MEMORY_LEAST:
        raise Advice(said, remedy)
    return said


def memory_bytes() -> tuple[int, int]:
    """(all, available), the cgroup's limit included."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit = next(iter(_lines(Path("/sys/fs/cgroup/memory.max"))), "max")
    if limit.isdecimal():
        total, free = min(total, int(limit)), min(free, int(limit))
    return total, free


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return []


def permissions(home: Path) -> str:
    """Keys and what lies beside them: used by this account alone."""
    folder = home / "keys"
    if not folder.is_dir():
        return "there are no keys yet"
    loose = [path for path in sorted(folder.glob("*.key")) if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)]
    if loose:
        raise KeyFileUnsafe(
            f"others may use {', '.join(path.name for path in loose)} in {folder}",
            remedy=f"`chmod 600 {folder}/*.key`. Who could read a key could speak for you: ask for a new invitation if "
            "somebody may have.",
        )
    for path in (home, folder):
        if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise KeyFileUnsafe(f"others may write into {path}", remedy=f"`chmod 700 {path}`")
    strangers = [path.name for path in sorted(folder.iterdir()) if path.stat().st_uid != os.geteuid()]
    if strangers:
        raise Advice(
            f"{', '.join(strangers)} in {folder} belong to another account than the one that looks",
            "Run this as the account of the service; if it is that one, `chown` the folder to it.",
        )
    return f"keys in {folder} are readable by this account alone"


def logs(folder: Path) -> str:
    if not folder.is_dir():
        return "no log file yet"
    size = sum(path.stat().st_size for path in folder.glob("*.jsonl"))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise IsocenterError(f"{folder} cannot be written to", remedy="`chown` it to the account of the service.")
    return f"{size / 1e6:.1f} MB in {folder}"


def crashes(home: Path) -> str:
    names = crash.names(home)
    if names:
        last = crash.read(home, names[0]) or {}
        raise Advice(
            f"{len(names)} reports of errors that nobody foresaw, the last of {last.get('last', 'unknown time')}",
            "Read it with `crash show`; it holds nothing of a patient, so you may send it to the coordinator. Then remove it.",
        )
    return "none"


# The way to the coordinator -------------------------------------------------------------------------------------------


def proxy(way: Way | None, target: str | None, where: str, environment: Mapping[str, str] = os.environ) -> str:
    """Which proxy is used, whether it lets through to `target`, and which one the environment names in vain."""
    named = [name for name in PROXY_VARIABLES if environment.get(name)]
    if way is None:
        if named:
            raise Advice(
                f"{named[0]} is set in this environment and is not looked at; {where} names no proxy",
                f"If connections leave through a proxy only, enter it in {where} (docs/site-it.md, Behind a proxy).",
            )
        return "none; connections are direct"
    if target is None:
        reach.connect(way.host, way.port, None, NETWORK_S).close()
        return f"{way} answers; the coordinator is not known yet"
    host, _, port = target.rpartition(":")
    reach.connect(host, int(port), way, NETWORK_S).close()
    return f"{way} lets through to {target}"


def name(host: str, way: Way | None) -> str:
    """Whether this machine finds the address of `host`, or of the proxy, which finds the coordinator's itself."""
    asked = way.host if way else host
    try:
        found = sorted({str(each[4][0]) for each in socket.getaddrinfo(asked, None, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError):
        raise reach.no_name(asked) from None
    return f"{asked} is {', '.join(found)}{f'; the proxy looks for {host}' if way else ''}"


def door(address: str, way: Way | None, ca: x509.Certificate, shake: ssl.SSLContext | None = None) -> str:
    """Whether the consortium answers at `address`, with a certificate of `ca` and TLS that nobody opened on the way.

    `shake`: for a port that asks for a certificate; only where that handshake fails, it is looked at why.
    """
    host, _, port = address.rpartition(":")
    good = f"{address} answers with the consortium's certificate{f', through {way}' if way else ''}"
    if shake is not None:
        with (
            contextlib.suppress(OSError),
            reach.connect(host, int(port), way, NETWORK_S) as link,
            shake.wrap_socket(link, server_hostname=host),
        ):
            return f"{good}, and took this one's"
    chain = reach.shown_chain(host, int(port), way, NETWORK_S)
    certificate = chain[0]
    if not issued_by(ca, certificate):
        raise foreign(address, certificate)
    now = datetime.now(UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise WrongAuthority(
            f"the certificate shown at {address} is valid from {certificate.not_valid_before_utc:%Y-%m-%d} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d}, and today is {now:%Y-%m-%d}",
            remedy="If this machine's date is wrong, set it. Otherwise the coordinator's certificate has ended: tell them.",
        )
    if host not in hosts_of(certificate):
        raise WrongAuthority(
            f"the certificate shown at {address} is made out to {', '.join(hosts_of(certificate)) or 'nobody'}",
            remedy="Use the name that the coordinator founded the consortium with.",
        )
    if shake is not None:
        raise TrustError(
            f"{address} shows the consortium's certificate, and no handshake with this one's succeeds",
            remedy="Compare the files of the folder keys with your backup, or join again with a new invitation.",
        )
    return good


def invited(line: calls.InvitationLine, way: Way | None) -> str:
    """`door` before joining: the fingerprint stands in the invitation, whose token is not sent."""
    address = f"{line.host}:{line.service_port}"
    chain = reach.shown_chain(line.host, line.service_port, way, NETWORK_S)
    if not any(keys.fingerprint(each) == line.ca_fingerprint for each in chain):
        raise foreign(address, chain[0])
    return f"{address} shows the authority that the invitation names"


def foreign(address: str, shown: x509.Certificate) -> WrongAuthority:
    """TLS ends at somebody else; who that says it is."""
    issuer = calls.printable(shown.issuer.rfc4514_string())[:200]
    return WrongAuthority(
        f"TLS at {address} ends at a certificate that '{issuer}' issued, not this consortium's authority",
        remedy="Either a box on the way opens TLS (then the issuer is your institution's or its firewall's: have this host "
        "exempted from inspection), or it is another server (compare the address with the coordinator). Do not go on until then.",
    )


def issued_by(ca: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except Exception:  # another kind of key or signature, and whatever a hostile certificate makes the library say
        return False
    return True


def hosts_of(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    addresses = [str(each) for each in names.get_values_for_type(x509.IPAddress)]
    return [calls.printable(each) for each in (*names.get_values_for_type(x509.DNSName), *addresses)]


@dataclass
class Greeting:
    """One greeting, which three findings are about: who is known, whose clock is off, who has to upgrade."""

    open_caller: Callable[[], calls.Caller]
    us: str
    lock: threading.Lock = field(default_factory=threading.Lock)
    said: tuple[Versions | None, float | None] | IsocenterError | None = None

    def ask(self) -> tuple[Versions | None, float | None]:
        """(the coordinator's versions, seconds that its clock is ahead); raises what the call raised, each time."""
        with self.lock:
            if self.said is None:
                try:
                    with self.open_caller() as caller:
                        self.said = caller.greet(), caller.ahead_s
                except IsocenterError as error:
                    self.said = error
            if isinstance(self.said, IsocenterError):
                raise self.said
            return self.said

    def membership(self) -> str:
        with contextlib.suppress(
            ClockSkewed
        ):  # said by `clock`; a call is refused for it after its signature was believed
            self.ask()
        return "the coordinator answers to this key"

    def clock(self) -> str:
        """Raises ClockSkewed with the seconds where the coordinator refused the call for them."""
        remedy = "Turn on time synchronisation: `timedatectl set-ntp true`. From 120 s on the coordinator refuses every call."
        try:
            _, ahead = self.ask()
        except ClockSkewed as error:
            raise ClockSkewed(str(error), remedy=remedy) from None
        except IsocenterError as error:
            raise _untold(error) from None
        if ahead is None:
            return "the coordinator is of an earlier version, which does not tell its time"
        side = "behind" if ahead > 0 else "ahead of"
        said = f"this clock is {abs(ahead):.1f} s {side} the coordinator's"
        if abs(ahead) > CLOCK_S:
            raise Advice(said, remedy)
        return said

    def versions(self) -> str:
        here = own()
        try:
            there, _ = self.ask()
        except IsocenterError as error:
            raise _untold(error) from None
        found = skew(here, there, self.us, "the coordinator")
        if found is None:
            return f"{self.us} and the coordinator run Isocenter {here.release} (wire {here.wire})"
        if found.must:
            raise VersionSkew(found.sentence, remedy=found.remedy)
        raise Advice(found.sentence, found.remedy)


def _untold(error: IsocenterError) -> Advice:
    return Advice("cannot be told, because the coordinator could not be asked", error.remedy)


def days_left(held: x509.Certificate) -> int:
    return (held.not_valid_after_utc - datetime.now(UTC)).days


def certificate(path: Path, role: str) -> str:
    """How long the party's certificate is good for."""
    held = keys.load_certificate(path.read_bytes())
    days = days_left(held)
    if keys.ended(held):
        raise IsocenterError(
            f"it ended on {held.not_valid_after_utc:%Y-%m-%d}",
            remedy="Ask the coordinator for a new invitation (`fl-server invite NAME`), and join with it in the same folder.",
        )
    if days < CERTIFICATE_DAYS and keys.renewal_due(held):
        raise Advice(
            f"{days} days left, and it is due for renewal",
            "Start the node (`fl-client start`), which renews it; or run `fl-client studies` once."
            if role == "site"
            else "Run `fl-study studies` once, which renews it.",
        )
    return f"valid for {days} more days; it is renewed by itself in the last third of its time"
