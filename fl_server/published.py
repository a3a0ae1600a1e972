"""The models that this coordinator publishes: HOME/models/NAME-VERSION.isocenter, each with its signed notice beside it.

A version is published once and never exchanged: whoever pulled it has what everybody has. A notice is written after its package,
so what is listed is there; what is withdrawn stays in the folder, and nobody gets it any more.
"""

import datetime as dt
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fl_server.roster import Home
from models.catalogue import Notice
from models.registry import Package, fingerprint, version_key
from privacy import disk, heads, keys
from privacy.errors import DocumentError, IsocenterError, MessageMalformed, PackageRefused, RunUnknown

FOLDER = "models"
VERSION = 1
NOTICE_BYTES_MAX = 64 * 1024


@dataclass(frozen=True)
class Entry:
    """One published model. `withdrawn`: when, UTC, or None."""

    notice: Notice
    signature: bytes
    withdrawn: str | None = None

    def store(self, home: Home) -> None:
        document = {
            "version": VERSION,
            "notice": self.notice.body().decode(),
            "signature": self.signature.hex(),
            "withdrawn": self.withdrawn,
        }
        keys.write_private(_place(home, self.notice).with_suffix(".json"), json.dumps(document, indent=1).encode())

    @classmethod
    def open(cls, path: Path) -> "Entry":
        """Raises DocumentError if the file is damaged; its remedy is a backup."""
        try:
            with path.open("rb") as file:
                found = json.loads(file.read(NOTICE_BYTES_MAX))
            disk.require_known(path, found["version"], VERSION)
            withdrawn = None if found["withdrawn"] is None else str(found["withdrawn"])
            return cls(Notice.read(found["notice"].encode()), bytes.fromhex(found["signature"]), withdrawn)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, MessageMalformed):
            raise DocumentError(
                f"{path}: the notice of a published model cannot be read", remedy="Restore the file from your backup."
            ) from None


def entries(home: Home) -> list[Entry]:
    """Everything that was ever published here, by name and version."""
    found = [Entry.open(path) for path in (home.root / FOLDER).glob("*.json")]
    return sorted(found, key=lambda entry: (entry.notice.name, version_key(entry.notice.version)))


def path_of(home: Home, sha256: str) -> Path:
    """The package with this hash, if it is published and not withdrawn; raises RunUnknown. The hash is compared, never a path."""
    for entry in entries(home):
        if entry.notice.sha256 == sha256 and entry.withdrawn is None:
            return _place(home, entry.notice)
    raise RunUnknown("no such model is published here", remedy="List them with `models`.")


def publish(home: Home, file: Path) -> Notice:
    """Let every site and researcher in good standing fetch the package in `file`; the same file twice changes nothing.

    Raises PackageRefused, in words that say why, unless an enrolled researcher signed it, it is of a run of this consortium with
    the weights that this run ended with, and its head of this coordinator's journal is one; and for a version that exists.
    """
    researchers = {fingerprint(one.public_key): one.name for one in home.roster.researchers() if not one.revoked}
    package = Package.open(file)
    if package.signer not in researchers:
        raise PackageRefused(
            f"it is signed by {keys.grouped(package.signer)}, and no enrolled researcher has this key",
            remedy="Have a researcher of this consortium release it with `fl-study release`.",
        )
    content = file.read_bytes()
    if keys.digest(content) != package.sha256:
        raise PackageRefused(f"{file}: it was changed while it was read")
    _check_run(home, package)
    _check_heads(home, package)
    now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    notice = Notice.of(package, len(content), researchers[package.signer], now)
    for entry in entries(home):
        if (entry.notice.name, entry.notice.version) == (notice.name, notice.version):
            if entry.notice.sha256 == notice.sha256 and entry.withdrawn is None:
                return entry.notice
            raise PackageRefused(
                f"{notice.name} {notice.version} was published before, on {entry.notice.published[:10]}",
                remedy="A version is never exchanged: have it released under a new one (`fl-study release --version`).",
            )
    keys.write_private(_place(home, notice), content)
    signature = keys.sign(home.coordinator_key, keys.MODEL_NOTICE, notice.body())
    Entry(notice, signature).store(home)
    facts = {"study": notice.digest, "run": notice.run_id, "researcher": notice.researcher}
    home.journal.append("model-published", name=notice.name, model=notice.sha256, **facts)
    return notice


def withdraw(home: Home, wanted: str) -> Notice:
    """Let nobody fetch NAME@VERSION any more; who has it keeps it. Raises RunUnknown if it is not published."""
    for entry in entries(home):
        if f"{entry.notice.name}@{entry.notice.version}" == wanted and entry.withdrawn is None:
            home.journal.append("model-withdrawn", name=entry.notice.name, model=entry.notice.sha256)
            now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            Entry(entry.notice, entry.signature, now).store(home)
            return entry.notice
    raise RunUnknown(
        f"no model {wanted!r} is published here", remedy="List them with `fl-server models`: NAME@VERSION."
    )


def _place(home: Home, notice: Notice) -> Path:
    return home.root / FOLDER / notice.file_name


def _check_run(home: Home, package: Package) -> None:
    """Raise PackageRefused unless the weights are those with which the named run of the named study ended here."""
    facts = package.manifest
    folder = home.runs / facts["run_id"]
    try:
        card = json.loads((folder / "card.json").read_bytes())
        ended = load_file(folder / "model.safetensors")["model"]
    except (OSError, ValueError, KeyError, SafetensorError):
        raise PackageRefused(
            f"it is of run {facts['run_id']}, and no finished run of this consortium has that name",
            remedy="Publish what was released of a run of this consortium.",
        ) from None
    from models import (
        exporting,
        networks,
    )  # torch takes two seconds to load, and no other command of this side needs it

    here = networks.to_vector(exporting.network(package))
    if (card["digest"], card["selected_round"]) != (facts["digest"], facts["lineage"]["round"]):
        raise PackageRefused("the run of that name is of another study, or chose another round")
    if here.tobytes() != np.asarray(ended, np.float32).tobytes():
        raise PackageRefused("its weights are not those with which that run ended")


def _check_heads(home: Home, package: Package) -> None:
    """Raise PackageRefused unless it is tied to this coordinator's journal as it is, every line of it."""
    own = home.coordinator_key.public_key()
    if package.coordinator != keys.point_hex(own):
        raise PackageRefused(
            "it is not tied to the journal of this coordinator",
            remedy="Have it released again with `fl-study release`.",
        )
    try:
        heads.verify(home.journal.path, heads.COORDINATOR, [own], home.roster.known_keys(), package.heads)
    except IsocenterError as error:
        raise PackageRefused(f"the head in it and this coordinator's journal do not agree: {error}") from None
