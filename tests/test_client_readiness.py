"""`fl-client check`: its figures against an independent count, its page against hostile headers and marked patients."""

import csv
import json
import re
import shutil
import stat
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hospital import COORDINATOR, Hospital, study
from PIL import Image
from test_leaks import marks_in, plant, spoil
from typer.testing import CliRunner

from fl_client import facts as counted
from fl_client.cli import app
from fl_client.cohort import SPLITS, Cohort
from fl_client.facts import Facts, facts_of
from fl_client.index import Index, IndexedImage
from fl_client.ingest import ingest
from fl_client.preview import preview
from fl_client.readiness import Inspection, findings
from fl_client.readiness_page import check_place, write_page
from fl_client.rehearsal import prepare
from fl_client.site import Site
from fl_client.sources import Reason
from models.labels import LabelMap, LabelTable
from models.study import Study
from privacy import keys
from privacy.errors import CohortTooSmall, DocumentError, IsocenterError, LabelTableError

SUBJECTS = [
    *("site.yaml", "membership", "certificate", "gateway", "service", "versions", "images"),
    *("labels", "disk", "worker", "policy", "budget", "journal"),
]
"""What `--json` has held since the first version."""
COUNTS = ["damage", "missing", "people", "views", "spacing", "duplicates", "leakage"]


@pytest.fixture
def north(tmp_path: Path) -> Hospital:
    return Hospital.open(tmp_path)


def labels_of(home: Path) -> LabelTable:
    source = Site.source_of(Site.settings_of(home), home)
    return LabelTable.open(home, source.labels)


def page_of(home: Path, asked: Study | None = None, *, thumbnails: bool = True) -> str:
    path = home / "readiness.html"
    write_page(path, Inspection(home, asked), thumbnails=thumbnails)
    return path.read_text(encoding="utf-8")


def image(number: int, **change: Any) -> IndexedImage:
    """An indexed radiograph of a patient of its own."""
    plain: dict[str, Any] = {"file": f"f{number}", "files": 1, "sha256": "", "cache": f"{number:064x}", "lossy": False}
    plain |= {"content": f"c{number}", "patient": f"p{number}", "study_uid": f"1.{number}", "series_uid": f"2.{number}"}
    plain |= {"sop_uid": f"3.{number}", "accession": f"a{number}", "modality": "CR", "view": "frontal", "text": 0.0}
    plain |= {"manufacturer": "Aurora", "sex": "F", "age_years": 40.0, "spacing_mm": (0.2, 0.15), "shape": (10, 12)}
    return IndexedImage(**plain | {"low": 0.0, "high": 1.0} | change)


def facts(images: list[IndexedImage], table: LabelTable | None = None, **left_out: Reason) -> Facts:
    return facts_of(Index(Path(), images, left_out, {"complete": "1"}), table)


def table_of(folder: Path, *rows: str, **mapping: Any) -> LabelTable:
    path = folder / "labels.csv"
    path.write_text("\n".join(["who,opacity,person,age,sex,race", *rows]) + "\n", encoding="utf-8")
    words = {"opacity": {"column": "opacity", "words": {"1": 1, "0": 0}}}
    given = {"table": str(path), "key": "who", "matches": "accession", "targets": words}
    return LabelTable.read(path, LabelMap.model_validate(given | mapping))


# Figures ---------------------------------------------------------------------------------------------------------------


def test_figures_equal_an_independent_count_over_the_hospitals_own_files(north: Hospital) -> None:
    """Counted here from the headers and the table as they lie there, by nothing of ours."""
    with (north.home / "hospital" / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter=";"))[1:]
    words = {accession: word.strip().casefold() for accession, word, *_ in rows}
    seen: dict[str, Any] = {}
    for path in (north.home / "hospital" / "dicom").rglob("*"):
        if path.is_file() and not path.name.endswith("L"):  # laterals, as the phantom names them
            try:
                header = pydicom.dcmread(path)
                if header.AccessionNumber in words and len(header.PixelData) > 0:
                    seen.setdefault(str(header.SOPInstanceUID), header)
            except Exception:  # noqa: S112  the broken files that are part of it
                continue
    found = Inspection(north.home).facts
    people = {str(header.PatientID) for header in seen.values()}
    assert found.images == len(seen) >= 16 and found.patients == len(people) == found.per_patient.total
    assert found.studies == len({str(header.StudyInstanceUID) for header in seen.values()})
    several = Counter(Counter(str(header.PatientID) for header in seen.values()).values())
    assert found.per_patient.counts == {str(n): several[n] for n in sorted(several)}
    positive = [h for h in seen.values() if words[h.AccessionNumber] == "opacity"]
    target = found.targets["opacity"]
    assert (target.positive, target.negative, target.missing) == (len(positive), len(seen) - len(positive), 0)
    assert target.patients_positive == len({str(h.PatientID) for h in positive})
    assert found.vendors.counts == {"Boreal Medical": len(seen)} and found.modalities.counts == {"DX": len(seen)}
    ages = [str(h.get("PatientAge", "")) for h in {str(h.PatientID): h for h in seen.values()}.values()]
    assert found.ages.known == sum(bool(age) for age in ages) and found.ages.total == len(people)
    files = sum(path.is_file() or path.is_symlink() for path in (north.home / "hospital" / "dicom").rglob("*"))
    assert found.files == files == found.images + sum(found.left_out.values())


def test_people_are_counted_once_and_contradictions_are_named() -> None:
    images = [image(n, age_years=age) for n, age in enumerate((17.9, 18.0, 29.5, 84.0, 85.0, 119.0, None))]
    images += [replace(image(90), patient="p0", age_years=16.0), replace(image(91), patient="p1", age_years=None)]
    images += [replace(image(92), patient="p2", sex="M"), replace(image(93), patient="p3", sex="")]
    images += [image(94, sex=""), image(95, sex="O")]
    found = facts(images)
    by_age = Counter({"0-17": 1, "18-29": 2, "40-49": 3, "85+": 2})
    assert {name: count for name, count in found.ages.counts.items() if count} == by_age and found.ages.missing == 1
    assert list(found.ages.counts) == ["0-17", "18-29", "30-39", "40-49", "50-64", "65-74", "75-84", "85+"]
    assert found.sexes.counts == {"female": 6, "other": 1, "contradicting": 1} and found.sexes.missing == 1
    assert found.per_patient.counts == {"1": 5, "2": 4}


def test_spacings_and_views_have_bins_and_what_is_missing() -> None:
    spacings = [(0.05, 0.09), (0.1, 0.1), (0.3, 0.139), (0.2, 0.2), None]
    images = [image(n, spacing_mm=spacing) for n, spacing in enumerate(spacings)]
    images += [image(8, view="unknown"), image(9, shape=(40, 10, 10), spacing_mm=(1.25, 0.7, 0.7), modality="CT")]
    found = facts(images, x=Reason.VIEW_UNKNOWN, y=Reason.TRUNCATED)
    known = {name: count for name, count in found.spacings.counts.items() if count}
    assert known == {"< 0.1": 1, "0.1–0.125": 1, "0.125–0.15": 1, "0.15–0.175": 1, "0.2–0.3": 1, "0.5–0.75": 1}
    assert found.spacings.missing == 1 and found.slices.counts == {"1–1.5": 1} and found.slices.total == 1
    assert found.views.counts == {"frontal": 5} and found.views.missing == 1, "of radiographs"
    assert found.modalities.counts == {"CR": 6, "CT": 1} and found.damaged == 1 and found.files == 9


def test_a_manufacturer_that_few_patients_share_is_not_named() -> None:
    """Whoever typed a patient's name into the wrong field finds it nowhere on the page."""
    images = [image(n, manufacturer=" aurora  Imaging" if n % 3 else "Aurora Imaging") for n in range(6)]
    images += [image(10 + n, manufacturer="ZZTEST^MARIA", patient="one") for n in range(9)]
    images += [image(30, manufacturer=""), image(31, manufacturer="\x00\u202e ")]
    found = facts(images)
    assert found.vendors.counts == {"aurora Imaging": 6, "other": 9} and found.vendors.missing == 2
    many = [image(100 * v + n, manufacturer=f"Vendor {v}") for v in range(12) for n in range(5)]
    assert list(facts(many).vendors.counts) == [f"Vendor {v}" for v in (0, 1, 10, 11, 2, 3, 4, 5)] + ["other"]


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("Siemens\n\x1b[31m Healthineers", "Siemens [31m Healthineers"),
        ("\u202eevil\u200b\u2028x", "evil x"),
        ("A" * 100, "A" * counted.VENDOR_LETTERS_MAX),
        ("  ", ""),
        ("Müller & Söhne", "Müller & Söhne"),
    ],
)
def test_texts_of_headers_are_one_short_plain_line(written: str, shown: str) -> None:
    assert counted.plain(written) == shown


def test_labels_are_counted_by_image_and_by_patient(tmp_path: Path) -> None:
    table = table_of(tmp_path, "a0,1,", "a1,0,", "a2,,", "a3,perhaps,", "a5,1,p4", "gone,1,", patient="person")
    images = [*(image(n) for n in range(5)), image(5)]
    found = facts(images, table)
    target = found.targets["opacity"]
    assert (target.positive, target.negative, target.missing) == (2, 1, 3) and target.share_missing == 0.5
    assert (target.patients_positive, target.patients_negative) == (2, 1)
    assert found.patients == 5, "a5 is an image of p4, as the table says"
    assert found.patients_unlabelled == 2 and found.table is not None and found.table.keys_without_image == 1
    assert facts(images).patients_unlabelled == 6 and facts(images).targets == {}


def test_what_the_label_table_says_of_people_comes_before_the_header(tmp_path: Path) -> None:
    about = {"age": "age", "sex": "sex", "race": "race"}
    rows = ["a0,1,,70,M,Asian", "a1,1,,40s,,White", "a2,1,,155,X,Asian", "a3,1,,,Female,Not Reported", "a4,1,,50+,,"]
    found = facts([image(n, age_years=20.0) for n in range(6)], table_of(tmp_path, *rows, about=about))
    known = {name: count for name, count in found.ages.counts.items() if count}
    assert known == {"18-29": 4, "40-49": 1, "65-74": 1}, "50+ could be in several bins, and then the header says"
    assert found.sexes.counts == {"female": 5, "male": 1}
    assert found.races.counts == {"Asian": 2, "White": 1} and found.races.missing == 3 and not found.ethnicities.known
    assert found.implausible_ages == 1 and found.misread == {"sex": 1} and found.table_misread == 2


def test_what_stands_under_two_patients_is_found(tmp_path: Path) -> None:
    images = [*(image(n) for n in range(4)), image(10, content="c0"), image(11, content="c1", patient="p1")]
    images += [image(12, study_uid="1.2"), image(13, study_uid="1.3", patient="p3"), image(14, sop_uid="3.0")]
    found = facts(images).twice
    assert (found.copies, found.across_patients, found.examinations, found.instances) == (2, 1, 1, 1)


# Findings --------------------------------------------------------------------------------------------------------------


def found_in(home: Path, subject: str) -> Any:
    return next(finding for finding in findings(home) if finding.subject == subject)


def test_json_keeps_its_keys_and_gains_facts(north: Hospital) -> None:
    result = CliRunner().invoke(app, ["check", "--json", "--home", str(north.home)])
    document = json.loads(result.stdout)
    assert result.exit_code == 1 and document["ready"] is False and "study" not in document
    assert [finding["subject"] for finding in document["findings"]] == [*SUBJECTS, *COUNTS]
    assert all({"subject", "good", "sentence"} <= set(finding) for finding in document["findings"])
    assert document["facts"]["images"] == Index.open(north.home / "state").taken
    assert document["facts"]["targets"]["opacity"]["missing"] == 0


def test_what_should_be_looked_at_does_not_make_a_site_unready(north: Hospital) -> None:
    table = Path(labels_of(north.home).mapping.table)
    own = north.home / "own.csv"
    first, *rows = table.read_text(encoding="utf-8").splitlines()
    own.write_text("\n".join([first, *rows[: len(rows) // 2]]) + "\n", encoding="utf-8")
    site = north.home / "site.yaml"
    site.write_text(site.read_text().replace(str(table), str(own)))
    missing = found_in(north.home, "missing")
    assert missing.good and missing.look and "mapped wrongly" in missing.sentence
    result = CliRunner().invoke(app, ["check", "--home", str(north.home)])
    assert (
        "LOOK    missing" in result.output and "ok      damage" in result.output and "FIX     gateway" in result.output
    )
    own.write_text(f"{first}\nnobody;normal\n", encoding="utf-8")
    assert "No study can train here" in found_in(north.home, "missing").sentence


def test_an_examination_under_two_patients_is_leakage_in_an_approved_study(
    north: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, labels = Index.open(north.home / "state"), labels_of(north.home)
    for split in SPLITS:
        Cohort.open(index, labels, north.study, split, north.site.pins(north.study))
    assert not found_in(north.home, "leakage").look
    before = preview(index, labels, north.study, north.site.settings, north.site.pins(north.study))
    assert before.pinned and before.divided == 0
    same = [replace(one, study_uid="1.2.3") for one in index.images()]
    monkeypatch.setattr(Index, "images", lambda _: same)
    leakage = found_in(north.home, "leakage")
    assert leakage.look and "in 1 approved studies, 1 examinations stand" in leakage.sentence


@pytest.mark.parametrize("state", ["nothing", "empty", "no index", "broken index", "no table", "no data"])
def test_whatever_is_broken_gives_a_sentence_and_a_page(north: Hospital, tmp_path: Path, state: str) -> None:
    home, index = north.home, north.home / "state" / "index.sqlite"
    if state == "nothing":
        home = tmp_path / "new"
        home.mkdir()
    elif state == "empty":
        source = Site.source_of(Site.settings_of(home), home).model_copy(update={"folder": str(tmp_path / "void")})
        (tmp_path / "void").mkdir()
        shutil.rmtree((home / "state").resolve())
        ingest(source, home, Site.state_of(home))
    elif state == "no index":
        index.unlink()
    elif state == "broken index":
        index.write_bytes(b"ZZTEST^MARIA" * 500)
    elif state == "no table":
        text = (home / "site.yaml").read_text()
        (home / "site.yaml").write_text(re.sub(r"table: .*", "table: /nowhere/ZZTEST.csv", text))
    else:
        (home / "site.yaml").write_text("version: 1\nsite: north\n")
    result = CliRunner().invoke(app, ["check", "--home", str(home), "--page", str(home / "page.html")])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output and "This site is not ready." in result.output
    text = (home / "page.html").read_text(encoding="utf-8")
    assert "not ready yet" in text and text.endswith("</html>") and not marks_in(text.encode())
    said = {"empty": "No image was taken", "no table": "There are no labels", "no data": "There are no labels"}
    assert said.get(state, "No index of images can be read") in text
    assert ("data:image" in text) == (state in ("no table", "no data"))


def test_pixels_that_are_gone_are_counted_and_the_rest_is_shown(north: Hospital) -> None:
    cached = sorted((north.home / "state" / "cache").rglob("*.npy"))
    cached[0].unlink()
    cached[1].write_bytes(b"ZZTEST")
    text = page_of(north.home)
    assert "the pixels of 2 more are lost" in text and f"Measured in {len(cached) - 2} of {len(cached)} images" in text


# A study ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [False, True])
def test_a_study_takes_what_was_foretold(north: Hospital, private: bool) -> None:
    plan = "{epsilon: 8, clip_norm: 1.0, noise_multiplier: 1.0, sampling_rate: 0.5}"
    asked = study(privacy__none=f"privacy: {plan}") if private else study(title="title")
    asked = asked.model_copy(update={"title": "Another"})
    index, labels, pins = Index.open(north.home / "state"), labels_of(north.home), north.site.pins(asked)
    before = sorted(path for path in north.home.rglob("*"))
    foretold = preview(index, labels, asked, north.site.settings, pins)
    assert not foretold.pinned and foretold.role == "trains"
    assert sorted(path for path in north.home.rglob("*")) == before, "looking keeps nothing"
    total = 0
    for split in SPLITS:
        try:
            cohort = Cohort.open(index, labels, asked, split, pins)
        except CohortTooSmall:
            assert any(split in short for short in foretold.short)
            continue
        portion = foretold.splits[split]
        assert vars(cohort.counts) == {k: v for k, v in vars(portion).items() if k != "grid_bytes"}
        assert portion.grid_bytes == cohort.images.numel() * cohort.images.element_size()
        total += portion.images
    assert total == index.taken or foretold.short
    assert preview(index, labels, asked, north.site.settings, pins) == replace(foretold, pinned=True)


@pytest.mark.parametrize(
    ("rounds", "sites", "external", "splits"),
    [
        (0, ["north"], "test_split", ["validation", "test"]),
        (2, ["south"], "test_split", ["test"]),
        (2, ["south"], "all", ["external"]),
    ],
)
def test_only_what_orders_can_ask_for_is_foretold(
    north: Hospital, tmp_path: Path, rounds: int, sites: list[str], external: str, splits: list[Any]
) -> None:
    facts = study(title="title").model_dump(mode="json")
    facts["training"]["rounds"], facts["evaluation"]["external"] = rounds, external
    facts["participation"] |= {"sites": sites, "evaluate_only": [] if sites == ["north"] else ["north"], "quorum": 1}
    asked, index, labels = Study.model_validate(facts), Index.open(north.home / "state"), labels_of(north.home)
    foretold = preview(index, labels, asked, north.site.settings, tmp_path / "pins")
    assert list(foretold.splits) == splits and foretold.used == tuple(splits)
    whole = sum(portion.images for portion in foretold.splits.values())
    assert whole == index.taken if "test" not in splits or rounds == 0 else 0 < whole < index.taken
    for split, portion in foretold.splits.items():
        assert len(Cohort.open(index, labels, asked, split, tmp_path / "pins")) == portion.images


def test_why_a_study_could_not_run_here_is_said(north: Hospital, tmp_path: Path) -> None:
    index, labels, settings = Index.open(north.home / "state"), labels_of(north.home), north.site.settings
    demanding = study(minimum_patients__2="minimum_patients: 50", sites__="sites: ")
    found = preview(index, labels, demanding, settings, tmp_path / "none")
    assert len(found.short) == 3 and "Each split needs 50 labelled patients; train has" in " ".join(found.problems)
    elsewhere = study(sites__="sites: ").model_copy(
        update={"participation": demanding.participation.model_copy(update={"sites": ["south"], "quorum": 1})}
    )
    assert any(
        "does not name this site" in p for p in preview(index, labels, elsewhere, settings, tmp_path / "x").problems
    )
    strict = settings.model_copy(
        update={"policy": settings.policy.model_copy(update={"permit_without_privacy": False})}
    )
    assert any("policy forbids" in p for p in preview(index, labels, study(), strict, tmp_path / "x").problems)
    with pytest.raises(LabelTableError, match="none of the study's targets"):
        preview(index, labels, study(targets__="targets: ", opacity="nodule"), settings, tmp_path / "x")


def test_check_takes_a_study_by_file_and_by_digest(north: Hospital, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(north.study.model_dump(mode="json")))
    for text in (str(path), north.study.digest, north.study.digest[:12]):
        result = CliRunner().invoke(app, ["check", "--home", str(north.home), "--study", text, "--json"])
        document = json.loads(result.stdout)
        assert document["study"]["digest"] == north.study.digest and document["study"]["problems"] == []
        assert document["findings"][-1]["subject"] == "study" and document["findings"][-1]["good"]
    for text in ("0" * 12, north.study.digest[:3], "nothing.yaml"):
        result = CliRunner().invoke(app, ["check", "--home", str(north.home), "--study", text])
        assert isinstance(result.exception, IsocenterError), text
    text = page_of(north.home, north.study)
    assert "What this study would take: " in text and 'id="study"' in text


# The page --------------------------------------------------------------------------------------------------------------


def test_the_page_is_private_and_whole_and_its_folder_is_checked(north: Hospital, tmp_path: Path) -> None:
    page = tmp_path / "own" / "page.html"
    page.parent.mkdir(mode=0o700)
    page.write_text("old")
    page.chmod(0o644)
    result = CliRunner().invoke(app, ["check", "--home", str(north.home), "--page", str(page)])
    assert f"Page: {page}. It stays at the hospital." in result.output and "Others on this machine" not in result.output
    assert stat.S_IMODE(page.stat().st_mode) == 0o600 and [*page.parent.iterdir()] == [page]
    page.parent.chmod(0o755)
    assert "Others on this machine" in str(check_place(page))
    page.parent.chmod(0o777)
    page.unlink()
    result = CliRunner().invoke(app, ["check", "--home", str(north.home), "--page", str(page)])
    assert isinstance(result.exception, DocumentError) and not page.exists()
    for wrong in (tmp_path / "own", tmp_path / "absent" / "page.html"):
        with pytest.raises(DocumentError):
            check_place(wrong)


def test_the_page_says_that_it_stays_and_asks_nobody_for_anything(north: Hospital) -> None:
    text = page_of(north.home)
    words = re.sub('base64,[^"]*', "base64,", text)
    top = text[text.index("<body>") :]
    assert top.index("holds thumbnails of patients and stays at the hospital") < top.index("<main>")
    assert (
        "<script" not in text and "default-src 'none'" in text and not re.search(r"https?:|//\w|@import|url\(", words)
    )
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources and all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert text.count("<svg") > 8 and text.count("<details>") > 8, "each plot is a table too"
    assert all(' alt="' in tag for tag in re.findall(r"<img[^>]*>", text))
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids)) and set(re.findall(r'aria-labelledby="([^"]*)"', text)) <= set(ids)


def test_without_thumbnails_there_is_no_image_and_no_list_of_them(north: Hospital) -> None:
    text = page_of(north.home, thumbnails=False)
    assert "data:image" not in text and "holds figures about patients" in text and "Intensities" in text
    assert not (north.home / "private" / "thumbnails.tsv").exists()


def test_tokens_lead_to_files_at_the_site_only(north: Hospital) -> None:
    text = page_of(north.home)
    tokens = re.findall(r"<code>([0-9a-f]{16})</code>", text)
    lookup = north.home / "private" / "thumbnails.tsv"
    with lookup.open(newline="", encoding="utf-8") as file:
        rows = {row["token"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert tokens and set(tokens) == set(rows) and stat.S_IMODE(lookup.stat().st_mode) == 0o600
    images = {one.file: one for one in Index.open(north.home / "state").images()}
    key = keys.token_key(north.home / "private" / "token.key")
    for token, row in rows.items():
        assert images[row["file"]].patient == row["patient"] and keys.token(key, row["file"]) == token
    assert re.findall(r"<code>([0-9a-f]{16})</code>", page_of(north.home)) == tokens, "the same each time"
    (north.home / "private" / "token.key").unlink()
    assert not set(re.findall(r"<code>([0-9a-f]{16})</code>", page_of(north.home))) & set(tokens)


def test_odd_images_are_shown_with_the_reason(north: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index.open(north.home / "state")
    images = index.images()
    changed = [replace(images[0], text=9.0), replace(images[1], shape=(100, 900)), *images[2:]]
    dark = np.zeros((200, 200), np.float32)
    real = Index.pixels
    monkeypatch.setattr(Index, "images", lambda _: changed)
    monkeypatch.setattr(Index, "pixels", lambda self, one: dark if one.file == images[2].file else real(self, one))
    text = page_of(north.home)
    said = re.findall('<span class="why">([^<]*)</span>', text)
    assert {"may hold text", "very long or wide", "nearly blank", "much darker than its kind"} <= set(
        "; ".join(said).split("; ")
    )
    assert said[0] == "nearly blank; much darker than its kind", "those with most reasons come first"


def test_one_exposure_under_two_patients_is_found_though_it_was_stored_anew(
    north: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = Index.open(north.home / "state").images()
    copy, own = replace(images[0], file="copy", patient="another"), replace(images[1], file="own")
    real = Index.pixels

    def stored_anew(index: Index, one: IndexedImage) -> Any:
        pixels = real(index, one)
        return pixels if one.file in {image.file for image in images} else pixels[2:-1:2, 1::2] ** 0.9

    monkeypatch.setattr(Index, "pixels", stored_anew)
    assert "Perhaps one exposure under two patients" not in page_of(north.home), "phantoms differ enough"
    monkeypatch.setattr(Index, "images", lambda _: [*images, copy, own])
    text = page_of(north.home)
    key = keys.token_key(north.home / "private" / "token.key")
    pairs = text[text.index('id="alike"') : text.index('id="odd"')]
    tokens = {keys.token(key, one.file) for one in (images[0], copy)}
    assert set(re.findall(r"<code>([0-9a-f]{16})</code>", pairs)) == tokens, "of one patient, copies are no leakage"


def _hostile(home: Path, name: str, change: Callable[[Any], None]) -> Path:
    """A hospital of phantoms whose headers were changed before they were ingested."""
    prepare(home, name, (16, len(name)), COORDINATOR.public_key())
    for path in (home / "hospital" / "dicom").rglob("IM*"):
        if path.suffix or path.name.endswith("L"):
            continue
        try:
            header = pydicom.dcmread(path)
            change(header)
            header.save_as(path)
        except Exception:  # noqa: S112  the broken files that are part of it
            continue
    site = Site.open(home)
    ingest(site.source, home, site.state)
    return home


def test_hostile_headers_are_shown_as_the_text_that_they_are(tmp_path: Path) -> None:
    def change(header: Any) -> None:
        header.Manufacturer = '<img src=x onerror="a()">&\x1b[2J'
        header.PatientSex, header.PatientAge = "<b>", "999Y"

    home = _hostile(tmp_path / "north", "north", change)
    text = page_of(home)
    assert "onerror" in text and "<img src=x" not in text and "&lt;img src=x" in text
    assert (
        not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", text)
        and "<b>" not in text.split("</main>")[0].split("tiles")[2]
    )
    found = Inspection(home).facts
    assert found.ages.known == 0 and found.sexes.known == 0


def test_nothing_on_the_page_names_a_patient_a_file_or_a_date(tmp_path: Path) -> None:
    home = tmp_path / "north"
    prepare(home, "north", (16, 5), COORDINATOR.public_key())
    plant(home / "hospital")
    spoil(home / "hospital")
    site = Site.open(home)
    ingest(site.source, home, site.state)
    assert site.state and {"MRN-", "ZZTEST", "ACCQ"} <= marks_in((site.state / "index.sqlite").read_bytes())
    for thumbnails in (True, False):
        text = page_of(home, study(), thumbnails=thumbnails)
        assert Inspection(home).facts.images > 10 and not marks_in(text.encode())
        assert str(home) not in text and str(tmp_path) not in text
    result = CliRunner().invoke(app, ["check", "--home", str(home), "--json"])
    facts_said = json.dumps(json.loads(result.stdout)["facts"])
    assert not marks_in(facts_said.encode())


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_the_page(north: Hospital, tmp_path: Path, width: int, dark: bool) -> None:
    page_of(north.home, north.study)
    shot = tmp_path / "shot.png"
    look = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    given = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", look, f"--window-size={width},6000"]
    subprocess.run(
        ["chromium", *given, f"--screenshot={shot}", f"file://{north.home / 'readiness.html'}"],
        check=True,
        capture_output=True,
        timeout=120,
    )
    drawn = np.asarray(Image.open(shot).convert("L"), dtype=np.float32)
    background = float(np.median(drawn))
    assert drawn.shape == (6000, width) and (background < 60 if dark else background > 230)
    assert float(drawn[:3000].std()) > 10, "something is drawn"
    edge = drawn[:4000, -4:]
    assert float(np.abs(edge - background).max()) < 8, "nothing reaches over the right edge"
