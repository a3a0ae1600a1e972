"""`fl-server weights`: the files that studies may start from; and what `fl-study check --weights` says of one."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fl_server import weights
from fl_server.roster import Home
from models.questions import Counting
from models.study import Study
from privacy import screen
from privacy.errors import StudyConflict

if TYPE_CHECKING:
    from models.weights import Verdict

SHOWN = 5  # names of tensors in one line

app = typer.Typer(help="Keep the files of weights that studies start from.", no_args_is_help=True)

HomeOption = Annotated[
    Path, typer.Option("--home", "-H", help="Folder of the consortium. Default: the current folder.")
]


@app.command()
def add(
    file: Annotated[Path, typer.Argument(help="A safetensors file, or a .pt or .pth of tensors alone.")],
    home: HomeOption = Path(),
) -> None:
    """Keep a copy of a file of weights; studies name it by the SHA-256 that is printed."""
    opened = Home.open(home)
    with screen.busy("reading the weights"):
        kept = weights.add(opened.root, file)
    opened.journal.append("weights-added", sha256=kept.sha256, bytes=kept.bytes)
    # The hash alone on stdout, so that it can be piped.
    typer.echo(kept.sha256)
    typer.echo(f"Studies start from it with network: {{initial: {{sha256: {kept.sha256}}}}}", err=True)


@app.command("list")
def list_(
    home: HomeOption = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """List the files of weights by hash and size."""
    found = weights.held(Home.open(home).root)
    if as_json:
        typer.echo(json.dumps({"weights": [kept._asdict() for kept in found]}, indent=2))
        return
    for kept in found:
        typer.echo(f"{kept.sha256}  {kept.bytes / 2**20:.1f} MiB")
    if not found:
        typer.echo("No weights yet: fl-server weights add FILE")


def judged(study: Study, file: Path) -> "Verdict":
    """Whether `study` can start from `file`. Raises StudyConflict for a study without a network."""
    from models.weights import judge  # torch takes two seconds to load, and few commands here need it

    if isinstance(study.task, Counting):
        raise StudyConflict("a study that counts has no network", remedy="Leave --weights out.")
    return judge(study, file)


def lines_of(study: Study, verdict: "Verdict") -> list[str]:
    """What a person reads of a verdict; of long lists of names the beginning, `--json` has all."""
    fit = verdict.fit
    lines = [f"SHA-256 {verdict.sha256}", fit.sentence]
    other = [
        f"{name} ({_shape(file)}, the network has {_shape(here)})" for name, (file, here) in verdict.shapes.items()
    ]
    absent = [name for name in fit.fresh if name not in verdict.shapes]
    groups = (("of another shape", other), ("not in the file, so made by the seed", absent), ("left out", [*fit.left]))
    lines += [f"{what}: {_beginning(names)}" for what, names in groups if names]
    if verdict.problem is not None:
        lines.append(f"They do not fit: {verdict.problem}")
    elif study.network.initial is None:
        lines.append(f"They fit. To start from them: network: {{initial: {{sha256: {verdict.sha256}}}}}")
    else:
        lines.append("They fit, and are those that the study names.")
    return lines


def _beginning(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
