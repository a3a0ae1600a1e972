"""`make bench`, the part about images: indexing, decoding, and reading from the cache beside the least that each could cost.

indexing: the first look at CT slices by as many processes as there are cores, beside pydicom's header reading and SHA-256 in as
many. decode: our decoder for each transfer syntax beside the fastest plugin that pydicom has for it. loader: the share of a
training step that waits for its images. Both sides are measured in turn, in one run; medians of RUNS count.
"""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

RUNS = 7
SLICES, SIDE = 2400, 512
SYNTAXES = {
    "RLE": "1.2.840.10008.1.2.5",
    "JPEG-LS": "1.2.840.10008.1.2.4.80",
    "JPEG 2000": "1.2.840.10008.1.2.4.90",
}
PLUGINS = ("gdcm", "pylibjpeg", "pyjpegls", "pydicom", "pillow")


def main() -> None:
    print(json.dumps(measured(), indent=1))


def measured() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="isocenter-bench-") as folder:
        return {"indexing": indexing(Path(folder)), "decode": decode(), "loader": loader(Path(folder))}


def bare(path: str) -> tuple[str, str]:
    """The least that an index needs of a file: its bytes, their hash, and what pydicom makes of the header."""
    import pydicom

    data = Path(path).read_bytes()
    dataset = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
    return hashlib.sha256(data).hexdigest(), str(dataset.SOPInstanceUID)


def indexing(folder: Path) -> dict[str, Any]:
    import numpy as np
    from pydicom.data import get_testdata_file

    from fl_client.ingest import distrust, ingest
    from fl_client.site import Source

    images = folder / "ct"
    images.mkdir()
    template: Any = get_testdata_file("CT_small.dcm", read=True)  # a scanner's whole header, with its private groups
    template.Rows = template.Columns = SIDE
    template.PixelData = np.random.default_rng(1).integers(-1000, 1000, (SIDE, SIDE)).astype("<i2").tobytes()
    for number in range(SLICES):
        # Each at a place of its own and in a series of its own: looking is measured, and no volume is made.
        template.SOPInstanceUID = template.SeriesInstanceUID = f"1.2.3.{number}"
        template.file_meta.MediaStorageSOPInstanceUID = template.SOPInstanceUID
        template.save_as(images / f"{number:05d}", enforce_file_format=True)
    (folder / "labels.csv").write_text("key,finding\n1,yes\n")
    mapping = {"table": "labels.csv", "key": "key", "matches": "study_uid"}
    mapping |= {"targets": {"opacity": {"column": "finding", "words": {"yes": 1}}}}  # type: ignore[dict-item]
    source = Source.model_validate({"folder": "ct", "labels": mapping})
    jobs = len(os.sched_getaffinity(0))
    moments: list[float] = []

    def look(stage: str, done: int, total: int) -> None:
        if stage == "looking at files":
            moments.append(time.monotonic())

    def ours() -> float:
        moments.clear()
        if (folder / "state" / "index.sqlite").exists():
            distrust(folder / "state")
        ingest(source, folder, folder / "state", look, jobs)
        return moments[-1] - moments[0]

    paths = [str(path) for path in sorted(images.iterdir())]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:

        def least() -> float:
            began = time.monotonic()
            for _ in pool.imap_unordered(bare, paths, chunksize=8):
                pass
            return time.monotonic() - began

        note = f"{SLICES} CT slices of {SIDE} x {SIDE}, {jobs} processes; header and SHA-256 alone"
        return compared(ours, least, note)


def decode() -> dict[str, Any]:
    """For each syntax our decoder beside the fastest plugin, as a ratio."""
    import numpy as np
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(2)
    smooth = gaussian_filter(rng.normal(0, 1, (1500, 1500)), 12) * 4000 + 2000
    stored = (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 4095).astype("<u2")
    return {name: _decoded(stored, syntax) for name, syntax in SYNTAXES.items()}


def _decoded(stored: Any, syntax: str) -> dict[str, Any]:
    from pydicom.pixels import pixel_array

    from models.imaging import stored_values

    dataset = _radiograph(stored)
    dataset.compress(syntax, generate_instance_uid=False)

    def by(plugin: str) -> Any:
        return pixel_array(dataset, raw=True, decoding_plugin=plugin)

    times = {}
    for plugin in PLUGINS:
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError, AttributeError):
            times[plugin] = statistics.median(seconds(partial(by, plugin), 3))
    fastest = min(times, key=lambda plugin: times[plugin])
    note = f"1500 x 1500, 12 bits; fastest of {len(times)} plugins: {fastest}"
    return compared(lambda: stored_values(dataset), partial(by, fastest), note)


def _radiograph(stored: Any) -> Any:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel, dataset.PixelRepresentation = "MONOCHROME2", 1, 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


def loader(folder: Path) -> dict[str, Any]:
    """Seconds that an epoch spends on getting its images from the cohort's map, beside the whole epoch."""
    import torch

    from fl_client.cohort import Cohort
    from fl_client.ingest import Index, ingest
    from fl_client.phantom import VENDORS, make_hospital
    from fl_client.site import Source
    from models import learning, networks
    from models.labels import LabelTable
    from models.study import Study, parse

    torch.set_num_threads(1)
    mapping = make_hospital(folder / "hospital", "bench", 150, 1, VENDORS["aurora"])
    source = Source.model_validate({"folder": str(folder / "hospital" / "dicom"), "labels": mapping})
    ingest(source, folder, folder / "loader")
    text = {
        **{"name": "bench", "title": "Benchmark", "purpose": "Seconds.", "task": {"targets": ["opacity"]}},
        **{"training": {"rounds": RUNS, "batch_size": 16}, "privacy": "none", "images": {"size_px": 96}},
        "participation": {"sites": ["a", "b", "c"], "quorum": 3},
    }
    study = parse(Study, json.dumps(text), "bench")
    labels = LabelTable.open(folder, source.labels)
    cohort = Cohort.open(Index.open(folder / "loader"), labels, study, "train", folder / "pins.json")
    net, order = networks.build(study), torch.randperm(len(cohort))

    def reading() -> None:
        for rows in order.split(16):
            cohort.images[rows].to(torch.float32)

    learning.learn(net, cohort, study, round_number=1)
    epochs = seconds(lambda: learning.learn(net, cohort, study, round_number=2), RUNS)
    waits = seconds(reading, RUNS)
    share = statistics.median(waits) / statistics.median(epochs)
    note = f"{len(cohort)} images of 96 x 96 from the map, small_cnn, one core: getting them, and the epoch"
    return entry(waits, epochs, note) | {"ratio": round(share, 4)}


def compared(ours: Callable[[], Any], least: Callable[[], Any], note: str) -> dict[str, Any]:
    """Both in turn, RUNS times; a function that returns seconds is believed, because it knows what to leave out."""
    mine, theirs = [], []
    for number in range(RUNS + 1):
        pair = [_timed(ours), _timed(least)]
        if number:  # the first pair warms caches
            mine.append(pair[0])
            theirs.append(pair[1])
    return entry(mine, theirs, note)


def entry(ours: list[float], limit: list[float], note: str) -> dict[str, Any]:
    mine, least = statistics.median(ours), statistics.median(limit)
    return {"ratio": round(mine / least, 2), "limit_s": round(least, 4), "ours_s": round(mine, 4), "note": note}


def seconds(work: Callable[[], Any], runs: int) -> list[float]:
    return [_timed(work) for _ in range(runs)]


def _timed(work: Callable[[], Any]) -> float:
    began = time.monotonic()
    found = work()
    return found if isinstance(found, float) else time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
