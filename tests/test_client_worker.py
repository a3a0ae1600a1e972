"""The process that trains: it holds no key, asks for no more signatures than its order needs, keeps to the site's limits, and
cannot harm the node that reads its answers."""

import ctypes
import json
import os
import pickle
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import worker_probe
from federation import Federation
from hospital import Hospital, study
from test_client_node import journal, message
from test_private_round import LOCAL, private

from fl_client import node, worker
from fl_client.worker import Worker, environment
from privacy import keys, wire
from privacy.errors import WorkerDied
from privacy.secagg import BUNDLE_BYTES, Place

MASKED = {"sites__[north, south]": "sites: [north, south, east]", "protection__plain": "protection: masked"}


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    return Hospital.open(tmp_path_factory.mktemp("worker"))


@pytest.fixture
def made(hospital: Hospital) -> Iterator[list[Worker]]:
    """Workers that a test starts with `start`; they are ended with it."""
    workers: list[Worker] = []
    yield workers
    for each in workers:
        each.stop()


# Readers of files, and what speaks with others: other processes of a hospital hold these, and a worker has its memory for itself.
NEVER_LOADED = {
    *("pydicom", "nibabel", "gdcm", "_gdcm", "PIL", "openjpeg", "jpeg_ls", "libjpeg"),
    *("flwr", "grpc", "httpx", "requests", "google", "fastapi", "sqlalchemy"),
    *("scipy", "monai", "sympy", "dp_accounting", "matplotlib", "pandas", "rich", "typer", "torchvision"),
}


def start(made: list[Worker], hospital: Hospital) -> Worker:
    made.append(Worker(hospital.site))
    return made[-1]


def ask(hospital: Hospital, by: Worker, order: wire.Order) -> Any:
    return wire.decode(node.answer(message(order), hospital.site, by), *wire.REPORTS)


def keys_order(hospital: Hospital, run: str, attempt: int = 1, number: int = 2) -> wire.Order:
    """An order that needs no images and one signature."""
    masked = study(**MASKED)
    hospital.approve(masked)
    return hospital.order(wire.KeysOrder, study=masked.digest, run=run, attempt=attempt, sum=number)


def set_resources(hospital: Hospital, **values: object) -> None:
    path = hospital.home / "site.yaml"
    head = path.read_text().split("resources:")[0]
    path.write_text(head + "resources:\n" + "".join(f"  {name}: {value}\n" for name, value in values.items()))


def replaced(hospital: Hospital) -> list[str]:
    """Why workers were replaced, as the journal says."""
    return [line["facts"]["why"] for line in journal(hospital) if line["kind"] == "worker-replaced"]


# One process for all orders ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library is not glibc")
def test_a_worker_that_waits_gives_its_free_memory_back(
    hospital: Hospital, made: list[Worker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker_probe.program(monkeypatch, "leaves_free_memory", tmp_path / "held")
    by = start(made, hospital)
    ask(hospital, by, keys_order(hospital, "idle"))
    held, until = json.loads((tmp_path / "held").read_text()), time.monotonic() + 60
    while worker._resident(by.statm) > held - (48 << 20):
        assert time.monotonic() < until, "it still holds what it does not need"
        time.sleep(0.1)


def test_a_worker_that_trained_and_evaluated_loaded_no_reader_and_no_network(
    hospital: Hospital, made: list[Worker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 MiB of each worker, before: its training set was read when it was ingested."""
    worker_probe.program(monkeypatch, "tells_its_packages", tmp_path / "told")
    by = start(made, hospital)
    for number, kind in enumerate((wire.TrainOrder, wire.EvaluateOrder), 1):
        assert ask(hospital, by, hospital.order(kind, run="light", sum=number)).kind == f"{kind.kind}-report"
    for line in (tmp_path / "told").read_text().splitlines():
        loaded = set(json.loads(line))
        assert {"torch", "fl_client"} <= loaded and not loaded & NEVER_LOADED


def test_keys_of_a_sum_stay_in_the_worker_from_order_to_order_and_are_made_once(
    hospital: Hospital, made: list[Worker]
) -> None:
    """The vault lives as long as the process, and a number of a sum is used once and only upwards."""
    by = start(made, hospital)
    report = ask(hospital, by, keys_order(hospital, "five"))
    assert isinstance(report, wire.KeysReport) and len(report.keys) == BUNDLE_BYTES
    for number, code in ((2, "order-replayed"), (1, "step-refused")):
        refusal = ask(hospital, by, keys_order(hospital, "five", number=number))
        assert isinstance(refusal, wire.Refusal) and refusal.code == code
    assert replaced(hospital) == []


def test_a_worker_that_dies_at_work_refuses_and_the_next_order_is_worked_on(
    hospital: Hospital, made: list[Worker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker_probe.program(monkeypatch, "dies_at_work", tmp_path / "died")
    by = start(made, hospital)
    report = ask(hospital, by, keys_order(hospital, "three"))
    assert isinstance(report, wire.Refusal) and report.code == "worker-died"
    assert replaced(hospital)[-1] == "worker-died"
    assert isinstance(ask(hospital, by, keys_order(hospital, "three", 2)), wire.KeysReport)


def test_a_worker_that_dies_while_it_starts_or_waits_is_replaced_and_the_order_is_worked_on(
    hospital: Hospital, made: list[Worker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker_probe.program(monkeypatch, "dies_while_it_starts", tmp_path / "died")
    by = start(made, hospital)
    assert isinstance(ask(hospital, by, keys_order(hospital, "again")), wire.KeysReport)
    os.kill(by.process.pid, signal.SIGKILL)
    by.process.wait()
    assert isinstance(ask(hospital, by, keys_order(hospital, "again", 2)), wire.KeysReport)


def test_a_worker_that_always_dies_is_named(
    hospital: Hospital, made: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker_probe.program(monkeypatch, "dies_while_it_starts", "")
    with pytest.raises(WorkerDied, match="3 times"):
        start(made, hospital).wait()


def test_a_worker_whose_self_test_fails_works_on_nothing(
    hospital: Hospital, made: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker_probe.program(monkeypatch, "fails_at_once")
    by = start(made, hospital)
    for attempt in (1, 2):
        report = ask(hospital, by, keys_order(hospital, "red", attempt))
        assert isinstance(report, wire.Refusal) and report.code == "audit-failed"


def test_a_worker_ends_with_its_node(hospital: Hospital, made: list[Worker], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node was killed and said no word: the pipes end, and with them the process."""
    worker_probe.program(monkeypatch, "dies_while_it_starts", hospital.home)
    by = start(made, hospital)
    by.wait()
    by.line.writer.close()
    assert by.process.wait(60) == 0


# What it holds -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_server.rounds.LINGER_S", 0.05)
    monkeypatch.setattr("fl_server.rounds.GRACE_S", 0.05)
    monkeypatch.setattr("fl_server.rounds.ONLINE_LOOK_S", 0.01)


def test_a_whole_masked_run_in_a_worker_that_opens_no_key_no_socket_and_has_no_secret_in_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """The worker notes every file that it opens from its first line on; a server with its name and keys is the control."""
    federation = Federation(tmp_path, study(**{**MASKED, "quorum__2": "quorum: 3"}))
    monkeypatch.setenv("HTTPS_PROXY", "http://user:geheim@proxy")
    monkeypatch.setenv("HOSPITAL_TOKEN", "geheim")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    worker_probe.program(monkeypatch, "tells_its_files", tmp_path / "told", "")
    site = federation.hospitals["north"].site
    by = Worker(site)
    try:
        grid = federation.grid()
        grid.answers[federation.node("north")] = lambda asked: node.answer(asked, site, by)
        run = federation.run(grid)
    finally:
        by.stop()
    results = json.loads((run / "results.json").read_text())
    assert [sorted(found["contributors"]) for found in results["rounds"]] == [["east", "north", "south"]] * 2
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    keyed = [line["opened"] for line in told if "opened" in line and str(site.home) in line["opened"]]
    assert keyed == []
    seen = [line for line in told if "fds" in line]
    assert len(seen) >= 4 and {line["pid"] for line in seen} == {by.process.pid}
    for line in seen:
        ours = {number: target for number, target in line["fds"].items() if int(number) > 2}
        assert not any("socket" in target for target in ours.values()), ours
        assert sum("pipe:" in target for target in ours.values()) == 2
        assert not any("/keys" in target for target in ours.values())
        assert line["core"] == ["0", "0"]
        assert line["environment"]["CUDA_VISIBLE_DEVICES"] == "" and line["environment"]["OMP_NUM_THREADS"] == "1"
        assert "geheim" not in json.dumps(line["environment"])


def test_the_file_watch_of_the_test_above_would_see_a_key(
    hospital: Hospital, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = subprocess.run(
        [
            worker.sys.executable,
            "-c",
            f"import sys; sys.path[:0] = {[str(worker.ROOT), str(Path(__file__).parent)]!r}; import worker_probe\n"
            "from fl_client import worker; from fl_client.site import Site; from pathlib import Path\n"
            f"worker.main = lambda: Site.open(Path({str(hospital.home)!r})).key\n"
            f"worker_probe.tells_its_files({str(tmp_path / 'told')!r}, '')",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    told = (tmp_path / "told").read_text()
    assert str(hospital.home / "keys" / "site.key") in told, found.stderr


def test_a_gpu_is_seen_only_where_site_yaml_permits_it(
    hospital: Hospital, made: list[Worker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the next order on: the process with the other environment takes the place of the present one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    worker_probe.program(monkeypatch, "tells_its_files", tmp_path / "told", "bare")
    by = start(made, hospital)
    try:
        for number, gpu in enumerate(("false", "true", "true", "false"), start=1):
            set_resources(hospital, gpu=gpu)
            assert isinstance(ask(hospital, by, keys_order(hospital, "gpu", number)), wire.KeysReport)
    finally:
        set_resources(hospital, cpu_threads=0)
    told = [line for line in map(json.loads, (tmp_path / "told").read_text().splitlines()) if "fds" in line]
    assert [line["environment"]["CUDA_VISIBLE_DEVICES"] for line in told] == ["", "0", "0", ""]
    assert [line["pid"] == told[1]["pid"] for line in told] == [False, True, True, False]


def test_variables_that_may_hold_a_secret_do_not_reach_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = ["AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "SSH_AUTH_SOCK", "http_proxy", "PYTHONSTARTUP", "KUBECONFIG"]
    for name in (*secret, "OMP_NUM_THREADS", "LC_ALL"):
        monkeypatch.setenv(name, "x")
    kept = environment(gpu=True)
    assert not set(secret) & set(kept) and {"OMP_NUM_THREADS", "LC_ALL", "PATH"} <= set(kept)
    assert kept["PYTHONPATH"] == str(Path(__file__).resolve().parent.parent)


# What it may ask and answer ------------------------------------------------------------------------------------------


def place(masked: str, **change: Any) -> bytes:
    return Place(**({"study": masked, "run": "signing", "attempt": 1, "sum": 2} | change)).canonical()


def bundle(name: str) -> bytes:
    return name.encode().ljust(32, b"\0") + bytes(range(96))


ASKED: dict[str, Any] = {
    "the keys of the order once more": lambda digest: (keys.SUM_KEYS, place(digest) + b"\n" + bundle("north")),
    "a context while making keys": lambda digest: (keys.SUM_CONTEXT, bytes(32)),
    "a decision about a study": lambda digest: (keys.STUDY_DECISION, b"{}"),
    "a call": lambda digest: (keys.CALL, b"x"),
    "no label of ours": lambda digest: (b"isocenter/v1/anything", b"x"),
    "nothing": lambda digest: (b"", b""),
}


@pytest.mark.parametrize("asked", ASKED)
def test_a_worker_that_asks_for_another_signature_gets_none_and_is_replaced(
    hospital: Hospital, made: list[Worker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str
) -> None:
    file = tmp_path / "asked"
    file.write_text(json.dumps([part.hex() for part in ASKED[asked](study(**MASKED).digest)]))
    worker_probe.program(monkeypatch, "asks_for_signatures", file)
    by, number = start(made, hospital), list(ASKED).index(asked) + 1
    report = ask(hospital, by, keys_order(hospital, "signing", number))
    assert isinstance(report, wire.Refusal) and report.code == "signature-refused"
    assert replaced(hospital)[-1] == "signature-refused"
    assert not Path(f"{file}.signed").exists()
    file.unlink()
    assert isinstance(ask(hospital, by, keys_order(hospital, "signing", number, number=3)), wire.KeysReport)


def frames(*facts: Any, more: tuple[bytes, ...] = ()) -> list[bytes]:
    return [json.dumps(list(facts)).encode(), *more]


class Runs:
    """What a node that unpickled would run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def lies(order: wire.Order, mark: Path) -> dict[str, list[bytes]]:
    refusal = wire.Refusal(**order.naming(), site="north", code="internal").to_facts()
    good = {**order.naming(), "site": "north", "seconds": 0.0, "vector": b"", "vouch": b"", "keys": b""}
    other = wire.TrainReport(**good | {"run": "another"}).to_facts()
    sizes = dict.fromkeys(("vector", "vouch", "keys"), 0)
    plain = {name: value for name, value in other.items() if name not in sizes}
    return {
        "nothing that is JSON": [b"\xff\xfe junk"],
        "a pickle": [pickle.dumps(Runs(mark))],
        "a text": frames("report"),
        "no facts": frames("report", [], {}),
        "another run": frames("report", plain, sizes, more=(b"", b"", b"")),
        "another site": frames("report", refusal | {"site": "south"}, {}),
        "a code that is none of ours": frames("report", refusal | {"code": "ZZTEST^PATIENT"}, {}),
        "one field more": frames("report", refusal | {"text": "ZZTEST^PATIENT"}, {}),
        "an order": frames("report", {"kind": "keys", "version": 1}, {}),
        "facts that no record holds": frames("report", refusal | {"code": {"a": [None]}}, {}),
        "a negative size": frames("report", {}, {"vector": -5}),
        "less than it says": frames("report", plain, sizes | {"vector": 2**40}, more=(b"x" * (1 << 20), b"", b"")),
        "very deep": [b"[" * 1_000_000],
        "more than a head may be": [b" " * (3 << 20)],
        "a signature over numbers": frames("sign", {"label": 5, "body": 5}, {}),
    }


def test_whatever_a_worker_sends_the_node_refuses_the_order_and_goes_on_with_another_worker(
    hospital: Hospital, made: list[Worker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its line to the node carries JSON and bytes of the wire's schema; a pickle on it is not opened."""
    file, mark = tmp_path / "frames", tmp_path / "unpickled"
    worker_probe.program(monkeypatch, "answers", file)
    by = start(made, hospital)

    for number, name in enumerate(lies(keys_order(hospital, "lies"), mark), start=1):
        asked = keys_order(hospital, "lies", number)
        file.write_text(json.dumps([frame.hex() for frame in lies(asked, mark)[name]]))
        report = ask(hospital, by, asked)
        assert isinstance(report, wire.Refusal) and report.code == "worker-died", name
        assert len([why for why in replaced(hospital) if why == "worker-died"]) >= number
    assert not mark.exists()
    pickle.loads(pickle.dumps(Runs(mark)))  # noqa: S301  the control: it would have worked
    assert mark.exists(), "the pickle of this test does nothing"


# What it may take ----------------------------------------------------------------------------------------------------


@pytest.fixture
def at_home(tmp_path: Path) -> Hospital:
    return Hospital.open(tmp_path)


def test_an_order_that_takes_more_memory_than_permitted_is_ended_and_the_next_one_is_worked_on(
    at_home: Hospital, made: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker_probe.program(monkeypatch, "takes_memory")
    set_resources(at_home, memory_gb=0.5)
    by = start(made, at_home)
    first = by.process.pid
    report = ask(at_home, by, keys_order(at_home, "much"))
    assert isinstance(report, wire.Refusal) and report.code == "limit-exceeded"
    assert replaced(at_home) == ["memory"] and by.process.pid != first
    worker_probe.program(monkeypatch, "dies_while_it_starts", at_home.home)  # which is there, so it does not
    os.kill(by.process.pid, signal.SIGKILL)
    by.process.wait()
    assert isinstance(ask(at_home, by, keys_order(at_home, "much", 2)), wire.KeysReport)


def test_limits_hold_from_the_next_order_on_after_site_yaml_was_changed(
    at_home: Hospital, made: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker_probe.program(monkeypatch, "dies_while_it_starts", at_home.home)
    by = start(made, at_home)
    answers = []
    for number, limit in enumerate((0, 0.01, 64), start=1):
        set_resources(at_home, memory_gb=limit)
        answers.append(ask(at_home, by, keys_order(at_home, "limits", number)))
    assert [type(answer) for answer in answers] == [wire.KeysReport, wire.Refusal, wire.KeysReport]
    assert answers[1].code == "limit-exceeded" and replaced(at_home) == ["memory"]


def test_an_order_that_takes_too_long_is_ended_and_what_it_reserved_stays_charged(
    tmp_path: Path, made: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs after the patients were charged; the time runs out only then."""
    mark = tmp_path / "reserved"
    plain = Hospital.open(tmp_path, "north", private(LOCAL, **{"protection__masked": "protection: plain"}))
    path = plain.home / "site.yaml"
    path.write_text(path.read_text().replace("minimum_patients: 2", "minimum_patients: 1"))
    worker_probe.program(monkeypatch, "hangs_after_reserving", mark)

    def run_out() -> None:
        while not mark.exists():
            time.sleep(0.05)
        worker.MINUTE_S = 0.0

    monkeypatch.setattr(worker, "MINUTE_S", 60.0)  # and back at the end
    by, clock = start(made, plain), threading.Thread(target=run_out)
    clock.start()
    report = ask(plain, by, plain.order(run="long"))
    clock.join()
    assert isinstance(report, wire.Refusal) and report.code == "limit-exceeded"
    assert replaced(plain) == ["time"]
    spent = plain.site.ledger.spendings(0.001)["total"]
    assert (spent.open, spent.rounds) == (1, 1) and spent.spent == 0 < spent.charged
