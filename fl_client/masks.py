"""Reference masks of a site, as `fl_client.mask_files` left them behind: one bit a structure, on the voxels of its image.

What is taken lies below state/masks like the pixels of images; state/masks.json says which mask is of which image. Both can be
made again. Apart from what reads mask files, because what trains on masks that were taken before needs no reader in memory.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fl_client.cache import Cache
from fl_client.index import IndexedImage
from fl_client.observed import answered
from fl_client.sources import Reason
from models.labels import Label, LabelMap
from models.study import Regression, Study
from privacy import disk, keys
from privacy.errors import CacheLost

VERSION = 1  # of masks.json
Bits = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Mask:
    """The mask of one image: `cache` names its bits, `content` is their hash. `annotated`: structures that it speaks about."""

    cache: str
    content: str
    annotated: list[str]
    present: list[str]


@dataclass
class Masks:
    """What `ingest` left behind of a site's masks. `structures`: their names, in the order of the bits; `taken`: by the cache
    name of the image; `left_out`: by file.
    """

    state: Path
    structures: list[str] = field(default_factory=list)
    taken: dict[str, Mask] = field(default_factory=dict)
    left_out: dict[str, Reason] = field(default_factory=dict)
    cache_key: str = ""

    @classmethod
    def open(cls, state: Path) -> "Masks":
        """Those below `state`; none where none were ingested. Raises CacheLost for a damaged file or one of another version."""
        path = file_of(state)
        if not path.exists():
            return cls(state)
        try:
            found = json.loads(path.read_bytes())
            disk.require_known(path, found["version"], VERSION)
            taken = {name: Mask(**mask) for name, mask in found["taken"].items()}
            left_out = {name: Reason(reason) for name, reason in found["left_out"].items()}
            return cls(state, list(found["structures"]), taken, left_out, found["cache_key"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise CacheLost(f"{path}: the index of masks cannot be read") from None

    def store(self) -> None:
        facts = {
            "version": VERSION,
            "structures": self.structures,
            "cache_key": self.cache_key,
            "taken": {name: vars(mask) for name, mask in sorted(self.taken.items())},
            "left_out": {name: str(reason) for name, reason in sorted(self.left_out.items())},
        }
        keys.write_private(file_of(self.state), json.dumps(facts, indent=0).encode())

    @property
    def cache(self) -> Cache:
        return cache_of(self.state, self.cache_key)

    def bits(self, image: IndexedImage) -> Bits:
        """uint8 of the image's own shape, bit n for structure n. Raises CacheLost."""
        mask = self.taken[image.cache]
        stored: Bits = self.cache.read(mask.cache, mask.content)
        if stored.dtype != np.uint8:
            raise CacheLost(f"{mask.cache}: this is no cached mask")
        return stored

    def labels(self, image: IndexedImage, targets: Iterable[str]) -> tuple[Label, ...]:
        """Of each target: 1 if it is in the image's mask, 0 if it is not, None if nobody looked, or there is no mask."""
        mask = self.taken.get(image.cache)
        if mask is None:
            return tuple(None for _ in targets)
        told = mask.annotated
        return tuple((1 if name in mask.present else 0) if name in told else None for name in targets)

    def reasons(self) -> Counter[Reason]:
        return Counter(self.left_out.values())


def mapped(state: Path, labels: LabelMap, study: Study) -> list[str]:
    """Targets of `study` of which this site says what they are: in its masks, or in its label table."""
    here = Masks.open(state).structures if study.segments else answered(labels, study.task)
    return [name for name in study.task.targets if name in here]


def where(study: Study) -> str:
    """The part of site.yaml that says so."""
    if study.segments:
        return "data.masks.structures"
    return "data.labels.numbers" if isinstance(study.task, Regression) else "data.labels.targets"


def file_of(state: Path) -> Path:
    return state / "masks.json"


def cache_of(state: Path, key: str) -> Cache:
    return Cache(state / "masks", Path(key) if key else None)
