"""`fl-study simulate` and `attack`: a study rehearsed on this machine or on Ray, and what an adversary finds in it."""

import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fl_server import summary
from fl_server.means import Means
from models.questions import Counting
from models.study import Study
from privacy import screen
from privacy.errors import DocumentError, StudyConflict
from privacy.screen import Screen

if TYPE_CHECKING:
    from fl_server.matrix import Comparison
    from fl_server.simulation import Outcome

console = Screen()
FEW = 16
"""Patients of each phantom site where `--sites` asks for many: made in a second, and a few for each split."""

StudyFile = Annotated[Path, typer.Argument(help="The study, a YAML file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
StartingWeights = Annotated[
    Path | None, typer.Option("--weights", metavar="FILE", help="The file that network.initial names.")
]
SiteHomes = Annotated[
    list[str] | None,
    typer.Option("--site", help="NAME=FOLDER of a site's home (site.yaml, ingested); repeat. Default: phantoms."),
]
Phantoms = Annotated[int, typer.Option(min=30, max=2000, help="Patients of each phantom hospital.")]
Watched = Callable[[], AbstractContextManager[Callable[[dict[str, Any]], None]]]
"""Opened for one run: gives who shows its events."""


def add_to(app: typer.Typer, read_study: Callable[[Path], Study], progress: Watched, panel: str) -> None:
    """Give `app` the commands, in a panel of its help."""

    @app.command(rich_help_panel=panel)
    def simulate(  # noqa: PLR0913, PLR0917  each parameter is one option
        file: StudyFile,
        site: SiteHomes = None,
        patients: Annotated[
            int | None,
            typer.Option(min=8, max=2000, help=f"Patients of each phantom hospital: 120; {FEW} with --sites."),
        ] = None,
        sites: Annotated[
            int | None,
            typer.Option(
                min=1, max=1000, help="Train at so many phantom sites in place of those that the study names."
            ),
        ] = None,
        sample: Annotated[
            int | None, typer.Option(min=1, max=1000, help="Ask so many of them in each round (participation.sample).")
        ] = None,
        processes: Annotated[
            int,
            typer.Option(
                min=0, max=1024, help="Processes that are the sites; 0: one a core from 16 sites in a sum on."
            ),
        ] = 0,
        backend: Annotated[
            Literal["local", "ray"],
            typer.Option(help="local: on this machine; ray: on Ray's machines (isocenter[ray])."),
        ] = "local",
        ray_address: Annotated[
            str, typer.Option(metavar="HOST:PORT", help="Ray's head; without it Ray is started on this machine.")
        ] = "",
        out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report.")] = Path("simulation"),
        compare: Annotated[
            bool,
            typer.Option(
                "--compare",
                help="Also train at each site alone, on all images together, and on at each site; draw the matrix.",
            ),
        ] = False,
        weights: StartingWeights = None,
        as_json: AsJson = False,
    ) -> None:
        """Run the same coordinator and site programs on this machine, on phantoms or on given site folders."""
        study, homes = read_study(file), dict(_pair(text) for text in site or [])
        if sites is not None or sample is not None:
            study = _many(study, sites, sample, homes)
            study.check()
        means = Means(weights, processes, backend, ray_address)
        rehearsal = Rehearsal(study, homes, patients or (FEW if sites is not None else 120), out, means)
        _simulate(rehearsal, progress, compare=compare, as_json=as_json)

    @app.command(rich_help_panel=panel)
    def attack(
        file: StudyFile,
        site: SiteHomes = None,
        patients: Phantoms = 120,
        out: Annotated[Path, typer.Option("--out", "-o", help="Folder for attack.json and the plots.")] = Path(
            "attack"
        ),
        weights: StartingWeights = None,
        as_json: AsJson = False,
    ) -> None:
        """Rehearse a study and attack it: canaries against its ε, membership inference, reconstruction of pictures."""
        study, homes = read_study(file), dict(_pair(text) for text in site or [])
        _attack(Rehearsal(study, homes, patients, out, Means(weights)), progress, as_json=as_json)


@dataclass(frozen=True)
class Rehearsal:
    """What is to be simulated: a study over site homes or phantoms, with what means, and where the report goes."""

    study: Study
    homes: dict[str, Path]
    patients: int
    out: Path
    means: Means

    def run(self, progress: Watched, log: str) -> "Outcome":
        """The finished simulation. Ends the command if somebody stops it."""
        from fl_server import simulation

        self.out.mkdir(parents=True, exist_ok=True)
        logging.basicConfig(filename=self.out / log, level=logging.WARNING)
        try:
            with stopping() as stop, progress() as tell:

                def heard(event: dict[str, Any]) -> None:
                    stop()
                    tell(event)

                return simulation.simulate(self.study, self.homes, self.patients, self.out, heard, self.means)
        except KeyboardInterrupt:
            _line(f"Stopped. What was finished until then lies in {self.out}; every process of it has ended.")
            raise typer.Exit(130) from None


@contextmanager
def stopping() -> Iterator[Callable[[], None]]:
    """Ctrl-C is not lost while this is entered: what it gives raises KeyboardInterrupt if one came before.

    Where Python cannot raise, in a destructor or in what a library calls back, it drops the exception and goes on.
    """
    came = list[int]()

    def note(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield check
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def _simulate(rehearsal: Rehearsal, progress: Watched, *, compare: bool, as_json: bool) -> None:
    study, out = rehearsal.study, rehearsal.out
    if compare:
        from fl_server import comparison, matrix, report

        comparison.check(study)
    outcome = rehearsal.run(progress, "simulate.log")
    if isinstance(study.task, Counting):
        from fl_server import counting

        counting.say(counting.Found.of(outcome.results), None, as_json)
        return
    found = None
    if compare:
        found = comparison.compare(study, outcome, progress)
        matrix.write(found, out)
        report.write(outcome.results, out, found, outcome.saliency)
    summary.say(outcome.page, as_json)
    if found is not None and not as_json:
        _say_matrix(found, out / "comparison.png")


def _attack(rehearsal: Rehearsal, progress: Watched, *, as_json: bool) -> None:
    from fl_server import evidence

    study, out = rehearsal.study, rehearsal.out
    if isinstance(study.task, Counting):
        raise StudyConflict("a study that counts trains nothing to attack", remedy="Attack a study that trains.")
    if study.segments:
        raise StudyConflict(
            "attacks are made on scores of images, and this study outlines structures",
            remedy="There is no attack on outlines yet, so such a model with differential privacy cannot be released.",
        )
    if study.images.volume is not None:
        raise StudyConflict(
            "attacks are made on pictures, and this study is of volumes",
            remedy="There is no attack on volumes yet, so a model of volumes with differential privacy cannot be released.",
        )
    if study.strategy.local_norms:
        raise StudyConflict(
            "with strategy: fedbn there is no common model to attack",
            remedy="Attack the study with fedavg: its updates hold all that those of fedbn do.",
        )
    outcome = rehearsal.run(progress, "attack.log")
    with screen.busy("attacking") as status:
        found = evidence.attack(study, outcome, out, status)
    if as_json:
        print(json.dumps(found))
    else:
        for sentence in found["sentences"]:
            _line(sentence)
        _line(f"Plots and figures: {out}")
    if found["audit"] is not None and found["audit"]["faults"]:
        raise typer.Exit(1)


def _say_matrix(found: "Comparison", picture: Path) -> None:
    """The AUROC of each model at each site that released one, and pooled."""
    from fl_server import matrix

    for target in found.targets:
        table = screen.table("model", *(f"on {name}" for name in found.sites), "all sites")
        for line in matrix.lines(found, target):
            table.add_row(*line)
        console.print(f"Test AUROC of {target} by model and by where it is tested:", highlight=False)
        screen.show(table, console)
    for model in found.models:
        if model.kind in ("centralised", "personalised"):
            _line(f"{model.kind}: {model.note}")
    _line(f"Written: {picture} and comparison.json")


def _many(study: Study, sites: int | None, sample: int | None, homes: dict[str, Path]) -> Study:
    """`study` with so many phantom sites in place of its own, of which each round asks `sample`.

    They are small, so no least number of patients is asked of a split. Raises StudyConflict where there are real homes.
    """
    if sites is not None and homes:
        raise StudyConflict("--sites makes phantom sites, and --site names real ones", remedy="Give one of the two.")
    changes: dict[str, Any] = {} if sample is None else {"sample": sample}
    if sites is not None:
        names = [f"site-{number:04d}" for number in range(1, sites + 1)]
        changes |= {"sites": names, "evaluate_only": [], "minimum_patients": 1}
    part = study.participation.model_copy(update=changes)
    return study.model_copy(update={"participation": part, "roster": {}, "aggregator": ""})


def _line(sentence: str) -> None:
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _pair(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise DocumentError(f"--site {text!r} is not NAME=FOLDER", remedy="For example: --site north=/data/north")
    return name, Path(folder)
