"""Clinical covariates beside the image: what the study declares of them, what sites read, and what the network makes of them."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from hospital import Hospital, _ingested
from hospital import study as tiny
from torch import nn

from fl_client import scoring
from fl_client.cli import _beside as show
from fl_client.cohort import join
from fl_client.index import Index
from fl_client.observed import covariates_of, unnamed, years_of
from models import covariates, exporting, learning, networks
from models.attributes import About
from models.grids import to_grid
from models.labels import LabelMap, LabelTable
from models.study import Study
from privacy import dpsgd, wire
from privacy.dpsgd import Clip, LoopEngine, VmapEngine
from privacy.errors import DocumentError, StudyConflict

SIDE = 32
CRP = {"range": [0, 500], "unit": "mg/L", "missing": 5}


def made_study(name: str = "small_cnn", beside: Any = None, **change: Any) -> Study:
    given = {"age": {"missing": 60}, "sex": {}, "crp": CRP} if beside is None else beside
    return Study.model_validate(
        {
            "name": "fate",
            "title": "Fate",
            "purpose": "a test",
            "task": {"targets": ["icu"]},
            "images": {"size_px": SIDE},
            "network": {"name": name},
            "training": {"rounds": 5, "batch_size": 8, "learning_rate": 0.01, "schedule": "constant", "balance": False},
            "protection": "plain",
            "privacy": "none",
            "participation": {"sites": ["north"], "quorum": 1},
            **({"covariates": given} if given else {}),
        }
        | change
    )


def made_cohort(count: int = 24) -> Any:
    """Noise, whose label follows from the second covariate (crp, by the alphabet) and from nothing in the picture."""
    g = torch.Generator().manual_seed(3)
    values = torch.stack(
        [
            torch.rand(count, generator=g) * 90,
            torch.rand(count, generator=g) * 500,
            (torch.rand(count, generator=g) > 0.5) * 1.0,
        ],
        1,
    )
    values[::5, 0] = math.nan
    return SimpleNamespace(
        images=torch.rand(count, 1, SIDE, SIDE, generator=g),
        targets=(values[:, 1:2] > 250).float(),
        known=torch.ones(count, 1),
        patients=torch.arange(count) // 2,
        covariates=values,
    )


# The study ----------------------------------------------------------------------------------------------------------------


def test_a_study_without_covariates_keeps_its_digest_and_its_network() -> None:
    plain = made_study(beside={})
    assert b"covariates" not in plain.canonical()
    assert not any(layer.name.startswith("head.both") for layer in networks.layout(networks.build(plain)))
    assert made_study().digest != plain.digest


def test_what_is_known_of_age_and_sex_is_filled_in_and_signed() -> None:
    study = made_study()
    assert (study.covariates["age"].range, study.covariates["age"].unit) == ([0, 90], "years")
    assert (study.covariates["sex"].range, study.covariates["sex"].missing) == ([0, 1], 0.5)
    assert made_study(beside={"age": {"missing": 60, "range": [18, 90]}}).covariates["age"].range == [18, 90]
    again = Study.from_canonical(study.canonical())
    assert again == study and covariates.names_of(again.covariates) == ["age", "crp", "sex"]
    assert "crp (mg/L, 0 to 500; a missing one counts as 5, with a mark)" in study.learns_from


@pytest.mark.parametrize(
    ("beside", "says"),
    [
        ({"age": {}}, "missing"),  # no mean of a cohort stands in for what the researcher did not say
        ({"age": {"missing": 60, "unit": "months"}}, "leave that line out"),
        ({"sex": {"range": [0, 2]}}, "leave that line out"),
        ({"crp": CRP | {"missing": 501}}, "outside the range"),
        ({"crp": CRP | {"range": [5, 5]}}, "two rising numbers"),
        ({"crp": CRP | {"range": [0, math.inf]}}, "rising"),
        ({"crp": CRP | {"header": True}}, "no DICOM header"),
        ({"crp": CRP | {"unit": "mg\u202eL"}}, "pattern"),
        ({"crp": 5}, "dictionary"),
        ({f"c{i}": CRP for i in range(17)}, "at most 16"),
    ],
)
def test_covariates_that_say_too_little_or_contradict_themselves_are_refused(beside: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made_study(beside=beside)


def test_a_target_is_no_covariate_and_questions_have_none() -> None:
    with pytest.raises(StudyConflict, match="icu: what is predicted cannot be a covariate"):
        made_study(beside={"icu": CRP}).check()
    question = {"kind": "counting", "questions": {"all": {}}}
    counting = made_study(task=question, beside={"crp": CRP})
    assert any(sentence.startswith("covariates has no meaning") for sentence in counting.counting_conflicts())


# The site -----------------------------------------------------------------------------------------------------------------

TABLE = """uid,Age,Sex,CRP
1,63,F,1.5
2,95,male,
3,50+,O,high
4,,,7
5,40,F,2
5,40,F,3
6,155,F,51
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> LabelTable:
    path = tmp_path_factory.mktemp("table") / "labels.csv"
    path.write_text(TABLE)
    mapping = {
        "table": str(path),
        "key": "uid",
        "matches": "study_uid",
        "about": {"age": "Age", "sex": "Sex"},
        "numbers": {"crp": {"column": "CRP", "times": 10}},
    }
    return LabelTable.read(path, LabelMap.model_validate(mapping))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("1", (63.0, 15.0, 0.0)),
        ("2", (90.0, None, 1.0)),  # above 89 there is one age
        ("3", (None, None, 0.5)),  # a span of years is no age, a word no number
        ("4", (None, 70.0, None)),
        ("5", (40.0, None, 0.0)),  # two rows that differ
        ("6", (None, 510.0, 0.0)),  # nobody is 155
        ("unknown", (None, None, None)),
    ],
)
def test_a_site_reads_them_as_its_table_says(table: LabelTable, key: str, expected: Any) -> None:
    header = SimpleNamespace(sex="M", age_years=33.0)
    assert covariates_of(key, header, table, made_study().covariates) == expected
    assert table.unmapped["crp"].total() == 1 and table.conflicts == 1


def test_the_header_counts_only_where_the_study_says_so_and_the_table_is_silent(table: LabelTable) -> None:
    beside = {"age": {"missing": 60, "header": True}, "sex": {"header": True}}
    asked = made_study(beside=beside).covariates
    header = SimpleNamespace(sex="M", age_years=91.0)
    assert covariates_of("4", header, table, asked) == (90.0, 1.0)
    assert covariates_of("1", header, table, asked) == (63.0, 0.0)
    assert (
        years_of(About(None, over_89=False, age_bin="40-49"), 33.0) is None
    )  # the table knows better than to be overruled
    assert unnamed(table.mapping, made_study().covariates) == []
    bare = LabelMap.model_validate({"table": "t", "key": "k", "matches": "file", "numbers": {"age": {"column": "Age"}}})
    assert unnamed(bare, made_study().covariates) == ["age", "crp", "sex"] and unnamed(bare, asked) == []


def test_values_outside_the_declared_range_are_refused_and_none_is_cut_off() -> None:
    crp = made_study().covariates["crp"]
    assert [crp.admits(value) for value in (None, 0.0, 500.0, 500.1, -1.0)] == [True, True, True, False, False]


# The network --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small_cnn", "linear"])
def test_missing_values_are_the_studys_constant_and_a_mark(name: str) -> None:
    """Against a second writing of the same rule in numpy: nothing else of a cohort enters."""
    study = made_study(name)
    net = networks.build(study).eval()
    image, values = torch.rand(1, 1, SIDE, SIDE), torch.tensor([[math.nan, 100.0, 1.0]])
    facts: list[torch.Tensor] = []
    head: Any = net.head
    head.register_forward_hook(lambda module, given, answer: facts.append(given[1]))
    with torch.inference_mode():
        answer = net(image, values)
        marked = net(image, torch.tensor([[60.0, 100.0, 1.0]]))
    low, high = np.array([0.0, 0.0, 0.0]), np.array([90.0, 500.0, 1.0])
    filled = np.array([60.0, 100.0, 1.0])
    expected = [*(2 * (2 * (filled - low) / (high - low) - 1)), 1.0, 0.0, 0.0]
    np.testing.assert_allclose(facts[0].numpy()[0], expected, rtol=1e-6)
    assert answer.shape == (1, 1) and not torch.equal(answer, marked)  # known to be 60 is another thing than not known


@pytest.mark.parametrize("name", ["small_cnn", "linear", "densenet121", "efficientnet_b0", "vit"])
def test_every_network_takes_them_and_its_head_can_be_trained_alone(name: str) -> None:
    study = made_study(name, network={"name": name, "trained": "head"})
    net = networks.build(study)
    moved = {layer for layer, p in net.named_parameters() if p.requires_grad}
    assert moved and all(layer.startswith("head.") for layer in moved)
    assert networks.to_vector(net).size == sum(p.numel() for p in net.parameters())  # constants are no weights
    blocks = networks.build(made_study(name, network={"name": name, "trained": "last_block"}))
    assert {layer for layer, p in blocks.named_parameters() if p.requires_grad} >= moved
    if name in ("small_cnn", "linear", "vit"):
        assert net.eval()(torch.rand(2, 1, SIDE, SIDE), torch.rand(2, 3)).shape == (2, 1)


def test_a_round_learns_what_stands_beside_the_picture_and_repeats_bit_for_bit() -> None:
    plan = {"rounds": 5, "batch_size": 8, "local_epochs": 12, "learning_rate": 0.05, "augmentation": "none"}
    cohort, study = made_cohort(), made_study("linear", training=plan)
    nets = [networks.build(study) for _ in range(2)]
    first, second = (learning.learn(net, cohort, study, round_number=3) for net in nets)
    assert first.delta.tobytes() == second.delta.tobytes()
    scores = learning.predict(nets[0], cohort)
    assert np.abs((scores > 0.5) - cohort.targets.numpy()).mean() < 0.2
    np.testing.assert_allclose(learning.predict(nets[0], cohort, batch=5), scores, atol=1e-6)
    swapped = SimpleNamespace(**vars(cohort) | {"covariates": cohort.covariates.flip(0)})
    assert not np.allclose(learning.predict(nets[0], swapped), scores)


PRIVATE = {"epsilon": 8, "clip_norm": 1.0, "sampling_rate": 0.5, "noise_multiplier": 1.0, "images_per_patient": 2}


def units(cohort: Any, study: Study) -> list[dpsgd.Batch]:
    generator = torch.Generator().manual_seed(1)
    return [learning.unit(cohort, rows, study, generator) for rows in learning.labelled_patients(cohort)]


@pytest.mark.parametrize("name", ["small_cnn", "linear"])
def test_private_engines_agree_with_a_loop_over_patients(name: str) -> None:
    """The oracle clips and adds in float64, one patient at a time; engines may differ by their rounding onto the grid."""
    study = made_study(name, privacy=PRIVATE)
    net, clip, given = networks.build(study).train(), Clip(0.05), units(made_cohort(12), study)
    assert all(len(unit) == 4 and unit[1].shape == (1, 2, 3) for unit in given)
    total = np.zeros(sum(p.numel() for p in net.parameters()))
    for unit in given:
        net.zero_grad()
        logits = net(unit[0][0], unit[1][0])
        nn.functional.binary_cross_entropy_with_logits(logits, unit[2][0]).backward()
        flat = np.concatenate([p.grad.numpy().ravel() for p in net.parameters() if p.grad is not None]).astype(
            np.float64
        )
        total += flat * min(1.0, clip.norm / np.linalg.norm(flat))
    net.zero_grad(set_to_none=True)
    for engine in (LoopEngine(net, learning.patient_losses), VmapEngine(net, learning.patient_losses)):
        found = engine.clipped_sum(given, clip).total * clip.norm * 2.0**-clip.bits
        assert np.linalg.norm(found - total) < 2e-3 * np.linalg.norm(total)


def test_no_patient_meets_another_by_way_of_covariates() -> None:
    study = made_study(privacy=PRIVATE)
    net = networks.build(study).train()
    dpsgd.check_isolation(net, learning.patient_losses, units(made_cohort(8), study)[:2])


# In use -------------------------------------------------------------------------------------------------------------------


def package_of(study: Study, net: nn.Module) -> Any:
    tensors = {name: tensor.detach().numpy() for name, tensor in net.state_dict().items()}
    return SimpleNamespace(study=study, tensors=tensors, files={}, manifest={"version": "1.0.0"}, longest_side_px=1024)


def test_an_exported_model_takes_plain_numbers_and_a_bundle_is_refused_by_name(tmp_path: Path) -> None:
    study = made_study("linear")
    net = networks.build(study).eval()
    cohort = made_cohort(5)
    package = package_of(study, net)
    exporting.export(package, "pt2", tmp_path / "m.pt2")
    found = torch.export.load(tmp_path / "m.pt2").module()(cohort.images, cohort.covariates)
    np.testing.assert_allclose(found.detach().numpy(), learning.predict(net, cohort), atol=1e-5)
    with pytest.raises(DocumentError, match="takes covariates beside them"):
        exporting.export(package, "bundle", tmp_path / "bundle")


ASKED = {"age": {"missing": 60, "range": [30, 80], "header": True}, "crp": CRP, "sex": {"header": True}}
AT_THE_SITE = "task: {targets: [opacity]}\ncovariates:\n" + "".join(
    f"  {name}: {said}\n" for name, said in ASKED.items()
)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    asked = tiny(**{"task: {targets: [opacity]}": AT_THE_SITE.replace("True", "true")})
    return Hospital.open(tmp_path_factory.mktemp("home"), given=asked)


def persons(home: Path) -> dict[str, tuple[float, float]]:
    """SOP Instance UID -> age and sex, by another reader than the program's."""
    found = {}
    for path in (home / "hospital" / "dicom").rglob("IM?????"):
        header = pydicom.dcmread(path, stop_before_pixels=True)
        found[str(header.SOPInstanceUID)] = (float(header.PatientAge[:3]), float(header.PatientSex == "M"))
    return found


def test_a_site_trains_with_them_and_counts_who_is_outside_the_range(hospital: Hospital) -> None:
    site, asked = hospital.site, hospital.study
    index, labels = Index.open(site.state), LabelTable.open(hospital.home, site.source.labels)
    members, left_out = join(index, labels, asked)
    truth = persons(_ingested("north"))
    for member in members:
        age, sex = truth[member.image.sop_uid]
        assert member.covariates == (age, None, sex) and 30 <= age <= 80  # the site maps no column to crp
    outside = [image for image in index.images() if not 30 <= truth[image.sop_uid][0] <= 80]
    assert left_out.out_of_range == len(outside) > 0
    assert unnamed(site.source.labels, asked.covariates) == ["crp"]
    report = hospital.answer(hospital.order())
    assert isinstance(report, wire.TrainReport)
    shown = dict(show(asked))
    assert "age (years, 30 to 80, from the label table or else the DICOM header" in shown["Beside"]


def test_predict_takes_a_table_and_names_what_it_leaves_out(hospital: Hospital, tmp_path: Path) -> None:
    net = networks.build(hospital.study).eval()
    package: Any = package_of(hospital.study, net)
    images, truth = _ingested("north") / "hospital" / "dicom", persons(_ingested("north"))
    kept = min(uid for uid, (age, _) in truth.items() if 30 <= age <= 80)
    outside, *others = sorted(set(truth) - {kept})
    rows = [
        f"{kept},,F,7",
        f"{outside},81,F,7",
        *(f"{uid},50,,{'much' if n == 0 else ''}" for n, uid in enumerate(others[2:])),
    ]
    path = tmp_path / "facts.csv"
    path.write_text("\n".join(["SOP_Instance_UID,age,sex,crp", *rows]))
    found = scoring.score(package, images, 0, lambda *_: None, path)
    by_uid = {row.uid: row.scores for row in found.rows}
    assert set(by_uid) == {kept, *others[2:]}
    assert found.left_out["covariate-out-of-range"] >= 1 and found.left_out["no-row-of-covariates"] >= 2
    assert found.misread == 1
    index = Index.open(hospital.site.state)
    image = next(image for image in index.images() if image.sop_uid == kept)
    grid = torch.from_numpy(to_grid(index.pixels(image), SIDE)).reshape(1, 1, SIDE, SIDE)
    with torch.inference_mode():  # the empty age is the header's, as the study says; the others are the table's
        expected = torch.sigmoid(net(grid, torch.tensor([[truth[kept][0], 7.0, 0.0]])))
    assert by_uid[kept][0] == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(StudyConflict, match=r"takes age .* crp"):
        scoring.score(package, images, 0, lambda *_: None)
    package.study = made_study(beside={})
    with pytest.raises(StudyConflict, match="takes images alone"):
        scoring.score(package, images, 0, lambda *_: None, path)
