"""`fl-server runs`, `show`, `watch`, `stop`, `resume` and `extend`: the coordinator's commands about training runs."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fl_server import telling
from fl_server.progress import STAGES, Onlooker, Progress, ahead, duration, find, printable, queue, remedy_of
from fl_server.roster import Home
from fl_server.run import Run, ask_to_stop, holding, list_runs, mark_stopped, read_facts, stop_asked
from models.study import Study
from privacy import screen
from privacy.errors import DocumentError, MessageMalformed, RunError, TooFewApprovals

EXIT_CODES = {"complete": 0, "failed": 1, "partial": 3, "stopped": 4}
"""Of `watch`. 2 is the exit code of a command line that is not understood."""
LOOK_S = 0.5

HomeOption = Annotated[
    Path,
    typer.Option(
        "--home", "-H", help="Folder of the consortium, made by `fl-server init`. Default: the current folder."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Id of a run; its beginning is enough. See `fl-server runs`.")
]


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the commands, in the panel of the help."""
    for command in (runs, show, watch, stop, resume, extend):
        app.command(rich_help_panel=panel)(command)


def runs(home: HomeOption = Path(), as_json: JsonOption = False) -> None:
    """List the training runs and their state. The oldest have their turn first, as many at once as server.yaml says."""
    from fl_server.consortium import run_records

    opened = Home.open(home)
    found, facts = run_records(opened), {str(each["run_id"]): each for each in list_runs(opened.runs)}
    waiting = queue(list(facts.values()))
    if as_json:
        more = ("researcher", "created", "started", "finished", "round", "rounds", "attempt", "sites")
        rows = [vars(run) | {key: facts.get(run.run_id, {}).get(key) for key in more} for run in found]
        for row in rows:
            row["stopping"] = stop_asked(opened.runs / row["run_id"]) or None
            row["before_it"] = _ahead(opened, row["run_id"], waiting)
        typer.echo(json.dumps({"runs": rows}, indent=2))
        return
    table = screen.table("run", "state", "round", "digest")
    for run in found:
        each = facts.get(run.run_id, {})
        rounds = f"{each.get('round', '?')} of {each.get('rounds', '?')}"
        label = _label(opened.runs / run.run_id, run.label, _ahead(opened, run.run_id, waiting))
        label = f"unreadable: {label}" if run.state == "unreadable" else label
        table.add_row(run.run_id, label, rounds, run.digest[:12])
    if table.row_count:
        screen.show(table)
    else:
        typer.echo("No runs yet. A researcher starts one with `fl-study run`.")


def show(run: RunArgument, home: HomeOption = Path(), as_json: JsonOption = False) -> None:
    """Show one run: its rounds, who is at which stage, who is missing and what helps, losses, and how long it will take."""
    opened = Home.open(home)
    folder = find(opened.runs, run)
    progress, before_it = Onlooker(folder).look(), _ahead(opened, folder.name)
    if as_json:
        typer.echo(json.dumps(progress.to_json() | {"before_it": before_it}, indent=2))
        return
    screen.facts(_head(progress, before_it))
    typer.echo()
    screen.show(_sites_table(progress))
    for reason in sorted({part.reason for part in progress.sites.values() if part.reason}):
        screen.say(f"{reason}: {remedy_of(reason)}")
    if progress.rounds:
        typer.echo()
        screen.show(_rounds_table(progress))
    for note in progress.notes:
        screen.say(f"{note.at[:16].replace('T', ' ')} {note.sentence}")


def watch(
    run: RunArgument,
    home: HomeOption = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as one line of JSON.")] = False,
) -> None:
    """Watch a run until it ends. Exit code: 0 complete, 1 failed, 3 partial, 4 stopped."""
    from fl_server import consortium

    opened = Home.open(home)
    folder = find(opened.runs, run)
    if not as_json and (before_it := _ahead(opened, folder.name)):
        screen.say(f"queued; {_runs(before_it)} before it")
    lines = (text for _, text in consortium.follow(folder, lambda: True))
    try:
        if as_json:
            for line in lines:
                typer.echo(line)
        else:
            telling.follow(_known(lines))
    except RunError as error:
        if not as_json:
            screen.say(str(error))
    except KeyboardInterrupt:
        typer.echo("The run goes on; nobody watches it now.", err=True)
        raise typer.Exit(130) from None
    raise typer.Exit(EXIT_CODES.get(_ended_as(folder), 1))


def stop(
    run: RunArgument,
    home: HomeOption = Path(),
    at_once: Annotated[
        bool, typer.Option("--now", help="Give up the stage that is under way; what the sites spent on it stays spent.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Stop a run cleanly after the stage that is under way. Committed rounds stay; `fl-server resume` carries it on."""
    opened = Home.open(home)
    folder = find(opened.runs, run)
    state = str(read_facts(folder).get("state"))
    if state not in ("queued", "running"):
        raise RunError(f"run {folder.name} is {state} already", remedy="Nothing to do.")
    ask_to_stop(folder, at_once=at_once)  # first: whoever takes the run from here on heeds it
    opened.journal.append("stop-asked", run=folder.name)
    with holding(folder) as free:
        # Nobody carries it out: it waits in the queue, or the coordinator is down.
        if free and read_facts(folder).get("state") in ("queued", "running"):
            mark_stopped(folder)
            opened.journal.append("run-ended", run=folder.name, state="stopped")
    progress = Onlooker(folder).look()
    if as_json:
        typer.echo(json.dumps({"run_id": folder.name, "state": progress.state, "stopping": progress.stopping or None}))
        return
    typer.echo(f"{folder.name}: {progress.label}")
    if progress.stopping:
        typer.echo(f"Wait for it: fl-server watch {folder.name}")


def resume(
    run: RunArgument,
    home: HomeOption = Path(),
    from_round: Annotated[
        int | None,
        typer.Option(
            "--from-round",
            metavar="K",
            help="Train round K and all after it again: 1, or a round after one of the last two committed. What they had "
            "learned is given up; what they cost patients stays spent.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Queue a stopped or failed run again; it goes on at the first round that is not committed."""
    opened = Home.open(home)
    folder = find(opened.runs, run)
    with holding(folder) as free:
        state = str(read_facts(folder).get("state"))
        if not free or state not in ("stopped", "failed"):
            raise RunError(
                f"run {folder.name} is {state}{' and is being carried out' if not free else ''}",
                remedy="Only a stopped or failed run is resumed; `fl-server show RUN` says where it stands.",
            )
        stopped = Run.open(folder)
        approved = opened.roster.approvals(stopped.study.digest)
        _require_quorum(stopped.study, approved)
        given_up = 0
        if from_round is not None:
            given_up = stopped.restart_at(from_round)
            opened.journal.append("run-restarted", run=folder.name, round=from_round, given_up=given_up)
        stopped.facts["sites"] = approved
        stopped.requeue()
        opened.journal.append("run-resumed", run=folder.name, sites=approved)
    before_it = _ahead(opened, folder.name)
    if as_json:
        typer.echo(json.dumps({"run_id": folder.name, "state": "queued", "before_it": before_it, "given_up": given_up}))
    else:
        if given_up:
            typer.echo(f"Given up: rounds {from_round} to {given_up + (from_round or 0) - 1}.")
        typer.echo(f"{folder.name}: queued{f'; {_runs(before_it)} before it' if before_it else ''}")


def extend(
    run: RunArgument,
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=10_000, help="Rounds to train on for.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the study; it must not exist.")],
    home: HomeOption = Path(),
) -> None:
    """Write a study that trains on for more rounds where a finished run ended; sites approve it anew, as any study.

    It starts from the run's released model, which is kept as weights here, and every patient stays on the same side of the split.
    """
    from fl_server.extension import extended  # torch takes two seconds to load

    opened = Home.open(home)
    folder = find(opened.runs, run)
    if out.exists():
        raise DocumentError(f"{out} exists already", remedy="Choose another name; nothing was overwritten.")
    text, kept = extended(opened, folder, rounds)
    opened.journal.append("weights-added", sha256=kept.sha256, bytes=kept.bytes)
    out.write_text(text, encoding="utf-8")
    typer.echo(f"Wrote {out}. The researcher reads it, then runs: fl-study submit {out}")
    typer.echo("The sites approve it as a study of its own, with an ε of its own if it is private.")


def _require_quorum(study: Study, approved: list[str]) -> None:
    here = [site for site in study.participation.sites if site in approved]
    if len(here) < study.participation.quorum:
        raise TooFewApprovals(
            f"{len(here)} training sites approve {study.name} now; its quorum is {study.participation.quorum}"
        )


def _known(lines: Iterator[str]) -> Iterator[str]:
    """The lines that are events: one that was torn by a crash must not end the watching."""
    for line in lines:
        try:
            if isinstance(json.loads(line), dict):
                yield line
        except ValueError:
            continue


def _ended_as(folder: Path) -> str:
    """The state of a run whose last event was seen; run.json may be a moment behind it."""
    for _ in range(10):
        try:
            state = str(read_facts(folder).get("state"))
        except MessageMalformed:
            return "unreadable"
        if state in EXIT_CODES:
            return state
        time.sleep(LOOK_S)
    return "running"


def _ahead(home: Home, run_id: str, waiting: list[str] | None = None) -> int | None:
    """How many runs have to end before this one begins; None if it neither waits nor has its turn."""
    waiting = queue(list_runs(home.runs)) if waiting is None else waiting
    return ahead(waiting, run_id, home.settings.runs_at_once) if run_id in waiting else None


def _runs(count: int | None) -> str:
    return f"{count} run{'' if count == 1 else 's'}"


def _label(folder: Path, label: str, before_it: int | None) -> str:
    if asked := stop_asked(folder):
        return "stopping" if asked == "now" else "stopping after the present stage"
    if label == "queued" and before_it is not None:
        return f"queued, {_runs(before_it)} before it" if before_it else "queued, next"
    return printable(label)


def _head(progress: Progress, before_it: int | None) -> Iterator[tuple[str, str]]:
    facts = progress.facts
    yield "Run", printable(facts.get("run_id", ""))
    yield "Study", printable(f"{facts.get('study')} ({str(facts.get('digest'))[:12]}), by {facts.get('researcher')}")
    more = f"; {_runs(before_it)} before it" if before_it and progress.state == "queued" else ""
    yield "State", f"{progress.label}{more}"
    if progress.state == "running":
        yield "Now", progress.sentence()
    if progress.failure[0]:
        yield "Failure", f"{progress.failure[1]} ({progress.failure[0]})"
    attempt = facts.get("attempt", 0)
    yield "Rounds", f"{progress.done} of {progress.planned} committed; attempt {attempt}, launch {progress.launches}"
    began = printable(facts.get("started", "not yet"), 19).replace("T", " ")
    remaining, median = progress.remaining_s(), progress.median_seconds
    told = [f"started {began}"]
    told += [f"median round {duration(median)}"] if median is not None else []
    told += [f"about {duration(remaining)} left until the test"] if remaining is not None else []
    yield "Time", "; ".join(told)
    if progress.test_auroc is not None:
        yield "Test", f"AUROC {progress.test_auroc:.3f}"
    if progress.test_dice is not None:
        yield "Test", f"Dice {progress.test_dice:.3f}"


def _sites_table(progress: Progress) -> Table:
    table = screen.table("site", "now", "rounds", "seconds", "was missing")
    for name, part in sorted(progress.sites.items()):
        stage = STAGES.get(part.stage, part.stage)
        now = {"working": stage, "done": f"done: {stage}", "missing": f"missing: {part.reason}"}.get(part.doing, "-")
        was = ", ".join(f"{reason} ({count}x)" for reason, count in sorted(part.refusals.items()))
        rounds = f"{part.rounds} of {progress.due(name)}" if part.trains else "evaluates only"
        table.add_row(name, now, rounds, f"{part.seconds:.1f}" if part.seconds else "", was)
    return table


def _rounds_table(progress: Progress) -> Table:
    table = screen.table(
        "round", "seconds", "training loss", "validation loss", progress.measure, "contributors", "missing"
    )
    for each in progress.rounds:
        odd = ", ".join(f"{name}: {why}" for name, why in each.missing.items())
        table.add_row(
            str(each.round), f"{each.seconds:.1f}", _figure(each.train_loss), _figure(each.loss), _figure(each.score),
            ", ".join(each.contributors), odd,
        )  # fmt: skip
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
