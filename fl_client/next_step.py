"""`fl-client` alone: what a hospital does next, from what stands in its folder; nobody is asked, and nothing is changed."""

import fcntl
from pathlib import Path

from fl_client.consent import consents
from fl_client.site import Site, SiteFile
from privacy.errors import IsocenterError


def steps(home: Path) -> list[str]:  # noqa: PLR0911  each return is one state
    """One or two sentences, each with the command that it is about."""
    if not SiteFile.path(home).is_file():
        return [
            "This folder is no site yet. Join with the line that your coordinator sent: fl-client join LINE",
            "If the site lies elsewhere, go to its folder, or name it: fl-client check --home FOLDER",
        ]
    try:
        settings = Site.settings_of(home)
        approved = [one.offer for one in consents(home) if one.statement.decision == "approved"]
    except IsocenterError as error:
        return [f"{error}", error.remedy]
    name = settings.site
    if settings.coordinator is None or not (home / "keys" / "site.pem").is_file():
        return [f"Site {name} has no certificate yet. Run again the line of your invitation: fl-client join LINE"]
    if settings.data is None:
        return [f"Site {name} has joined. Describe your images below `data` in site.yaml, then run: fl-client ingest"]
    if not (home / "state" / "index.sqlite").is_file():
        return [f"Site {name} has described its images. Read them: fl-client ingest"]
    if not approved:
        return [
            f"Site {name} has read its images. See whether all is well: fl-client check",
            "See what you are asked to take part in, and decide: fl-client studies",
        ]
    if not running(home):
        return [f"Site {name} approved {_studies(len(approved))}, and its node is not running: fl-client start"]
    return [f"The node of site {name} is running. What it sent: fl-client egress. New studies: fl-client studies"]


def running(home: Path) -> bool:
    """Whether a node of this site holds its lock."""
    try:
        with (home / "state" / "node.lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _studies(count: int) -> str:
    return "a study" if count == 1 else f"{count} studies"
