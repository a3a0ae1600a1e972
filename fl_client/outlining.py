"""The site's half of `fl-study predict` for a model that outlines: a folder of DICOM in, one DICOM SEG for each image out.

Files are read as `ingest` reads them and brought to the study's grid by the same functions, so an outline is the one that the
image would get in the study. It goes back to the image's own pixels by the nearest voxel, and its SEG names the instances that
it is of. Nothing of it leaves: outlines and file names go to whoever runs the command.
"""

import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from fl_client.cohort import on_grid
from fl_client.headers import parse_whole
from fl_client.index import Index, IndexedImage
from fl_client.ingest import ingest
from fl_client.scoring import ANOTHER_MODALITY
from fl_client.site import Source
from fl_client.sources import Folder
from models import exporting
from models.imaging import quiet_reading
from models.masks import from_plane_grid, from_volume_grid
from models.registry import Package
from models.study import Study
from privacy import keys
from privacy.errors import TrainingDiverged

NO_TABLE = {
    "table": "none",
    "key": "none",
    "matches": "study_uid",
    "targets": {"none": {"column": "none", "words": {"none": 0}}},
}
EMPTY_IF_MISSING = ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "AccessionNumber")
"""What every SEG has to have (type 2 of PS3.3) and many radiographs lack."""
Bool = NDArray[np.bool_]


@dataclass
class Outlined:
    """`rows`: first file below the folder, Series and SOP Instance UID, name of the SEG, and of each structure its volume in ml
    or, on a radiograph, its area in cm² (None where nobody knows the size of a pixel). `left_out`: files by reason.
    """

    rows: list[tuple[str, str, str, str, list[float | None]]]
    left_out: Counter[str]


def outline(package: Package, folder: Path, out: Path, jobs: int, tell: Callable[[int, int], None]) -> Outlined:
    """Outline every image below `folder` that is of the study's kind, into `out`, which is made; `tell` hears how many are done.

    `jobs`: confined reading processes; 0 reads in this process, for images known to be sound. Raises PackageRefused for weights
    of another network, TrainingDiverged if the network answers with what is no number.
    """
    study, net, found = package.study, exporting.network(package), Outlined([], Counter())
    items = {item.name: item for item in Folder(folder).items()}
    facts = {
        "folder": str(folder.resolve()),
        "labels": NO_TABLE,
        "scaling": study.images.scaling,
        "longest_side_px": package.longest_side_px,
        "damaged_share_max": 1,
    }
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        ingest(Source.model_validate(facts), root, root / "state", jobs=jobs)
        index = Index.open(root / "state")
        found.left_out.update({str(reason): count for reason, count in index.reasons().items()})
        images = [image for image in index.images() if image.modality in study.images.modalities]
        found.left_out[ANOTHER_MODALITY] += sum(image.files for image in index.images()) - sum(i.files for i in images)
        out.mkdir(mode=0o700)
        for number, image in enumerate(images, start=1):
            with torch.inference_mode():
                logits = net(torch.from_numpy(on_grid(index, image, study))[None])[0]
            if not bool(torch.isfinite(logits).all()):
                raise TrainingDiverged("the network answers with values that are not numbers")
            outlines = _on_image((logits > 0).numpy(), image, study)
            name, names = f"{number:05d}.dcm", index.files_of(image)
            sources = [_header(items[one].read()) for one in names]
            made = segmentation(outlines, sources, package)
            made.save_as(out / name)
            (out / name).chmod(0o600)
            sizes = [_size(int(one.sum()), image) for one in outlines]
            found.rows.append((image.file, image.series_uid, image.sop_uid, name, sizes))
            tell(number, len(images))
    found.left_out += Counter()  # without what is 0
    return found


def _on_image(outlines: Bool, image: IndexedImage, study: Study) -> Bool:
    """(T, H, W) or (T, D, H, W) on the pixels of the image's files."""
    if study.images.volume is None:
        rows, columns = image.matrix
        return from_plane_grid(outlines, (rows, columns))
    affine = np.array(image.affine, np.float64).reshape(3, 4)
    return from_volume_grid(outlines, image.shape, affine, study.images.volume)


def _size(voxels: int, image: IndexedImage) -> float | None:
    """Millilitres of so many voxels, or cm² of so many pixels."""
    if image.is_volume:
        return voxels * abs(float(np.linalg.det(np.array(image.affine).reshape(3, 4)[:, :3]))) / 1000
    return None if image.spacing_mm is None else voxels * math.prod(image.spacing_mm) / 100


def _header(data: bytes) -> Dataset:
    with quiet_reading():
        dataset = parse_whole(data)
        for keyword in EMPTY_IF_MISSING:
            if keyword not in dataset:
                setattr(dataset, keyword, "")
    return dataset


def segmentation(outlines: Bool, sources: list[Dataset], package: Package) -> Any:
    """A binary DICOM SEG of outlines (T, H, W), or (T, D, H, W) with one source for each slice, in the order of the slices."""
    import highdicom
    from pydicom.sr.codedict import codes

    study, version = package.study, str(package.manifest["version"])
    family = highdicom.AlgorithmIdentificationSequence(study.name, codes.DCM.ArtificialIntelligence, version)
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            # What a structure is, the study's name for it says; no code of a terminology is guessed from a name.
            segmented_property_category=codes.SCT.SpatialAndRelationalConcept,
            segmented_property_type=highdicom.sr.CodedConcept(f"S{number}", "99ISOCENTER", name),
            algorithm_type="AUTOMATIC",
            algorithm_identification=family,
        )
        for number, name in enumerate(study.task.targets, start=1)
    ]
    frames = np.moveaxis(outlines if outlines.ndim == 4 else outlines[:, None], 0, -1).astype(np.uint8)
    with quiet_reading(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an outline of nothing is kept with all its empty frames
        return highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=frames,
            segmentation_type="BINARY",
            segment_descriptions=segments,
            series_instance_uid=highdicom.UID(),
            series_number=900,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="Isocenter",
            manufacturer_model_name=study.name,
            software_versions=version,
            device_serial_number=keys.digest(package.sha256.encode())[:16],
            series_description=study.title[:64],
        )
