"""A released model in use: packaged from a rehearsal, scored on DICOM as in training, and exported for others' programs."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coordinator import coordinator
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import save
from typer.testing import CliRunner

from fl_client import scoring
from fl_client.cli import app as client
from fl_client.cohort import join, read_pins
from fl_client.index import Index
from fl_client.rehearsal import cohort
from fl_client.site import Site
from fl_server import published, release, simulation
from fl_server.cli import app as server
from fl_server.research import app
from models import exporting, learning, networks, registry
from models.labels import LabelTable
from models.registry import Package
from models.study import Study, parse
from privacy import keys
from privacy.errors import CertificateRevoked, DocumentError, PackageRefused, RunUnknown

TEXT = """
name: small
title: Small
purpose: A test.
task: {targets: [opacity]}
images: {size_px: 32}
training: {rounds: 1, batch_size: 8}
protection: plain
privacy: none
participation: {sites: [north, south], quorum: 2, minimum_patients: 2, round_timeout_s: 60}
evaluation: {validation: 0.2, test: 0.3, bins: 50}
"""
KEY = ec.derive_private_key(7, ec.SECP256R1())


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("rehearsal")
    return simulation.simulate(parse(Study, TEXT, "study.yaml"), {}, 60, folder, lambda event: None)


@pytest.fixture(scope="module")
def results(rehearsed: Any) -> Path:
    found: Path = rehearsed.folder / "coordinator" / "runs" / rehearsed.results["run_id"]
    return found


@pytest.fixture(scope="module")
def package(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "small-1.0.0.isocenter"
    path.write_bytes(release.package(results, release.Wanted(), KEY))
    return path


def say(*words: str, app: Any = app) -> str:
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_package_says_what_the_run_said(package: Path, rehearsed: Any) -> None:
    found = Package.open(package)
    card = json.loads(found.files["card.json"])
    assert (card["run_id"], card["digest"]) == (rehearsed.results["run_id"], found.study.digest)
    assert card["metrics"] and card["intended_use"] == "A test." and len(card["preprocessing_sha256"]) == 64
    assert found.manifest["lineage"] == {"parent": None, "round": 1}
    assert json.loads(say("verify", str(package), "--json"))["sha256"] == found.sha256
    assert "small 1.0.0" in say("models", "--registry", str(package.parent))


def numbers(value: Any, under: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from numbers(part, f"{under}.{name}")
    elif isinstance(value, list):
        for part in value:
            yield from numbers(part, under)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield under, value


@pytest.mark.parametrize("few", [False, True])
def test_a_card_counts_in_tens_and_says_nothing_of_small_classes(few: bool, results: Path, tmp_path: Path) -> None:
    """What leaves the consortium: no exact count, no time, no archive, no round."""
    copy = tmp_path / "results"
    shutil.copytree(results, copy)
    document = json.loads((copy / "results.json").read_bytes())
    if few:  # all but nine of the positives have no label
        counts = np.array(document["test"]["counts"])
        counts[0, 1] = 0
        counts[0, 1, 30] = 9
        document["test"]["counts"], document["figures"] = counts.tolist(), {}
        (copy / "results.json").write_text(json.dumps(document))
    card = json.loads(Package.read(release.package(copy, release.Wanted(), KEY)).files["card.json"])
    found = card["metrics"]
    assert set(found) == {"label", "selected_round", "test_missing", "pooled", "sites", "subgroups"}
    for name, number in numbers({"pooled": found["pooled"], "sites": found["sites"]}):
        if name.rpartition(".")[2] in ("patients", "images", "positives", "negatives"):
            assert number % 10 == 0, name
    pooled = found["pooled"]["targets"]["opacity"]
    assert (pooled["auroc"] is None) == few and ("fewer than 10" in pooled.get("why", "")) == few
    text = json.dumps(card)
    assert {entry["testing"] for entry in found["sites"].values()} == {"internal"}
    assert card["limits"][0].endswith("and nowhere else: internal testing.")
    assert not any(word in text for word in ("site_seconds", "ingested", "history", "train_loss", "clipped"))


def test_weights_of_another_network_are_refused(package: Path) -> None:
    found = Package.open(package)
    files = found.files | {"model.safetensors": save({"layer": np.zeros(3, np.float32)})}
    facts = {name: value for name, value in found.manifest.items() if name not in ("format", "files")}
    other = Package.read(registry.pack(facts, files, KEY))
    with pytest.raises(PackageRefused, match="another network"):
        exporting.network(other)


def test_a_run_without_a_model_is_not_released(tmp_path: Path) -> None:
    with pytest.raises(RunUnknown):
        release.package(tmp_path, release.Wanted(), KEY)


def test_scores_are_those_of_the_study_and_what_is_left_out_is_counted(
    package: Path, rehearsed: Any, tmp_path: Path
) -> None:
    home = rehearsed.folder / "sites" / "north"
    study = Study.model_validate(rehearsed.results["study"])
    members = cohort(home, study, "test")
    # A cohort is in the order of patients and files, so its rows are those of these members; who they are is told by their UIDs.
    site = Site.open(home)
    joined, _ = join(Index.open(site.state), LabelTable.open(home, site.source.labels), study)
    splits = read_pins(site.pins(study)).splits
    uids = [member.image.sop_uid for member in joined if splits[member.token] == "test"]
    expected = dict(zip(uids, learning.predict(exporting.network(Package.open(package)), members)[:, 0], strict=True))
    images = home / "hospital" / "dicom"
    told = list[tuple[str, int, int]]()
    scored = scoring.score(Package.open(package), images, 0, lambda *news: told.append(news))
    every = np.array([row.scores[0] for row in scored.rows])
    by_uid = {row.uid: row.scores[0] for row in scored.rows}
    assert len(expected) > 5 and len(by_uid) == len(scored.rows) and scored.left_out["duplicate"] >= 1
    assert told[-1][1] == told[-1][2] and {stage for stage, _, _ in told} == {"looking at files", "scoring images"}
    assert all(abs(by_uid[uid] - score) < 1e-6 for uid, score in expected.items())
    assert len({round(float(score), 5) for score in expected.values()}) > 5  # swapped images would be seen
    files = sum(path.is_file() for path in images.rglob("*"))
    assert len(scored.rows) + scored.left_out.total() == files and scored.left_out
    # The command says the same.
    out = tmp_path / "scores.csv"
    assert f"{len(scored.rows)} scored" in say("predict", str(package), str(images), "--out", str(out))
    with out.open() as file:
        table = list(csv.DictReader(file))
    assert np.allclose([float(row["opacity"]) for row in table], every, atol=1e-6)
    assert out.stat().st_mode & 0o077 == 0


def test_exports_answer_as_the_network_does(package: Path, tmp_path: Path) -> None:
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = torch.sigmoid(exporting.network(Package.open(package))(images))
    say("export", str(package), "--to", "pt2", "--out", str(tmp_path / "m.pt2"))
    assert torch.allclose(torch.export.load(tmp_path / "m.pt2").module()(images), expected, atol=1e-4)
    with pytest.raises(DocumentError, match="exists already"):
        exporting.export(Package.open(package), "pt2", tmp_path / "m.pt2")
    bundle = tmp_path / "bundle"
    say("export", str(package), "--to", "bundle", "--out", str(bundle))
    (bundle / "inputs").mkdir(exist_ok=True)
    for number, image in enumerate(images):
        np.save(bundle / "inputs" / f"{number}.npy", image[0].numpy())
    # What `python -m monai.bundle run` calls; the command itself needs the package fire, which Isocenter does not.
    call = "from monai.bundle import run; run(config_file='configs/inference.json')"
    words = [sys.executable, "-I", "-c", call]  # isolated: nothing of Isocenter is found
    done = subprocess.run(words, cwd=bundle, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads((bundle / "scores.json").read_text())
    assert np.allclose([scores[f"{n}.npy"] for n in range(3)], expected.numpy(), atol=1e-4)
    assert set(torch.load(bundle / "models" / "model.pt", weights_only=True)) == set(Package.open(package).tensors)


@pytest.mark.parametrize(
    ("relation", "name"),
    [("exclusive", "small_cnn"), ("ordered", "small_cnn"), ("independent", "vit"), ("exclusive", "resnet18")],
)
def test_a_network_is_exported_whatever_it_answers(relation: str, name: str) -> None:
    text = TEXT.replace("[opacity]}", f"[p, q, r], relation: {relation}}}\nnetwork: {{name: {name}}}")
    study = parse(Study, text, "study.yaml")
    scorer = exporting._Scorer(networks.build(study), study).eval()
    dynamic = ({0: torch.export.Dim("batch")},)
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        program = torch.export.export(scorer, (torch.zeros(2, 1, 32, 32),), dynamic_shapes=dynamic)
        assert torch.allclose(program.module()(images), scorer(images), atol=1e-4)


def test_onnx_without_its_extra_names_it(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any, **__: Any) -> None:
        raise ImportError("no module", name="onnxscript")

    monkeypatch.setattr(torch.onnx, "export", lacking)
    with pytest.raises(DocumentError, match="onnxscript") as caught:
        exporting.export(Package.open(package), "onnx", tmp_path / "m.onnx")
    assert "isocenter[onnx]" in str(caught.value.remedy) and not (tmp_path / "m.onnx").exists()


def test_onnx_answers_as_the_network_does(package: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = torch.sigmoid(exporting.network(Package.open(package))(images))
    exporting.export(Package.open(package), "onnx", tmp_path / "m.onnx")
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"))
    assert np.allclose(session.run(None, {"images": images.numpy()})[0], expected.numpy(), atol=1e-4)


def test_release_signs_with_the_key_of_whoever_releases(results: Path) -> None:
    found = Package.read(release.package(results, release.Wanted("2.0.1"), KEY))
    assert found.signer == keys.digest(keys.public_pem(KEY.public_key())) and found.manifest["version"] == "2.0.1"


def test_a_model_goes_from_its_run_to_a_site_and_a_researcher(rehearsed: Any, results: Path, tmp_path: Path) -> None:
    """With real gRPC: released, published, listed, pulled; and nobody who is revoked gets it any more."""
    with coordinator(tmp_path) as served:
        for name, role in (("north", "site"), ("south", "site"), ("rosa", "researcher"), ("ruth", "researcher")):
            served.join(name, role)  # type: ignore[arg-type]
        study, run_id = Study.model_validate(rehearsed.results["study"]), str(rehearsed.results["run_id"])
        home, folder = served.home, str(served.home.root)
        home.roster.add_study(study, "rosa", b"", b"")
        shutil.copytree(results, home.runs / run_id)
        site, rosa = str(tmp_path / "north"), str(tmp_path / "rosa")
        where = {"gateway": "127.0.0.1:1", "service": served.address}
        settings = {"version": 1, "site": "north", "coordinator": where}
        keys.write_private(tmp_path / "north" / "site.yaml", json.dumps(settings).encode())
        words = ["release", run_id, "--home", rosa, "--version", "1.2.0", "--out", str(tmp_path)]
        assert "Released" in say(*words)
        package = tmp_path / "small-1.2.0.isocenter"
        assert "no model yet" in say("models", "--home", site, app=client)
        for _ in range(2):
            assert "Published small 1.2.0" in say("publish", str(package), "--home", folder, app=server)
        (listed,) = json.loads(say("models", "--home", site, "--json", app=client))
        assert (listed["name"], listed["version"], listed["researcher"]) == ("small", "1.2.0", "rosa")
        pulled = json.loads(say("pull", "small", "--home", site, "--out", site, "--json", app=client))
        assert Path(pulled["file"]).read_bytes() == package.read_bytes() and pulled["signer_trusted"]
        assert "Pulled" in say("pull", "small@1.2.0", "--home", str(tmp_path / "ruth"), "--out", str(tmp_path / "ruth"))
        assert "request for the released model small" in say("egress", "--home", site, "--json", app=client)
        # The head in it is one of the coordinator's journal, by the verification that exists.
        (head,) = Package.open(package).heads
        assert f"--head {head.head}" in say("verify", str(package))
        verified = json.loads(say("journal", "verify", "--home", folder, "--head", head.head, "--json", app=server))
        assert verified["head_found"] and head.party == "coordinator"
        home.revoke("ruth")
        with pytest.raises(CertificateRevoked):
            say("pull", "small", "--home", str(tmp_path / "ruth"), "--out", str(tmp_path / "again"))
        # What is withdrawn is not served, and its version is spent.
        say("withdraw", "small@1.2.0", "--home", folder, app=server)
        with pytest.raises(RunUnknown):
            say("pull", "small", "--home", site, "--out", str(tmp_path / "again"), app=client)
        with pytest.raises(RunUnknown), served.caller("rosa") as caller:
            list(caller.fetch(listed["sha256"], 0))
        with pytest.raises(PackageRefused, match="published before"):
            published.publish(home, package)
        refuses_to_publish(home, package, tmp_path)


def refuses_to_publish(home: Any, package: Path, folder: Path) -> None:
    """Packages that no coordinator should pass on, each refused by name."""
    found, other = Package.open(package), folder / "other.isocenter"
    facts = {name: value for name, value in found.manifest.items() if name not in ("format", "files")}
    rosa = keys.load_key(folder / "rosa" / "keys" / "researcher.key")
    changed = {name: tensor + np.float32(1) for name, tensor in found.tensors.items()}
    for words, manifest, files, key in (
        ("no enrolled researcher", facts, {}, KEY),
        ("no finished run", facts | {"run_id": "run-9"}, {"card.json": b'"run_id": "run-9"'}, rosa),
        ("not those with which", facts, {"model.safetensors": save(changed)}, rosa),
        ("not tied", {**facts, "heads": [], "coordinator": ""}, {}, rosa),
    ):
        content = dict(found.files) | files
        if "card.json" in files:
            content["card.json"] = json.dumps(json.loads(found.files["card.json"]) | {"run_id": "run-9"}).encode()
        other.write_bytes(registry.pack(manifest | {"version": "9.0"}, content, key))
        with pytest.raises(PackageRefused, match=words):
            published.publish(home, other)
    assert [entry.notice.version for entry in published.entries(home)] == ["1.2.0"]
