"""Weights to start from, kept by the coordinator as HOME/weights/<sha256>. Studies name them by hash; sites need no file."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from models.study import Study
from privacy import keys
from privacy.errors import StudyConflict

FOLDER = "weights"


class Held(NamedTuple):
    """One file of weights."""

    sha256: str
    bytes: int


def add(root: Path, file: Path) -> Held:
    """Keep a copy of `file` in the consortium's folder `root`; adding it twice changes nothing.

    Raises DocumentError if nothing could be started from it; then it is not kept.
    """
    from models import weights  # torch takes two seconds to load, and whoever only lists files needs none

    weights.read(file)
    content = file.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    weights.read(file, sha256)  # the bytes that are kept are bytes that were read
    keys.write_private(root / FOLDER / sha256, content)
    return Held(sha256, len(content))


def held(root: Path) -> list[Held]:
    """What is there, in the order of the hashes."""
    found = (root / FOLDER).glob("[0-9a-f]" * 64) if (root / FOLDER).is_dir() else ()
    return sorted(Held(path.name, path.stat().st_size) for path in found)


def file_of(root: Path, study: Study) -> Path | None:
    """The file that `study` starts from; None if it starts from its seed.

    Raises StudyConflict if it is not held here. Its content is checked against the hash when it is read.
    """
    if study.network.initial is None:
        return None
    path = root / FOLDER / study.network.initial.sha256
    if not path.is_file():
        raise StudyConflict(
            f"the study starts from weights {study.network.initial.sha256[:12]}, which the coordinator does not have",
            remedy="Have the coordinator add the file with `fl-server weights add FILE`; a simulation takes it with --weights.",
        )
    return path
