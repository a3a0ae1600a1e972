"""Questions over four hospitals in one process: masked sums of tens. The oracle reads label tables and file headers by itself."""

import csv
import functools
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import yaml
from federation import Federation
from flwr.app import Message
from grid import FaultyGrid
from hospital import Hospital, _ingested
from hospital import study as training
from rich.console import Console
from test_hostile_sums import Liar
from typer.testing import CliRunner

from fl_client import cli as client_cli
from fl_client import egress
from fl_client.index import Index
from fl_server import counting, research, telling
from fl_server.run import Run, read_facts
from models.attributes import age_bin
from models.questions import CELLS
from models.study import Study, parse
from privacy import journal, wire
from privacy.errors import DocumentError, MessageMalformed

FOUR = ["north", "south", "east", "west"]
TEXT = """
name: cohort
title: How many there are
purpose: To plan a study of opacities.
task:
  kind: counting
  targets: [opacity]
  questions:
    everybody: {}
    asked: {modalities: [CR, DX], views: [frontal], targets: {opacity: 1}, age: [40, 59]}
    women: {sex: F, targets: {opacity: 0}}
    volumes: {modalities: [CT]}
  breakdown: [age, sex, race, modality, manufacturer]
privacy: none
participation: {sites: [north, south, east, west], quorum: 3, minimum_patients: 10, round_timeout_s: 60}
"""


def question(text: str = TEXT) -> Study:
    return parse(Study, text, "question.yaml")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.documents.parse", functools.cache(parse))
    monkeypatch.setattr("os.fsync", lambda file: None)  # processes end in these tests; machines do not


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return Federation(tmp_path_factory.mktemp("counting"), question())


@pytest.fixture
def four(consortium: Federation) -> Federation:
    """Four hospitals that approved the questions and have answered no order of any run."""
    for hospital in consortium.hospitals.values():
        (hospital.home / "orders.sqlite").unlink(missing_ok=True)
    return consortium


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Federation]:
    """Four hospitals, one of which changed its site.yaml: `change` gets its content."""

    def make(name: str, change: Callable[[dict[str, Any]], None]) -> Federation:
        federation = Federation(tmp_path, question())
        path = federation.hospitals[name].home / "site.yaml"
        settings = yaml.safe_load(path.read_text())
        change(settings)
        path.write_text(yaml.safe_dump(settings))
        return federation

    return make


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


# What the numbers are -------------------------------------------------------------------------------------------------


def people(home: Path) -> list[dict[str, Any]]:
    """Every image of a hospital with what its file's header and the label table say; which images there are, the index says."""
    settings = yaml.safe_load((home / "site.yaml").read_text())["data"]
    labels = settings["labels"]
    target = labels["targets"]["opacity"]
    text = Path(labels["table"]).read_text(encoding="utf-8-sig")
    dialect = csv.Sniffer().sniff(text.splitlines()[0], delimiters=",;\t")
    rows = csv.DictReader(text.splitlines(), dialect=dialect)
    table = {row[labels["key"]].strip(): row[target["column"]].strip().casefold() for row in rows}
    meaning = {str(word).strip().casefold(): value for word, value in target["words"].items()}
    tag = {"study_uid": "StudyInstanceUID", "accession": "AccessionNumber", "patient_id": "PatientID"}[
        labels["matches"]
    ]
    found = []
    for image in Index.open(home / "state").images():
        head = pydicom.dcmread(Path(settings["folder"]) / image.file, stop_before_pixels=True)
        word = table.get(str(head.get(tag, "")).strip())
        found.append(
            {
                "patient": str(head.PatientID).strip(),
                "modality": str(head.Modality),
                "sex": str(head.PatientSex),
                "age": int(str(head.PatientAge).rstrip("Y")),
                "opacity": meaning.get(word or ""),
            }
        )
    return found


QUESTIONS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "everybody": lambda image: True,
    "asked": lambda image: image["opacity"] == 1 and 40 <= image["age"] <= 59,
    "women": lambda image: image["sex"] == "F" and image["opacity"] == 0,
    "volumes": lambda image: False,
}


def oracle(home: Path, name: str) -> dict[str, Any]:
    images = [image for image in people(home) if QUESTIONS[name](image)]
    first = {image["patient"]: image for image in reversed(images)}
    age = {p: min(image["age"] for image in images if image["patient"] == p) for p in first}
    return {
        "patients": len(first),
        "images": len(images),
        "age": {cell: sum(age_bin(years) == cell for years in age.values()) for cell in CELLS["age"]},
        "sex": {cell: sum(image["sex"] == cell for image in first.values()) for cell in CELLS["sex"]},
        "modality": {cell: sum(image["modality"] == cell for image in first.values()) for cell in CELLS["modality"]},
    }


@pytest.mark.parametrize("ten", [10, 1])
def test_the_sum_is_what_a_count_by_hand_over_files_and_tables_gives(
    four: Federation, ten: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With numbers rounded to ones instead of tens, the sum is exact, and 16 patients at each site are enough to see it."""
    monkeypatch.setattr("models.questions.TEN", ten)
    folder = four.run()
    document = results(folder)
    assert document["label"] == "complete" == read_facts(folder)["label"]
    assert document["contributors"] == sorted(FOUR) and document["missing"] == {}
    seen = 0
    for name in QUESTIONS:
        sites = [oracle(hospital.home, name) for hospital in four.hospitals.values()]
        told = document["answers"][name]

        def floor(key: str, cell: str | None = None, sites: list[dict[str, Any]] = sites) -> int:
            numbers = [site[key] if cell is None else site[key][cell] for site in sites]
            return sum(number // ten * ten for number in numbers)

        assert told["patients"] == {"least": floor("patients"), "most": floor("patients") + 4 * (ten - 1)}
        assert told["images"] == {"least": sum(s["images"] // ten * ten for s in sites if s["patients"] >= ten)}
        for attribute in ("age", "sex", "modality"):
            for cell in CELLS[attribute]:  # type: ignore[index]
                assert told["breakdown"][attribute][cell]["least"] == floor(attribute, cell), (name, attribute, cell)
        assert told["breakdown"]["race"]["unknown"]["least"] == floor("patients")
        assert told["breakdown"]["manufacturer"]["other"]["least"] == floor("patients")
        seen += told["patients"]["least"]
    assert seen >= 40


def test_nothing_below_ten_leaves_a_site(four: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes under the masks is looked at: every number of every site is 0 or ten and more, in tens."""
    from fl_client import counting as at_site

    under: list[np.ndarray[Any, Any]] = []
    true_tens = at_site.tens

    def keep(*given: Any) -> Any:
        under.append(true_tens(*given))
        return under[-1]

    monkeypatch.setattr(at_site, "tens", keep)
    four.run()
    assert len(under) == 4 and {int(n) for numbers in under for n in numbers} == {0, 10, 20}
    exact = [oracle(hospital.home, "women")["patients"] for hospital in four.hospitals.values()]
    assert any(0 < number < 10 for number in exact), "the hospitals have no small number, so this shows nothing"


def test_a_run_that_counts_trains_nothing_and_leaves_no_model(four: Federation) -> None:
    folder = four.run()
    assert {path.name for path in folder.iterdir()} == {"study.json", "run.json", "events.jsonl", "results.json"}
    run = Run.open(folder)
    assert run.facts["state"] == "complete" and run.history == []
    sent = {message.content["isocenter"]["kind"] for message in grid_of(four).sent}
    assert sent == {"keys", "unmask", "evaluate"}


def grid_of(federation: Federation) -> FaultyGrid:
    for hospital in federation.hospitals.values():
        (hospital.home / "orders.sqlite").unlink(missing_ok=True)
    grid = federation.grid()
    federation.run(grid)
    return grid


def test_the_record_names_sites_as_contributors_and_nowhere_beside_a_number(four: Federation) -> None:
    document = results(four.run())
    study = document.pop("study")
    assert set(study["roster"]) == set(FOUR)
    document.pop("contributors")
    assert not [name for name in FOUR if f'"{name}"' in json.dumps(document)]


def test_egress_and_journal_say_that_numbers_left_in_tens(four: Federation) -> None:
    home = four.hospitals["north"].home
    folder = four.run()
    rows = [row for row in egress.read(home).rows if row.run == folder.name]
    assert [row.kind for row in rows] == ["keys-report", "unmask-report", "evaluate-report", "unmask-report"]
    assert rows[2].words == (
        "masked part of a sum: numbers of patients and images in tens, as the study's questions ask"
    )
    assert journal.verify(home / "journal.jsonl") >= 4
    assert not list((home / "studies").glob("*.pins.json")), "nobody was put into a split"


# Who is missing -------------------------------------------------------------------------------------------------------


def test_a_site_without_the_labels_refuses_and_is_missing_by_name(changed: Callable[..., Federation]) -> None:
    def rename(settings: dict[str, Any]) -> None:
        targets = settings["data"]["labels"]["targets"]
        targets["fracture"] = targets.pop("opacity")

    document = results(changed("west", rename).run())
    assert document["label"] == "partial (3 of 4, west missing: label-table)"
    assert document["answers"]["everybody"]["patients"] == {"least": 30, "most": 57}
    page = counting.Found.of(document)
    assert any("not the answer of all sites" in sentence for sentence in counting.sentences(page))


def test_a_site_below_its_own_minimum_refuses(changed: Callable[..., Federation]) -> None:
    def ask_for_more(settings: dict[str, Any]) -> None:
        settings["policy"]["minimum_patients"] = 17

    document = results(changed("south", ask_for_more).run())
    assert document["label"] == "partial (3 of 4, south missing: cohort-too-small)"


def test_a_site_that_does_not_permit_counting_is_missing(changed: Callable[..., Federation]) -> None:
    def forbid(settings: dict[str, Any]) -> None:
        del settings["policy"]["tasks"]

    document = results(changed("east", forbid).run())
    assert document["label"] == "partial (3 of 4, east missing: policy-forbids)"


def test_unlabelled_patients_are_undetermined_and_not_counted_as_absent(four: Federation, tmp_path: Path) -> None:
    home = four.hospitals["north"].home
    before = (home / "site.yaml").read_text()
    settings = yaml.safe_load(before)
    labels = settings["data"]["labels"]
    target = labels["targets"]["opacity"]
    table = Path(labels["table"])
    empty = tmp_path / "empty.csv"
    lines = table.read_text().splitlines()
    mark = next(mark for mark in ",;\t" if mark in lines[0])
    place = lines[0].split(mark).index(target["column"])
    blank = [[*cells[:place], "", *cells[place + 1 :]] for cells in (line.split(mark) for line in lines[1:])]
    empty.write_text("\n".join([lines[0], *(mark.join(cells) for cells in blank)]) + "\n")
    labels["table"] = str(empty)
    try:
        (home / "site.yaml").write_text(yaml.safe_dump(settings))
        document = results(four.run())
    finally:
        (home / "site.yaml").write_text(before)
    everybody = oracle(home, "everybody")["patients"] // 10 * 10
    middle = len({i["patient"] for i in people(home) if 40 <= i["age"] <= 59}) // 10 * 10
    assert document["label"] == "complete"
    assert document["answers"]["asked"]["undetermined"]["least"] == middle
    assert document["answers"]["everybody"]["undetermined"]["least"] == 0 < everybody


def test_a_site_that_drops_out_is_named_and_the_others_are_summed(
    four: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = four.grid()
    node = four.node("west")
    honest = grid.answers[node]

    def leave_before_the_work(message: Message) -> Message | None:
        return None if message.content["isocenter"]["kind"] == "evaluate" else honest(message)

    grid.answers[node] = leave_before_the_work
    monkeypatch.setattr("fl_server.sums.timeout_of", lambda study: 0.3)
    document = results(four.run(grid))
    assert document["label"].startswith("partial (3 of 4, west missing:")
    assert document["contributors"] == ["east", "north", "south"]
    assert document["answers"]["everybody"]["patients"] == {"least": 30, "most": 57}


def test_below_the_quorum_there_is_no_number_and_the_run_goes_on_later(four: Federation) -> None:
    away = []
    for name in ("south", "west"):
        state = four.hospitals[name].home / "state"
        shutil.move(state, state.with_name("away"))
        away.append(state)
    folder = four.run()
    assert "quorum-lost" in read_facts(folder)["label"] and not (folder / "results.json").exists()
    for state in away:
        shutil.rmtree(state, ignore_errors=True)
        shutil.move(state.with_name("away"), state)
    run = Run.open(folder)
    run.requeue()
    four.run(folder=folder)
    assert read_facts(folder)["label"] == "complete"


# A coordinator with no principles -------------------------------------------------------------------------------------


@pytest.fixture
def liar(four: Federation, monkeypatch: pytest.MonkeyPatch) -> Liar:
    monkeypatch.setattr("test_hostile_sums.first_model", lambda study: np.zeros(1, np.float32))
    return Liar(four, "run-liar")


COUNT = {"split": "cohort", "scale": 0}


def test_an_answer_is_given_once_under_one_mask(liar: Liar) -> None:
    _, fields = liar.agree()
    order = liar.order(wire.EvaluateOrder, **COUNT, **fields)
    report = liar.ask("north", order)
    assert isinstance(report, wire.EvaluateReport) and (report.figures == -1).all()
    assert liar.refused("north", order) == "order-replayed"
    # The same sum for fewer sites, whose difference from the first would be one site's part.
    fewer = {**fields, "participants": ("east", "north", "south")}
    assert liar.refused("north", liar.order(wire.EvaluateOrder, **COUNT, **fewer)) == "order-replayed"


def test_how_long_a_site_counted_is_not_told(liar: Liar) -> None:
    """It would say, beside the mask, how many images there are."""
    assert liar.ask("east", liar.order(wire.KeysOrder, 7)).seconds == 0
    _, fields = liar.agree(9)
    assert liar.ask("north", liar.order(wire.EvaluateOrder, 9, **COUNT, **fields)).seconds == 0


@pytest.mark.parametrize(
    ("kind", "change", "code"),
    [
        (wire.EvaluateOrder, {"split": "test"}, "step-refused"),
        (wire.EvaluateOrder, {"split": "validation"}, "step-refused"),
        (wire.EvaluateOrder, COUNT | {"model": np.ones(1, np.float32)}, "step-refused"),
        (wire.EvaluateOrder, COUNT | {"model": np.zeros(2, np.float32)}, "step-refused"),
        (wire.EvaluateOrder, COUNT | {"round": 2}, "policy-forbids"),
        (wire.EvaluateOrder, COUNT | {"participants": ("east", "north")}, "mask-keys-lost"),
        (wire.EvaluateOrder, COUNT, "mask-keys-lost"),
        (wire.TrainOrder, {}, "step-refused"),
    ],
)
def test_any_other_work_on_a_study_that_counts_is_refused(
    liar: Liar, kind: type[wire.Order], change: Any, code: str
) -> None:
    assert liar.refused("north", liar.order(kind, **change)) == code


def test_an_order_that_was_changed_on_its_way_is_forged(liar: Liar) -> None:
    order = liar.order(wire.EvaluateOrder, **COUNT)
    records = order.to_records()
    records["isocenter"]["round"] = 2
    answer = liar.federation.hospitals["north"].deliver(records, "evaluate")
    assert wire.decode(answer, wire.Refusal).code == "order-forged"


def test_other_questions_than_the_approved_ones_are_not_answered(liar: Liar) -> None:
    other = question(TEXT.replace("age: [40, 59]", "age: [40, 49]"))
    liar.study = liar.federation.home.with_keys(other)
    assert liar.refused("north", liar.order(wire.EvaluateOrder, **COUNT)) == "study-not-approved"


@pytest.mark.parametrize(
    "change",
    [
        {"protection: masked": "protection: plain"},
        {"quorum: 3": "quorum: 2"},
        {"kind: counting": "kind: counting", "privacy: none": "privacy: none\nevaluation: {site_figures: true}"},
    ],
)
def test_a_question_that_is_not_asked_of_masked_sums_is_refused_although_it_was_approved(
    four: Federation, change: dict[str, str], tmp_path: Path
) -> None:
    """A hostile consortium can sign anything; what a site answers does not depend on whether its coordinator checked."""
    text = TEXT + "protection: masked\n"
    for old, new in change.items():
        text = text.replace(old, new)
    hospital = Hospital.open(tmp_path, given=four.home.with_keys(question(text)))
    order = hospital.order(wire.EvaluateOrder, model=np.zeros(1, np.float32), **COUNT)
    answer = hospital.answer(order)
    assert isinstance(answer, wire.Refusal) and answer.code == "policy-forbids"


def test_a_study_that_trains_counts_nobody(tmp_path: Path) -> None:
    hospital = Hospital.open(tmp_path, given=training())
    answer = hospital.answer(hospital.order(wire.EvaluateOrder, split="cohort"))
    assert isinstance(answer, wire.Refusal) and answer.code == "step-refused"


def test_a_site_that_sends_no_tens_voids_the_sum(four: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    from fl_client import counting as at_site

    true_tens = at_site.tens
    monkeypatch.setattr(at_site, "tens", lambda task, answers: true_tens(task, answers) + 1)
    folder = four.run()
    assert "quorum-lost" in read_facts(folder)["label"] and not (folder / "results.json").exists()
    assert (folder / "events.jsonl").read_text().count('"void"') == 3


# What people read -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(consortium: Federation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """results.json of an undisturbed run."""
    for hospital in consortium.hospitals.values():
        (hospital.home / "orders.sqlite").unlink(missing_ok=True)
    path = tmp_path_factory.mktemp("page") / "cohort.json"
    path.write_bytes((consortium.run() / "results.json").read_bytes())
    return path


def study_command(*words: str) -> Any:
    return CliRunner().invoke(research.app, list(words), env={"COLUMNS": "150"})


def test_cohort_shows_bounds_and_suppressed_numbers(page: Path, tmp_path: Path) -> None:
    shown = study_command("cohort", str(page), "--out", str(tmp_path / "out"))
    assert shown.exit_code == 0, shown.output
    said = " ".join(shown.stdout.split())
    assert "How many there are: complete" in said and "over east, north, south, west" in said
    assert "at most 36 higher (9 for each of 4 sites)" in said
    assert "everybody everybody >= 40" in said
    assert "volumes CT < 10 a site < 10 a site < 10 a site" in said
    assert json.loads((tmp_path / "out" / "cohort.json").read_text()) == json.loads(page.read_text())
    table = list(csv.DictReader((tmp_path / "out" / "cohort.csv").read_text().splitlines()))
    assert {"question": "volumes", "attribute": "patients", "category": "all", "least": "0", "most": "36"} in table
    assert len(table) == 4 * (3 + sum(len(CELLS[a]) for a in ("age", "sex", "race", "modality", "manufacturer")))  # type: ignore[index]


def test_cohort_compares_to_a_census(page: Path, tmp_path: Path) -> None:
    census = tmp_path / "census.csv"
    census.write_text("attribute,category,share\nsex,Female,0.505\nsex,Male,0.495\nethnicity,Hispanic or Latino,19\n"
                      "ethnicity,Not Hispanic or Latino,81\n".replace("19\n", "0.19\n").replace("81\n", "0.81\n"))  # fmt: skip
    shown = study_command("cohort", str(page), "--census", str(census))
    assert shown.exit_code == 0, shown.output
    assert "everybody, sex:" in shown.stdout and "50.5 %" in shown.stdout
    assert "Not compared, because the study is not broken down by it: ethnicity" in shown.stdout
    told = json.loads(study_command("cohort", str(page), "--census", str(census), "--json").stdout)
    row = told["census"]["everybody"]["sex"]
    assert row["interval"][0] <= (row["distance"] or 0) <= row["interval"][1]
    assert [group["categories"] for group in row["groups"]] == [["F"], ["M"]]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["answers", "everybody", "patients", "least"], 45),
        (["answers", "everybody", "patients", "least"], "40"),
        (["answers", "everybody", "patients", "most"], 70),
        (["answers", "everybody", "images", "least"], 0),
        (["contributors"], ["north", "south", "east"]),
        (["contributors"], []),
        (["label"], "partial (1 of 4)"),
        (["digest"], "0" * 64),
        (["version"], 2),
        (["study", "task", "questions", "everybody", "sex"], "F"),
        (["answers"], {}),
    ],
)
def test_a_document_that_contradicts_itself_is_not_shown(page: Path, path: list[str], value: object) -> None:
    document = json.loads(page.read_text())
    inside = document
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    with pytest.raises(MessageMalformed):
        counting.Found.of(document)


def test_results_of_another_kind_are_sent_to_the_right_command(page: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(DocumentError, match="a study that trains"):
        counting.Found.of({"version": 2})
    with pytest.raises(DocumentError, match="no results can be read there"):
        counting.Found.open(tmp_path / "nowhere.json")
    monkeypatch.setattr(research, "_results", lambda *_: json.loads(page.read_text()))
    with pytest.raises(DocumentError, match="counts patients and trains nothing") as caught:
        research.report("run-1", tmp_path)
    assert "fl-study cohort run-1" in caught.value.remedy


def test_a_watched_run_says_that_it_counted_and_who_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    paper = io.StringIO()
    monkeypatch.setattr(telling, "console", Console(file=paper, width=100))
    events: list[dict[str, Any]] = [
        {"event": "started", "attempt": 1, "round": 0, "rounds": 1},
        {"event": "counted", "seconds": 1.25, "missing": {"west": "offline"}},
        {"event": "finished", "label": "partial (3 of 4, west missing: offline)", "auroc": None},
    ]
    assert telling.follow(json.dumps(event) for event in events)
    assert paper.getvalue().splitlines() == [
        "counted in 1.2 s  [west missing: offline]",
        "Run finished: partial (3 of 4, west missing: offline)",
    ]
    assert not telling.follow(iter(()))


def test_the_template_is_consistent_and_check_says_what_is_asked(tmp_path: Path) -> None:
    assert study_command("new", str(tmp_path / "q.yaml"), "--template", "cohort").exit_code == 0
    shown = study_command("check", str(tmp_path / "q.yaml"))
    assert shown.exit_code == 0 and "network" not in shown.stdout
    assert "middle-aged: CR/DX, frontal, opacity present, age 40 to 59" in shown.stdout


def test_simulate_carries_out_a_question(tmp_path: Path) -> None:
    (tmp_path / "q.yaml").write_text(TEXT)
    homes = [word for name in FOUR for word in ("--site", f"{name}={_ingested(name)}")]
    shown = study_command("simulate", str(tmp_path / "q.yaml"), *homes, "--out", str(tmp_path / "out"), "--json")
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout[shown.stdout.index("{") :])
    assert told["answers"]["everybody"]["patients"]["least"] == 40
    assert (tmp_path / "out" / "cohort.json").is_file() and not (tmp_path / "out" / "report.html").exists()


def test_check_of_a_question_says_what_would_leave_and_speaks_of_no_split(four: Federation, tmp_path: Path) -> None:
    (tmp_path / "q.yaml").write_text(TEXT)
    home = four.hospitals["south"].home
    shown = CliRunner().invoke(client_cli.app, ["check", "--study", str(tmp_path / "q.yaml"), "--home", str(home)])
    said = " ".join(shown.output.split())
    assert "asks for numbers and trains nothing; as things stand, this would go under the mask" in said
    assert f"everybody: 10 patients, 20 images (here: {oracle(home, 'everybody')['patients']}" in said
    assert "to choose the round" not in said


def test_a_person_approves_the_questions_in_words(four: Federation, capsys: pytest.CaptureFixture[str]) -> None:
    hospital = four.hospitals["north"]
    client_cli.show_study(four.plan, hospital.site, "ada", [])
    said = " ".join(capsys.readouterr().out.split())
    assert "asked: CR/DX, frontal, opacity present, age 40 to 59" in said
    assert "rounded down to tens before it is masked, so that less than 10 leaves as 0" in said
    assert "by age, sex, race, modality, manufacturer" in said
    people_here, images = (oracle(hospital.home, "everybody")[key] for key in ("patients", "images"))
    assert f"everybody: 10 patients, {images // 10 * 10} images (here: {people_here}, {images})" in said
    assert "volumes: 0 patients, 0 images (here: 0, 0)" in said
    assert "nothing is trained" in said and "no differential privacy" in said
    assert "Network" not in said and "training on your" not in said and "model update" not in said
