"""A coordinator that lies, repeats, exceeds or confuses: the site's gate answers with a code, and does nothing.

`test_hostile_sums.py` is about the same coordinator and secure aggregation.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, RecordDict
from hospital import COORDINATOR, Hospital, first_model, study

from fl_client.site import Site
from models import contributions
from privacy import journal, keys, wire
from privacy.errors import MessageMalformed, OrderReplayed, ProtectionError


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    return Hospital.open(tmp_path)


def refused(hospital: Hospital, order: wire.Order) -> str:
    answer = hospital.answer(order)
    assert isinstance(answer, wire.Refusal), f"the site carried out the order: {answer.kind}"
    return answer.code


def test_an_honest_order_is_carried_out(hospital: Hospital) -> None:
    report, encoding = hospital.answer(hospital.order()), hospital.encoding()
    assert isinstance(report, wire.TrainReport)
    total = encoding.decode(encoding.vector_of(report.vector))
    assert contributions.read(hospital.study, "train", total.values, total.counts).cases > 0 and np.any(
        total.values != 0
    )


def test_an_order_signed_by_somebody_else_is_forged(hospital: Hospital) -> None:
    stranger = ec.generate_private_key(ec.SECP256R1())
    assert refused(hospital, hospital.order().signed(stranger)) == "order-forged"


def test_an_order_whose_model_was_exchanged_is_forged(hospital: Hospital) -> None:
    order: Any = hospital.order()
    assert refused(hospital, dataclasses.replace(order, model=order.model * np.float32(2))) == "order-forged"


def test_a_study_that_was_not_approved_is_not_worked_on(hospital: Hospital) -> None:
    other = study(Opacity="Another")
    assert refused(hospital, hospital.order(study=other.digest, model=first_model(other))) == "study-not-approved"


def test_an_approval_that_was_withdrawn_no_longer_holds(hospital: Hospital) -> None:
    path = hospital.home / "studies" / f"{hospital.study.digest}.json"
    content = json.loads(path.read_text())
    content["statement"] = content["statement"].replace('"approved"', '"declined"')
    path.write_text(json.dumps(content))
    assert refused(hospital, hospital.order()) == "study-not-approved"


def test_a_study_that_the_coordinator_did_not_sign_is_not_worked_on(hospital: Hospital) -> None:
    path = hospital.home / "studies" / f"{hospital.study.digest}.json"
    content = json.loads(path.read_text())
    content["coordinator_signature"] = content["coordinator_signature"][:-2] + "00"
    path.write_text(json.dumps(content))
    assert refused(hospital, hospital.order()) == "order-forged"


def test_a_study_changed_in_one_number_is_another_study(tmp_path: Path) -> None:
    """The approved file is edited at the site, as an attacker with the researcher's ear would like it."""
    hospital = Hospital.open(tmp_path)
    path = hospital.home / "studies" / f"{hospital.study.digest}.json"
    path.write_text(path.read_text().replace('\\"rounds\\":2', '\\"rounds\\":9'))
    assert refused(hospital, hospital.order()) != ""


def test_the_same_order_twice_is_a_replay(hospital: Hospital) -> None:
    order = hospital.order()
    assert isinstance(hospital.answer(order), wire.TrainReport)
    assert refused(hospital, order) == "order-replayed"
    assert isinstance(hospital.answer(hospital.order(attempt=2)), wire.TrainReport)


def test_a_replay_is_noticed_after_a_restart_and_by_two_processes(hospital: Hospital) -> None:
    order = hospital.order()
    Site.open(hospital.home).admit(order)
    with pytest.raises(OrderReplayed):
        Site.open(hospital.home).admit(order)


def test_more_rounds_than_agreed_are_refused(hospital: Hospital) -> None:
    assert refused(hospital, hospital.order(round=3)) == "policy-forbids"


def test_an_unprotected_study_needs_the_policys_word(hospital: Hospital) -> None:
    path = hospital.home / "site.yaml"
    path.write_text(path.read_text().replace("least_protection: plain", "least_protection: sealed"))
    assert refused(hospital, hospital.order()) == "policy-forbids"


def test_a_site_that_only_evaluates_does_not_train(tmp_path: Path) -> None:
    plan = study(**{"[north, south], quorum__2": "[south], evaluate_only: [north], quorum: 1"})
    hospital = Hospital.open(tmp_path, given=plan)
    assert refused(hospital, hospital.order()) == "study-not-approved"
    assert isinstance(hospital.answer(hospital.order(wire.EvaluateOrder)), wire.EvaluateReport)


def test_a_model_of_another_size_is_refused(hospital: Hospital) -> None:
    assert refused(hospital, hospital.order(model=np.zeros(10, np.float32))) == "message-malformed"


def test_a_lost_cache_is_named(hospital: Hospital) -> None:
    shutil.rmtree(hospital.home / "state")
    assert refused(hospital, hospital.order()) == "cache-lost"


def test_a_cohort_below_the_sites_minimum_is_refused(hospital: Hospital) -> None:
    path = hospital.home / "site.yaml"
    path.write_text(path.read_text().replace("minimum_patients: 2", "minimum_patients: 50"))
    assert refused(hospital, hospital.order()) == "cohort-too-small"


JUNK: list[RecordDict] = [
    RecordDict(),
    RecordDict({"isocenter": ConfigRecord({"kind": "train"})}),
    RecordDict({"config": ConfigRecord({"cmd": "__import__('os').system('id')"})}),
]


@pytest.mark.parametrize("records", JUNK)
def test_junk_is_dropped_without_an_answer(hospital: Hospital, records: RecordDict) -> None:
    with pytest.raises(MessageMalformed):
        hospital.deliver(records)


def test_an_exception_in_the_client_crosses_as_a_code_only(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("could not convert string to float: 'ZZTEST^JOHN' in /data/MRN-4711/IM0001")

    monkeypatch.setattr("models.learning.learn", fail)
    reply = hospital.deliver(hospital.order())
    assert wire.decode(reply, wire.Refusal).code == "internal"
    assert b"ZZTEST" not in everything(reply.content) and b"MRN" not in everything(reply.content)


def everything(records: RecordDict) -> bytes:
    """Every byte of a reply's records."""
    assert set(records) == {"isocenter"}
    values = dict(records["isocenter"]).items()
    return b"".join(value if isinstance(value, bytes) else repr((name, value)).encode() for name, value in values)


def test_nothing_that_names_a_patient_or_file_leaves(hospital: Hospital) -> None:
    """Every patient id, UID and file name of the hospital is looked for in every byte of the answers."""
    from fl_client.ingest import Index

    images = Index.open(hospital.home / "state").images()
    secrets = {text for image in images for text in (image.patient, image.study_uid, image.sop_uid, image.file) if text}
    assert len(secrets) > 20
    for order in (
        hospital.order(),
        hospital.order(wire.EvaluateOrder),
        hospital.order(wire.EvaluateOrder, split="test"),
    ):
        sent = everything(hospital.deliver(order).content)
        assert not [text for text in secrets if text.encode() in sent]
    log = (hospital.home / "journal.jsonl").read_bytes()
    assert not [text for text in secrets if text.encode() in log]


def test_everything_sent_or_refused_is_in_the_journal_first(hospital: Hospital) -> None:
    hospital.answer(hospital.order())
    hospital.answer(hospital.order())
    hospital.answer(hospital.order(wire.EvaluateOrder))
    text = (hospital.home / "journal.jsonl").read_text()
    assert [kind for kind in ("train-report", "refusal", "evaluate-report") if f'"{kind}"' in text] == [
        "train-report",
        "refusal",
        "evaluate-report",
    ]
    # The release of the one that was trained, and the ledger's note that no ε covers this run.
    assert journal.verify(hospital.home / "journal.jsonl") == 3 + 1 + 1
    assert COORDINATOR is not None


# Sealed


def test_a_sealed_study_without_the_key_of_an_aggregator_sends_nothing(tmp_path: Path) -> None:
    hospital = Hospital.open(tmp_path, given=study(protection__plain="protection: sealed"))
    assert hospital.study.aggregator == ""
    assert refused(hospital, hospital.order()) == "message-malformed"


def test_a_sealed_study_with_another_aggregator_is_another_study(tmp_path: Path) -> None:
    plan = study(protection__plain="protection: sealed").model_copy(update={"aggregator": "0a" * 32})
    hospital = Hospital.open(tmp_path, given=plan)
    swapped = plan.model_copy(update={"aggregator": "0b" * 32})
    assert refused(hospital, hospital.order(study=swapped.digest)) == "study-not-approved"


def test_a_sealed_update_opens_for_its_aggregator_and_its_order_alone(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    own, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    point = own.public_key().public_bytes_raw().hex()
    hospital = Hospital.open(
        tmp_path, given=study(protection__plain="protection: sealed").model_copy(update={"aggregator": point})
    )
    order: Any = hospital.order()
    report: Any = hospital.answer(order)
    packed = keys.unseal(own, report.vector, order.about("north"))
    assert len(packed) == hospital.encoding().size
    for key, about in (
        (other, order.about("north")),
        (own, order.about("south")),
        (own, dataclasses.replace(order, round=2).about("north")),
        (own, dataclasses.replace(order, sum=2).about("north")),
        (own, dataclasses.replace(order, attempt=2).about("north")),
        (own, dataclasses.replace(order, run="run-2").about("north")),
    ):
        with pytest.raises(ProtectionError):
            keys.unseal(key, report.vector, about)


def test_figures_of_the_test_split_leave_for_one_model_in_a_run(hospital: Hospital) -> None:
    """Figures of many models of a coordinator's choice would tell the labels of single images."""
    model = first_model(hospital.study)

    def asked(model: Any, **change: Any) -> bool:
        order = hospital.order(wire.EvaluateOrder, **({"model": model, "split": "test"} | change))
        assert isinstance(order, wire.EvaluateOrder)
        return hospital.site.may_release(order)

    assert not asked(model, split="validation")
    assert asked(model) and asked(model, attempt=2)  # a sum that has to be tried again
    assert not asked(model * np.float32(2)) and not asked(model * np.float32(2), attempt=3)
    assert asked(model * np.float32(2), run="run-2")
