"""The node's worker: whatever happens in it, the coordinator gets an answer, and it says nothing but a code."""

import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hospital import Hospital, study

from fl_client import node
from fl_client.node import Worker
from privacy import wire
from privacy.errors import AuditFailed, WorkerDied
from privacy.secagg import BUNDLE_BYTES


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    return Hospital.open(tmp_path_factory.mktemp("node"))


@pytest.fixture(scope="module")
def worker(hospital: Hospital) -> Iterator[Worker]:
    made = Worker(hospital.site)
    yield made
    made.stop()


def message(order: wire.Order | RecordDict, kind: str = "train") -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    records = order if isinstance(order, RecordDict) else order.to_records()
    made = Message(records, dst_node_id=5, message_type=kind)
    made.metadata.__dict__["_message_id"] = "m1"
    return made


def test_an_order_is_worked_on_in_another_process_and_answered(hospital: Hospital, worker: Worker) -> None:
    report = wire.decode(worker.answer(message(hospital.order(run="one"))), *wire.REPORTS)
    assert isinstance(report, wire.TrainReport)
    assert len(report.vector) == hospital.encoding().size


@pytest.mark.parametrize("kind", ["train", "evaluate", "query", "train.shell"])
def test_junk_is_answered_with_a_bare_error(worker: Worker, kind: str) -> None:
    reply = worker.answer(message(RecordDict({"isocenter": ConfigRecord({"kind": "shell", "x": "rm -rf /"})}), kind))
    assert reply.has_error() and reply.error.reason == "message-malformed"


@pytest.mark.parametrize(("kind", "code"), [("train.shell", "internal"), ("query", "message-malformed")])
def test_an_order_in_a_message_of_another_kind_is_refused(
    hospital: Hospital, worker: Worker, kind: str, code: str
) -> None:
    """One that no handler is registered for, and one whose handler is for other orders."""
    report = wire.decode(worker.answer(message(hospital.order(run="two"), kind)), *wire.REPORTS)
    assert isinstance(report, wire.Refusal) and report.code == code


def test_keys_of_a_sum_stay_in_the_worker_from_order_to_order_and_are_made_once(
    hospital: Hospital, worker: Worker
) -> None:
    """The vault lives as long as the process, and a number of a sum is used once and only upwards."""
    masked = study(
        **{"sites__[north, south]": "sites: [north, south, east]", "protection__plain": "protection: masked"}
    )
    hospital.approve(masked)

    def ask(number: int) -> wire.Report:
        order = hospital.order(wire.KeysOrder, study=masked.digest, run="five", sum=number)
        report: wire.Report = wire.decode(worker.answer(message(order, "query")), *wire.REPORTS)
        return report

    report = ask(2)
    assert isinstance(report, wire.KeysReport) and len(report.keys) == BUNDLE_BYTES
    for number, code in ((2, "order-replayed"), (1, "step-refused")):
        refusal = ask(number)
        assert isinstance(refusal, wire.Refusal) and refusal.code == code


def test_a_worker_that_is_killed_refuses_and_the_next_order_is_worked_on(hospital: Hospital, worker: Worker) -> None:
    (pid,) = worker.pool._processes or {}

    def kill() -> None:
        time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    os.kill(pid, signal.SIGSTOP)  # so that the kill meets it at work
    killer.start()
    report = wire.decode(worker.answer(message(hospital.order(run="three"))), *wire.REPORTS)
    killer.join()
    assert isinstance(report, wire.Refusal) and report.code == "worker-died"
    again = wire.decode(worker.answer(message(hospital.order(run="three", attempt=2))), *wire.REPORTS)
    assert isinstance(again, wire.TrainReport)


def test_a_site_yaml_broken_while_the_node_runs_is_a_refusal(
    hospital: Hospital, worker: Worker, tmp_path: Path
) -> None:
    path = hospital.home / "site.yaml"
    good = path.read_text()
    try:
        path.write_text("nonsense: [")
        report = wire.decode(worker.answer(message(hospital.order(run="four"))), *wire.REPORTS)
        assert isinstance(report, wire.Refusal) and report.code == "bad-document"
    finally:
        path.write_text(good)


def _fails_its_test() -> None:
    raise AuditFailed("the self-test of this node failed: noise: half of it")


def _dies_at_first(mark: Path) -> None:
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def _dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_node_whose_self_test_fails_stops_before_it_connects(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "_warm", _fails_its_test)
    monkeypatch.setattr(node, "connect", lambda site: pytest.fail("connected"))
    said: list[str] = []
    with pytest.raises(AuditFailed, match="half of it"):
        node.serve(hospital.home, said.append)
    assert said == []


def test_a_worker_whose_self_test_fails_works_on_nothing(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "_warm", _fails_its_test)
    made = Worker(hospital.site)
    try:
        report = wire.decode(made.answer(message(hospital.order(run="red"))), *wire.REPORTS)
    finally:
        made.stop()
    assert isinstance(report, wire.Refusal) and report.code == "audit-failed"


def test_a_worker_killed_while_it_starts_is_replaced_and_the_order_is_worked_on(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(node, "_warm", functools.partial(_dies_at_first, tmp_path / "died"))
    made = Worker(hospital.site)
    try:
        report = wire.decode(made.answer(message(hospital.order(run="again"))), *wire.REPORTS)
    finally:
        made.stop()
    assert isinstance(report, wire.TrainReport)


def test_a_worker_that_always_dies_is_named(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "_warm", _dies)
    made = Worker(hospital.site)
    try:
        with pytest.raises(WorkerDied, match="3 times"):
            made.wait()
    finally:
        made.stop()
