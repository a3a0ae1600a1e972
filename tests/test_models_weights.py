"""Files of weights: taken by name and shape, refused when they are another file, another network, or more than tensors."""

import hashlib
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from fl_server import cli, research
from fl_server import weights as store
from fl_server.roster import Home
from fl_server.settings import ServerFile
from models import networks, weights
from models.study import Study
from privacy.errors import DocumentError, StudyConflict


def study(name: str = "resnet18", **network: Any) -> Study:
    return Study.model_validate(
        {
            "name": "s",
            "title": "S",
            "purpose": "P.",
            "task": {"targets": ["opacity"]},
            "images": {"size_px": 64},
            "network": {"name": name, **network},
            "training": {"rounds": 1, "seed": 7},
            "privacy": "none",
            "participation": {"sites": ["a", "b", "c"], "quorum": 3},
        }
    )


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def other(name: str = "resnet18") -> dict[str, torch.Tensor]:
    """State of the network of `name` as another seed makes it."""
    plan = study(name).model_copy(update={"training": study().training.model_copy(update={"seed": 8})})
    return {key: value.clone() for key, value in networks.build(plan).state_dict().items()}


@pytest.mark.parametrize("name", ["small_cnn", "linear", "densenet121", "resnet18", "efficientnet_b0"])
def test_a_file_of_the_same_network_is_the_first_model(name: str, tmp_path: Path) -> None:
    tensors = other(name)
    plan = study(name, initial={"sha256": saved(tmp_path / "w", tensors)})
    vector, fit = weights.start(plan, tmp_path / "w")
    expected = torch.cat([value.reshape(-1) for value in tensors.values()]).numpy()
    assert fit is not None and not fit.fresh and not fit.left
    assert (vector == expected).all()


def test_an_archive_of_torch_is_read_like_safetensors_and_prefixes_do_not_count(tmp_path: Path) -> None:
    tensors = other()
    torch.save({"state_dict": {f"module.{name}": value for name, value in tensors.items()}}, tmp_path / "w.pt")
    net = networks.build(study())
    fit = weights.fit(net, study(), weights.read(tmp_path / "w.pt"))
    assert not fit.fresh
    assert all(torch.equal(value, tensors[name]) for name, value in net.state_dict().items())


def test_a_head_of_another_shape_stays_as_the_seed_made_it(tmp_path: Path) -> None:
    tensors = other()
    head = [name for name in tensors if name.startswith(networks.PARTS["resnet18"].head)]
    for name in head:
        tensors[name] = torch.zeros(14, *tensors[name].shape[1:])
    net, fresh = networks.build(study()), networks.build(study()).state_dict()
    fit = weights.fit(net, study(), tensors)
    assert sorted(fit.fresh) == sorted(head)
    assert all(torch.equal(net.state_dict()[name], fresh[name]) for name in head)


def test_batch_norms_are_left_out_with_their_gains(tmp_path: Path) -> None:
    tensors = other("densenet121")
    norms = [name.removesuffix(".weight") for name, value in tensors.items() if value.dim() == 1 and "norm" in name]
    for norm in {name for name in norms if f"{name}.weight" in tensors}:
        tensors[f"{norm}.running_mean"] = torch.ones(3)
        tensors[f"{norm}.weight"] = torch.full_like(tensors[f"{norm}.weight"], 9.0)
    net = networks.build(study("densenet121"))
    weights.fit(net, study("densenet121"), tensors)
    gains = [value for name, value in net.state_dict().items() if "norm" in name and name.endswith(".weight")]
    assert gains and all((gain == 1).all() for gain in gains)


def test_another_file_than_the_study_names_is_refused_before_it_is_read(tmp_path: Path) -> None:
    saved(tmp_path / "w", other())
    plan = study(initial={"sha256": "0" * 64})
    with pytest.raises(DocumentError, match="is not the one that the study names"):
        weights.start(plan, tmp_path / "w")


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["pickle", "archive"])
def test_a_pickle_with_a_program_is_refused_and_does_not_run(form: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "w.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Hostile(mark)))
    else:
        torch.save({"a": torch.zeros(2), "b": Hostile(mark)}, path)
    with pytest.raises(DocumentError):
        weights.read(path)
    assert not mark.exists()


def test_truncated_and_packed_archives_and_other_files_are_refused(tmp_path: Path) -> None:
    torch.save(other("linear"), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for name, content in {"half": whole[: len(whole) // 2], "empty": b"", "text": b"weights", "zip": whole[:4]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DocumentError):
            weights.read(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10_000_000))
    with pytest.raises(DocumentError, match="compressed"):
        weights.read(tmp_path / "packed")
    with pytest.raises(DocumentError, match="no such file"):
        weights.read(tmp_path / "absent")


def test_values_that_are_no_numbers_are_refused_and_nothing_is_taken() -> None:
    tensors, net = other(), networks.build(study())
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    before = networks.to_vector(net)
    with pytest.raises(StudyConflict, match="not finite"):
        weights.fit(net, study(), tensors)
    assert (networks.to_vector(net) == before).all()


@pytest.mark.parametrize("given", ["resnet50", "densenet121", "small_cnn"])
def test_weights_of_another_network_are_refused(given: str) -> None:
    net = networks.build(study())
    with pytest.raises(StudyConflict, match="another network"):
        weights.fit(net, study(), other(given))


def test_the_coordinator_keeps_files_under_their_hash_and_misses_others_by_name(tmp_path: Path) -> None:
    sha256 = saved(tmp_path / "w", other("linear"))
    assert store.add(tmp_path, tmp_path / "w") == store.add(tmp_path, tmp_path / "w")
    assert [held.sha256 for held in store.held(tmp_path)] == [sha256]
    path = store.file_of(tmp_path, study("linear", initial={"sha256": sha256}))
    assert path is not None and path.read_bytes() == (tmp_path / "w").read_bytes()
    assert store.file_of(tmp_path, study()) is None
    with pytest.raises(StudyConflict, match="does not have"):
        store.file_of(tmp_path, study(initial={"sha256": "1" * 64}))
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(DocumentError):
        store.add(tmp_path, tmp_path / "bad")
    assert len(store.held(tmp_path)) == 1


def test_the_operators_commands_print_the_hash_and_list_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    Home.found(home, ServerFile(version=1, name="test", host="127.0.0.1"))
    sha256 = saved(tmp_path / "w", other("linear"))
    say = CliRunner()
    added = say.invoke(cli.app, ["weights", "add", str(tmp_path / "w"), "--home", str(home)])
    assert added.exit_code == 0 and added.stdout.strip() == sha256
    listed = say.invoke(cli.app, ["weights", "list", "--json", "--home", str(home)])
    assert [entry["sha256"] for entry in json.loads(listed.stdout)["weights"]] == [sha256]
    refused = say.invoke(cli.app, ["weights", "add", str(home / "absent"), "--home", str(home)])
    assert isinstance(refused.exception, DocumentError)


def checked(tmp_path: Path, plan: Study, *words: str) -> tuple[int, str]:
    (tmp_path / "study.yaml").write_text(json.dumps(plan.model_dump(mode="json", exclude_none=True)))
    line = ["check", str(tmp_path / "study.yaml"), "--weights", str(tmp_path / "w"), *words]
    result = CliRunner().invoke(research.app, line, env={"COLUMNS": "200"})
    return result.exit_code, result.stdout if "--json" in words else " ".join(result.stdout.split())


def test_a_file_that_fits_is_told_before_the_study_is_submitted(tmp_path: Path) -> None:
    sha256 = saved(tmp_path / "w", other("small_cnn"))
    code, said = checked(tmp_path, study("small_cnn"))
    assert code == 0 and f"{{initial: {{sha256: {sha256}}}}}" in said and "They fit" in said
    code, said = checked(tmp_path, study("small_cnn", initial={"sha256": sha256}))
    assert code == 0 and "those that the study names" in said
    code, said = checked(tmp_path, study("small_cnn", initial={"sha256": "0" * 64}), "--json")
    found = json.loads(said)["weights"]
    assert code == 1 and not found["fits"] and "is not the one that the study names" in found["problem"]
    assert found["fresh"] == [] and len(found["taken"]) > 3


def test_what_does_not_fit_is_named_tensor_by_tensor(tmp_path: Path) -> None:
    tensors = other("small_cnn")
    first, *_, last = tensors
    head = tuple(tensors[last].shape)
    tensors[last] = torch.zeros(14, *head[1:])
    tensors["stranger"] = tensors.pop(first)
    saved(tmp_path / "w", tensors)
    _, said = checked(tmp_path, study("small_cnn"), "--json")
    found = json.loads(said)["weights"]
    assert found["shapes"] == {last: {"file": [14, *head[1:]], "network": list(head)}}
    assert sorted(found["fresh"]) == sorted([first, last]) and sorted(found["left_out"]) == sorted([last, "stranger"])
    _, said = checked(tmp_path, study("small_cnn"))
    assert f"of another shape: {last} (14" in said and f"made by the seed: {first}" in said and "stranger" in said


def test_a_file_of_another_network_does_not_fit_and_the_command_says_so(tmp_path: Path) -> None:
    saved(tmp_path / "w", other("linear"))
    code, said = checked(tmp_path, study("small_cnn"))
    assert code == 1 and "They do not fit: the weights are those of another network" in said
    (tmp_path / "w").write_bytes(pickle.dumps(os.getcwd))
    assert checked(tmp_path, study("small_cnn"))[0] == 1
