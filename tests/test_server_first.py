"""The first model of a run comes out of a process of its own as it would be made here, and so does every reason against it."""

import subprocess
import sys
from pathlib import Path

import pytest
from hospital import study

from fl_server import first
from models import networks
from models.sections import Initial
from privacy.errors import RunError, StudyConflict

TORCHLESS = """
import sys
from pathlib import Path
import fl_server.executor
from fl_server.first import first_model
from models.study import Study
model = first_model(Path(sys.argv[1]), Study.from_canonical(sys.stdin.buffer.read()))
assert not {"torch", "sqlalchemy", "alembic", "pydicom", "scipy", "matplotlib"} & set(sys.modules)
sys.stdout.buffer.write(model.tobytes())
"""


def test_the_executor_gets_the_model_of_the_seed_and_never_loads_torch(tmp_path: Path) -> None:
    words = [sys.executable, "-c", TORCHLESS, str(tmp_path)]
    made = subprocess.run(words, input=study().canonical(), capture_output=True, check=True).stdout
    assert (
        made == networks.to_vector(networks.build(study())).tobytes() == first.first_model(tmp_path, study()).tobytes()
    )


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of this test looks as if it had not loaded torch."""
    monkeypatch.setattr(first, "_made", lambda *_: pytest.fail("made here"))
    monkeypatch.setattr(first, "sys", type("Sys", (), {"modules": {}, "executable": sys.executable}))


@pytest.mark.usefixtures("without_torch")
def test_a_reason_against_it_keeps_its_kind_and_its_remedy(tmp_path: Path) -> None:
    network = study().network.model_copy(update={"initial": Initial(sha256="0" * 64)})
    plan = study().model_copy(update={"network": network})
    with pytest.raises(StudyConflict, match="which the coordinator does not have") as caught:
        first.first_model(tmp_path, plan)
    assert "fl-server weights add" in caught.value.remedy


@pytest.mark.usefixtures("without_torch")
def test_a_process_that_dies_gives_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_server.first.sys.executable", "/bin/false")
    with pytest.raises(RunError, match="ended with code 1"):
        first.first_model(tmp_path, study())


@pytest.mark.usefixtures("without_torch")
def test_what_lies_where_the_coordinator_was_started_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other software has packages called `models` too."""
    (tmp_path / "models.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    assert first.first_model(tmp_path, study()).tobytes() == networks.to_vector(networks.build(study())).tobytes()
