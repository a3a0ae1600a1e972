"""The three commands as one: what is read can be had as JSON, fits 80 columns, is whole in a pipe; shells complete; nobody is
left without a next step.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from coordinator import Coordinator, coordinator, study
from dashboard_cast import furnished
from test_docs import PROGRAMS
from test_server_run import study as trained
from typer.testing import CliRunner

from fl_client import data_cli, egress, enrol
from fl_client import next_step as of_site
from fl_client.phantom import VENDORS, make_hospital
from fl_server import authority, next_step
from fl_server.roster import Home
from fl_server.run import Run
from fl_server.settings import ServerFile
from privacy import calls, crash, keys, screen
from privacy.greeting import Readiness, own

LONG = "university-hospital-of-the-north"  # 32 characters: no name may be longer
DIGEST = "0123456789ab"
ROOT = Path(__file__).resolve().parent.parent

READS: dict[str, tuple[str, ...]] = {
    "fl-client ingest": (),
    "fl-client quarantine": (),
    "fl-client check": (),
    "fl-client studies": (),
    "fl-client rules": (),
    "fl-client doctor": (),
    "fl-client egress": (),
    "fl-client budget": (),
    "fl-client models": (),
    "fl-client journal verify": (),
    "fl-client journal show": (),
    "fl-client crash list": (),
    "fl-client crash show": (),
    "fl-server sites": (),
    "fl-server doctor": (),
    "fl-server requests": (),
    "fl-server runs": (),
    "fl-server show": ("RUN",),
    "fl-server models": (),
    "fl-server journal verify": (),
    "fl-server journal show": (),
    "fl-server crash list": (),
    "fl-server crash show": (),
    "fl-server weights list": (),
    "fl-study new": ("x.yaml", "--list"),
    "fl-study check": ("STUDY",),
    "fl-study plan": ("PRIVATE",),
    "fl-study cost": ("STUDY",),
    "fl-study doctor": (),
    "fl-study studies": (),
    "fl-study models": (),
}
"""Commands that say how things stand, with the words that they need here."""
LONGER = {
    "fl-client fetch", "fl-client evaluate", "fl-client export dicom", "fl-client export bih", "fl-client pull",
    "fl-server watch", "fl-server stop", "fl-server resume",
    "fl-study watch", "fl-study simulate", "fl-study attack", "fl-study report", "fl-study cohort", "fl-study pull",
    "fl-study verify",
}  # fmt: skip
"""These print JSON as well, of things that take a run, an archive or a model to be there: their own tests make these."""
ACTS = {
    "fl-client join", "fl-client approve", "fl-client decline", "fl-client pause", "fl-client resume", "fl-client start",
    "fl-client phantom",
    "fl-server init", "fl-server invite", "fl-server revoke", "fl-server offline", "fl-server sign", "fl-server accept",
    "fl-server extend", "fl-server publish", "fl-server withdraw", "fl-server start", "fl-server notify",
    "fl-server dashboard", "fl-server weights add",
    "fl-study join", "fl-study submit", "fl-study run", "fl-study release", "fl-study predict", "fl-study export",
}  # fmt: skip
"""These do one thing and say so in a sentence."""


def commands() -> Iterator[tuple[str, Any]]:
    """("fl-client journal show", its click command) of every command there is."""
    for program, (app, _, _) in PROGRAMS.items():
        for name, command in getattr(typer.main.get_command(app), "commands", {}).items():
            inner = getattr(command, "commands", None)
            yield from ((f"{program} {name} {each}", found) for each, found in (inner or {}).items())
            if inner is None:
                yield f"{program} {name}", command


def asked(line: str, *more: str, width: int | None = 80) -> Any:
    """What a command line answers; `width` columns, or a pipe."""
    program, *words = line.split()
    environment = {"COLUMNS": None if width is None else str(width)}
    return CliRunner().invoke(PROGRAMS[program][0], [*words, *more], env=environment, prog_name=program)


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A folder for each command: a joined and ingested site, a coordinator with a run, a researcher with a study."""
    folder = tmp_path_factory.mktemp("interface")
    with coordinator(folder / "served") as served:
        served.join("south")
        served.join("rosa", "researcher")
        site = folder / "north"
        enrol.join(str(served.home.invite("north", "site")), site)
        labels = make_hospital(folder / "hospital", "north", 12, 1, VENDORS["aurora"])
        with (site / "site.yaml").open("a") as file:
            file.write(data_cli.data_section(folder / "hospital", labels))
        served.submit(study("north", "south"))
        home, _, _ = furnished(folder / "run")
        for place in (site, home.root):
            report_crash(place)
        yield {"fl-client": site, "fl-server": home.root, "fl-study": served.folder / "rosa"}


def report_crash(home: Path) -> None:
    try:
        raise ValueError("nobody foresaw this")
    except ValueError as error:
        crash.Crashes(home, "test").note(error)


@pytest.fixture
def words(homes: dict[str, Path], tmp_path: Path) -> dict[str, str]:
    """What stands for the words in capitals of READS."""
    run = next(path.name for path in (homes["fl-server"] / "runs").iterdir())
    found = {"RUN": run}
    for word, template in (("STUDY", "phantoms"), ("PRIVATE", "opacity_private")):
        found[word] = str(tmp_path / f"{template}.yaml")
        assert asked("fl-study new", found[word], "--template", template).exit_code == 0
    return found


def test_every_command_that_says_how_things_stand_has_json() -> None:
    known = {line: any("--json" in each.opts for each in command.params) for line, command in commands()}
    assert set(known) == set(READS) | LONGER | ACTS, "a command is in none of the three lists, or in one too many"
    assert {line for line, has in known.items() if has} == set(READS) | LONGER


@pytest.mark.parametrize("line", READS)
def test_json_is_one_document_and_nothing_else(line: str, homes: dict[str, Path], words: dict[str, str]) -> None:
    program = line.split(maxsplit=1)[0]
    given = [words.get(word, word) for word in READS[line]]
    home = (
        []
        if line in ("fl-study new", "fl-study check", "fl-study plan", "fl-study cost")
        else ["--home", str(homes[program])]
    )
    answered = asked(line, *given, "--json", *home)
    assert answered.exception is None or isinstance(answered.exception, SystemExit), answered.exception
    assert json.loads(answered.stdout) is not None
    assert "\x1b" not in answered.stdout


@pytest.mark.parametrize("line", READS)
def test_nothing_is_wider_than_80_columns_and_nothing_coloured_in_a_pipe(
    line: str, homes: dict[str, Path], words: dict[str, str]
) -> None:
    """Tables and named facts; single sentences are one line each, which a terminal breaks."""
    program = line.split(maxsplit=1)[0]
    given = [words.get(word, word) for word in READS[line]]
    home = (
        []
        if line in ("fl-study new", "fl-study check", "fl-study plan", "fl-study cost")
        else ["--home", str(homes[program])]
    )
    answered = asked(line, *given, *home)
    assert "\x1b" not in answered.stdout  # furnished: one name is a command to the terminal
    for row in answered.stdout.splitlines():
        sentence = not re.search(r"\S {2,}\S", row) and not row.startswith(" ")
        assert len(row.rstrip()) <= 80 or sentence or line.startswith("fl-study new"), row


# --- tables


def wide() -> Any:
    made = screen.table("digest", "title", "decision", "certificate until", "ready")
    for number in range(3):
        made.add_row(
            f"{DIGEST}{number}",
            "A title that goes on for longer than one line has room " * 2,
            LONG,
            "2026-11-27",
            "yes",
        )
    return made


def printed(made: Any, capsys: pytest.CaptureFixture[str]) -> list[str]:
    screen.show(made)
    return capsys.readouterr().out.splitlines()


def test_a_table_folds_between_words_and_never_cuts_what_people_copy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    rows = printed(wide(), capsys)
    assert rows[0].split()[0] == "digest" and max(map(len, rows)) <= 120
    assert [row for row in rows if DIGEST in row] and LONG in rows[1]
    assert all(f"{DIGEST}{number}" in "\n".join(rows) for number in range(3))


def test_a_table_that_does_not_fit_is_one_line_for_each_column(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows = printed(wide(), capsys)
    assert max(map(len, rows)) <= 80
    assert rows[0] == f"digest             {DIGEST}0"
    assert f"decision           {LONG}" in rows and rows.count("") == 2
    assert rows[2].startswith(" " * 19) and rows[2].strip()  # the title goes on below itself


def test_a_pipe_gets_each_row_on_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    rows = printed(wide(), capsys)
    assert len(rows) == 4 and len(rows[1]) > 120
    screen.say("a sentence " * 30)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_what_a_table_shows_is_no_markup_and_no_command_to_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    made = screen.table("name", "why")
    made.add_row("[red]north[/red]", "\x1b[2Jgone\x07")
    screen.show(made)
    screen.facts([("[bold]", "\x1b[2Jgone"), ("why", "[link=https://example.org]here[/link]")])
    screen.finding("FIX", "red", "images", "[red]none\x1b]0;title\x07")
    screen.say("\u202eturned round\x1b[1A")
    shown = capsys.readouterr().out
    assert "[red]north[/red]" in shown and "[link=" in shown and "[red]none" in shown
    assert not set(shown) & set("\x1b\x07\u202e")


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pseudo-terminal, with and without NO_COLOR."""
    program = "from privacy import screen; screen.finding('FIX', 'red', 'images', 'none'); screen.say('so', 'green')"
    for wanted, environment in ((True, {}), (False, {"NO_COLOR": "1"})):
        out, inside = os.openpty()
        there = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
        subprocess.run(
            [sys.executable, "-c", program], stdout=inside, cwd=ROOT, env={**there, "TERM": "xterm", **environment},
            check=True, timeout=60,
        )  # fmt: skip
        os.close(inside)
        shown = os.read(out, 65536).decode()
        os.close(out)
        assert ("\x1b[31m" in shown) == wanted and "images" in shown


def test_the_widest_tables_of_a_coordinator_and_a_site_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home.found(tmp_path / "c", ServerFile(version=1, name="chest", host="127.0.0.1"))
    names = [LONG, LONG.replace("north", "south"), LONG.replace("north", "lands")]
    for number, name in enumerate(names, start=1):
        secret = keys.make_key(tmp_path / f"{name}.key")
        line = home.invite(name, "site")
        authority.enrol(home, line.token, name, "site", keys.make_csr(secret, name))
        home.roster.set_node(name, number)
        home.roster.tell(name, own(), Readiness(False, ("images", "labels", "disk")))
    plan = home.with_keys(trained(**{"[north, south, west]": f"[{', '.join(names)}]"}))
    run = Run.create(home.runs, plan, "rosa", names)
    run.start()
    run.event("asked", stage="train", round=1, sites=names)
    run.event("site_missing", site=names[0], reason="offline")
    for line in ("fl-server sites", "fl-server runs", f"fl-server show {run.run_id}", "fl-server journal show"):
        shown = asked(line, "--home", str(home.root)).stdout
        assert max(len(row.rstrip()) for row in shown.splitlines() if not row.endswith(".")) <= 80, shown
        assert names[0] in shown or run.run_id in shown
        piped = asked(line, "--home", str(home.root), width=None).stdout
        assert not names[0].startswith("u") or names[0] in piped or run.run_id in piped


def test_the_table_of_what_left_fits(tmp_path: Path) -> None:
    rows = [
        egress.Egress(n, "2026-11-27T18:50:00Z", "train-report", "model update, masked; losses and counts in a sum", "a" * 64,
                      f"{LONG}-20261127-185000-abcdef", n, 123_456_789, 12.345, 1.234)
        for n in (1, 2)
    ]  # fmt: skip
    made = screen.table(*egress.HEADINGS, title=egress.heading(rows[0].study, rows[0].run))
    for row in rows:
        made.add_row(*row.row())
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("COLUMNS", "80")
        console = screen.Screen()
        with console.capture() as captured:
            screen.show(made, console)
    shown = captured.get().splitlines()
    assert max(len(row.rstrip()) for row in shown) <= 80
    assert shown[0].startswith("Study aaaaaaaaaaaa, run ") and "123,456,789" in shown[2]


# --- completion


def completed(program: str, typed: str, shell: str = "bash") -> list[str]:
    """What a shell is told, by the protocol that the installed script of completion speaks."""
    module = PROGRAMS[program][1]
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - (not typed.endswith(" ")))}
    entry = f"import sys; from {module} import main; sys.argv = [{program!r}]; main()"
    ran = subprocess.run(
        [sys.executable, "-c", entry], capture_output=True, text=True, cwd=ROOT, check=False, timeout=60,
        env={**os.environ, variable: f"complete_{shell}", "_TYPER_COMPLETE_ARGS": typed, **words},
    )  # fmt: skip
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.stdout.split()


def test_shells_complete_commands_and_options() -> None:
    assert completed("fl-client", "fl-client ch") == ["check"]
    assert completed("fl-client", "fl-client journal v") == ["verify"]
    assert "--json" in completed("fl-server", "fl-server sites --")
    assert {"submit", "studies", "simulate"} <= set(completed("fl-study", "fl-study s"))
    assert completed("fl-study", "fl-study nothing-like-it") == []
    assert any("check" in line for line in completed("fl-client", "fl-client ch", "zsh"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_script_for_the_shell_names_the_command(program: str) -> None:
    """`--show-completion` asks which shell it runs in, so the script is taken where typer makes it."""
    from typer._completion_shared import get_completion_script

    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    for shell in ("bash", "zsh", "fish"):
        script = get_completion_script(prog_name=program, complete_var=variable, shell=shell)
        assert program in script and variable in script
    shown = asked(program, "--help").stdout
    assert "--install-completion" in shown and "--show-completion" in shown


# --- without arguments


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_command_alone_says_what_comes_next_and_lists_its_commands(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    alone = asked(program)
    assert alone.exit_code == 0
    first = " ".join(alone.stdout.split("Usage:")[0].split())
    suggested = {
        "fl-client": "fl-client join LINE",
        "fl-server": "fl-server init FOLDER",
        "fl-study": "fl-study new study.yaml",
    }
    assert suggested[program] in first and "Usage:" in alone.stdout
    assert not list(tmp_path.iterdir())  # and nothing was made


def names_real_commands(steps: list[str]) -> list[str]:
    """Every command that the sentences name is there."""
    known = {line for line, _ in commands()}
    for program, name in re.findall(r"\b(fl-(?:client|server|study)) ([a-z]+)", " ".join(steps)):
        assert f"{program} {name}" in known
    assert 1 <= len(steps) <= 2 and all(steps)
    return steps


def test_a_site_is_led_from_joining_to_the_running_node(served: Coordinator, tmp_path: Path) -> None:
    site = tmp_path / "west"
    enrol.join(str(served.home.invite("west", "site")), site)
    path = site / "site.yaml"
    path.write_text(path.read_text().replace("permit_without_privacy: false", "permit_without_privacy: true"))
    path.write_text(path.read_text().replace("least_protection: masked", "least_protection: plain"))
    assert "Describe your images" in names_real_commands(of_site.steps(site))[0]
    labels = make_hospital(tmp_path / "hospital", "west", 12, 1, VENDORS["aurora"])
    with path.open("a") as file:
        file.write(data_cli.data_section(tmp_path / "hospital", labels))
    assert "fl-client ingest" in names_real_commands(of_site.steps(site))[0]
    assert asked("fl-client ingest", "--home", str(site)).exit_code == 0
    assert "fl-client check" in names_real_commands(of_site.steps(site))[0]
    served.submit(study("west", "south"))
    (offer,) = enrol.fetch_offers(site)
    enrol.decide(site, offer, "approved")
    assert "fl-client start" in names_real_commands(of_site.steps(site))[0]
    from fl_client import node
    from fl_client.site import Site

    with node.only_one(Site.open(site)):
        assert "is running" in names_real_commands(of_site.steps(site))[0]
    assert "fl-client start" in of_site.steps(site)[0]
    path.write_text(path.read_text() + "surprise: 1\n")
    assert "surprise" in of_site.steps(site)[0]
    (site / "keys" / "site.pem").unlink()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    with coordinator(tmp_path_factory.mktemp("steps")) as found:
        found.join("south")
        found.join("rosa", "researcher")
        yield found


def test_a_coordinator_is_led_from_founding_to_runs(tmp_path: Path) -> None:
    assert "fl-server init" in names_real_commands(next_step.coordinator(tmp_path))[0]
    asleep = Home.found(tmp_path / "asleep", ServerFile(version=1, name="chest", host="127.0.0.1", service_port=1))
    assert "fl-server start" in names_real_commands(next_step.coordinator(asleep.root))[0]
    with coordinator(tmp_path / "awake") as awake:
        root = awake.home.root
        assert "fl-server invite NAME" in names_real_commands(next_step.coordinator(root))[0]
        line = awake.home.invite("north", "site")
        assert "waits for north" in names_real_commands(next_step.coordinator(root))[0]
        calls.join(str(line), awake.keys_of("north"), "site")
        assert "--researcher" in names_real_commands(next_step.coordinator(root))[0]
        awake.join("rosa", "researcher")
        assert "1 hospital, 0 runs" in names_real_commands(next_step.coordinator(root))[0]
    (root / "server.yaml").write_text("version: 1\nsurprise: 2\n")
    assert "surprise" in next_step.coordinator(root)[0]


def test_a_researcher_is_led_from_a_template_to_the_sites(tmp_path: Path) -> None:
    assert "fl-study new" in names_real_commands(next_step.researcher(tmp_path))[0]
    (tmp_path / "notes.yaml").write_text("a: 1\n")
    (tmp_path / "broken.yaml").write_bytes(b"\xff\xfe")
    assert "fl-study new" in next_step.researcher(tmp_path)[0]
    assert asked("fl-study new", str(tmp_path / "mine.yaml")).exit_code == 0
    steps = names_real_commands(next_step.researcher(tmp_path))
    assert "fl-study simulate mine.yaml" in steps[0] and "fl-study join LINE" in steps[1]
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "researcher.pem").write_text("")
    assert "fl-study submit mine.yaml" in names_real_commands(next_step.researcher(tmp_path))[0]


def test_every_command_stands_in_a_panel() -> None:
    for program, (app, _, _) in PROGRAMS.items():
        alone = asked(program, "--help").stdout
        assert "─ Commands ─" not in alone, f"{program}: a command has no panel"
        assert app.info.no_args_is_help in (False, None) or program
