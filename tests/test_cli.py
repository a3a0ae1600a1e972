"""The three commands as people meet them: every mistake is one sentence with its remedy, exit code 1, never a traceback."""

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from hospital import Hospital

from fl_client import data_cli
from fl_client.cli import app as fl_client
from fl_server.cli import app as fl_server
from fl_server.research import app as fl_study
from models.study import Study, read
from privacy import console

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run one command line in this process: (exit code, standard output, standard error)."""

    def run(app: typer.Typer, *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["isocenter", *map(str, words)])
        code = 0
        try:
            console.run(app)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


def flat(text: str) -> str:
    return " ".join(text.split())


STUDY_MISTAKES = {
    "an unknown key": (
        "  batch_size: 16",
        "  bath_size: 16",
        "unknown key 'training.bath_size'; did you mean 'batch_size'?",
    ),
    "a wrong type": (
        "  rounds: 8",
        "  rounds: eight",
        "training.rounds: input should be a valid integer (found 'eight')",
    ),
    "too large": (
        "  learning_rate: 0.002",
        "  learning_rate: 99",
        "training.learning_rate: input should be less than or equal to 10",
    ),
    "an unknown word": ("  name: fedavg", "  name: fedsum", "strategy.name"),
    "a missing key": ("privacy: none", "# nothing", "the key 'privacy' is missing"),
    "an unknown protection": ("protection: masked", "protection: hidden", "protection: input should be 'masked'"),
    "too few sites for masks": ("  quorum: 3", "  quorum: 2", "masked needs 3 training sites and a quorum of 3"),
    "a quorum nobody reaches": ("  quorum: 3", "  quorum: 9", "quorum 9 is more than the 3 training sites"),
    "a key twice": ("privacy: none", "privacy: none\nprivacy: none", "key 'privacy' stands twice"),
    "an alias bomb": ("title: ", "title: &a x\nalso: *a\nx: ", "aliases"),
    "a tab": ("  quorum: 3", "\tquorum: 3", "line"),
    "a path as a name": ("[alpine, bayside, central]", "[../alpine, bayside, central]", "participation.sites.0"),
}


@pytest.mark.parametrize("mistake", STUDY_MISTAKES)
def test_a_mistake_in_a_study_is_named_with_its_line(call: Call, tmp_path: Path, mistake: str) -> None:
    before, after, said = STUDY_MISTAKES[mistake]
    file = tmp_path / "study.yaml"
    assert call(fl_study, "new", file, "--template", "phantoms")[0] == 0
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))
    code, _, err = call(fl_study, "check", file)
    assert code == 1
    assert said in flat(err)
    if mistake not in ("a quorum nobody reaches", "too few sites for masks"):  # a conflict of two keys has no one line
        line = next(
            n for n, t in enumerate(file.read_text().splitlines(), 1) if after.splitlines()[-1].split(":")[0] in t
        )
        assert f"{file}, line " in flat(err)
        assert mistake != "an unknown key" or f"line {line}:" in flat(err)


def test_templates_work_as_they_stand(call: Call, tmp_path: Path) -> None:
    code, out, _ = call(fl_study, "new", tmp_path / "x.yaml", "--list", "--json")
    names = [template["name"] for template in json.loads(out)]
    assert code == 0 and {"opacity", "phantoms"} <= set(names)
    for name in names:
        assert call(fl_study, "new", tmp_path / f"{name}.yaml", "--template", name)[0] == 0
        code, out, _ = call(fl_study, "check", tmp_path / f"{name}.yaml", "--json")
        found = json.loads(out)
        assert code == 0 and found["digest"] is None  # the sites' keys, which the digest covers, are not in it yet
        assert found["study"]["protection"] == "masked"
        assert "fixed by `fl-study submit`" in flat(call(fl_study, "check", tmp_path / f"{name}.yaml")[1])


def test_a_study_that_names_its_keys_has_a_digest(call: Call, tmp_path: Path) -> None:
    point, file = "02" + "ab" * 32, tmp_path / "study.yaml"
    assert call(fl_study, "new", file, "--template", "phantoms")[0] == 0
    roster = "".join(f"  {name}: '{point}'\n" for name in ("alpine", "bayside", "central"))
    file.write_text(f"{file.read_text()}\nroster:\n{roster}")
    digest = json.loads(call(fl_study, "check", file, "--json")[1])["digest"]
    assert digest == read(Study, file).digest
    assert digest in call(fl_study, "check", file)[1]


def test_nothing_is_overwritten(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("mine")
    assert call(fl_study, "new", file)[0] == 1 and file.read_text() == "mine"
    assert call(fl_client, "phantom", tmp_path)[0] == 1
    assert call(fl_server, "init", tmp_path)[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


NOT_THERE: list[tuple[typer.Typer, list[str], str]] = [
    (fl_client, ["check"], ""),
    (fl_client, ["ingest"], "there is no such file"),
    (fl_client, ["studies"], "belongs to no consortium yet"),
    (fl_client, ["start"], "there is no such file"),
    (fl_server, ["start"], "there is no consortium"),
    (fl_server, ["sites"], "there is no consortium"),
    (fl_study, ["studies"], "belongs to no consortium yet"),
    (fl_study, ["run", "abcdef"], "belongs to no consortium yet"),
]


@pytest.mark.parametrize(
    ("app", "words", "said"), NOT_THERE, ids=lambda value: value[0] if isinstance(value, list) else ""
)
def test_a_command_in_the_wrong_folder_says_so(
    call: Call, tmp_path: Path, app: typer.Typer, words: list[str], said: str
) -> None:
    code, out, err = call(app, *words, "--home", tmp_path)
    assert code == 1
    assert said in flat(err) if said else "This site is not ready" in out


def test_a_line_that_is_no_invitation(call: Call, tmp_path: Path) -> None:
    for app in (fl_client, fl_study):
        code, _, err = call(app, "join", "https://example.org", "--home", tmp_path)
        assert code == 1 and "invitation" in flat(err)


def test_nobody_at_the_address(call: Call, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        line = f"isocenter-join:v1:north@127.0.0.1:{port}:{'a' * 64}:{'b' * 32}"
        code, _, err = call(fl_client, "join", line, "--home", tmp_path)
    assert code == 1 and str(port) in flat(err)


def test_a_port_in_use_is_named(call: Call, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert call(fl_server, "init", tmp_path / "c", "--host", "127.0.0.1", "--gateway-port", port)[0] == 0
        code, _, err = call(fl_server, "start", "--home", tmp_path / "c")
    assert code == 1 and f"127.0.0.1:{port}" in flat(err) and "server.yaml" in flat(err)


def test_check_tells_a_ready_site_from_one_that_lost_its_cache(call: Call, tmp_path: Path) -> None:
    hospital = Hospital.open(tmp_path)
    code, out, _ = call(fl_client, "check", "--home", hospital.home, "--json")
    found = {finding["subject"]: finding for finding in json.loads(out)["findings"]}
    assert code == 1 and len(found) == 20  # this one has no coordinator in its site.yaml
    assert found["images"]["good"] and found["labels"]["good"]
    for path in (hospital.home / "state").iterdir():
        path.rename(path.with_name(path.name + ".lost"))
    code, out, _ = call(fl_client, "check", "--home", hospital.home)
    assert code == 1 and "fl-client ingest" in flat(out)


def test_ingest_lists_label_words_that_are_not_mapped(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital = Hospital.open(tmp_path)
    table = Path(hospital.site.source.labels.table)
    lines = table.read_text().splitlines()
    copy = tmp_path / "labels.csv"
    first = lines[1]
    for word in hospital.site.source.labels.targets["opacity"].words:
        first = re.sub(rf"(?i)\b{re.escape(word)}\b", "maybe", first)
    copy.write_text("\n".join([lines[0], first, *lines[2:]]) + "\n")
    site = hospital.home / "site.yaml"
    site.write_text(site.read_text().replace(str(table), str(copy)))
    code, out, _ = call(fl_client, "ingest", "--home", hospital.home)
    # Into a file or a pipe go counts alone: in a column that is mapped by mistake, words are names.
    assert code == 0 and "1 rows say 1 words that site.yaml does not map" in flat(out) and "maybe" not in out
    as_json = call(fl_client, "ingest", "--json", "--home", hospital.home)[1]
    assert json.loads(as_json)["labels"]["unmapped"] == {"opacity": 1} and "maybe" not in as_json
    monkeypatch.setattr(data_cli.console, "_force_terminal", True)
    out = call(fl_client, "ingest", "--home", hospital.home)[1]
    assert "1 rows say 'maybe', which site.yaml does not map; they count as missing" in flat(out)


@pytest.mark.parametrize("app", [fl_client, fl_server, fl_study])
def test_version_and_help(call: Call, app: typer.Typer) -> None:
    assert call(app, "--version")[1].strip().endswith("0.1.0")
    assert "Usage" in call(app, "--help")[1]
