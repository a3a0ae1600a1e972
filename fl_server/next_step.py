"""`fl-server` and `fl-study` alone: what comes next, from what stands in the folder; nobody is asked, and nothing is changed."""

import socket
from pathlib import Path

from fl_server.roster import Home
from fl_server.run import list_runs
from privacy.errors import IsocenterError

LOOK_S = 0.5


def coordinator(root: Path) -> list[str]:  # noqa: PLR0911  each return is one state
    """One or two sentences, each with the command that it is about."""
    if not (root / "server.yaml").is_file():
        return [
            "There is no consortium in this folder. Found one: fl-server init FOLDER --host NAME",
            "If yours lies elsewhere, go to its folder, or name it: fl-server start --home FOLDER",
        ]
    try:
        home = Home.open(root)
        sites, invited = home.roster.sites(), home.roster.invitations()
        runs = list_runs(home.runs)
    except IsocenterError as error:
        return [f"{error}", error.remedy]
    name = home.settings.name
    if not serving(home):
        return [f"Consortium {name} is not being served, so nobody can join or train: fl-server start"]
    if not sites and not invited:
        return [f"Consortium {name} is being served, and nobody is in it yet. Invite a hospital: fl-server invite NAME"]
    if not sites:
        names = ", ".join(sorted(each.name for each in invited))
        return [f"Consortium {name} waits for {names} to join. Who is here: fl-server sites"]
    if not home.roster.researchers():
        return [
            f"Consortium {name}: {_counted(len(sites), 'hospital')}, and nobody who writes studies. Invite a researcher: "
            "fl-server invite NAME --researcher"
        ]
    waiting = sum(run["state"] in ("queued", "running") for run in runs)
    return [
        f"Consortium {name}: {_counted(len(sites), 'hospital')}, {_counted(len(runs), 'run')}, {waiting} of them not ended. "
        "What they do: fl-server runs. In a browser: fl-server dashboard"
    ]


def serving(home: Home) -> bool:
    """Whether something answers on this machine where the consortium service listens."""
    where = "127.0.0.1" if home.settings.listen == "0.0.0.0" else home.settings.listen  # noqa: S104  it is compared
    try:
        with socket.create_connection((where, home.settings.service_port), LOOK_S):
            return True
    except OSError:
        return False


def researcher(folder: Path) -> list[str]:
    """The same for whoever writes studies."""
    written = sorted(path.name for path in folder.glob("*.yaml") if _is_study(path))
    joined = (folder / "keys" / "researcher.pem").is_file()
    if not written and not joined:
        return [
            "There is no study in this folder. Write one: fl-study new study.yaml --template phantoms",
            "It can be rehearsed at once, without a hospital: fl-study simulate study.yaml",
        ]
    if not written:
        return ["You have joined a consortium. Write a study: fl-study new study.yaml"]
    first = written[0]
    if not joined:
        return [
            f"Check the study and rehearse it on phantoms: fl-study check {first}, then fl-study simulate {first}",
            "To run it at hospitals, join with the line that the coordinator sent: fl-study join LINE",
        ]
    return [
        f"Offer the study to its sites: fl-study submit {first}",
        "What you handed in, who approved it, and its runs: fl-study studies",
    ]


def _is_study(path: Path) -> bool:
    """By its first key; whether it is a good one, `fl-study check` says."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return any(line.startswith("participation:") for line in text.splitlines())


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
