"""What a site may say of the archive that its images come from, and what every kind of archive is asked for and answers.

`data.archive` in site.yaml is one of two sections: `kind: dicomweb` (QIDO-RS and WADO-RS, DICOM PS3.18) or `kind: dimse` (C-FIND
with C-GET or C-MOVE, PS3.4 annex C). Nothing here connects to anything. `fl_client.dicomweb` and `fl_client.dimse` are the two
archives, `fl_client.fetching` decides what is asked of them and when, and all of them know each other only through this module.

Whatever an archive answers is taken for hostile: it may be misconfigured, or be another machine than the one that was meant.
Names, birth dates and patient numbers are never asked for; a study is a UID, an accession number and the words that select it.
"""

import csv
import datetime as dt
import ipaddress
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Protocol, TypeAlias
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from fl_client.policy import Hours
from models.study import Document
from privacy.errors import DataError, KeyFileUnsafe

SECRET_BYTES_MAX = 16 * 1024  # a token of OAuth is one or two thousand
LIST_BYTES_MAX = 64 * 1024 * 1024
DAYS_MAX = 36_600  # a hundred years of studies
UID = re.compile(r"[0-9][0-9.]{0,62}[0-9]|[0-9]")
_ACCESSION = re.compile(r"[^\x00-\x1f\x7f*?\\\"]{1,64}")  # `*`, `?` and `\` would make one number match others
_TITLE = r"^[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?$"  # an application entity's title, PS3.5: 16 characters without a backslash
Day = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
Title = Annotated[str, Field(pattern=_TITLE)]
Port = Annotated[int, Field(ge=1, le=65535)]

SOP_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.1": "CR",
    "1.2.840.10008.5.1.4.1.1.1.1": "DX for presentation",
    "1.2.840.10008.5.1.4.1.1.1.1.1": "DX for processing",
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.2.1": "enhanced CT",
    "1.2.840.10008.5.1.4.1.1.7": "secondary capture",
}
"""What is copied of a study. Reports, presentation states and segmentations stay in the archive."""


# site.yaml -----------------------------------------------------------------------------------------------------------


class Select(Document):
    """Which studies are copied. All that is said has to hold."""

    modalities: list[Annotated[str, Field(pattern=r"^[A-Z]{2,16}$")]] = Field(
        default=[], max_length=16, description="kinds of series that are copied, such as CR, DX, CT; none listed: all"
    )
    first_day: Day | None = Field(default=None, description="first study date, such as 2024-01-31")
    last_day: Day | None = Field(default=None, description="last study date; left out: today")
    accession_numbers: str | None = Field(
        default=None, min_length=1, description="file with one accession number a line, or a table (CSV, TSV) with them"
    )
    column: str | None = Field(default=None, min_length=1, description="the column of that table")
    description_words: list[Annotated[str, Field(min_length=1, max_length=64)]] = Field(
        default=[], max_length=32, description="words of which the study's description has to hold one; none: any"
    )

    @field_validator("first_day", "last_day")
    @classmethod
    def _day(cls, text: str | None) -> str | None:
        if text is not None:
            dt.date.fromisoformat(text)
        return text

    @model_validator(mode="after")
    def _selects(self) -> "Select":
        if self.first_day is None and self.accession_numbers is None:
            raise ValueError("name a first_day or a file of accession_numbers; a whole archive is never asked for")
        if self.first_day is None and self.last_day is not None:
            raise ValueError("last_day needs a first_day")
        if self.first_day is not None and self.last_day is not None and self.last_day < self.first_day:
            raise ValueError("last_day lies before first_day")
        return self


class _Common(Document):
    """What holds for every kind of archive."""

    select: Select = Field(description="which studies are copied")
    per_minute: float = Field(default=6, gt=0, le=6000, description="most studies that are begun in a minute")
    pause_s: float = Field(default=0, ge=0, le=3600, description="seconds of rest after each study")
    timeout_s: float = Field(
        default=60, ge=1, le=3600, description="most seconds that the archive may take to begin an answer"
    )
    studies_per_run: int = Field(default=1000, ge=1, le=1_000_000, description="most studies of one `fl-client fetch`")
    gigabytes_per_run: float = Field(default=100, gt=0, le=1_000_000, description="most GiB of one `fl-client fetch`")
    gigabytes_free: float = Field(default=5, ge=0, le=1_000_000, description="GiB of the disk that are left free")
    hours: Hours = Field(default=Hours(), description="when the archive may be asked")


class Dicomweb(_Common):
    """An archive that speaks DICOMweb: QIDO-RS and WADO-RS."""

    kind: Literal["dicomweb"]
    url: str = Field(max_length=2048, description="where QIDO-RS and WADO-RS begin: https://pacs.example.org/dicom-web")
    user: str | None = Field(default=None, min_length=1, max_length=256, description="user, with a password_file")
    password_file: str | None = Field(default=None, min_length=1, description="file with the password (mode 0600)")
    token_file: str | None = Field(
        default=None, min_length=1, description="file with a bearer token (mode 0600), instead of user and password"
    )
    ca_file: str | None = Field(
        default=None,
        min_length=1,
        description="PEM file of the authority behind its certificate; left out: the system's",
    )
    certificate: str | None = Field(default=None, min_length=1, description="PEM file of our certificate, if asked for")
    key: str | None = Field(default=None, min_length=1, description="PEM file of its key (mode 0600)")

    @field_validator("url")
    @classmethod
    def _safe(cls, text: str) -> str:
        parts = urlsplit(text)
        if parts.username or parts.password or parts.query or parts.fragment or not parts.hostname:
            raise ValueError("expected an address without user, password, ? or #")
        if parts.scheme == "http" and not loopback(parts.hostname):
            raise ValueError("http would carry images and the password readably; use https")
        if parts.scheme not in ("http", "https"):
            raise ValueError("expected an address that begins with https://")
        return text.rstrip("/")

    @model_validator(mode="after")
    def _whole(self) -> "Dicomweb":
        if (self.user is None) != (self.password_file is None):
            raise ValueError("user and password_file belong together")
        if self.token_file is not None and self.user is not None:
            raise ValueError("either user and password_file, or token_file")
        if self.user is not None and (":" in self.user or not self.user.isprintable()):
            raise ValueError("a user name holds no colon and no control characters")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together")
        return self


class Tls(Document):
    """TLS between archive and site; both show a certificate."""

    ca_file: str = Field(min_length=1, description="PEM file of the authority behind the archive's certificate")
    certificate: str = Field(min_length=1, description="PEM file of our certificate")
    key: str = Field(min_length=1, description="PEM file of its key (mode 0600)")


class Dimse(_Common):
    """An archive that speaks DIMSE: C-FIND, and C-GET or C-MOVE."""

    kind: Literal["dimse"]
    host: str = Field(pattern=r"^[A-Za-z0-9.:_-]{1,253}$", description="the archive's name or address")
    port: Port = Field(description="its DICOM port, such as 104 or 11112")
    called_ae: Title = Field(description="its application entity title")
    calling_ae: Title = Field(description="ours, as the archive knows it")
    method: Literal["get", "move"] = Field(
        default="get", description="get: images come back on our connection; move: the archive connects to listen_port"
    )
    listen_address: str | None = Field(
        default=None, pattern=r"^[0-9A-Fa-f.:]{2,45}$", description="move: address of this machine that it connects to"
    )
    listen_port: Port | None = Field(default=None, description="move: port of this machine that it connects to")
    senders: list[Annotated[str, Field(pattern=r"^[0-9A-Fa-f.:]{2,45}$")]] = Field(
        default=[], max_length=64, description="move: addresses that may send; none listed: those of `host`"
    )
    tls: Tls | None = Field(default=None, description="left out: images cross your network readably")

    @model_validator(mode="after")
    def _whole(self) -> "Dimse":
        listens = (self.listen_address is not None, self.listen_port is not None)
        if self.method == "move" and not all(listens):
            raise ValueError("method: move needs listen_address and listen_port")
        if self.method == "get" and (any(listens) or self.senders):
            raise ValueError("listen_address, listen_port and senders belong to method: move")
        return self

    @field_validator("listen_address", "senders")
    @classmethod
    def _addresses(cls, given: str | list[str] | None) -> str | list[str] | None:
        for address in [given] if isinstance(given, str) else given or []:
            ipaddress.ip_address(address)
        return given


def _kind(given: object) -> str:
    """In brackets: a tag is no key that stands in site.yaml, and errors leave such parts of a place out."""
    kind = given.get("kind") if isinstance(given, dict) else getattr(given, "kind", None)
    return f"[{kind}]"


ArchiveSettings: TypeAlias = Annotated[
    Annotated[Dicomweb, Tag("[dicomweb]")] | Annotated[Dimse, Tag("[dimse]")],
    Discriminator(
        _kind, custom_error_type="archive_kind", custom_error_message="expected `kind: dicomweb` or `kind: dimse`"
    ),
]


def loopback(host: str) -> bool:
    """Whether `host` can be nothing but this machine: names are not looked up, so a resolver cannot lie about one."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def secret(path: Path) -> str:
    """One line out of a file that only this user can read. Raises KeyFileUnsafe or DataError; neither quotes it."""
    check_private(path)
    with path.open("rb") as file:
        data = file.read(SECRET_BYTES_MAX + 1)
    try:
        text = data.decode("utf-8").strip("\r\n")
    except UnicodeDecodeError:
        text = ""
    if not text or len(data) > SECRET_BYTES_MAX or not text.isprintable():
        raise DataError(
            f"{path} does not hold one line of text", remedy="Write the password or token into it, and nothing else."
        )
    return text


def check_private(path: Path) -> None:
    """Raise KeyFileUnsafe if others may use the file at `path`, DataError if it is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}", remedy="Correct its path in `data.archive` of site.yaml.") from None
    except OSError as error:
        raise KeyFileUnsafe(f"{path} cannot be opened as a plain file ({error.strerror})") from None
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode) or mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise KeyFileUnsafe(f"{path} can be read or changed by other users (mode {stat.S_IMODE(mode):04o})")


@dataclass(frozen=True)
class Accessions:
    """A list of accession numbers as a person wrote it: each number once, in order, and how many lines hold none."""

    numbers: tuple[str, ...]
    malformed: int

    @classmethod
    def read(cls, path: Path, column: str | None) -> "Accessions":
        """Raises DataError, which quotes no number."""
        if not path.is_file():
            raise DataError(f"{path}: there is no such file", remedy="Correct data.archive.select.accession_numbers.")
        if path.stat().st_size > LIST_BYTES_MAX:
            raise DataError(
                f"{path} is larger than {LIST_BYTES_MAX // 2**20} MiB", remedy="Split it into several lists."
            )
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise DataError(f"{path} is not UTF-8 text", remedy="Save it as UTF-8.") from None
        cells = lines if column is None else _column(path, lines, column)
        told = [cell.strip() for cell in cells if cell.strip()]
        good = [number for number in told if _ACCESSION.fullmatch(number)]
        return cls(tuple(dict.fromkeys(good)), len(told) - len(good))


def _column(path: Path, lines: list[str], column: str) -> list[str]:
    head = lines[0] if lines else ""
    delimiter = max(",;\t", key=head.count)
    try:
        rows = list(csv.reader(lines, delimiter=delimiter))
    except csv.Error:
        raise DataError(f"{path} is no table", remedy="Save it as CSV with one header line.") from None
    names = [name.strip() for name in rows[0]] if rows else []
    if names.count(column) != 1:
        raise DataError(
            f"{path} has {len(names)} columns, and not exactly one is called {column!r}",
            remedy="Correct data.archive.select.column in site.yaml.",
        )
    place = names.index(column)
    return [row[place] for row in rows[1:] if len(row) > place]


# What goes wrong -----------------------------------------------------------------------------------------------------


class Reason(StrEnum):
    """Why a study was not copied. The value is stored and counted; `explanation` and `remedy` are for people."""

    UNREACHABLE = "unreachable"
    UNTRUSTED = "untrusted"
    TIMEOUT = "timeout"
    TOO_SLOW = "too_slow"
    BROKEN_OFF = "broken_off"
    UNAUTHORISED = "unauthorised"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    BUSY = "busy"
    REDIRECTED = "redirected"
    ARCHIVE_ERROR = "archive_error"
    UNSUPPORTED = "unsupported"
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    TOO_MANY = "too_many"
    WRONG_STUDY = "wrong_study"
    WRONG_INSTANCE = "wrong_instance"
    INCOMPLETE = "incomplete"
    NO_IMAGES = "no_images"

    @property
    def explanation(self) -> str:
        return _WORDS[self][0]

    @property
    def remedy(self) -> str:
        return _WORDS[self][1]

    @property
    def passing(self) -> bool:
        """Whether it can be otherwise in a minute, so that trying again is worth the archive's time."""
        return self in _PASSING

    @property
    def stops(self) -> bool:
        """Whether no other study can fare better before a person did something."""
        return self in (Reason.UNTRUSTED, Reason.UNAUTHORISED, Reason.REDIRECTED)


_IT = "Show this to whoever runs the archive."
_WORDS = {
    Reason.UNREACHABLE: ("nothing answers at the archive's address", "Check address, port and firewall."),
    Reason.UNTRUSTED: (
        "its TLS certificate is not one that site.yaml trusts, or it does not trust ours",
        "Do not continue before you know whose it is; set ca_file, certificate and key below data.archive.",
    ),
    Reason.TIMEOUT: ("no answer in the time that site.yaml allows", "Raise timeout_s, or fetch at a quieter hour."),
    Reason.TOO_SLOW: ("it sent so slowly that the copy would not have ended", _IT),
    Reason.BROKEN_OFF: (
        "the connection ended in the middle of an answer",
        "If it does so at once, the archive may not know calling_ae; else show this to whoever runs it.",
    ),
    Reason.UNAUTHORISED: (
        "it does not know this user, certificate or application entity title",
        "Check user, password_file or token_file; for DIMSE have calling_ae and this machine's address entered there.",
    ),
    Reason.FORBIDDEN: ("it does not give this study to this user", _IT),
    Reason.NOT_FOUND: ("the study is not there any more", ""),
    Reason.BUSY: ("it had too much to do", "Lower per_minute, or fetch at other hours."),
    Reason.REDIRECTED: (
        "it sends us to another address, which is never followed",
        "If that address is right, write it into url.",
    ),
    Reason.ARCHIVE_ERROR: ("it reported an error of its own", _IT),
    Reason.UNSUPPORTED: ("it does not offer what is needed, or would not send images as they are stored", _IT),
    Reason.MALFORMED: ("what it sent is not what the standard describes", _IT),
    Reason.TOO_LARGE: ("one image is larger than any that is read here", ""),
    Reason.TOO_MANY: ("more images or answers than a study or a question can have", _IT),
    Reason.WRONG_STUDY: ("it sent an image of another study, which was not kept", _IT),
    Reason.WRONG_INSTANCE: ("it sent another image than the one asked for, which was not kept", _IT),
    Reason.INCOMPLETE: ("it did not send all images that it listed", _IT),
    Reason.NO_IMAGES: ("no series of the kinds that are copied", ""),
}
_PASSING = frozenset(
    [
        *(Reason.UNREACHABLE, Reason.TIMEOUT, Reason.TOO_SLOW, Reason.BROKEN_OFF),
        *(Reason.BUSY, Reason.ARCHIVE_ERROR, Reason.INCOMPLETE),
    ]
)


class NotFetched(Exception):
    """Something could not be had of an archive. It never leaves this package: it becomes a study's reason, or a DataError.

    `wait_s`: for how long the archive asked not to be asked again.
    """

    def __init__(self, reason: Reason, wait_s: float = 0) -> None:
        super().__init__(str(reason))
        self.reason, self.wait_s = reason, wait_s


# What is asked and answered ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One query for studies: an accession number, or days and a modality, or all of these."""

    accession: str = ""
    first_day: str = ""
    last_day: str = ""
    modality: str = ""


@dataclass(frozen=True)
class Found:
    """One study in an answer, as the archive described it. `description` is compared and then forgotten."""

    uid: str
    accession: str
    day: str
    modalities: tuple[str, ...]
    description: str


@dataclass(frozen=True)
class Instance:
    """One image that the archive lists for a study."""

    series: str
    uid: str


Keep = Callable[[Instance, Iterator[bytes]], None]
"""Takes an image as a DICOM file, in pieces; returns when it is safely on the disk, raises NotFetched if it is refused."""


class Archive(Protocol):
    """What `fl_client.fetching` needs of an archive. Every method raises NotFetched and nothing else, whatever is answered."""

    @property
    def days_at_once(self) -> int:
        """Most days in one question; archives that cannot be asked page by page cut long answers off in silence."""

    def studies(self, question: Question) -> Iterator[Found]:
        """Studies that answer `question`, and maybe others: archives may ignore a key that they do not know."""

    def instances(self, study: str, modalities: tuple[str, ...]) -> list[Instance]:
        """Images of `study` that are copied: of these modalities (none: any) and of SOP_CLASSES."""

    def fetch(self, study: str, wanted: list[Instance], keep: Keep) -> None:
        """Hand each image of `wanted` to `keep`, as it is stored in the archive."""

    def close(self) -> None:
        """End whatever is open."""
