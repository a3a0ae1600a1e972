"""Masks at a site: NIfTI and DICOM SEG on their images, and every way in which one is no mask of this site, by name."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import highdicom as hd
import nibabel
import numpy as np
import pydicom
import pytest
from hospital import COORDINATOR
from pydicom.sr.codedict import codes

from fl_client import mask_files, masks
from fl_client.cohort import Cohort
from fl_client.index import Index
from fl_client.ingest import ingest
from fl_client.masks import Masks
from fl_client.rehearsal import prepare
from fl_client.site import MaskMap, Site
from fl_client.sources import Reason
from models.labels import LabelTable
from models.study import Study
from privacy.errors import CacheLost, LabelTableError, NewerVersion

STUDY = Study.model_validate(
    {
        "name": "s",
        "title": "t",
        "purpose": "p",
        "task": {"kind": "segmentation", "targets": ["opacity", "lungs", "heart"]},
        "images": {"size_px": 64},
        "network": {"name": "unet"},
        "training": {"rounds": 1},
        "privacy": "none",
        "protection": "plain",
        "participation": {"sites": ["north"], "quorum": 1, "minimum_patients": 1},
    }
)
CT = STUDY.model_copy(
    update={
        "images": type(STUDY.images).model_validate(
            {"modalities": ["CT"], "volume": {"spacing_mm": [20, 12, 12], "size": [16, 24, 32]}}
        )
    }
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A home of radiographs and one of CT, ingested with their masks."""
    folder = tmp_path_factory.mktemp("masks")
    public = COORDINATOR.public_key()
    prepare(folder / "dx", "north", (8, 3), public, made=["masks"])
    prepare(folder / "ct", "north", (3, 0), public, made=["masks", "volumes"])
    return {"dx": folder / "dx", "ct": folder / "ct"}


@pytest.fixture
def home(made: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies that a test may change; images and their cache stay what they were."""
    for name, path in made.items():
        shutil.copytree(path, tmp_path / name)
        text = (tmp_path / name / "site.yaml").read_text().replace(str(path), str(tmp_path / name))
        (tmp_path / name / "site.yaml").write_text(text)
    return {name: tmp_path / name for name in made}


def read(home: Path) -> Masks:
    return Masks.open(home / "state")


def again(home: Path, **change: Any) -> Masks:
    """Masks ingested once more, images as they are."""
    from fl_client.readers import Readers

    given = Site.settings_of(home).data
    assert given is not None and given.masks is not None
    mapping = MaskMap.model_validate(given.masks.model_dump() | change)
    with Readers(0, home) as readers:
        return mask_files.ingest(mapping, home, Index.open(home / "state"), readers, lambda done, total: None)


def one(home: Path) -> tuple[Path, Any]:
    """A mask file and the image that it is of."""
    images = {
        image.series_uid if image.is_volume else image.sop_uid: image for image in Index.open(home / "state").images()
    }
    path = sorted((home / "hospital" / "masks").iterdir())[0]
    return path, images[path.name.removesuffix(".nii")]


def opened(home: Path, study: Study) -> Cohort:
    site = Site.open(home)
    labels = LabelTable.open(home, site.source.labels)
    everybody = study.model_copy(
        update={
            "participation": study.participation.model_copy(update={"evaluate_only": ["north"], "sites": ["other"]}),
        }
    )
    return Cohort.open(Index.open(site.state), labels, everybody, "external", site.pins(study))


def test_every_radiograph_and_volume_has_its_mask(made: dict[str, Path]) -> None:
    for home in made.values():
        found, index = read(home), Index.open(home / "state")
        assert set(found.taken) == {image.cache for image in index.images()} and not found.left_out
        assert found.structures == ["lungs", "opacity"]
        assert all(mask.annotated == ["lungs", "opacity"] for mask in found.taken.values())
        assert any("opacity" not in mask.present for mask in found.taken.values())


def test_a_cohort_holds_masks_on_the_grid_of_its_images(made: dict[str, Path]) -> None:
    """What lies in a lung of a phantom CT is darker than what lies around it: half a voxel beside, it would not be."""
    cohort = opened(made["ct"], CT)
    assert cohort.targets.shape == (3, 3, 16, 24, 32) and cohort.targets.dtype.is_floating_point is False
    assert cohort.known.tolist() == [[1, 1, 0]] * 3  # the heart is nobody's structure here
    assert cohort.spacing_mm.tolist() == [[20, 12, 12]] * 3
    for image, mask in zip(cohort.images.numpy(), cohort.targets.numpy(), strict=True):
        lungs, clouds = mask[1] > 0, mask[0] > 0
        assert 50 < lungs.sum() < 2000 and not (clouds & ~lungs).any() and not mask[2].any()
        assert image[0][lungs & ~clouds].mean() < 0.3 and (image[0][lungs & ~clouds] < 0.5).mean() > 0.9
    flat = opened(made["dx"], STUDY)
    assert flat.targets.shape[1:] == (3, 64, 64)
    assert np.allclose(flat.spacing_mm.numpy(), 0.150 * 1024 / 256 * 256 / 64)  # dorado's pixels
    assert flat.counts.positives["lungs"] == len(flat) and flat.counts.negatives["heart"] == 0


def test_masks_move_onto_the_grid_by_the_nearest_pixel(made: dict[str, Path]) -> None:
    """Oracle: the NIfTI file itself, every fourth pixel from the second on (middles of a grid four times coarser)."""
    path, image = one(made["dx"])
    values = np.asarray(nibabel.load(path).dataobj)[:, :, 0].T  # type: ignore[attr-defined]
    cohort = opened(made["dx"], STUDY)
    rows = {member: row for row, member in enumerate(_order(made["dx"]))}
    mask = cohort.targets[rows[image.cache]].numpy()
    assert (mask[1] == (values[2::4, 2::4] > 0)).all() and (mask[0] == (values[2::4, 2::4] == 2)).all()


def _order(home: Path) -> list[str]:
    from fl_client.cohort import join

    site = Site.open(home)
    index = Index.open(site.state)
    return [member.image.cache for member in join(index, LabelTable.open(home, site.source.labels), STUDY)[0]]


def test_known_masks_are_not_read_again_and_changed_ones_are(
    home: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    run = mask_files.Make.run
    monkeypatch.setattr(mask_files.Make, "run", lambda self: ran.append(self.item.name) or run(self))
    before = again(home["dx"]).taken
    assert not ran
    path, image = one(home["dx"])
    found = nibabel.load(path)
    values = np.asarray(found.dataobj).copy()  # type: ignore[attr-defined]
    values[:40] = 0
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)  # type: ignore[no-untyped-call]
    after = again(home["dx"]).taken
    assert ran == [path.name] and after[image.cache] != before[image.cache]
    path.unlink()
    assert image.cache not in again(home["dx"]).taken


# What is refused -----------------------------------------------------------------------------------------------------


def spoil(path: Path, how: Any, affine: Any = None) -> None:
    found = nibabel.load(path)
    values = how(np.asarray(found.dataobj).copy())  # type: ignore[attr-defined]
    where = found.affine if affine is None else affine(found.affine)  # type: ignore[attr-defined]
    nibabel.save(nibabel.Nifti1Image(values, where), path)  # type: ignore[no-untyped-call]


def _with(value: Any) -> Any:
    def change(values: Any) -> Any:
        values = values.astype(np.float32) if isinstance(value, float) else values
        values[3, 3] = value
        return values

    return change


def _shifted(away: float) -> Any:
    return lambda affine: affine + np.array([[0, 0, 0, away]] + [[0] * 4] * 3)


SPOILED: list[tuple[str, str, Any, Any, Reason]] = [
    ("value", "dx", _with(7), None, Reason.MASK_VALUES),
    ("negative", "dx", lambda v: -v.astype(np.int16), None, Reason.MASK_VALUES),
    ("fraction", "dx", _with(0.5), None, Reason.MASK_VALUES),
    ("infinity", "dx", _with(float("inf")), None, Reason.MASK_VALUES),
    ("empty", "dx", np.zeros_like, None, Reason.MASK_EMPTY),
    ("matrix", "dx", lambda v: v[::2, ::2], None, Reason.MASK_GEOMETRY),
    ("volume", "dx", lambda v: np.repeat(v, 3, axis=2), None, Reason.MASK_GEOMETRY),
    ("slices", "ct", lambda v: v[:, :, :-2], None, Reason.MASK_GEOMETRY),
    ("beside", "ct", lambda v: v, _shifted(30), Reason.MASK_GEOMETRY),
    ("turned", "ct", lambda v: v, lambda affine: affine @ np.diag([1, 1, -1, 1.0]), Reason.MASK_GEOMETRY),
]


@pytest.mark.parametrize(("kind", "how", "affine", "reason"), [row[1:] for row in SPOILED], ids=[r[0] for r in SPOILED])
def test_a_mask_that_does_not_fit_is_left_out_by_name_and_the_others_stay(
    home: dict[str, Path], kind: str, how: Any, affine: Any, reason: Reason
) -> None:
    path, image = one(home[kind])
    spoil(path, how, affine)
    found = again(home[kind])
    assert found.left_out == {path.name: reason} and image.cache not in found.taken
    assert len(found.taken) == len(Index.open(home[kind] / "state").images()) - 1


def test_a_mask_of_a_coarser_grid_over_the_same_box_is_taken(home: dict[str, Path]) -> None:
    path, image = one(home["ct"])
    before = read(home["ct"]).bits(image)
    spoil(path, lambda v: v[::2, ::2], lambda a: a @ np.diag([2, 2, 1, 1.0]) + _middle(a))
    found = again(home["ct"])
    assert not found.left_out
    agree = 2 * ((found.bits(image) & 1) & (before & 1)).sum() / ((found.bits(image) & 1).sum() + (before & 1).sum())
    assert agree > 0.85


def _middle(affine: Any) -> Any:
    """The first voxel of a grid twice as coarse lies half an old voxel further in."""
    found = np.zeros((4, 4))
    found[:3, 3] = affine[:3, :2].sum(axis=1) / 2
    return found


def test_an_empty_mask_means_that_nothing_is_there_if_the_site_says_so(home: dict[str, Path]) -> None:
    path, image = one(home["dx"])
    spoil(path, np.zeros_like)
    found = again(home["dx"], empty="absent")
    assert found.taken[image.cache].present == [] and found.taken[image.cache].annotated == ["lungs", "opacity"]
    assert found.labels(image, ["opacity", "heart"]) == (0, None)


def test_values_of_no_interest_are_named_and_count_for_nothing(home: dict[str, Path]) -> None:
    found = again(home["dx"], structures={"lungs": [1]}, ignored=[2])
    assert not found.left_out and found.structures == ["lungs"]
    assert set(again(home["dx"], structures={"lungs": [1]}).left_out.values()) == {Reason.MASK_VALUES}


def test_what_is_no_mask_or_of_no_image_or_twice_there_is_counted(home: dict[str, Path]) -> None:
    folder = home["dx"] / "hospital" / "masks"
    path, image = one(home["dx"])
    (folder / "notes.txt").write_text("hello")
    (folder / "empty.nii").write_bytes(b"")
    (folder / "half.nii").write_bytes(path.read_bytes()[:5000])
    (folder / "1.2.3.nii").write_bytes(path.read_bytes())
    (folder / "dicom.dcm").write_bytes(next((home["dx"] / "hospital" / "dicom").rglob("IM*")).read_bytes())
    (folder / "second").mkdir()
    (folder / "second" / path.name).write_bytes(path.read_bytes())
    found = again(home["dx"])
    assert found.left_out == {
        "notes.txt": Reason.NOT_DICOM,
        "empty.nii": Reason.EMPTY_FILE,
        "half.nii": Reason.MASK_WITHOUT_IMAGE,
        "1.2.3.nii": Reason.MASK_WITHOUT_IMAGE,
        "dicom.dcm": Reason.NOT_A_MASK,
        path.name: Reason.MASK_TWICE,
        f"second/{path.name}": Reason.MASK_TWICE,
    }
    assert image.cache not in found.taken
    (folder / "second" / path.name).unlink()
    path.write_bytes(path.read_bytes()[:5000])
    assert again(home["dx"]).left_out[path.name] == Reason.TRUNCATED


def test_a_damaged_index_of_masks_is_an_error_and_is_made_anew(home: dict[str, Path]) -> None:
    file = masks.file_of(home["dx"] / "state")
    whole = file.read_text()
    for text in ("{", "[]", whole.replace('"taken"', '"token"'), whole.replace('"content"', '"contempt"')):
        file.write_text(text)
        with pytest.raises(CacheLost, match="index of masks"):
            read(home["dx"])
    file.write_text(json.dumps(json.loads(whole) | {"version": 99}))
    with pytest.raises(NewerVersion):
        read(home["dx"])
    file.write_text("{")
    assert len(again(home["dx"]).taken) == len(Index.open(home["dx"] / "state").images())


def test_pixels_of_a_mask_that_changed_on_the_disk_are_not_trained_on(home: dict[str, Path]) -> None:
    _, image = one(home["dx"])
    found = read(home["dx"])
    path = found.cache.path(found.taken[image.cache].cache)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheLost):
        found.bits(image)


def test_a_site_that_names_no_masks_any_more_forgets_them(home: dict[str, Path]) -> None:
    source = Site.settings_of(home["dx"]).data
    assert source is not None
    report = ingest(source, home["dx"], home["dx"] / "state")
    assert (
        report.masks is not None
        and report.masks.taken == report.taken
        and report.masks.present["lungs"] == report.taken
    )
    assert report.to_json()["masks"]["reasons"] == {}
    report = ingest(source.model_copy(update={"masks": None}), home["dx"], home["dx"] / "state")
    assert report.masks is None and not masks.file_of(home["dx"] / "state").exists()
    assert not list((home["dx"] / "state" / "masks" / "cache").rglob("*.npy"))
    with pytest.raises(LabelTableError, match=r"data\.masks\.structures"):
        opened(home["dx"], STUDY)


# DICOM segmentations -------------------------------------------------------------------------------------------------


def described(number: int, label: str) -> Any:
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=label,
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=codes.SCT.Lung,
        algorithm_type="MANUAL",
    )


def segmented(home: Path, image: Any, **change: Any) -> tuple[Any, Any]:
    """(a SEG of the lungs of `image`, its pixels (frames, rows, columns)) as highdicom writes it."""
    files = [pydicom.dcmread(home / "hospital" / "dicom" / name) for name in Index.open(home / "state").files_of(image)]
    for dataset in files:
        dataset.PatientBirthDate = dataset.StudyID = dataset.StudyTime = dataset.ReferringPhysicianName = ""
        dataset.SeriesNumber = dataset.InstanceNumber = 1
    values = (read(home).bits(image) & 1).astype(np.uint8)
    values = values if image.is_volume else values[None]
    facts: dict[str, Any] = {
        "source_images": files,
        "pixel_array": values,
        "segmentation_type": "BINARY",
        "segment_descriptions": [described(1, "Lungs of both sides")],
        "series_instance_uid": hd.UID(),
        "series_number": 9,
        "sop_instance_uid": hd.UID(),
        "instance_number": 1,
        "manufacturer": "Somebody",
        "manufacturer_model_name": "Something",
        "software_versions": "1",
        "device_serial_number": "1",
    }
    return hd.seg.Segmentation(**facts | change), values


@pytest.mark.parametrize("kind", ["dx", "ct"])
def test_a_dicom_segmentation_is_the_same_mask_as_the_nifti_file(home: dict[str, Path], kind: str) -> None:
    path, image = one(home[kind])
    before = read(home[kind]).bits(image)
    made, _ = segmented(home[kind], image)
    path.unlink()
    made.save_as(path.with_name("any-name.dcm"))
    found = again(home[kind], structures={"lungs": [1, 2, "LUNGS of both sides"], "opacity": [2]})
    assert not found.left_out
    assert (found.bits(image) == (before & 1)).all()
    # Nobody outlined opacities in it: not annotated, and not absent.
    assert found.labels(image, ["lungs", "opacity"]) == (1, None)


def test_segmentations_that_do_not_fit_are_left_out_by_name(home: dict[str, Path]) -> None:
    path, image = one(home["ct"])
    made, values = segmented(home["ct"], image)
    path.unlink()
    seg = path.with_name("seg.dcm")

    def moved(dataset: Any) -> None:
        position = dataset.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence[0]
        position.ImagePositionPatient[2] += 4

    def turned(dataset: Any) -> None:
        dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = [
            0,
            1,
            0,
            1,
            0,
            0,
        ]

    def coarse(dataset: Any) -> None:
        dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [12, 12]

    def foreign(dataset: Any) -> None:
        dataset.ReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.3"

    def unknown(dataset: Any) -> None:
        dataset.SegmentSequence[0].SegmentNumber = 5

    def missing(dataset: Any) -> None:
        del dataset.SharedFunctionalGroupsSequence[0].SegmentIdentificationSequence

    def short(dataset: Any) -> None:
        dataset.PixelData = dataset.PixelData[:100]

    def labelmap(dataset: Any) -> None:
        dataset.SegmentationType = "LABELMAP"

    expected = {
        moved: Reason.MASK_GEOMETRY,
        turned: Reason.MASK_GEOMETRY,
        coarse: Reason.MASK_GEOMETRY,
        foreign: Reason.MASK_WITHOUT_IMAGE,
        unknown: Reason.MASK_VALUES,
        missing: Reason.UNREADABLE_PIXELS,
        short: Reason.UNREADABLE_PIXELS,
        labelmap: Reason.NOT_A_MASK,
    }
    made.save_as(seg)
    for spoiled, reason in expected.items():
        dataset = pydicom.dcmread(seg)
        spoiled(dataset)
        dataset.save_as(path.with_name("spoiled.dcm"))
        kept = seg.read_bytes()
        seg.unlink()
        found = again(home["ct"])
        assert found.left_out == {"spoiled.dcm": reason}, spoiled.__name__
        path.with_name("spoiled.dcm").unlink()
        seg.write_bytes(kept)
    assert not again(home["ct"]).left_out and values.any()


def test_readers_that_answer_nonsense_are_no_masks(home: dict[str, Path]) -> None:
    readers = SimpleNamespace(run=lambda tasks: ((key, {"sha256": "x"}) for key, _ in tasks))
    mapping = MaskMap.model_validate({"folder": str(home["dx"] / "hospital" / "masks"), "structures": {"lungs": [1]}})
    found = mask_files.ingest(mapping, home["dx"], Index.open(home["dx"] / "state"), readers, lambda a, b: None)  # type: ignore[arg-type]
    assert not found.taken and set(found.left_out.values()) == {Reason.DECODER_FAILED}
