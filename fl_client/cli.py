"""The hospital's command, `fl-client`: join, point at data, check, approve or decline studies, run the node."""

import itertools
import json
import logging
import signal
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from fl_client import archive_cli, data_cli, doctor_cli, enrol, evaluate_cli, export_cli, next_step, standing
from fl_client.consent import consents, find_consent
from fl_client.policy import Pause
from fl_client.site import Site
from models import catalogue_cli, covariates
from models.catalogue import Notice
from models.questions import Counting
from models.study import Regression, Study
from privacy import crash_cli, heads, journal_cli, keys, logs, screen
from privacy.calls import Enrolment
from privacy.console import ProxyPassword, ProxyUrl, ProxyUser, begin, proxy_of, show_version
from privacy.console import run as run_command
from privacy.deidentify import guarded
from privacy.errors import DataError, TrustError
from privacy.journal_cli import Book
from privacy.screen import Screen

app = typer.Typer(
    help="Run a hospital's node: images stay here, you decide what is learned from them.",
    pretty_exceptions_enable=False,
)
console = Screen()

JOIN, IMAGES, DECIDE, RUN = "Join", "Your images", "Studies", "At work"
LEFT, MODELS, TRY = "What left, and what it cost", "Released models", "To try, and when something is wrong"
"""Panels of the help, in the order of the work."""

Home = Annotated[Path, typer.Option("--home", "-H", help="The site's folder, with site.yaml and keys.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Digest = Annotated[str, typer.Argument(help="Digest of a study (its beginning is enough); see `fl-client studies`.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run a hospital's node: images stay here, you decide what is learned from them."""
    begin(context, next_step.steps)


@app.command(rich_help_panel=JOIN)
def join(
    line: Annotated[str, typer.Argument(help="The line that the coordinator sent you.")],
    home: Home = Path(),
    proxy: ProxyUrl = None,
    proxy_user: ProxyUser = None,
    proxy_password_file: ProxyPassword = None,
) -> None:
    """Join a consortium. The key is made here and never leaves; a commented site.yaml is written."""
    enrolment = enrol.join(line, home, proxy_of(proxy, proxy_user, proxy_password_file))
    console.print(f"Joined as site {enrolment.name}.")
    console.print(f"Next: describe your images in {home / 'site.yaml'}, then run: fl-client ingest")


app.command(rich_help_panel=TRY)(doctor_cli.doctor)
app.command(rich_help_panel=IMAGES)(archive_cli.fetch)
app.command(rich_help_panel=IMAGES)(data_cli.ingest)
app.command(rich_help_panel=IMAGES)(data_cli.quarantine)
app.add_typer(export_cli.app, name="export", rich_help_panel=IMAGES)


@app.command(rich_help_panel=IMAGES)
def check(
    home: Home = Path(),
    page: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Also write a page with figures and thumbnails; it stays here."),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(metavar="DIGEST|FILE", help="Also say what this study would take here; nothing is kept."),
    ] = None,
    no_thumbnails: Annotated[bool, typer.Option("--no-thumbnails", help="Leave thumbnails out of the page.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say line by line whether this site is ready, and how its images and labels look; exit code 1 if it is not."""
    from fl_client.readiness import Inspection

    asked = None
    if study is not None:
        from fl_client.preview import study_of

        asked = study_of(home, study)
        if isinstance(asked.task, Counting):  # it has no splits to look at
            numbers = _own_numbers(asked, asked.task, Site.open(home))
            _tell(f"“{asked.title}” asks for numbers and trains nothing; {numbers}")
            asked = None
    with screen.busy("looking at your images"):
        looked = Inspection(home, asked)
    standing.note(home, [finding.subject for finding in looked.findings if not finding.good])
    if page is not None:
        from fl_client.readiness_page import check_place, write_page

        if warning := check_place(page):
            _tell(warning)
        with guarded(home), screen.busy("drawing the page"):
            write_page(page, looked, thumbnails=not no_thumbnails)
    if as_json:
        print(json.dumps(looked.to_json()))
    else:
        for finding in looked.findings:
            mark, colour = ("LOOK", "yellow") if finding.look else ("ok", "green") if finding.good else ("FIX", "red")
            screen.finding(mark, colour, finding.subject, finding.sentence)
        ready, colour = ("ready", "green") if looked.ready else ("not ready", "red")
        console.print(f"This site is {ready}.", style=colour)
        if page is not None:
            screen.say(f"Page: {page}. It stays at the hospital.")
    if not looked.ready:
        raise typer.Exit(1)


@app.command(rich_help_panel=DECIDE)
def studies(home: Home = Path(), as_json: AsJson = False) -> None:
    """Fetch the studies offered to this site and list them with your decisions."""
    offers = enrol.fetch_offers(home)
    if as_json:
        rows = [{"digest": o.digest, "study": o.study.model_dump(mode="json"), "decision": o.decision} for o in offers]
        print(json.dumps(rows))
        return
    if not offers:
        console.print("No study has been offered to this site yet.")
        return
    table = screen.table("digest", "title", "rounds", "researcher", "your decision")
    for offer in offers:
        rounds = str(offer.study.training.rounds)
        paused = ", paused" if Pause.open(home, time.time(), offer.digest) else ""
        decision = f"{offer.decision or 'not yet'}{paused}"
        table.add_row(offer.digest[:12], offer.study.title, rounds, offer.researcher, decision)
    screen.show(table)
    console.print("Read and decide: fl-client approve DIGEST, or fl-client decline DIGEST")


@app.command(rich_help_panel=DECIDE)
def approve(
    digest: Digest,
    home: Home = Path(),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask; the study is still shown.")] = False,
) -> None:
    """Show a study in plain words and, if you agree, send your signed approval."""
    site, offer = Site.open(home), enrol.find_offer(home, digest)
    peers = enrol.peers(home, offer.study)
    show_study(offer.study, site, offer.researcher, peers)
    site.check_policy(offer.study)
    with screen.busy("adding up what it would spend of your patients' privacy"):
        _check_budget(site, offer.study)
    _ask_about_changed([peer for peer in peers if peer.changed], yes)
    if not yes:
        typer.confirm("Do you approve this study for your site?", abort=True)
    enrol.decide(home, offer, "approved")
    console.print(
        f"Approved {offer.digest[:12]}. Orders of this study, and of no other, are carried out.", highlight=False
    )


@app.command(rich_help_panel=DECIDE)
def decline(digest: Digest, home: Home = Path()) -> None:
    """Decline a study, or withdraw an approval; no further order of it is carried out."""
    offer = enrol.find_offer(home, digest)
    enrol.decide(home, offer, "declined")
    console.print(f"Declined {offer.digest[:12]}.")


@app.command(rich_help_panel=DECIDE)
def rules(home: Home = Path(), as_json: AsJson = False) -> None:
    """Say for each study that waits here which rule of site.yaml approves it, or why none does; nothing is approved by this."""
    from fl_client.rules import approving

    site, rows = Site.open(home), list[dict[str, Any]]()
    for offer in enrol.fetch_offers(home):
        if offer.decision is None:
            number, why = approving(site, offer, datetime.now().date())
            rows.append({"digest": offer.digest, "title": offer.study.title, "rule": number, "why_not": why})
    if as_json:
        print(json.dumps(rows))
        return
    if not rows:
        console.print("No study waits for an answer.")
    for row in rows:
        said = f"approved by rule {row['rule']}" if row["rule"] else f"waits for you: {'; '.join(row['why_not'])}"
        screen.say(f"{row['digest'][:12]} {row['title']}: {said}")


PausedStudy = Annotated[
    str | None, typer.Argument(metavar="STUDY", help="Digest of one study (its beginning is enough); left out: all.")
]


@app.command(rich_help_panel=RUN)
def pause(
    study: PausedStudy = None,
    home: Home = Path(),
    hours: Annotated[
        float | None, typer.Option("--hours", min=0.01, help="For so long; left out: until resumed.")
    ] = None,
) -> None:
    """Take no new orders (of one study, or of all) from now on, until `fl-client resume`; sums that this site is in already are
    still opened. Running rounds go on without this site and ask it again each time.
    """
    site, now, (digest, what) = Site.open(home), time.time(), _paused(home, study)
    held = Pause(now, None if hours is None else now + hours * 3600)
    held.store(home, digest)
    site.journal.append("paused", hours=hours or 0, **({"study": digest} if digest else {}))
    console.print(f"{what or site.name} is {held}.")


@app.command(rich_help_panel=RUN)
def resume(study: PausedStudy = None, home: Home = Path()) -> None:
    """Take orders again after `fl-client pause`; a study that was paused by itself is resumed by itself."""
    site, (digest, what) = Site.open(home), _paused(home, study)
    if not Pause.path(home, digest).exists():
        console.print(f"{what or site.name} is not paused.")
    else:
        site.journal.append(
            "resumed", **({"study": digest} if digest else {})
        )  # first: never at work without this line
        Pause.path(home, digest).unlink()
        console.print(f"{what or site.name} takes orders again.")
    for consent in consents(home):
        if consent.offer.digest != digest and (left := Pause.open(home, time.time(), consent.offer.digest)):
            console.print(f"The study {consent.offer.digest[:12]} is {left}.")


def _paused(home: Path, study: str | None) -> tuple[str, str]:
    """(digest of the study, what it is called here); empty for the whole site."""
    if study is None:
        return "", ""
    digest = find_consent(home, study).offer.digest
    return digest, f"The study {digest[:12]}"


@app.command(rich_help_panel=LEFT)
def egress(
    home: Home = Path(),
    study: Annotated[str | None, typer.Option("--study", help="Only this study; the beginning of its digest.")] = None,
    as_json: AsJson = False,
) -> None:
    """List in words everything that left this building, by study and round, after the journal was checked."""
    from fl_client import egress as leaving

    with screen.busy("checking the journal"):
        report = leaving.read(home, study)
    if as_json:
        print(json.dumps(report.to_json()))
        return
    for (digest, run), rows in itertools.groupby(report.rows, lambda row: (row.study, row.run)):
        table = screen.table(*leaving.HEADINGS, title=leaving.heading(digest, run))
        for row in rows:
            table.add_row(*row.row())
        screen.show(table)
        console.print()
    for sentence in report.sentences():
        screen.say(sentence)


def _ask_about_changed(changed: list[enrol.Peer], yes: bool) -> None:
    """Have a person type what each site with another key than before says on the telephone; raises TrustError.

    `--yes` is for scripts, and no script can telephone.
    """
    for peer in changed:
        sentence = f"The key of {peer.name} changed since {peer.changed}, when you approved a study with it."
        console.print(
            f"{sentence} Somebody may pose as {peer.name}; ask them by telephone.",
            style="bold red",
            highlight=False,
            soft_wrap=True,
        )
    if changed and yes:
        names = ", ".join(peer.name for peer in changed)
        raise TrustError(
            f"the key of {names} changed, and --yes cannot answer for that",
            remedy=f"Ask {names} by telephone for the fingerprint that `fl-client check` shows there, then run the "
            "command again without --yes.",
        )
    for peer in changed:
        typed = typer.prompt(f"Fingerprint that {peer.name} read to you over the telephone")
        if "".join(typed.split()).lower() != peer.fingerprint.replace(" ", ""):
            raise TrustError(
                f"that is not the fingerprint of the key that the study names for {peer.name}",
                remedy=f"If {peer.name} said so, do not approve: somebody poses as them. Tell the coordinator.",
            )


def show_study(study: Study, site: Site, researcher: str, peers: list[enrol.Peer]) -> None:
    """The study in plain words: what is learned or asked, of what, how long, with whom, what leaves, who sees it."""
    lines = [
        ("Study", f"{study.title} ({study.digest[:12]}), by researcher {researcher}"),
        ("Purpose", study.purpose.strip()),
    ]
    lines += _asked(study, study.task, peers) if isinstance(study.task, Counting) else _learned(study, site, peers)
    lines.append(("Yours", _own_data(study, site)))
    if isinstance(study.task, Counting):
        lines.append(("Numbers", _own_numbers(study, study.task, site)))
    screen.facts(lines, console)


def _asked(study: Study, task: Counting, peers: list[enrol.Peer]) -> list[tuple[str, str]]:
    """What a study that counts asks, and what leaves: everything about it, in the words that a person approves."""
    groups = f", and of patients by {', '.join(task.breakdown)}" if task.breakdown else ""
    return [
        ("Asked", "\n".join(f"{name}: {task.questions[name].words}" for name in task.names)),
        ("Here", "your patients and images are counted; nothing is trained, and no image is opened"),
        ("Others", _others(study, peers)),
        ("Stays", "images, identifiers, dates, file names, labels; and the exact numbers, which nobody else ever has"),
        (
            "Leaves",
            "masked, as parts of sums: for each question the number of patients who fit, of those of whom too little is known to "
            f"say, of images{groups}; each rounded down to tens before it is masked, so that less than 10 leaves as 0",
        ),
        ("Seen by", f"{_seen_by(study)}. Even by itself it would be in tens (protection: {study.protection})"),
        (
            "Privacy",
            "no differential privacy, and no ε is spent: a number in tens changes where one patient makes a ten full. Many "
            "questions that differ a little find such places; so ages are asked in fixed bands, and you are asked each time",
        ),
    ]


def _own_numbers(study: Study, task: Counting, site: Site) -> str:
    """What this site would answer now, and in brackets its exact numbers, for the eyes of whoever approves."""
    from fl_client.counting import counted
    from models.questions import read as read_tens
    from models.questions import tens

    try:
        exact = counted(site, study, task)
    except DataError as error:
        return f"none yet: {error} {error.remedy}"
    told = read_tens(task, tens(task, exact))
    rows = [
        f"{name}: {told[name].patients} patients, {told[name].images} images (here: {answer.patients}, {answer.images})"
        for name, answer in exact.items()
    ]
    return "\n".join(["as things stand, this would go under the mask:", *rows])


def _learned(study: Study, site: Site, peers: list[enrol.Peer]) -> list[tuple[str, str]]:
    """What a study trains, and what leaves for it."""
    part = study.participation
    trains = site.name in part.sites
    masked = "masked, as parts of sums: " if study.protection == "masked" else ""
    lines = [
        ("Learned", f"{study.predicts} from {study.images.words}"),
        *_beside(study),
        (
            "Here",
            _asked_of(study, trains=trains),
        ),
        (
            "Network",
            f"{study.network.words}; one round may take {part.round_timeout_s / 60:g} minutes at most",
        ),
        ("Others", _others(study, peers)),
        ("Stays", f"images, identifiers, dates, file names, {_single(study)} of any single image"),
        ("Leaves", f"{masked}{_leaving(study)}"),
    ]
    if study.evaluation.site_figures:
        told = "AUROC with its intervals and class counts in tens, if both classes have 10 images"
        if isinstance(study.task, Regression):
            told = (
                "mean error, bias, and agreement with the reference, with intervals, from 10 images of 10 patients on"
            )
        elif study.segments:
            told = "Dice, surface Dice and HD95 of each structure with intervals, and cases in tens, from 10 patients"
        lines.append(("Figures", f"your own test {told}"))
    else:
        lines.append(("Figures", "none of your site alone; test results are released over all sites together"))
    if study.evaluation.subgroups:
        lines.append(
            (
                "Groups",
                f"test histograms by {', '.join(study.evaluation.subgroups)} of your images as well, in the same sum; none of "
                "a group with fewer than 10 patients or 10 images of a class, nor one that gives such a group away. "
                f"{_group_of_one(study)}",
            )
        )
    if isinstance(study.task, Regression):
        few = "" if study.privacy == "none" else "; none of fewer than 10 images of 10 patients"
        lines.append(
            ("Errors", f"sums over your test images of errors, references and predictions, in the same sum{few}")
        )
    if study.segments and study.protection == "masked":
        lines.append(("Alone", _alone("structure that no other site annotates", "sums", "structure")))
    if study.relation == "ordered" and study.privacy == "none":
        lines.append(("Grades", "how many test images of each grade are called which grade, in the same sum"))
    lines.append(("Seen by", f"{_seen_by(study)} (protection: {study.protection})"))
    return lines + _privacy_lines(study, site)


def _beside(study: Study) -> list[tuple[str, str]]:
    """Which facts of a patient are learned from beside the image."""
    if not study.covariates:
        return []
    shown = "\n".join(covariates.words(study.covariates))
    return [("Beside", f"of each patient, and it never leaves as it is:\n{shown}")]


def _single(study: Study) -> str:
    return "the mask, the outline and the figures" if study.segments else "the score"


def _summed(study: Study) -> str:
    """What of an evaluation is added up, in words."""
    if study.segments:
        return (
            f"of each structure ({', '.join(study.task.targets)}) with 10 annotated patients: number of cases and of empty "
            "masks, sums of Dice, surface Dice and HD95 and of their squares"
        )
    return (
        "sums of errors of the test images" if isinstance(study.task, Regression) else "histograms of scores by label"
    )


def _kind_of_sum(study: Study) -> str:
    if study.segments:
        return "sums of figures"
    return "sums of errors" if isinstance(study.task, Regression) else "histograms"


def _group_of_one(study: Study) -> str:
    if study.protection != "masked":
        return "The coordinator sees those of your site by themselves"
    return _alone("group that no other site tells of", "histogram", "group")


def _alone(what: str, seen: str, kept: str) -> str:
    return (
        f"A {what} is yours alone in that sum: the coordinator's program sees its {seen} when the sum is opened, and keeps no "
        f"{kept} of fewer than 3 sites"
    )


def _asked_of(study: Study, *, trains: bool) -> str:
    if trains and study.training.rounds:
        return f"{study.training.rounds} rounds of training on your labelled images"
    whole = not trains and study.evaluation.external == "all"
    return f"evaluation only, no training{', on all your labelled images' if whole else ''}"


def _others(study: Study, peers: list[enrol.Peer]) -> str:
    """Who else takes part, each with the fingerprint of its key; one line each, as wide as the longest name needs."""
    if not peers:
        return "nobody"
    width = max(len(peer.name) for peer in peers)
    rows = [f"a round needs {study.participation.quorum} sites. Keys, to compare with theirs over the telephone:"]
    for peer in peers:
        note = "  evaluates only" if peer.name in study.participation.evaluate_only else ""
        rows.append(f"{peer.name:<{width}}  {peer.fingerprint}{note}")
    return "\n".join(rows)


def _seen_by(study: Study) -> str:
    if study.protection == "masked":
        return (
            "the coordinator sees only sums over the sites; what yours added stays hidden in them unless a third of the "
            "sites in a sum, or more, work together with it"
        )
    own = f"the coordinator sees YOUR site's own update and {_kind_of_sum(study)}"
    if study.protection == "sealed":
        return f"{own}; nobody can read them on the way to it"
    return f"{own}, and so does whoever can look into its server"


def _leaving(study: Study) -> str:
    """What leaves in a round, beside released figures."""
    if study.privacy == "none":
        updates = "model updates, mean gradients" if study.strategy.steered else "model updates"
        updates += " without norm layers, which stay here" if study.strategy.local_norms else ""
        return f"{updates}, losses, numbers of patients and images, {_summed(study)}"
    few = "both classes have 10 of them"
    if study.segments:
        few = "10 of them hold the structure, or none, and 10 do not, or none"
    elif isinstance(study.task, Regression):
        few = "there are 10 of them, of 10 patients"
    what = "sums of gradients" if study.privacy.mode == "distributed" else "model updates"
    return (
        f"{what} with noise, your number of training patients in tens; {_summed(study)}, number and mean loss of evaluated "
        f"images, if {few}"
    )


def _privacy_lines(study: Study, site: Site) -> list[tuple[str, str]]:
    """What is promised about a single patient, and what was spent here before."""
    if site.name not in study.participation.sites:
        return [("Privacy", "nothing is trained on your patients; only counts of your test images leave")]
    if study.privacy == "none":
        return [("Privacy", "no differential privacy: an update can reveal something about patients behind it")]
    plan, policy = study.privacy, site.settings.policy
    if plan.noise_multiplier is None:
        return [("Privacy", "the study asks for differential privacy, and says nothing of its noise")]
    sentences = [statement.sentence() for statement in study.statements()]
    noise = f"noise of {plan.noise_multiplier:g} times the clip norm in each step, {plan.mode}"
    spent = site.ledger.spendings(policy.delta).get("total")
    before = f"ε {spent.charged:.2f} of your most used patient" if spent else "nothing"
    return [
        ("Privacy", "\n".join([noise, *sentences])),
        (
            "Not in ε",
            f"counts and {_kind_of_sum(study)} of your validation and test images; none of fewer than 10 leaves",
        ),
        (
            "Budget",
            f"{before} was spent before; site.yaml permits {policy.epsilon_per_study:g} for one study, "
            f"{policy.epsilon_per_year:g} in a year, {policy.epsilon_total:g} for ever, at δ = {policy.delta:g}",
        ),
    ]


def _check_budget(site: Site, study: Study) -> None:
    """Raise BudgetExceeded if the study would spend more than these patients have left. Without images there is nothing to check
    yet: then the first order is.
    """
    if study.privacy == "none" or site.name not in study.participation.sites:
        return
    from fl_client.cohort import Cohort
    from fl_client.index import Index
    from models.labels import LabelTable

    try:
        index, source = Index.open(site.state), site.source
        labels = LabelTable.open(site.home, source.labels)
        patients = Cohort.identities_of(index, labels, study, "train", site.pins(study))
    except DataError as error:
        sentence = f"What this study would spend of your patients cannot be told yet: {error} {error.remedy}"
        screen.say(sentence, style="yellow")
        return
    if patients:
        site.check_budget(study, patients)


def _own_data(study: Study, site: Site) -> str:
    """What this site would bring to the study, or what is missing for it; said before anybody approves."""
    from fl_client.index import Index
    from fl_client.masks import mapped
    from fl_client.observed import unnamed

    try:
        index, source = Index.open(site.state), site.source.labels
        unmapped = sorted(set(study.task.targets) - set(mapped(site.state, source, study)))
    except DataError as error:
        return f"{error} {error.remedy}"
    unmapped += unnamed(source, study.covariates)
    note = f"; site.yaml maps nothing to {', '.join(unmapped)}, so these count as missing" if unmapped else ""
    return f"{index.taken} images of {index.patients} patients are ready here{note}"


@app.command(rich_help_panel=LEFT)
def budget(
    home: Home = Path(),
    plot: Annotated[Path | None, typer.Option(help="Also draw what was charged over time into this PNG file.")] = None,
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild", help="Make a damaged ledger anew from what is left of it and the journal."),
    ] = False,
    accept_clock: Annotated[
        bool,
        typer.Option("--accept-clock", help="The clock is right now, and was wrong when the last entries were made."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what was spent of your patients' privacy, by study and in all, and what site.yaml still permits."""
    from fl_client import budget as spending

    if rebuild:
        charges = Site.open(home).ledger.rebuild()
        _tell(
            f"The ledger was made anew with {charges} charges. Those that could not be matched to patients any more count for "
            "every patient of this site. The old file was kept beside it."
        )
    if accept_clock:
        Site.open(home).ledger.accept_clock()
    with screen.busy("adding up"):
        found = spending.open_budget(home)
    if plot is not None:
        plot.write_bytes(spending.draw(home))
    if as_json:
        print(json.dumps(found.to_json()))
        return
    if found.rows:
        table = screen.table("study", "title", "rounds", "held", "ε spent", "ε charged")
        for row in found.rows:
            rounds = f"{row.rounds} of {row.rounds_most}" if row.rounds_most else str(row.rounds)
            figures = (spending.shown(row.spent), f"{spending.shown(row.charged)} of {found.caps['study']:g}")
            table.add_row(row.digest[:12], row.title, rounds, str(row.open or "-"), *figures)
        screen.show(table)
    else:
        console.print("Nothing was charged yet: no study with differential privacy has trained here.")
    for sentence in found.sentences():
        screen.say(sentence)
    if plot is not None:
        screen.say(f"Plot: {plot}")


def _book(home: Path) -> Book:
    """This site's journal: its own heads carry the key of its certificate, the coordinator's the key noted at joining."""
    name, folder = Enrolment.open(home / "keys").name, home / "keys"
    own = keys.public_key_of(keys.load_certificate((folder / "site.pem").read_bytes()))
    pinned = keys.load_public((folder / "coordinator.pem").read_bytes())
    return Book(home / "journal.jsonl", name, [own], {heads.COORDINATOR: [pinned]})


app.add_typer(journal_cli.commands(_book), name="journal", rich_help_panel=LEFT)
app.add_typer(crash_cli.app, name="crash", rich_help_panel=TRY)


def _tell(sentence: str) -> None:
    """For a person, beside what a command prints for programs."""
    screen.tell(sentence)


@app.command(rich_help_panel=RUN)
def start(
    home: Home = Path(),
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also print the node's log.")] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Answer Prometheus on 127.0.0.1 at this port; left out: the node listens nowhere."
        ),
    ] = None,
) -> None:
    """Run the node until Ctrl-C: it connects outwards only, and carries out orders of approved studies."""
    from fl_client import node

    settings = Site.settings_of(home)  # before a log is opened in a folder that is no site's
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for number in (signal.SIGINT, signal.SIGTERM):  # a service manager's stop is a person's Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        file = logs.handler(home, "node", settings.log)
        with guarded(home, level=logging.INFO if verbose else logging.ERROR, file=file):
            node.serve(home, _say, metrics_port)
    except KeyboardInterrupt:
        _say("The node has stopped.")


def _say(sentence: str) -> None:
    stamp = datetime.now(UTC).strftime("%H:%M:%SZ")
    screen.say(f"{stamp} {sentence}")


def _note(home: Path, kind: str, notice: Notice) -> None:
    Site.open(home).journal.append(kind, model=notice.sha256, name=notice.name)


catalogue_cli.add_to(app, enrol.open_caller, _note, MODELS)
app.command(rich_help_panel=MODELS)(evaluate_cli.evaluate)
app.command(rich_help_panel=TRY)(data_cli.phantom)


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    main()
