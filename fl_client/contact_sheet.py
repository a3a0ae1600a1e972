"""Images of a site for its own screen: what their grey values look like, a few of each kind, and those that look odd.

Which images are measured and shown is decided by a hash under a key that never leaves the site: repeatable here, and nobody
chooses. A thumbnail carries a token instead of a number or a name; HOME/private/thumbnails.tsv (0600) says which file a token
stands for, and it is the token under which a log mentions the file.
"""

import base64
import csv
import io
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from fl_client.facts import UNKNOWN, Rows, Tally, vendor_names
from fl_client.index import Index, IndexedImage
from models import burned_in
from privacy import deidentify, keys
from privacy.errors import CacheLost

MEASURED_MAX = 1500  # radiographs opened: some 15 seconds, and more than a distribution needs
VOLUMES_MAX = 24  # volumes opened: reading one checks all of its hundred megabytes
STRIDE = 4  # rows and columns of which one is measured
SIDE_PX = 144
QUALITY = 72  # of JPEG: 3 to 6 KB an image
GROUPS_MAX = 8
PER_GROUP = 6
ODD_MAX = 24
PAIRS_MAX = 12
BRIGHTNESS_BINS = 20
LUNG_HU = (-1000.0, 400.0)  # window in which a slice of a CT is shown
ASPECT_MOST = 1.8  # longer over shorter side; detectors have at most 1.25, so more was cut or is no chest
SPREAD_LEAST = 0.04  # standard deviation of grey values; an exposure of a person has 0.15 to 0.35
DEVIATIONS_MOST = 4.5  # robust standard deviations of mean brightness from the middle of its group
DEVIATION_LEAST = 0.03  # so that a group of nearly equal images has no outliers
ALIKE_PX = 32
ALIKE_LEAST = 0.975
"""Correlation of two images, reduced to ALIKE_PX on a side, from which they are likely one exposure. Of 44,850 pairs of 300 real
radiographs the most alike of two patients have 0.94; the same exposure as JPEG, at half the size, with another gamma or a border
of one percent cut off has at least 0.98.
"""
LOOKUP = "thumbnails.tsv"


@dataclass(frozen=True)
class Thumbnail:
    """One small picture: `data` is a JPEG in base64, `words` say what it shows, `why` what is odd about it."""

    token: str
    data: str
    words: str
    why: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grey:
    """Grey values of the measured images of one manufacturer, 0 black to 1 white.

    `low`, `high`: middle of the values in the files that became 0 and 1.
    """

    images: int
    brightness: tuple[float, float, float]  # 10th, 50th and 90th percentile of the images' means
    contrast: float  # middle standard deviation
    low: float
    high: float


@dataclass(frozen=True)
class Sheet:
    """`measured` of `images` were opened, `lost` could not be; `groups`: thumbnails by view and manufacturer.

    `alike`: pairs of measured radiographs of two patients that look like one exposure, stored differently.
    """

    images: int
    measured: int
    lost: int
    brightness: Tally
    contrast: Tally
    grey: dict[str, Grey]
    alike: int
    groups: dict[str, list[Thumbnail]] = field(default_factory=dict)
    pairs: list[tuple[Thumbnail, Thumbnail]] = field(default_factory=list)
    odd: list[Thumbnail] = field(default_factory=list)
    odd_in_all: int = 0


@dataclass(frozen=True)
class _Seen:
    """One image that was opened, in bytes as it is shown, with mean and standard deviation of its grey values.

    `coarse` float32 (ALIKE_PX ** 2,): the image as a vector of length 1, so that a product of two is their correlation.
    """

    image: IndexedImage
    patient: str
    token: str
    vendor: str
    group: str
    picture: npt.NDArray[np.uint8]
    coarse: npt.NDArray[np.float32]
    mean: float
    spread: float


def make_sheet(index: Index, home: Path, rows: Rows, *, thumbnails: bool) -> Sheet:
    """Open up to MEASURED_MAX images of `rows`, and those that the index itself finds odd. `thumbnails`: also draw some of them.

    With thumbnails, HOME/private/thumbnails.tsv is replaced. An image whose pixels are gone is counted and passed over.
    """
    folder = home / deidentify.FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    key = keys.token_key(folder / "token.key")
    tokens = {image.file: keys.token(key, image.file) for image in index.images()}
    by_token = sorted(index.images(), key=lambda image: tokens[image.file])
    drawn = [image for image in by_token if not image.is_volume][:MEASURED_MAX]
    drawn += [image for image in by_token if image.is_volume][:VOLUMES_MAX]
    known = set(drawn)
    by_index = [image for image in by_token if image not in known and _odd_by_header(image)][:ODD_MAX]
    look = _looking(index, tokens, rows)
    opened = [look(image) for image in drawn]
    measured = [one for one in opened if one is not None]
    pairs = _alike(measured)
    sheet = _measured(measured, len(opened) - len(measured), index.taken, len(pairs))
    if not thumbnails:
        return sheet
    odd = _odd(measured + [one for one in map(look, by_index) if one is not None])
    ordinary = _groups(measured, {one.token for one, _ in odd})
    shown = {name: [_thumbnail(one) for one in some] for name, some in ordinary.items()}
    strange = [_thumbnail(one, why) for one, why in odd[:ODD_MAX]]
    tied = [(_thumbnail(one), _thumbnail(other)) for one, other in pairs[:PAIRS_MAX]]
    named = {thumbnail.token for some in (*shown.values(), strange, *tied) for thumbnail in some}
    _write_lookup(folder / LOOKUP, [image for image in by_token if tokens[image.file] in named], tokens)
    return replace(sheet, groups=shown, pairs=tied, odd=strange, odd_in_all=len(odd))


def _looking(index: Index, tokens: dict[str, str], rows: Rows) -> Callable[[IndexedImage], _Seen | None]:
    vendor, patients = vendor_names(rows), {image.file: patient for patient, image in rows}

    def look(image: IndexedImage) -> _Seen | None:
        try:
            pixels = _slice(index.volume(image)) if image.is_volume else index.pixels(image)
        except CacheLost:
            return None
        some = pixels[::STRIDE, ::STRIDE]
        kind = "CT" if image.is_volume else f"{image.view} view" if image.view != UNKNOWN else "view unknown"
        maker = vendor(image)
        return _Seen(
            image=image,
            patient=patients[image.file],
            token=tokens[image.file],
            vendor=maker or UNKNOWN,
            group=f"{kind}, {maker or 'maker unknown'}",
            picture=_shrunk(pixels),
            coarse=_coarse(pixels),
            mean=float(some.mean()),
            spread=float(some.std()),
        )

    return look


def _slice(volume: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
    """The middle slice, float32 (H, W): 0 to 1 is the window of lungs."""
    low, high = LUNG_HU
    middle = (volume[len(volume) // 2].astype(np.float32) - low) / (high - low)
    result: npt.NDArray[np.float32] = middle.clip(0, 1)
    return result


def _shrunk(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    picture = Image.fromarray((pixels * 255).astype(np.uint8))
    picture.thumbnail((SIDE_PX, SIDE_PX))
    return np.asarray(picture)


def _coarse(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    small = Image.fromarray((pixels * 255).astype(np.uint8)).resize((ALIKE_PX, ALIKE_PX), Image.Resampling.BOX)
    vector = np.asarray(small, dtype=np.float32).ravel()
    vector = vector - vector.mean()
    length = float(np.linalg.norm(vector))
    result: npt.NDArray[np.float32] = vector / length if length else vector
    return result


def _alike(seen: list[_Seen]) -> list[tuple[_Seen, _Seen]]:
    """Radiographs under two patients that look like one exposure: equal pixels are one image, but a copy is seldom equal."""
    some = [one for one in seen if not one.image.is_volume]
    if not some:
        return []
    vectors = np.stack([one.coarse for one in some])
    pairs = np.argwhere(np.triu(vectors @ vectors.T, 1) >= ALIKE_LEAST).tolist()
    return [(some[a], some[b]) for a, b in pairs if some[a].patient != some[b].patient]


def _measured(seen: list[_Seen], lost: int, images: int, alike: int) -> Sheet:
    by_vendor: dict[str, list[_Seen]] = {}
    for one in seen:
        by_vendor.setdefault(one.vendor, []).append(one)
    grey = {name: _grey(some) for name, some in sorted(by_vendor.items(), key=lambda item: -len(item[1]))}
    return Sheet(
        images=images,
        measured=len(seen),
        lost=lost,
        brightness=_spread_out([one.mean for one in seen], 1.0, lost),
        contrast=_spread_out([one.spread for one in seen], 0.5, lost),
        grey=grey,
        alike=alike,
    )


def _spread_out(values: list[float], top: float, lost: int) -> Tally:
    """Counts of `values` in equal bins from 0 to `top`, named by their lower ends."""
    counts, edges = np.histogram(np.minimum(values, top), bins=BRIGHTNESS_BINS, range=(0, top))
    names = [f"{low:.3g} to {high:.3g}" for low, high in itertools.pairwise(edges.tolist())]
    return Tally(
        "images", {name: int(count) for name, count in zip(names, counts, strict=True)} if values else {}, lost
    )


def _grey(some: list[_Seen]) -> Grey:
    low, middle, high = np.percentile([one.mean for one in some], [10, 50, 90])
    return Grey(
        images=len(some),
        brightness=(float(low), float(middle), float(high)),
        contrast=float(np.median([one.spread for one in some])),
        low=float(np.median([one.image.low for one in some])),
        high=float(np.median([one.image.high for one in some])),
    )


def _odd_by_header(image: IndexedImage) -> tuple[str, ...]:
    """What is odd about an image that is not even opened."""
    why = []
    if image.text >= burned_in.THRESHOLD:
        why.append("may hold text")
    if max(image.shape[-2:]) > ASPECT_MOST * min(image.shape[-2:]):
        why.append("very long or wide")
    return tuple(why)


def _odd(seen: list[_Seen]) -> list[tuple[_Seen, tuple[str, ...]]]:
    """Images that somebody should look at, each with every reason."""
    means: dict[str, list[float]] = {}
    for one in seen:
        means.setdefault(one.group, []).append(one.mean)
    found = []
    for one in seen:
        group = np.asarray(means[one.group])
        middle = float(np.median(group))
        deviation = max(DEVIATION_LEAST, 1.4826 * float(np.median(np.abs(group - middle))))
        why = list(_odd_by_header(one.image))
        if one.spread < SPREAD_LEAST:
            why.append("nearly blank")
        if abs(one.mean - middle) > DEVIATIONS_MOST * deviation:
            why.append("much brighter than its kind" if one.mean > middle else "much darker than its kind")
        if why:
            found.append((one, tuple(why)))
    return _mixed(found)


def _mixed(found: list[tuple[_Seen, tuple[str, ...]]]) -> list[tuple[_Seen, tuple[str, ...]]]:
    """Those with most reasons first, then one of each reason in turn: a frequent reason must not hide a rare one."""
    turns: Counter[tuple[str, ...]] = Counter()
    ranked = []
    for one, why in sorted(found, key=lambda item: -item[0].image.text):
        ranked.append((-len(why), turns[why], one.token, one, why))
        turns[why] += 1
    return [(one, why) for *_, one, why in sorted(ranked, key=lambda item: item[:3])]


def _groups(seen: list[_Seen], odd: set[str]) -> dict[str, list[_Seen]]:
    """Up to PER_GROUP ordinary images of each of the GROUPS_MAX largest kinds."""
    groups: dict[str, list[_Seen]] = {}
    for one in seen:
        groups.setdefault(one.group, []).append(one)
    largest = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))[:GROUPS_MAX]
    return {name: [one for one in some if one.token not in odd][:PER_GROUP] for name, some in largest}


def _thumbnail(one: _Seen, why: tuple[str, ...] = ()) -> Thumbnail:
    file = io.BytesIO()
    Image.fromarray(one.picture).save(file, "JPEG", quality=QUALITY)
    return Thumbnail(one.token, base64.b64encode(file.getvalue()).decode(), one.group, why)


def _write_lookup(path: Path, images: list[IndexedImage], tokens: dict[str, str]) -> None:
    """Token, file and patient of each image shown, for the person who has to find it."""
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow(("token", "file", "patient"))
    table.writerows((tokens[image.file], image.file, image.patient) for image in images)
    keys.write_private(path, text.getvalue().encode("utf-8", "surrogateescape"))
