"""CT folders scored as the study would: the same series, the same grid, each volume once, everything else counted."""

import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_client_evaluating import packaged

from fl_client import scoring
from fl_client.cohort import Cohort, join
from fl_client.index import Index
from fl_client.ingest import ingest
from fl_client.phantom_ct import SCANNERS, make_ct_hospital
from fl_client.site import Source
from models import exporting, learning
from models.labels import LabelTable
from models.registry import Package
from models.study import Study
from privacy.errors import PackageRefused, StudyConflict

STUDY = Study.model_validate(
    {
        "name": "ct",
        "title": "Ground glass",
        "purpose": "A test.",
        "task": {"targets": ["opacity"]},
        "images": {"modalities": ["CT"], "volume": {"spacing_mm": [12.0, 12.0, 12.0], "size": [16, 24, 24]}},
        "network": {"name": "linear"},
        "training": {"rounds": 1},
        "protection": "plain",
        "privacy": "none",
        "participation": {"sites": ["north"], "quorum": 1, "minimum_patients": 1},
    }
)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    home = tmp_path_factory.mktemp("ct")
    return home, make_ct_hospital(home, "north", 4, 1, SCANNERS[0])


@pytest.fixture(scope="module")
def package() -> Package:
    return Package.read(packaged(STUDY))


def test_volumes_get_the_scores_that_they_have_in_the_study(
    hospital: tuple[Path, dict[str, Any]], package: Package, tmp_path: Path
) -> None:
    """Oracle: the site's own ingest and cohort of the same folder."""
    home, mapping = hospital
    source = Source.model_validate({"folder": str(home / "dicom"), "labels": mapping})
    ingest(source, home, tmp_path / "state")
    index = Index.open(tmp_path / "state")
    members, _ = join(index, LabelTable.open(home, source.labels), STUDY)
    expected = learning.predict(exporting.network(package), Cohort.of(index, STUDY, "external", members))[:, 0]
    by_series = dict(zip([member.image.series_uid for member in members], expected.tolist(), strict=True))
    told = list[tuple[str, int, int]]()
    scored = scoring.score(package, home / "dicom", 0, lambda *news: told.append(news))
    assert {row.uid: row.scores[0] for row in scored.rows} == pytest.approx(by_series, abs=1e-6)
    assert len(set(by_series.values())) == 4 and scored.uid == "series_instance_uid"
    files = sum(path.is_file() for path in (home / "dicom").rglob("*"))
    assert sum(row.files for row in scored.rows) + scored.left_out.total() == files
    assert scored.left_out == {str(reason): count for reason, count in index.reasons().items()}
    assert told[-1] == ("scoring images", 4, 4)


def test_a_volume_sent_twice_is_scored_once_and_a_broken_one_is_named(
    hospital: tuple[Path, dict[str, Any]], package: Package, tmp_path: Path
) -> None:
    home, _ = hospital
    first, second = sorted((home / "dicom").iterdir())[1:3]
    shutil.copytree(first, tmp_path / "a")
    shutil.copytree(first, tmp_path / "again")
    shutil.copytree(second, tmp_path / "b")
    slices = sorted((tmp_path / "b").iterdir())
    slices[len(slices) // 2].unlink()
    scored = scoring.score(package, tmp_path, 0, lambda *_: None)
    (row,) = scored.rows
    assert row.file.startswith("a/") and row.files == len(list(first.iterdir()))
    assert scored.left_out == {"duplicate": row.files, "missing_slices": len(slices) - 1}


def test_a_model_of_radiographs_takes_no_slice_and_one_of_volumes_no_radiograph(
    hospital: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    home, _ = hospital
    radiographs = STUDY.model_dump() | {"images": {"size_px": 32}}
    of_radiographs = Package.read(packaged(Study.model_validate(radiographs)))
    folder = sorted((home / "dicom").iterdir())[1]
    scored = scoring.score(of_radiographs, folder, 0, lambda *_: None)
    assert scored.rows == [] and scored.left_out == {scoring.ANOTHER_MODALITY: len(list(folder.iterdir()))}
    assert scoring.score(of_radiographs, tmp_path, 0, lambda *_: None).rows == []


def test_a_model_of_volumes_takes_covariates_by_series_and_answers_in_the_unit_of_its_number(
    hospital: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Oracle: the site's own cohort of the same folder, and the network on it with the numbers of the table."""
    home, mapping = hospital
    asked = STUDY.model_dump(mode="json") | {
        "task": {"kind": "regression", "targets": ["extent"], "range": [-10, 40], "unit": "points"},
        "covariates": {"crp": {"range": [0, 500], "unit": "mg/L", "missing": 5}, "sex": {"header": True}},
    }
    package = Package.read(packaged(Study.model_validate(asked)))
    source = Source.model_validate({"folder": str(home / "dicom"), "labels": mapping})
    ingest(source, home, tmp_path / "state")
    index = Index.open(tmp_path / "state")
    members, _ = join(index, LabelTable.open(home, source.labels), STUDY)
    grids = Cohort.of(index, STUDY, "external", members).images
    series = [member.image.series_uid for member in members]
    table = tmp_path / "facts.csv"
    crp, sexes = ["7", "", "501"], ["F", "", "M"]
    rows = [f"{uid},{n},{sex}" for uid, n, sex in zip(series, crp, sexes, strict=False)]
    table.write_text("\n".join(["series_instance_uid,crp,sex", *rows]))
    scored = scoring.score(package, home / "dicom", 0, lambda *_: None, table)
    found = {row.uid: row.scores[0] for row in scored.rows}
    header = {"F": 0.0, "M": 1.0}[members[1].image.sex]
    values = torch.tensor([[7.0, 0.0], [math.nan, header]])
    with torch.inference_mode():
        places = torch.sigmoid(exporting.network(package).eval()(grids[:2], values))[:, 0].tolist()
    assert found == pytest.approx({uid: -10 + 50 * place for uid, place in zip(series, places, strict=False)}, abs=1e-4)
    assert all(abs(number) > 1 for number in found.values()) and scored.misread == 0
    files = [len(list(Path(home / "dicom" / member.image.file).parent.iterdir())) for member in members]
    assert scored.left_out[scoring.OUT_OF_RANGE] == files[2] and scored.left_out[scoring.NO_ROW] >= files[3] - 1
    with pytest.raises(StudyConflict, match=r"takes crp .* sex") as caught:
        scoring.score(package, home / "dicom", 0, lambda *_: None)
    assert "series_instance_uid, crp, sex" in caught.value.remedy


@pytest.mark.parametrize("side", [63, 5000, 512.0, True, "512", None, [512]], ids=str)
def test_a_side_that_no_site_can_have_is_refused(side: object) -> None:
    with pytest.raises(PackageRefused, match="side of radiographs"):
        packaged(STUDY, longest_side_px=side)


def test_the_side_is_the_packages_not_this_versions() -> None:
    assert Package.read(packaged(STUDY, longest_side_px=512)).longest_side_px == 512
    radiographs = Study.model_validate(STUDY.model_dump() | {"images": {"size_px": 32}})
    found = Package.read(packaged(radiographs, longest_side_px=64))
    (wanted,) = scoring._radiographs(None, {"x": None}, [("x", "0" * 64, scoring.Header())], found)  # type: ignore[arg-type, dict-item]
    assert wanted.task.longest_side_px == 64  # type: ignore[attr-defined]


def test_equal_pixels_and_one_radiograph_sent_twice_are_one_row() -> None:
    left_out = Counter[str]()
    sent = [
        ("p1", "b", "1.2"),
        ("p1", "a", "1.1"),
        ("p2", "c", "1.3"),
        ("p3", "d", "1.3"),
        ("p4", "e", ""),
        ("p5", "f", ""),
    ]
    rows = scoring._once([(content, scoring.Row(file, uid, [0.5], 1)) for content, file, uid in sent], left_out)
    assert [row.file for row in rows] == ["a", "c", "e", "f"] and left_out == {"duplicate": 2}
