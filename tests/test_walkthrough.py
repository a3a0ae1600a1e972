"""The notebook runs as it stands and shows what it is committed with; every picture of the papers is there, whole and small."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import walkthrough
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SIZE_MOST = 150_000


def cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def kinds(cell: dict[str, Any]) -> list[tuple[str, ...]]:
    """What a cell shows, by kind and not by value: figures differ between machines."""
    return [(output["output_type"], *sorted(output.get("data", {}))) for output in cell["outputs"]]


def test_the_notebook_runs_and_shows_what_it_was_committed_with(tmp_path: Path) -> None:
    committed = json.loads(walkthrough.NOTEBOOK.read_text(encoding="utf-8"))
    ran = walkthrough.executed(json.loads(json.dumps(committed)), tmp_path)
    assert [kinds(cell) for cell in cells(ran)] == [kinds(cell) for cell in cells(committed)]
    assert any(kinds(cell) for cell in cells(ran)) and (tmp_path / "rehearsal" / "report.html").is_file()
    shown = "".join(text for cell in cells(ran) for output in cell["outputs"] for text in output.get("text", []))
    metrics = json.loads((tmp_path / "rehearsal" / "metrics.json").read_text())
    assert f"AUROC {metrics['pooled']['auroc']:.3f}" in shown and "complete" in shown
    assert "did you mean 'learning_rate'?" in shown
    for name in metrics["sites"]:
        assert f"\n{name}" in shown


def test_the_notebook_is_one_that_programs_open_and_is_small() -> None:
    """Against the rules of nbformat 4.5 that matter to who opens it: its schema, section by section."""
    notebook = json.loads(walkthrough.NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert walkthrough.NOTEBOOK.stat().st_size < 300_000
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", each) for each in ids)
    for number, cell in enumerate(cells(notebook), start=1):
        assert set(cell) == {"cell_type", "id", "execution_count", "metadata", "outputs", "source"}
        assert cell["execution_count"] == number
    text = walkthrough.NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(?:tmp|home|root|work)/", text), "it names a folder of the machine that ran it"
    pictures = [
        each["data"]["image/png"]
        for cell in cells(notebook)
        for each in cell["outputs"]
        if "image/png" in each.get("data", {})
    ]
    assert len(pictures) == 2
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as opened:
            opened.verify()


def test_a_cell_that_fails_is_not_passed_over(tmp_path: Path) -> None:
    before = Path.cwd()
    broken = {"cells": [{"cell_type": "code", "source": ["1 / 0"]}]}
    with pytest.raises(ZeroDivisionError):
        walkthrough.executed(broken, tmp_path)
    assert Path.cwd() == before


def test_outputs_are_what_a_kernel_would_show(tmp_path: Path) -> None:
    given = [
        "from PIL import Image\n",
        "a = 1\nprint('said')\na + 1",
        "a = a + 4",
        "Image.new('L', (2, 2))",
        "print(a)",
    ]
    notebook = {"cells": [{"cell_type": "code", "source": [text]} for text in given]}
    ran = walkthrough.executed(notebook, tmp_path)["cells"]
    assert [kinds(cell) for cell in ran] == [
        [],
        [("stream",), ("execute_result", "text/plain")],
        [],
        [("execute_result", "image/png", "text/plain")],
        [("stream",)],
    ]
    assert ran[1]["outputs"][0]["text"] == ["said\n"] and ran[1]["outputs"][1]["data"]["text/plain"] == ["2"]
    assert ran[4]["outputs"][0]["text"] == ["5\n"]


def shown_pictures() -> list[tuple[str, Path]]:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    return [
        (page.name, page.parent / target)
        for page in pages
        for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    ]


def test_every_picture_is_there_small_and_shown_somewhere() -> None:
    shown = shown_pictures()
    assert len(shown) > 5
    for page, path in shown:
        assert path.is_file(), f"{page} shows {path.name}, which is not there"
        if path.suffix == ".png":
            assert path.stat().st_size <= SIZE_MOST, f"{path.name} is large"
            with Image.open(path) as picture:
                picture.verify()
    gallery = {path.resolve() for _, path in shown}
    for path in (ROOT / "docs" / "pictures").glob("gallery-*"):
        assert path.resolve() in gallery, f"no page shows {path.name}"
