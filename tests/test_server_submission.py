"""The researcher's command: a study gets its keys when it is submitted, and its file still names it afterwards."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from coordinator import Coordinator, aggregator_of, coordinator, point_of, study, with_roster
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import save_file
from typer.testing import CliRunner

from fl_server import research, weights
from models.sections import Initial
from models.study import Study
from privacy import consortium_pb2 as pb
from privacy import keys
from privacy.errors import MessageMalformed, NotEnrolled, RunUnknown, StudyConflict


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    with coordinator(tmp_path_factory.mktemp("served")) as demo:
        for name in ("north", "south", "west"):
            demo.join(name)
        demo.join("rosa", "researcher")
        yield demo


def fl_study(served: Coordinator, *words: object) -> str:
    result = CliRunner().invoke(research.app, [*map(str, words), "--home", str(served.folder / "rosa")])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return " ".join(result.stdout.split())


def written(path: Path, asked: Study) -> Path:
    path.write_text(json.dumps(asked.model_dump(mode="json", exclude_defaults=True)))  # JSON is YAML
    return path


def test_submit_fills_in_the_keys_and_the_file_still_names_the_study(served: Coordinator, tmp_path: Path) -> None:
    asked = study("north", "south", quorum=2, evaluate_only=["west"]).model_copy(update={"title": "By its file"})
    file = written(tmp_path / "study.yaml", asked)
    whole = served.home.with_keys(asked)
    shown = fl_study(served, "submit", file)
    assert f"digest {whole.digest}" in shown and "to north, south, west." in shown
    assert served.home.roster.study(whole.digest).study == whole
    fl_study(served, "submit", file)  # once more changes nothing
    with served.caller("rosa") as caller:
        [state] = [state for state in caller.studies() if state.draft == asked.digest]
        assert state.digest == whole.digest != asked.digest
        complete = written(tmp_path / "whole.yaml", whole)
        for name in (file, complete, whole.digest[:6]):
            assert research._digest(caller, str(name)) == whole.digest
        changed = written(tmp_path / "changed.yaml", asked.model_copy(update={"title": "Another"}))
        for name in (changed, whole.digest[:5], "0" * 64, ""):
            with pytest.raises(RunUnknown, match="no study"):
                research._digest(caller, str(name))


def test_a_file_with_other_keys_than_the_coordinators_is_not_submitted(served: Coordinator, tmp_path: Path) -> None:
    good = served.home.with_keys(study("north", "south", "west"))
    stranger = keys.point_hex(ec.generate_private_key(ec.SECP256R1()).public_key())
    file = tmp_path / "study.yaml"
    for bad, sentence in [
        (with_roster(good, south=stranger), "another key for south than the coordinator"),
        (with_roster(good, aggregator="1" * 64), "another aggregator than the coordinator"),
    ]:
        with pytest.raises(StudyConflict, match=sentence):
            fl_study(served, "submit", written(file, bad))
    assert good.digest in fl_study(served, "submit", written(file, good))
    with pytest.raises(NotEnrolled, match="mars"):
        fl_study(served, "submit", written(file, study("north", "mars")))


def test_keys_in_another_form_than_studies_have_are_refused(
    served: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, aggregator = point_of(served, "north"), aggregator_of(served)
    public = keys.load_point(good).public_numbers()
    answers = [
        ("", aggregator),
        (good.upper(), aggregator),
        (good[:10] + " " + good[10:], aggregator),
        (f"04{public.x:064x}{public.y:064x}", aggregator),
        ("02" + "ff" * 32, aggregator),
        (good, ""),
        (good, aggregator.upper()),
        (good, aggregator + "\n"),
        (good, aggregator[:-1]),
    ]
    with served.caller("rosa") as caller:
        for point, key in answers:
            reply = pb.RosterReply(keys={"north": point}, aggregator=key)
            monkeypatch.setattr(caller, "_call", lambda *_, reply=reply: reply)
            with pytest.raises(MessageMalformed):
                caller.roster(["north"])


def test_a_study_that_starts_from_weights_nobody_holds_is_refused(served: Coordinator, tmp_path: Path) -> None:
    """Once the operator has added the file it is taken; once it is gone again, it is not launched."""
    saved = tmp_path / "w"
    save_file({"a": np.zeros(1, np.float32)}, saved)
    sha256 = hashlib.sha256(saved.read_bytes()).hexdigest()
    plain = study("north", "south", quorum=2, evaluate_only=["west"])
    network = plain.network.model_copy(update={"initial": Initial(sha256=sha256)})
    file = written(tmp_path / "study.yaml", plain.model_copy(update={"network": network, "title": "From weights"}))
    with pytest.raises(StudyConflict, match=sha256[:12]) as caught:
        fl_study(served, "submit", file)
    assert "fl-server weights add" in str(caught.value.remedy)
    weights.add(served.home.root, saved)
    assert "digest" in fl_study(served, "submit", file)
    (served.home.root / "weights" / sha256).unlink()
    with pytest.raises(StudyConflict, match=sha256[:12]):
        fl_study(served, "run", file)
