"""Other frameworks beside ours: what docs/benchmarks.md shows was measured, and all of them are given the same work."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import bench_tables
import numpy as np
import psutil
import pytest
import torch
from bench_peers import ROUNDS, Bench, between, workload
from bench_round import made_study
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from models import learning, networks
from models.study import Study, parse

ROOT = Path(__file__).resolve().parent.parent
FOUND: dict[str, Any] = json.loads((ROOT / "docs" / "benchmarks" / "peers.json").read_text())
BURN = "import time\nwhile time.process_time() < 0.5: pass\nprint(time.process_time())"


@pytest.mark.parametrize("name", ["peers", "peer_commands", "opacus"])
def test_the_page_shows_what_was_measured(name: str) -> None:
    text = bench_tables.PAGE.read_text(encoding="utf-8")
    assert bench_tables.written(text, name, bench_tables.TABLES[name][1](FOUND)) == text


def test_every_row_is_of_five_rounds_and_names_its_versions_and_its_load() -> None:
    for row in FOUND["rounds"].values():
        assert row["rounds"] >= 5 and row["load"] >= 0 and row["flwr"].startswith("1.41")
        assert row["ratio"] == pytest.approx(row["round_s"] / row["limit_s"], rel=0.02)
        assert row["ratio_processor"] == pytest.approx(row["round_processor_s"] / row["limit_processor_s"], rel=0.02)


def test_the_versions_are_those_that_the_environment_pins() -> None:
    pinned = dict(
        line.replace("[simulation]", "").split("==")
        for line in (ROOT / "deploy" / "peers" / "requirements.txt").read_text().splitlines()
        if "==" in line
    )
    for row in FOUND["rounds"].values():
        assert {name: row[name].split("+")[0] for name in ("flwr", "nvflare", "torch")} == {
            name: pinned[name] for name in ("flwr", "nvflare", "torch")
        }
    assert {entry["opacus"] for entry in FOUND["dp_step"].values()} == {pinned["opacus"]}


# The work ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four sites of different sizes whose images are noise."""
    (tmp_path / "study.json").write_text(json.dumps(made_study(workload.SITES, 3)))
    (tmp_path / "root").write_text(str(os.getpid()))
    for place, name in enumerate(workload.SITES):
        generator = torch.Generator().manual_seed(place)
        cohorts = {}
        for split, count in {"train": 40 + 10 * place, "validation": 8}.items():
            images, targets = torch.rand(count, 1, 64, 64, generator=generator), torch.zeros(count, 1)
            targets[::3] = 1
            cohorts[split] = workload.Split(images, targets, torch.ones(count, 1), torch.arange(count))
        workload.save(tmp_path, name, cohorts)
    return tmp_path


def trained(folder: Path, name: str, model: np.ndarray[Any, Any]) -> learning.Update:
    """What the project's own training makes of `model` in the first round at a site."""
    study: Study = parse(Study, (folder / "study.json").read_text(), "the study")
    net, site = networks.build(study), workload.Site(folder, name)
    networks.load_vector(net, model)
    return learning.learn(net, site.train_split, study, round_number=1)


def test_the_plain_process_averages_what_the_projects_own_training_gives(folder: Path) -> None:
    start = networks.to_vector(workload.Site(folder, "alpine").net)
    updates = [trained(folder, name, start) for name in workload.SITES]
    mean = sum(update.delta.astype(np.float64) * update.cases for update in updates) / sum(u.cases for u in updates)
    assert [update.cases for update in updates] == [40, 50, 60, 70]
    np.testing.assert_allclose(workload.plain(folder, 1), start + mean, atol=1e-6)
    assert len((folder / "marks.jsonl").read_text().splitlines()) == 2


def test_flowers_app_trains_and_validates_as_the_project_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "deploy" / "peers" / "flower"))
    app = import_module("app")
    for field in ("_run_id", "_node_id", "_task_id"):  # without them Flower makes no message
        monkeypatch.setattr(TaskIdentity, field, 7)
    net = workload.Site(folder, "bayside").net
    start, arrays = networks.to_vector(net), ArrayRecord(net.state_dict())
    config: Any = {"folder": str(folder), "rounds": 1}
    context = Context(1, 1, {"partition-id": 1}, RecordDict(), config)
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
    reply = app.train(Message(content, dst_node_id=1, message_type="train"), context).content
    net.load_state_dict(reply["arrays"].to_torch_state_dict())
    assert reply["metrics"]["num-examples"] == 50
    np.testing.assert_allclose(networks.to_vector(net) - start, trained(folder, "bayside", start).delta, atol=1e-6)
    scored = app.evaluate(Message(content, dst_node_id=1, message_type="evaluate"), context).content["metrics"]
    assert scored["num-examples"] == 8 and 0 <= scored["right"] <= 1


# The clock -----------------------------------------------------------------------------------------------------------


def test_processor_time_is_that_of_processes_which_have_ended_as_well() -> None:
    before = workload.processor_seconds(os.getpid())
    shell = f'"{sys.executable}" -c "$0"'  # a child of a child
    said = subprocess.run(["sh", "-c", f"{shell}; true", BURN], capture_output=True, text=True, check=True).stdout
    assert workload.processor_seconds(os.getpid()) - before >= float(said) - 0.05


def test_processor_time_of_strangers_does_not_count() -> None:
    alone = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    before = workload.processor_seconds(alone.pid)
    subprocess.run([sys.executable, "-c", BURN], capture_output=True, check=True)
    assert workload.processor_seconds(alone.pid) - before < 0.4
    alone.communicate(b"\n")


def test_rounds_are_what_lies_between_marks() -> None:
    marks = [{"at": at, "processor": at / 2} for at in (1.0, 3.0, 7.0)]
    assert between(marks) == [(2.0, 1.0), (4.0, 2.0)]


def test_nothing_that_was_started_is_left_and_nothing_else_is_ended(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    bench = Bench(tmp_path)
    with pytest.raises(RuntimeError, match="a word of its log"), bench.fresh():
        left = bench.start("sleep 600")
        bench.run("sh -c 'echo a word of its log; exit 3'")
    assert not psutil.pid_exists(left.pid) and other.poll() is None
    assert bench.commands == ["sleep 600", "sh -c 'echo a word of its log; exit 3'"] and ROUNDS - 2 >= 5
    other.communicate(b"\n")
