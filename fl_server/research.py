"""The researcher's command, `fl-study`: write a study, check it, rehearse it, submit it, run it, read the report."""

import importlib.resources
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from fl_server import cost_cli, doctor_cli, next_step, rehearsal_cli, release_cli, researcher, summary, weights_cli
from fl_server.telling import follow, progress
from models.questions import Counting
from models.study import Study, read
from privacy import calls, screen
from privacy.console import ProxyPassword, ProxyUrl, ProxyUser, begin, proxy_of, show_version
from privacy.console import run as run_command
from privacy.errors import DocumentError, RunUnknown, StudyConflict
from privacy.screen import Screen

app = typer.Typer(
    help="Write, rehearse, submit and evaluate a federated study.",
    pretty_exceptions_enable=False,
)
console = Screen()

WRITE, TOGETHER, MODELS = "Write and rehearse", "With the hospitals", "Released models"
"""Panels of the help, in the order of the work."""

SEEN = {
    "masked": "the coordinator sees sums over the sites only",
    "sealed": "the coordinator, and nobody on the way, sees each site's update",
    "plain": "the coordinator sees each site's update",
}

NAMES_SHOWN = 20

Home = Annotated[Path, typer.Option("--home", "-H", help="Folder with your keys; made by `fl-study join`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
StudyFile = Annotated[Path, typer.Argument(help="The study, a YAML file.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Write, rehearse, submit and evaluate a federated study."""
    begin(context, next_step.researcher)


def templates() -> dict[str, str]:
    """Name -> text of the study templates that ship with Isocenter."""
    folder = importlib.resources.files("configs.studies")
    found = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".yaml")), key=lambda entry: entry.name)
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in found}


@app.command(rich_help_panel=WRITE)
def new(
    file: Annotated[Path, typer.Argument(help="Where to write the study; it must not exist.")],
    template: Annotated[str, typer.Option(help="Which template to start from; see --list.")] = "opacity",
    list_: Annotated[bool, typer.Option("--list", help="List the templates and write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --list: print one JSON document.")] = False,
) -> None:
    """Write a commented study to start from."""
    known = templates()
    if list_ and as_json:
        print(json.dumps([{"name": name, "about": text.splitlines()[0].lstrip("# ")} for name, text in known.items()]))
        return
    if list_:
        screen.facts(((name, text.splitlines()[0].lstrip("# ")) for name, text in known.items()), console)
        return
    if template not in known:
        raise DocumentError(
            f"there is no template {template!r}; there are {', '.join(known)}", remedy="Use one of these."
        )
    if file.exists():
        raise DocumentError(f"{file} exists already", remedy="Choose another name; nothing was overwritten.")
    file.write_text(known[template], encoding="utf-8")
    console.print(f"Wrote {file}. Edit it, then run: fl-study check {file}")


@app.command(rich_help_panel=WRITE)
def check(
    file: StudyFile,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="Also say whether this file of weights fits the network."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read a study strictly and explain every conflict; exit code 1 if the weights do not fit."""
    with screen.busy("reading the study"):  # least noise and weights take seconds
        study = _read_study(file)
        verdict = None if weights is None else weights_cli.judged(study, weights)
    # The digest covers the keys of the sites, so a study that does not name them yet has none.
    digest = study.digest if study.roster else None
    if as_json:
        about = {} if verdict is None else {"weights": verdict.to_json()}
        print(json.dumps({"digest": digest, "study": study.model_dump(mode="json")} | about))
    else:
        console.print(study.title, style="bold", highlight=False, markup=False)
        fixed = digest or "fixed by `fl-study submit`, which fills in the keys of the sites"
        rows = [("digest", fixed), *(_questions(study) or _settings(study))]
        rows += [] if verdict is None else [("weights", line) for line in weights_cli.lines_of(study, verdict)]
        screen.facts(rows, console)
        console.print("The study is consistent.", style="green")
    if verdict is not None and verdict.problem is not None:
        raise typer.Exit(1)


def _questions(study: Study) -> list[tuple[str, str]]:
    """What a study that counts asks, and whom; empty for others."""
    task, part = study.task, study.participation
    if not isinstance(task, Counting):
        return []
    return [
        *(
            (f"asks {number}", f"{name}: {task.questions[name].words}")
            for number, name in enumerate(task.names, start=1)
        ),
        ("by", ", ".join(task.breakdown) or "no groups"),
        ("sites", f"{', '.join(part.sites)}; a sum needs {part.quorum}"),
        ("protection", f"{study.protection}: {SEEN[study.protection]}"),
        ("privacy", "each site rounds its numbers down to tens; nothing is trained"),
    ]


def _named(sites: list[str]) -> str:
    """The sites by name, as far as a screen holds them."""
    more = f" and {len(sites) - NAMES_SHOWN} more" if len(sites) > NAMES_SHOWN else ""
    return ", ".join(sites[:NAMES_SHOWN]) + more


def _settings(study: Study) -> list[tuple[str, str]]:
    """What a study trains, where, and what is promised."""
    plan, part = study.training, study.participation
    drawn = "" if part.sample is None else f"each round asks {part.sample} of the {len(part.sites)}, drawn anew; "
    rows = [
        ("predicts", study.predicts),
        ("from", study.learns_from),
        ("network", f"{study.network.words}, {plan.rounds} rounds of {plan.local_epochs} epoch(s), {plan.optimizer}"),
        ("sites", f"{_named(part.sites)}; {drawn}a round needs {part.quorum}"),
        ("evaluates", "sites drawn once more" if part.sample else _named(study.all_sites)),
        ("protection", f"{study.protection}: {SEEN[study.protection]}"),
        ("privacy", "none: no differential privacy; the policy of a site has to permit that")
        if study.privacy == "none"
        else ("privacy", f"differential privacy, {study.privacy.mode}; noise {study.privacy.noise_multiplier:g}"),
    ]
    return rows + [("", statement.sentence()) for statement in study.statements()]


@app.command(rich_help_panel=WRITE)
def plan(
    file: StudyFile,
    patients: Annotated[
        list[str] | None,
        typer.Option(
            "--patients", help="NAME=NUMBER of training patients at a site; repeat. Default: the study's minimum."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a private study costs in ε, and what larger draws, fewer rounds, more sites or distributed noise would buy."""
    from fl_server import planning

    study = read(Study, file)
    study.check()
    with screen.busy("asking for the ε of each plan"):
        found = planning.plan(study, dict(_count(text) for text in patients or []))
    if as_json:
        print(json.dumps(found.to_json()))
        return
    table = screen.table("plan", "rounds", "sites", "drawn", "noise", "ε", "ε coord.", "signal")
    base = found.options[0].signal_to_noise
    for option in found.options:
        table.add_row(
            option.name,
            str(option.rounds),
            str(option.sites),
            f"{option.drawn:.0f}",
            f"{option.noise:.2f}",
            f"{option.everybody:.2f}",
            f"{option.coordinator:.2f}",
            f"{option.signal_to_noise / base:.2f}x",
        )
    screen.show(table, console)
    naive, private = found.tuning
    for sentence in (
        f"ε at δ = {found.delta:g} per patient (add or remove one patient), Poisson sampling, against everybody else combined; "
        "ε coord.: against the coordinator with the colluding sites that the study names. Spare rounds are included.",
        "drawn: patients in a step, on average, over all sites; noise: of each site, in clip norms.",
        f"signal: expected signal to noise of the whole run, at most {base:.0f} as written, and what a change makes of it.",
        f"Trying {planning.TRIES} settings on private data and showing the best of them spends an ε of {naive:.1f}; with their "
        f"number drawn at random in secret and all others kept unseen, {private:.1f}. Tune on phantoms or public images instead.",
        *(f"Beware: {warning}." for warning in found.warnings),
    ):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _count(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not name or not number.isdecimal() or int(number) < 1:
        raise DocumentError(f"--patients {text!r} is not NAME=NUMBER", remedy="For example: --patients north=480")
    return name, int(number)


@app.command(rich_help_panel=TOGETHER)
def join(
    line: Annotated[str, typer.Argument(help="The line from `fl-server invite NAME --researcher`.")],
    home: Home = Path(),
    proxy: ProxyUrl = None,
    proxy_user: ProxyUser = None,
    proxy_password_file: ProxyPassword = None,
) -> None:
    """Join a consortium as a researcher; your key is made here and never leaves."""
    enrolment = researcher.join(line, home, proxy_of(proxy, proxy_user, proxy_password_file))
    console.print(f"Joined as researcher {enrolment.name}. Next: fl-study new study.yaml")


app.command("doctor", rich_help_panel=TOGETHER)(doctor_cli.researcher)
app.command("cost", rich_help_panel=WRITE)(cost_cli.cost)


@app.command(rich_help_panel=TOGETHER)
def submit(file: StudyFile, home: Home = Path()) -> None:
    """Fill in the keys of a study's sites, sign it, and offer it to them."""
    study = _read_study(file)
    with screen.busy("handing the study in"), researcher.open_caller(home) as caller:
        study = _with_keys(study, *caller.roster(study.all_sites))
        caller.submit(study.canonical())
    digest = study.digest
    console.print(f"Submitted {study.name}, digest {digest}", highlight=False, soft_wrap=True)
    console.print(f"Offered, with their keys, to {', '.join(study.all_sites)}.", highlight=False, soft_wrap=True)
    console.print(f"Each site now runs: fl-client approve {digest[:12]}", highlight=False)
    console.print(f"When {study.participation.quorum} have approved: fl-study run {digest[:12]}", highlight=False)


def _read_study(file: Path) -> Study:
    """The study in `file`, checked, with the least noise that keeps its ε if it does not say how much."""
    study = read(Study, file)
    study.check()
    return study.with_noise()


def _with_keys(study: Study, roster: dict[str, str], aggregator: str) -> Study:
    """The study with the coordinator's keys; raises StudyConflict if the file names other ones."""
    differ = [site for site, key in study.roster.items() if key != roster.get(site)]
    parts = [f"another key for {', '.join(differ)}"] if differ else []
    parts += ["another aggregator"] if study.aggregator not in ("", aggregator) else []
    if parts:
        raise StudyConflict(
            f"the file names {' and '.join(parts)} than the coordinator does",
            remedy="Find out by telephone which keys are right. To use the coordinator's, take `roster` and "
            "`aggregator` out of the file.",
        )
    return study.with_keys(roster, aggregator)


@app.command(rich_help_panel=TOGETHER)
def studies(home: Home = Path(), as_json: AsJson = False) -> None:
    """List your studies, who approved them, and their runs."""
    with researcher.open_caller(home) as caller:
        found = caller.studies()
    if as_json:
        print(json.dumps([_study_facts(state) for state in found]))
        return
    table = screen.table("digest", "study", "approved", "declined", "no answer", "runs")
    for state in found:
        runs = "\n".join(f"{run.run_id}: {run.label}" for run in state.runs) or "none"
        names = (", ".join(group) or "-" for group in (state.approved, state.declined, state.unanswered))
        table.add_row(state.digest[:12], state.name, *names, runs)
    screen.show(table, console)


def _study_facts(state: Any) -> dict[str, Any]:
    return {
        "digest": state.digest,
        "name": state.name,
        "submitted": state.submitted,
        "quorum": state.quorum,
        "approved": list(state.approved),
        "declined": list(state.declined),
        "unanswered": list(state.unanswered),
        "runs": [{"run_id": run.run_id, "state": run.state, "label": run.label} for run in state.runs],
    }


@app.command(rich_help_panel=TOGETHER)
def run(
    study: Annotated[str, typer.Argument(help="Digest (its beginning is enough) or file of a submitted study.")],
    home: Home = Path(),
    detach: Annotated[
        bool, typer.Option("--detach", help="Launch and return; watch later with `fl-study watch`.")
    ] = False,
) -> None:
    """Launch a study once enough sites approved it, and watch it with a progress bar."""
    with researcher.open_caller(home) as caller:
        run_id = caller.launch(_digest(caller, study))
        console.print(f"Run {run_id}", highlight=False)
        if not detach:
            counted = follow(iter(text for _, text in caller.watch(run_id)))
            console.print(f"Next: fl-study {'cohort' if counted else 'report'} {run_id}", highlight=False)


@app.command(rich_help_panel=TOGETHER)
def watch(
    run_id: Annotated[str, typer.Argument(help="A run of yours; see `fl-study studies`.")],
    home: Home = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as one line of JSON.")] = False,
) -> None:
    """Watch a run from its beginning until it ends."""
    with researcher.open_caller(home) as caller:
        if as_json:
            for _, text in caller.watch(run_id):
                typer.echo(text)
            return
        follow(iter(text for _, text in caller.watch(run_id)))


@app.command(rich_help_panel=TOGETHER)
def report(
    run_id: Annotated[
        str, typer.Argument(help="A finished run, or a study's digest or file (its latest finished run).")
    ],
    home: Home = Path(),
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for report.html, metrics.json and the plots.")
    ] = Path("report"),
    as_json: AsJson = False,
) -> None:
    """Fetch a run's results and write the evaluation report."""
    from fl_server import report as evaluation

    results = _results(home, run_id, out)
    if results.get("kind") == "counting":
        raise DocumentError(
            "this study counts patients and trains nothing, so there is no evaluation to report",
            remedy=f"Read its numbers with `fl-study cohort {run_id}`.",
        )
    with screen.busy("drawing the report"):
        page = evaluation.write(results, out)
    summary.say(page, as_json)


def _results(home: Path, run_id: str, out: Path) -> dict[str, Any]:
    """results.json of a finished run, which is stored in the folder `out` with the run's other files."""
    out.mkdir(parents=True, exist_ok=True)
    with screen.busy("fetching the results"), researcher.open_caller(home) as caller:
        files = caller.results(_run_id(caller, run_id), out)
    results = next((file for file in files if file.name == "results.json"), None)
    if results is None:
        raise RunUnknown(f"run {run_id} has no results yet", remedy="Watch it with `fl-study watch`.")
    found: dict[str, Any] = json.loads(results.read_bytes())
    return found


@app.command(rich_help_panel=TOGETHER)
def cohort(
    run_id: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A finished run, a study's digest or file (its latest finished run), or a cohort.json."
        ),
    ],
    home: Home = Path(),
    census: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="Compare to this table: attribute,category,count or share[,maps_to]."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for cohort.json and cohort.csv; without it, none.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the numbers of a finished study that counts, and how those counted compare to a census."""
    from fl_server import counting
    from fl_server.census import read_census

    table = None if census is None else read_census(census)
    if run_id.endswith(".json"):
        found = counting.Found.open(Path(run_id))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            found = counting.Found.of(_results(home, run_id, Path(scratch)))
    counting.say(found, table, as_json)
    if out is not None:
        page = counting.write(found, table, out)
        if not as_json:
            _line(f"Written: {page} and {page.with_suffix('.csv').name}")


rehearsal_cli.add_to(app, _read_study, progress, WRITE)


def _digest(caller: calls.Caller, text: str) -> str:
    """The digest of a submitted study, from its beginning or from the study's file."""
    states = caller.studies()
    if Path(text).is_file():
        written = read(Study, Path(text)).with_noise().digest  # of a file without the sites' keys: its draft
        found = [state.digest for state in states if written in (state.digest, state.draft)]
    else:
        found = [state.digest for state in states if state.digest.startswith(text)] if len(text) >= 6 else []
    if len(found) != 1:
        what = "more than one study" if found else "no study"
        raise RunUnknown(
            f"{what} of yours fits {text!r}",
            remedy="List them with `fl-study studies`. Six characters of a digest are enough; a changed file fits none.",
        )
    return found[0]


def _run_id(caller: calls.Caller, text: str) -> str:
    states = caller.studies()
    if any(run.run_id == text for state in states for run in state.runs):
        return text
    digest = _digest(caller, text)
    done = [run.run_id for s in states if s.digest == digest for run in s.runs if run.state in ("complete", "partial")]
    if not done:
        raise RunUnknown(f"no run of study {digest[:12]} has finished", remedy="Launch it with `fl-study run`.")
    return done[-1]


release_cli.add_to(app, _run_id, MODELS)


def _line(sentence: str) -> None:
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    main()
