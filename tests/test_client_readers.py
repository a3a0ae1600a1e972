"""The processes that open files: confined, bounded in time and memory, replaced when they die, and never believed."""

import json
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_client import readers
from fl_client.cache import SCALE
from fl_client.index import Index
from fl_client.ingest import Reason, distrust, ingest
from fl_client.phantom import VENDORS, make_hospital
from fl_client.readers import Answer, Readers
from fl_client.site import Source
from privacy.errors import CacheLost, DataError, ImageLeftOut


@dataclass(frozen=True)
class Probe:
    """A task that does something to the process it runs in."""

    what: str
    path: str = ""
    seconds: float = 20.0
    light: bool = False

    def run(self) -> Answer:
        return getattr(self, self.what)()  # type: ignore[no-any-return]

    def fine(self) -> Answer:
        return {"fine": os.getpid()}

    def left_out(self) -> Answer:
        raise ImageLeftOut(Reason.BLANK)

    def crash(self) -> Answer:
        os.kill(os.getpid(), signal.SIGSEGV)
        return {}

    def hang(self) -> Answer:
        time.sleep(60)
        return {}

    def flood(self) -> Answer:
        return {"much": "x" * (2 * readers.ANSWER_BYTES_MAX)}

    def full_disk(self) -> Answer:
        raise OSError(28, "the cache cannot be written: No space left on device")

    def bug(self) -> Answer:
        raise ZeroDivisionError

    def eat(self) -> Answer:
        try:
            return {"got": len(bytearray(readers.MEMORY_BYTES + 2**30))}
        except MemoryError:
            return {"refused": True}

    def confined(self) -> Answer:
        import socket
        import subprocess

        found: Answer = {}
        for name, attempt in (
            ("socket", socket.socket),
            ("program", lambda: subprocess.run(["true"], check=False)),
            ("key", lambda: Path(self.path).read_bytes()),
        ):
            try:
                attempt()  # type: ignore[no-untyped-call]
                found[name] = "done"
            except OSError as error:
                found[name] = type(error).__name__
        return found

    def speaks(self) -> Answer:
        os.write(2, b"ZZSECRET from compiled code\n")
        return {}


def run(home: Path, *tasks: Probe, count: int = 1) -> list[Answer]:
    with Readers(count, home) as pool:
        found = dict(pool.run(list(enumerate(tasks))))
    return [found[number] for number in range(len(tasks))]


FAILED = {"reason": "decoder_failed"}


def test_a_process_that_dies_hangs_or_floods_costs_one_file(tmp_path: Path) -> None:
    fine = Probe("fine")
    began = time.monotonic()
    tasks = [
        fine,
        Probe("crash"),
        fine,
        Probe("hang", seconds=1.0),
        fine,
        Probe("flood"),
        Probe("bug"),
        Probe("left_out"),
        fine,
    ]
    found = run(tmp_path, *tasks)
    assert [found[n] for n in (1, 3, 5, 6)] == [FAILED] * 4 and found[7] == {"reason": "blank"}
    alive = [found[n]["fine"] for n in (0, 2, 4, 8)]
    assert len(set(alive)) == 4 and os.getpid() not in alive
    assert time.monotonic() - began < 40


def test_one_bad_task_in_a_batch_costs_no_other(tmp_path: Path) -> None:
    tasks = [Probe("fine", light=True)] * 20 + [Probe("crash", light=True)] + [Probe("fine", light=True)] * 20
    found = run(tmp_path, *tasks, count=2)
    assert found[20] == FAILED and all("fine" in answer for n, answer in enumerate(found) if n != 20)


def test_every_process_is_ended_with_the_pool(tmp_path: Path) -> None:
    found = run(tmp_path, *[Probe("fine")] * 6, count=3)
    for answer in found:
        with pytest.raises(ProcessLookupError):
            os.kill(answer["fine"], 0)


def test_a_reader_has_no_network_no_program_and_no_key(tmp_path: Path) -> None:
    key = tmp_path / "keys" / "site.key"
    key.parent.mkdir()
    key.write_bytes(b"secret")
    (found,) = run(tmp_path, Probe("confined", str(key)))
    assert found["socket"] == found["program"] == "PermissionError"
    assert (
        found["key"] == "FileNotFoundError"
    )  # an empty folder lies over the keys, where mount namespaces are permitted
    assert key.read_bytes() == b"secret"


def test_memory_is_bounded(tmp_path: Path) -> None:
    assert run(tmp_path, Probe("eat")) == [{"refused": True}]


def test_a_full_disk_ends_the_run_and_is_no_bad_image(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, Probe("full_disk"))


def test_what_compiled_code_writes_stays_in_the_private_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, Probe("speaks"))
    out, err = capfd.readouterr()
    assert "ZZSECRET" not in out + err


def source(folder: Path, mapping: dict[str, Any]) -> Source:
    return Source.model_validate({"folder": str(folder / "dicom"), "labels": mapping})


def test_many_processes_find_what_one_finds(tmp_path: Path) -> None:
    mapping = make_hospital(tmp_path, "north", 12, 1, VENDORS["cirrus"])
    one, many = (ingest(source(tmp_path, mapping), tmp_path, tmp_path / f"state{jobs}", jobs=jobs) for jobs in (0, 2))
    assert one.to_json() | {"seconds": 0} == many.to_json() | {"seconds": 0}
    indexes = [Index.open(tmp_path / f"state{jobs}") for jobs in (0, 2)]
    assert indexes[0].images() == indexes[1].images()
    assert indexes[0].left_out() == indexes[1].left_out()


def test_a_file_that_changed_between_the_looks_is_left_out_and_taken_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = make_hospital(tmp_path, "north", 10, 1, VENDORS["aurora"])
    image = sorted((tmp_path / "dicom").rglob("IM*[0-9]"))[3]
    whole = image.read_bytes()
    flipped = whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:]

    def meanwhile(stage: str, done: int, total: int) -> None:
        if stage == "looking at files" and done == total:
            image.write_bytes(flipped)

    kept = ingest(source(tmp_path, mapping), tmp_path, tmp_path / "before").taken
    report = ingest(source(tmp_path, mapping), tmp_path, tmp_path / "state", meanwhile)
    assert report.reasons[Reason.CHANGED] == 1 and report.taken == kept - 1
    report = ingest(source(tmp_path, mapping), tmp_path, tmp_path / "state")
    assert Reason.CHANGED not in report.reasons and report.taken == kept


def test_rotten_bytes_under_an_old_date_are_found_by_reading_again(tmp_path: Path) -> None:
    mapping = make_hospital(tmp_path, "north", 10, 1, VENDORS["aurora"])
    image = sorted((tmp_path / "dicom").rglob("IM*[0-9]"))[3]
    ingest(source(tmp_path, mapping), tmp_path, tmp_path / "state")
    before = {i.file: i.sha256 for i in Index.open(tmp_path / "state").images()}
    facts = image.stat()
    whole = bytearray(image.read_bytes())
    whole[-1000] ^= 1
    image.write_bytes(bytes(whole))
    os.utime(image, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert ingest(source(tmp_path, mapping), tmp_path, tmp_path / "state").read == 0
    distrust(tmp_path / "state")
    ingest(source(tmp_path, mapping), tmp_path, tmp_path / "state")
    after = {i.file: i.sha256 for i in Index.open(tmp_path / "state").images()}
    assert {name for name in before if before[name] != after.get(name)} == {str(image.relative_to(tmp_path / "dicom"))}


def test_a_share_of_damaged_files_stops_the_site_and_says_why(tmp_path: Path) -> None:
    mapping = make_hospital(tmp_path, "north", 30, 1, VENDORS["dorado"])
    paths = sorted((tmp_path / "dicom").rglob("IM*[0-9]"))
    given = source(tmp_path, mapping)
    assert not ingest(given, tmp_path, tmp_path / "state").unfit
    for path in paths[:5]:
        path.write_bytes(path.read_bytes()[:-4000])
    report = ingest(given, tmp_path, tmp_path / "state")
    assert "are damaged" in report.unfit and report.taken > 20
    with pytest.raises(DataError, match="are damaged"):
        Index.open(tmp_path / "state").require_fit()
    loose = given.model_copy(update={"damaged_share_max": 0.5})
    assert not ingest(loose, tmp_path, tmp_path / "state").unfit
    Index.open(tmp_path / "state").require_fit()


def test_pruning_removes_what_can_be_made_again_and_no_image(tmp_path: Path) -> None:
    from fl_client.ingest import prune

    mapping = make_hospital(tmp_path, "north", 10, 1, VENDORS["dorado"])
    ingest(source(tmp_path, mapping), tmp_path, tmp_path / "state")
    grids = tmp_path / "state" / "grids"
    grids.mkdir()
    (grids / "x.npy").write_bytes(bytes(1000))
    assert prune(tmp_path / "state") == 1000 and not list(grids.iterdir())
    index = Index.open(tmp_path / "state")
    assert all(index.pixels(image).size for image in index.images())


def test_a_flipped_bit_in_the_cache_is_noticed(tmp_path: Path) -> None:
    mapping = make_hospital(tmp_path, "north", 10, 1, VENDORS["dorado"])
    ingest(source(tmp_path, mapping), tmp_path, tmp_path / "state")
    index = Index.open(tmp_path / "state")
    image = index.images()[0]
    path = index.cache.path(image.cache)
    whole = bytearray(path.read_bytes())
    whole[-7] ^= 4
    path.write_bytes(bytes(whole))
    with pytest.raises(CacheLost):
        index.pixels(image)
    distrust(index.state)
    ingest(source(tmp_path, mapping), tmp_path, tmp_path / "state")
    healed = Index.open(tmp_path / "state")
    assert healed.pixels(healed.images()[0]).size


LIES: list[Any] = [
    {},
    {"reason": "because"},
    {"reason": "blank", "cache": "../../keys/site.key"},
    {"sha256": "../x", "header": {}},
    {"sha256": "0" * 64, "header": {"patient": 7}},
    {"sha256": "0" * 64, "header": {"patient": "p", "unknown": 1}},
    {"sha256": "0" * 64, "header": {"patient": "p", "plane": [1.0] * 11, "size": [1]}},
    {"content": "0" * 64, "shape": [1, 1], "low": float("nan"), "high": 1.0, "text": 0.0},
    {"content": "0" * 64, "shape": [1], "low": 0.0, "high": 1.0, "text": 0.0},
    {"content": "0" * 64, "shape": [1, 1], "low": 0.0, "high": 1.0, "text": 0.0, "patient": "another"},
    {"content": "0" * 64, "shape": [1, 1], "low": 0.0, "high": 1.0, "text": 0.0, "affine": [1.0]},
]


@pytest.mark.parametrize("lie", LIES)
def test_what_a_process_says_in_another_shape_spoils_no_index(lie: Any) -> None:
    """A file may have taken the process over; it can lie about its own image, and about nothing else."""
    assert readers.seen(lie) == readers.made(lie) == FAILED


def test_zips_and_folders_of_the_same_files_are_the_same_images(tmp_path: Path) -> None:
    mapping = make_hospital(tmp_path, "north", 10, 1, VENDORS["boreal"])
    flat = ingest(source(tmp_path, mapping), tmp_path, tmp_path / "flat")
    (tmp_path / "zipped" / "dicom").mkdir(parents=True)
    shutil.make_archive(str(tmp_path / "zipped" / "dicom" / "all"), "zip", tmp_path / "dicom")
    packed = ingest(source(tmp_path / "zipped", mapping), tmp_path, tmp_path / "packed", jobs=1)
    assert (packed.taken, packed.patients, packed.labels) == (flat.taken, flat.patients, flat.labels)
    found = [{image.content for image in Index.open(tmp_path / name).images()} for name in ("flat", "packed")]
    assert found[0] == found[1]


def sidecar(**values: Any) -> bytes:
    tags = {
        "PatientID": "00100020",
        "ViewPosition": "00185101",
        "PhotometricInterpretation": "00280004",
        "PatientSex": "00100040",
    }
    return json.dumps({tags[name]: {"vr": "LO", "Value": [value]} for name, value in values.items()}).encode()


def test_pictures_with_a_json_header_need_no_column_for_the_patient(tmp_path: Path) -> None:
    """As BIMCV files them: 16-bit PNG, and the DICOM header as JSON beside it."""
    from PIL import Image

    folder = tmp_path / "dicom"
    folder.mkdir()
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 4000, (70, 60)).astype(np.uint16) for _ in range(5)]
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{number}.png")
    (folder / "0.json").write_bytes(sidecar(PatientID="A", ViewPosition="PA", PatientSex="F"))
    (folder / "1.json").write_bytes(sidecar(PatientID="B", ViewPosition="AP", PhotometricInterpretation="MONOCHROME1"))
    (folder / "2.json").write_bytes(sidecar(PatientID="B", ViewPosition="LL"))
    (folder / "3.json").write_bytes(b"{" * 100_000)
    (tmp_path / "labels.csv").write_text("key,finding\n0.png,yes\n")
    mapping = {
        "table": "labels.csv",
        "key": "key",
        "matches": "file",
        "targets": {"opacity": {"column": "finding", "words": {"yes": 1}}},
    }
    given = Source.model_validate({"folder": "dicom", "format": "pictures", "labels": mapping})
    report = ingest(given, tmp_path, tmp_path / "state")
    assert (report.taken, report.patients) == (2, 2)
    assert {str(reason): count for reason, count in report.reasons.items()} == {
        "sidecar": 4,
        "lateral": 1,
        "no_patient": 2,
    }
    index = Index.open(tmp_path / "state")
    first, second = index.images()
    assert (first.patient, first.sex, second.patient) == ("A", "F", "B")
    turned = np.corrcoef(index.pixels(second).ravel(), pictures[1].ravel())[0, 1]
    assert turned < -0.99 and np.corrcoef(index.pixels(first).ravel(), pictures[0].ravel())[0, 1] > 0.99


def test_nifti_volumes_lie_where_their_affine_says(tmp_path: Path) -> None:
    import nibabel

    from models.study import Volume
    from models.volumes import to_volume_grid

    folder = tmp_path / "dicom"
    folder.mkdir()
    values = np.full((40, 36, 20), -1000, np.int16)
    values[5:30, 6:30, 3:17] = 40
    values[25:28, 8:12, 12:15] = 900  # towards the patient's right or left, as the affine says
    for name, affine in (("ras", np.diag([3.0, 3, 4, 1])), ("las", np.diag([-3.0, 3, 4, 1]))):
        nibabel.save(nibabel.Nifti1Image(values, affine), folder / f"{name}.nii.gz")
    (folder / "cut.nii.gz").write_bytes((folder / "ras.nii.gz").read_bytes()[:400])
    (folder / "thin.nii").write_bytes(nibabel.Nifti1Image(values[..., :4], np.eye(4)).to_bytes())
    whole = nibabel.Nifti1Image(values, np.diag([2.0, 2, 2, 1])).to_bytes()
    (folder / "flat.nii").write_bytes(whole[:280] + bytes(48) + whole[328:])  # the three rows of its affine
    (folder / "note.txt").write_text("words")
    rows = "\n".join(
        f"{name},{name},yes" for name in ("ras.nii.gz", "las.nii.gz", "cut.nii.gz", "thin.nii", "flat.nii")
    )
    (tmp_path / "labels.csv").write_text(f"key,who,finding\n{rows}\n")
    mapping = {"table": "labels.csv", "key": "key", "matches": "file", "patient": "who"}
    mapping |= {"targets": {"opacity": {"column": "finding", "words": {"yes": 1}}}}  # type: ignore[dict-item]
    given = Source.model_validate({"folder": "dicom", "format": "nifti", "labels": mapping})
    report = ingest(given, tmp_path, tmp_path / "state", jobs=1)
    index = Index.open(tmp_path / "state")
    found = {image.file: image for image in index.images()}
    assert set(found) == {"ras.nii.gz"} or set(found) == {"las.nii.gz"}  # equal voxels are one exposure
    assert report.reasons[Reason.TRUNCATED] == 1 and report.reasons[Reason.NOT_NIFTI] == 1
    assert report.reasons[Reason.TOO_FEW_SLICES] == 1 and report.reasons[Reason.NO_GEOMETRY] == 1
    (image,) = found.values()
    assert image.spacing_mm == (4.0, 3.0, 3.0) and image.modality == "CT"
    from fl_client import nifti

    for name, left in (("ras", False), ("las", True)):
        volume, affine = nifti.read((folder / f"{name}.nii.gz").read_bytes())
        grid = to_volume_grid(volume, affine, Volume(spacing_mm=[4, 3, 3], size=[20, 36, 40], window_hu=[0, 1000]))
        z, y, x = np.argwhere(grid[0] > 0.8).mean(0)
        assert (x > 19.5) == left and z > 9.5  # the grid counts to the patient's left, and upwards
        assert y > 17.5  # NIfTI's second axis counts to the front, so what is low in it lies at the back


@pytest.mark.parametrize("jobs", [0, 1])
def test_a_locked_cache_holds_no_pixel_in_the_clear_and_gives_the_same_images(tmp_path: Path, jobs: int) -> None:
    from fl_client.cohort import Cohort
    from models.labels import LabelTable
    from models.study import Study, parse

    mapping = make_hospital(tmp_path, "north", 16, 1, VENDORS["dorado"])
    plain, locked = (
        source(tmp_path, mapping),
        source(tmp_path, mapping).model_copy(update={"cache_key": "secret/cache.key"}),
    )
    ingest(plain, tmp_path, tmp_path / "plain")
    ingest(locked, tmp_path, tmp_path / "locked", jobs=jobs)
    key = tmp_path / "secret" / "cache.key"
    assert key.stat().st_mode & 0o777 == 0o600 and len(key.read_bytes()) == 32
    open_, shut = Index.open(tmp_path / "plain"), Index.open(tmp_path / "locked")
    assert [image.content for image in open_.images()] == [image.content for image in shut.images()]
    for image in shut.images():
        np.testing.assert_array_equal(shut.pixels(image), open_.pixels(image))
        row = (shut.pixels(image) * SCALE).astype(np.uint16)[100].tobytes()
        assert row not in shut.cache.path(image.cache).read_bytes()
    study = parse(Study, STUDY, "study.yaml")
    table = LabelTable.open(tmp_path, locked.labels)
    cohorts = [
        Cohort.open(index, table, study, "train", tmp_path / f"{n}.pins") for n, index in enumerate((open_, shut))
    ]
    assert bool((cohorts[0].images == cohorts[1].images).all()) and not (tmp_path / "locked" / "grids").exists()
    first, second = shut.images()[:2]
    shut.cache.path(first.cache).write_bytes(
        shut.cache.path(second.cache).read_bytes()
    )  # one image under another's name
    key_bytes = key.read_bytes()
    for wrong in (key_bytes, bytes(32)):
        key.write_bytes(wrong)
        with pytest.raises(CacheLost):
            shut.pixels(first)


def test_the_key_of_the_cache_lies_outside_the_folder_that_readers_cannot_see(tmp_path: Path) -> None:
    mapping = make_hospital(tmp_path, "north", 10, 1, VENDORS["dorado"])
    given = source(tmp_path, mapping).model_copy(update={"cache_key": "keys/cache.key"})
    with pytest.raises(DataError, match="must not see"):
        ingest(given, tmp_path, tmp_path / "state")


STUDY = """
name: opacity
title: A test
purpose: A test.
task: {targets: [opacity]}
images: {size_px: 32}
training: {rounds: 1}
protection: plain
privacy: none
participation: {sites: [north], quorum: 1, minimum_patients: 2}
evaluation: {validation: 0.2, test: 0.2}
"""
