"""A released model: one signed file NAME-VERSION.isocenter, and a folder of them.

Inside a zip without compression lie manifest.json, its signature, the signer's public key and the files the manifest lists: the
study in canonical form, weights under the names of the network's layers, the model card, the SBOM. The manifest may hold signed
heads of the coordinator's journal, with the key that signed them. Guarantees of `Package.read`:

1. Nothing of a package is used before all of it was checked; whatever is wrong raises PackageRefused, and nothing else.
2. The signature covers the manifest, the manifest covers every file by size and SHA-256, and the zip has to be, byte for byte,
   the one that `pack` makes of these files. So no byte can be changed, added or left out.
3. Its lineage holds together: manifest, card and study name the same study, run, round and first weights, and the heads are
   signed by the coordinator's key in it. Whose key that is says only who joined the consortium (`coordinator`).
4. Nothing is ever unpacked to a path that a package names.
"""

import io
import json
import re
import struct
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from models.sections import LONGEST_SIDE_PX, LONGEST_SIDE_RANGE
from models.study import Study
from privacy import keys
from privacy.errors import IsocenterError, PackageRefused
from privacy.heads import COORDINATOR, SignedHead

VERSION = 1
ENDING = ".isocenter"
SEALS = ("manifest.json", "signature", "signer.pem")  # in this order, before the files that the manifest lists
FILES = ("card.json", "card.md", "model.safetensors", "sbom.cdx.json", "study.json")
PACKAGE_BYTES_MAX = 16 * 1024**3  # as of a result that crosses from the coordinator
VERSIONS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6}){0,2}")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same files give the same bytes on every day

_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, SafetensorError)

Files = Mapping[str, bytes]


def version_key(version: str) -> list[int]:
    """In the order of these, 9.0 is before 10.0."""
    return [int(part) for part in version.split(".")]


def fingerprint(key: keys.PublicKey) -> str:
    """64 hex characters: SHA-256 of a signer's public key (PEM), to be compared by telephone."""
    return keys.digest(keys.public_pem(key))


def pack(facts: Mapping[str, Any], files: Files, key: keys.PrivateKey) -> bytes:
    """The package of `files` (exactly FILES) signed with `key`; equal input gives equal bytes but for the signature.

    `facts` (name, version, digest, run_id, lineage, heads, created) go into the manifest. Raises PackageRefused for a version
    that is none, and for files that a reader would refuse.
    """
    if set(files) != set(FILES):
        raise PackageRefused(f"a package holds {', '.join(FILES)}, and not {', '.join(sorted(files))}")
    listed = {name: {"bytes": len(files[name]), "sha256": keys.digest(files[name])} for name in FILES}
    manifest = json.dumps({"format": VERSION, **facts, "files": listed}, sort_keys=True, separators=(",", ":")).encode()
    signature = keys.sign(key, keys.MODEL_PACKAGE, manifest)
    signer = keys.public_pem(key)
    content = _zipped({**dict(zip(SEALS, (manifest, signature, signer), strict=True)), **files})
    Package.read(content)  # what its own reader refuses is not written
    return content


@dataclass(frozen=True)
class Package:
    """A package that was checked. `manifest`: its facts; `trusted`: whether its signer is one the caller named."""

    manifest: dict[str, Any]
    files: dict[str, bytes]
    study: Study
    signer: str
    trusted: bool
    sha256: str

    @classmethod
    def open(cls, path: Path, trusted: Collection[str] | None = None) -> "Package":
        """The package in the file `path`, as `read`. Raises PackageRefused, also where no file can be read."""
        try:
            if path.stat().st_size > PACKAGE_BYTES_MAX:
                raise PackageRefused(f"{path}: no package is larger than {PACKAGE_BYTES_MAX} bytes")
            content = path.read_bytes()
        except OSError as error:
            raise PackageRefused(f"{path}: it cannot be read ({error.strerror})") from None
        return cls.read(content, trusted)

    @classmethod
    def read(cls, content: bytes, trusted: Collection[str] | None = None) -> "Package":
        """The package in `content`, all of it checked. Raises PackageRefused, and nothing else.

        `trusted`: fingerprints of those whose signature is accepted; None accepts anybody's, which proves only that the package
        is whole.
        """
        try:
            return cls._read(content, trusted)
        except PackageRefused:
            raise
        except IsocenterError as error:
            raise PackageRefused(f"the package does not hold together: {error}") from None
        except _DAMAGE as error:
            raise PackageRefused(f"the package is damaged ({type(error).__name__})") from None

    @classmethod
    def _read(cls, content: bytes, trusted: Collection[str] | None) -> "Package":
        found = _unzipped(content)
        manifest_bytes, signature, pem = (found.pop(name) for name in SEALS)
        signer = keys.load_public(pem)
        if keys.public_pem(signer) != pem:
            raise PackageRefused("the signer's key is not written as this format does")
        keys.verify(signer, keys.MODEL_PACKAGE, manifest_bytes, signature)
        if trusted is not None and fingerprint(signer) not in trusted:
            raise PackageRefused(
                f"it is signed by {keys.grouped(fingerprint(signer))}, whom you do not trust",
                remedy="Compare the fingerprint by telephone with the researcher who released it, then give it with --trust.",
            )
        manifest: dict[str, Any] = json.loads(manifest_bytes)
        if manifest["format"] != VERSION:
            raise PackageRefused(f"it is of format {manifest['format']!r}, and this version reads {VERSION}")
        listed = {name: {"bytes": len(data), "sha256": keys.digest(data)} for name, data in found.items()}
        if manifest["files"] != listed:
            raise PackageRefused("the files are not those that the signed manifest lists")
        if not VERSIONS.fullmatch(manifest["version"]):
            raise PackageRefused(f"{manifest['version']!r} is no version such as 1.0.0")
        study = Study.from_canonical(found["study.json"])
        if (study.digest, study.name) != (manifest["digest"], manifest["name"]):
            raise PackageRefused("the study is another than the manifest names")
        package = cls(manifest, found, study, fingerprint(signer), trusted is not None, keys.digest(content))
        package._check_lineage()
        _ = package.longest_side_px
        if not package.tensors or not all(np.isfinite(tensor).all() for tensor in package.tensors.values()):
            raise PackageRefused("the weights hold values that are not finite numbers, or none at all")
        return package

    def _check_lineage(self) -> None:
        """Raise PackageRefused unless manifest, card and study tell one story; a head that contradicts its key raises too."""
        card, facts = json.loads(self.files["card.json"]), self.manifest
        initial = self.study.network.initial
        story = {
            "study": (card["digest"], self.study.digest),
            "run": (card["run_id"], facts["run_id"]),
            "round": (card["selected_round"], facts["lineage"]["round"]),
            "first weights": (initial.sha256 if initial is not None else None, facts["lineage"]["parent"]),
        }
        if differ := [name for name, (one, other) in story.items() if one != other]:
            raise PackageRefused(
                f"its lineage does not hold together: card, manifest and study differ in {', '.join(differ)}"
            )
        point = self.coordinator
        if bool(point) != any(head["party"] == COORDINATOR for head in facts["heads"]):
            raise PackageRefused("it names a coordinator without a head of its journal, or the other way round")
        for head in self.heads:
            if head.party == COORDINATOR:
                head.verify([keys.load_point(point)])

    @property
    def coordinator(self) -> str:
        """The key of the coordinator whose journal the package is tied to, as `keys.point_hex` writes it; "" if to none."""
        return str(self.manifest.get("coordinator", ""))

    @property
    def heads(self) -> list[SignedHead]:
        """Signed heads of journals as they stood when the model was released."""
        return [SignedHead.of_facts(facts) for facts in self.manifest["heads"]]

    @cached_property
    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """The weights, float32, by layer. Raises PackageRefused for another type."""
        found = load(self.files["model.safetensors"])
        if any(tensor.dtype != np.float32 for tensor in found.values()):
            raise PackageRefused("the weights are not all float32")
        return found

    @cached_property
    def longest_side_px(self) -> int:
        """To which radiographs were reduced before they came to the grid; a card that says nothing is older than the setting.

        Raises PackageRefused for what is no such number.
        """
        found = json.loads(self.files["card.json"]).get("longest_side_px", LONGEST_SIDE_PX)
        low, high = LONGEST_SIDE_RANGE
        if type(found) is not int or not low <= found <= high:
            raise PackageRefused("the model card says no side of radiographs that sites can have")
        return found

    @property
    def file_name(self) -> str:
        return f"{self.manifest['name']}-{self.manifest['version']}{ENDING}"

    def facts(self) -> dict[str, Any]:
        """What may be said of the package in one document: the manifest, who signed it, and its own hash."""
        return {"sha256": self.sha256, "signer": self.signer, "signer_trusted": self.trusted, **self.manifest}


def listing(folder: Path, trusted: Collection[str] | None = None) -> list[tuple[Path, Package | PackageRefused]]:
    """Every package of a folder in the order of name and version, each opened or with why it is refused."""
    found: list[tuple[Path, Package | PackageRefused]] = []
    for path in folder.glob(f"*{ENDING}"):
        try:
            found.append((path, Package.open(path, trusted)))
        except PackageRefused as refused:
            found.append((path, refused))
    return sorted(found, key=lambda pair: _place(*pair))


def _place(path: Path, package: Package | PackageRefused) -> tuple[str, list[int], str]:
    if isinstance(package, PackageRefused):
        return path.name, [], path.name
    return package.manifest["name"], version_key(package.manifest["version"]), path.name


def _zipped(files: Files) -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive:
        for name in (*SEALS, *FILES):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, files[name])
    return whole.getvalue()


def _unzipped(content: bytes) -> dict[str, bytes]:
    """The files of a package's zip. Raises PackageRefused unless it is exactly the zip that `pack` writes of them."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            # Names first: nothing is read of a zip that holds a path, a name twice, or a file too many.
            if [entry.filename for entry in entries] != [*SEALS, *FILES]:
                raise PackageRefused("it does not hold exactly the files of a package")
            # What is stored as it is cannot grow: a zip bomb needs compression, or files that overlap.
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > len(content):
                raise PackageRefused("its files are compressed, or larger than itself")
            files = {entry.filename: archive.read(entry) for entry in entries}
    except (
        zipfile.BadZipFile,
        OSError,
        EOFError,
        ValueError,
        NotImplementedError,
        RuntimeError,
        KeyError,
        struct.error,
    ) as error:
        raise PackageRefused(f"it is no whole zip file ({type(error).__name__})") from None
    if _zipped(files) != content:
        raise PackageRefused("the zip holds more than its files, or was written by something else")
    return files
