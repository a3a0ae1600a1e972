"""Cohorts: splits by patient that never move, missing labels that stay missing, tensors that equal the cache."""

import csv
import json
import multiprocessing
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_client import cohort as cohort_module
from fl_client.cohort import SPLITS, Cohort, Split, _place
from fl_client.ingest import Index, ingest
from fl_client.phantom import VENDORS, make_hospital
from fl_client.site import Source
from models.grids import to_grid
from models.labels import LabelMap, LabelTable
from models.study import Study
from privacy.errors import CacheLost, CohortTooSmall, DataError, LabelTableError, NewerVersion, PatientInTwoSplits

PATIENTS = 40


def study(**changes: Any) -> Study:
    settings: dict[str, Any] = {
        "name": "test",
        "title": "t",
        "purpose": "p",
        "task": {"targets": ["opacity"]},
        "images": {"size_px": 32},
        "training": {"rounds": 1},
        "protection": "plain",
        "privacy": "none",
        "participation": {"sites": ["a"], "quorum": 1, "minimum_patients": 2},
    }
    return Study.model_validate(settings | changes)


class Site:
    """One ingested phantom hospital that tests may copy and change."""

    def __init__(self, home: Path) -> None:
        self.home, self.state, self.pins = home, home / "state", home / "pins" / "s.json"
        self.mapping = make_hospital(home, "site", PATIENTS, 3, VENDORS["aurora"])
        self.mapping["targets"] = {"opacity": self.mapping["targets"]["opacity"]}  # tests write tables of two columns
        del self.mapping["numbers"]
        self.ingest()

    def ingest(self) -> None:
        source = Source(folder="dicom", labels=LabelMap.model_validate(self.mapping), longest_side_px=64)
        ingest(source, self.home, self.state)

    def labels(self, **changes: Any) -> LabelTable:
        mapping = LabelMap.model_validate(self.mapping | changes)
        return LabelTable.read(Path(mapping.table), mapping)

    def relabel(self, words: dict[str, str]) -> None:
        with (self.home / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("StudyInstanceUID", "opacity"), *words.items()])

    def cohort(self, split: Split = "train", plan: Study | None = None) -> Cohort:
        return Cohort.open(Index.open(self.state), self.labels(), plan or study(), split, self.pins)

    def sides(self, plan: Study | None = None) -> dict[str, str]:
        """Study UID -> split, found by comparing tensors with cached pixels and so without the code's own bookkeeping."""
        index = Index.open(self.state)
        found: dict[str, str] = {}
        grids = {image.study_uid: to_grid(index.pixels(image), 32) for image in index.images()}
        for split in SPLITS:
            for image in self.cohort(split, plan).images.numpy():
                found[next(uid for uid, grid in grids.items() if np.array_equal(grid, image))] = split
        return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("cohort"))


@pytest.fixture
def site(made: Site, tmp_path: Path) -> Site:
    import copy
    import shutil

    fresh = copy.copy(made)
    fresh.home = tmp_path / "site"
    shutil.copytree(made.home, fresh.home)
    fresh.state, fresh.pins = fresh.home / "state", fresh.home / "pins" / "s.json"
    fresh.mapping = made.mapping | {"table": str(fresh.home / "labels.csv")}
    return fresh


def test_splits_are_by_patient_in_the_studys_shares_and_stratified(site: Site) -> None:
    index, table = Index.open(site.state), site.labels()
    patient = {image.study_uid: image.patient for image in index.images()}
    positive = {image.patient for image in index.images() if table.lookup(image.study_uid)["opacity"] == 1}
    sides = site.sides()
    assert sides.keys() == patient.keys()
    split_of: dict[str, set[str]] = {}
    for uid, split in sides.items():
        split_of.setdefault(patient[uid], set()).add(split)
    assert all(len(splits) == 1 for splits in split_of.values())
    assert max(Counter(patient.values()).values()) == 2  # some patients have two images, else this would show nothing
    shares = {"train": 0.65, "validation": 0.15, "test": 0.2}
    for stratum in (positive, set(patient.values()) - positive):
        counts = Counter(next(iter(split_of[p])) for p in stratum)
        assert all(abs(counts[s] - share * len(stratum)) <= 1 for s, share in shares.items()), counts


def test_tensors_counts_and_items_agree_with_table_and_cache(site: Site) -> None:
    index, table = Index.open(site.state), site.labels()
    cohort = site.cohort()
    assert cohort.images.shape == (len(cohort), 1, 32, 32) and cohort.images.dtype == torch.float32
    assert cohort.targets.shape == cohort.known.shape == (len(cohort), 1)
    assert cohort.patients.dtype == torch.int64 and len(cohort.patients) == len(cohort)
    by_grid = {to_grid(index.pixels(image), 32).tobytes(): image for image in index.images()}
    positives = 0
    for number in range(len(cohort)):
        pixels, target, known = cohort[number]
        image = by_grid[pixels.numpy().tobytes()]
        assert (int(target), int(known)) == (table.lookup(image.study_uid)["opacity"], 1)
        positives += int(target)
    assert cohort.counts.positives == {"opacity": positives}
    assert cohort.counts.negatives == {"opacity": len(cohort) - positives}
    assert cohort.counts.patients == len(set(cohort.patients.tolist())) == int(cohort.patients.max()) + 1
    assert cohort.ingested == index.taken


def test_missing_labels_are_unknown_and_never_negative(site: Site) -> None:
    images = Index.open(site.state).images()
    mapping = {
        "opacity": site.mapping["targets"]["opacity"],
        "effusion": {"column": "comment", "words": {"yes": 1, "no": 0}},
    }
    site.mapping |= {"targets": mapping}
    rows = [(i.study_uid, ["1", "0", "", "odd"][n % 4], ["yes", "", ""][n % 3]) for n, i in enumerate(images)]
    with (site.home / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("StudyInstanceUID", "opacity", "comment"), *rows])
    plan = study(task={"targets": ["effusion", "opacity", "unmapped"]})
    total = Counter[str]()
    for split in SPLITS:
        cohort = site.cohort(split, plan)
        assert bool((cohort.known.sum(1) > 0).all())
        assert bool((cohort.targets[cohort.known == 0] == 0).all())
        assert not cohort.known[:, 2].any()
        total.update(
            {
                "images": len(cohort),
                "effusion": int(cohort.known[:, 0].sum()),
                "op0": cohort.counts.negatives["opacity"],
            }
        )
        assert cohort.counts.negatives["effusion"] == 0
    labelled = [row for row in rows if row[1] in ("0", "1") or row[2]]
    assert total["images"] == len(labelled)
    assert cohort.left_out.unlabelled == len(images) - len(labelled)
    assert total["effusion"] == sum(row[2] == "yes" for row in rows)
    assert total["op0"] == sum(row[1] == "0" for row in rows)


def test_patients_never_change_sides_when_images_come_and_go(site: Site) -> None:
    before = site.sides()
    gone = sorted((site.home / "dicom").rglob("IM*"))[:10]
    for path in gone:
        path.unlink()
    make_hospital(site.home / "later", "later", 30, 4, VENDORS["aurora"])
    (site.home / "later" / "dicom").rename(site.home / "dicom" / "later")
    with (site.home / "labels.csv").open("a") as file:
        file.writelines((site.home / "later" / "labels.csv").read_text().splitlines(keepends=True)[1:])
    site.ingest()
    after = site.sides()
    assert len(after) > len(before)
    assert all(before[uid] == split for uid, split in after.items() if uid in before)
    tail = Counter(split for uid, split in after.items() if uid not in before)
    assert tail["train"] > tail["test"] > 0


def test_pins_hold_no_identifiers_and_only_the_owner_reads_them(site: Site) -> None:
    site.cohort()
    text = site.pins.read_text()
    assert not any(image.patient in text or image.study_uid in text for image in Index.open(site.state).images())
    for path in [site.pins, *(site.state / "grids").iterdir()]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_site_that_reads_its_images_anew_splits_them_alike(site: Site) -> None:
    """A lost state folder must not turn patients that were trained on into patients to be tested on."""
    first = site.sides()
    site.pins.unlink()
    shutil.rmtree(site.state)
    site.ingest()
    assert site.sides() == first


ODD_SIDE = b'{"version": 1, "splits": {"t": "all"}}'
OTHER_VERSION = b'{"version": 2, "splits": {}}'


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", ODD_SIDE, b"\xff"])
def test_damaged_pins_are_an_error_and_never_made_anew(site: Site, damage: bytes) -> None:
    site.cohort()
    site.pins.write_bytes(damage)
    with pytest.raises(DataError, match="cannot be read") as caught:
        site.cohort()
    assert "backup" in caught.value.remedy
    assert site.pins.read_bytes() == damage


def test_pins_of_a_later_version_are_left_alone_and_say_who_must_upgrade(site: Site) -> None:
    site.cohort()
    site.pins.write_bytes(OTHER_VERSION)
    with pytest.raises(NewerVersion, match="layout 2") as caught:
        site.cohort()
    assert "Upgrade Isocenter on this machine" in caught.value.remedy
    assert site.pins.read_bytes() == OTHER_VERSION


def test_too_few_patients_is_an_error_that_stays_local(site: Site) -> None:
    plan = study(participation={"sites": ["a"], "quorum": 1, "minimum_patients": 7})
    assert site.cohort("train", plan).counts.patients == 26
    with pytest.raises(CohortTooSmall, match="6 labelled patients and the study asks for 7"):
        site.cohort("validation", plan)


def test_no_labels_at_all_is_too_small_and_not_a_crash(site: Site) -> None:
    site.relabel({"9.9.9": "1"})
    with pytest.raises(CohortTooSmall, match="has 0 labelled"):
        site.cohort()


def test_a_study_whose_targets_the_site_does_not_map_is_refused(site: Site) -> None:
    with pytest.raises(LabelTableError, match=r"effusion.*opacity"):
        site.cohort("train", study(task={"targets": ["effusion"]}))


def test_other_modalities_are_left_out_and_counted(site: Site) -> None:
    with pytest.raises(CohortTooSmall):
        site.cohort("train", study(images={"size_px": 32, "modalities": ["DX"]}))
    assert site.cohort("train").left_out.modality == 0


def test_the_grid_is_made_once_and_made_again_when_images_change(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    before = site.cohort().images.clone()
    made: list[int] = []

    def counting(pixels: np.ndarray[Any, np.dtype[np.float32]], size_px: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        made.append(size_px)
        return to_grid(pixels, size_px)

    monkeypatch.setattr(cohort_module, "to_grid", counting)
    assert torch.equal(site.cohort().images, before) and not made
    (grid,) = (site.state / "grids").glob("*.npy")
    whole = grid.read_bytes()
    flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    for times, damaged in enumerate((whole[:-50], flipped), start=1):
        grid.write_bytes(damaged)
        assert torch.equal(site.cohort().images, before) and len(made) == times * len(before)
    site.cohort("train", study(images={"size_px": 48}))
    assert made[-1] == 48
    next((site.home / "dicom").rglob("IM*")).unlink()
    site.ingest()
    for split in SPLITS:
        site.cohort(split)
    assert len([p for p in (site.state / "grids").glob("*.npy") if p.name.startswith(study().digest[:16])]) == 3


def test_writing_to_the_tensor_does_not_reach_the_disk(site: Site) -> None:
    cohort = site.cohort()
    before = cohort.images.clone()
    cohort.images += 1
    assert torch.equal(site.cohort().images, before)


def test_a_missing_cache_file_is_named(site: Site) -> None:
    index = Index.open(site.state)
    for image in index.images():
        index.cache.path(image.cache).unlink()
    with pytest.raises(CacheLost) as caught:
        site.cohort()
    assert "ingest" in caught.value.remedy


def _tokens_of(site: Site) -> None:
    site.cohort("test")


def test_workers_that_open_at_once_agree(site: Site) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_tokens_of, args=(site,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    assert len(json.loads(site.pins.read_text())["splits"]) == PATIENTS


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 10_000), unique=True, max_size=80),
    st.dictionaries(st.integers(0, 10_000), st.sampled_from(SPLITS), max_size=30),
    st.floats(0.05, 0.4),
    st.floats(0.05, 0.4),
)
def test_placing_moves_nobody_and_fills_what_lacks(
    patients: list[int], pinned: dict[int, Split], validation: float, test: float
) -> None:
    tokens = [f"{p:05d}" for p in patients]
    placed: dict[str, Split] = {f"{p:05d}": split for p, split in pinned.items()}
    before = dict(placed)
    _place(tokens, placed, {"train": 1 - validation - test, "validation": validation, "test": test})
    assert all(placed[token] == split for token, split in before.items())
    assert all(token in placed for token in tokens)
    share = {"train": 1 - validation - test, "validation": validation, "test": test}
    counts = Counter(placed[token] for token in tokens)
    if not set(before) & set(tokens):
        assert all(abs(counts[split] - share[split] * len(tokens)) <= 2 for split in SPLITS)


# Splits of a private study.

PRIVACY = {"mode": "local", "epsilon": 8, "clip_norm": 1, "sampling_rate": 0.5, "noise_multiplier": 5.0}


def private(**changes: Any) -> Study:
    return study(privacy=PRIVACY, participation={"sites": ["a"], "quorum": 1, "minimum_patients": 1}, **changes)


def test_a_private_split_of_a_patient_depends_on_nobody_else(site: Site) -> None:
    """One patient more or less must change one patient's place, or the guarantee is about many."""
    everyone = {split: site.cohort(split, private()) for split in SPLITS}
    before = {min(i): split for split, cohort in everyone.items() for i in cohort.identities}
    site.pins.unlink()
    gone = sorted((site.home / "dicom").rglob("IM*"))[::3]
    for path in gone:
        path.unlink()
    site.ingest()
    after = {split: site.cohort(split, private()) for split in SPLITS}
    left = {identity: split for split, cohort in after.items() for i in cohort.identities for identity in i}
    shared = set(before) & set(left)
    assert len(shared) > 20 and all(before[identity] == left[identity] for identity in shared)


def test_the_public_size_is_in_tens_and_does_not_follow_the_patients(site: Site) -> None:
    first = site.cohort("train", private())
    assert first.public_size == first.counts.patients // 10 * 10 > 0
    assert {site.cohort(split, private()).public_size for split in SPLITS} == {first.public_size}
    for path in sorted((site.home / "dicom").rglob("IM*"))[::2]:
        path.unlink()
    site.ingest()
    later = site.cohort("train", private())
    assert later.counts.patients < first.public_size == later.public_size


def test_an_image_that_comes_back_under_a_patient_of_another_split_is_an_error(site: Site) -> None:
    site.cohort("train", private())
    pins = json.loads(site.pins.read_text())
    content = next(iter(pins["images"]))
    pins["images"][content] = "test" if pins["images"][content] != "test" else "train"
    site.pins.write_text(json.dumps(pins))
    with pytest.raises(PatientInTwoSplits, match="another patient"):
        site.cohort("train", private())


def test_identities_are_hashes_of_patient_and_pixels(site: Site) -> None:
    cohort = site.cohort("train", private())
    images = {image.content for image in Index.open(site.state).images()}
    assert len(cohort.identities) == cohort.counts.patients
    for number, identity in enumerate(cohort.identities):
        assert len(identity & images) == int((cohort.patients == number).sum()) == len(identity) - 1
        assert all(len(word) in (32, 64) and set(word) <= set("0123456789abcdef") for word in identity)
    index, labels = Index.open(site.state), site.labels()
    assert Cohort.identities_of(index, labels, private(), "train", site.pins) == cohort.identities
