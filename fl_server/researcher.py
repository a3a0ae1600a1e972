"""The researcher's folder: keys, and researcher.yaml where a proxy leads out.

HOME/
  keys/             researcher.key (0600), researcher.pem, ca.pem, coordinator.pem, enrolment.json
  researcher.yaml   how the coordinator is reached; without it directly
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from models.study import Document, parse, read
from privacy import calls, keys
from privacy.errors import DocumentError
from privacy.reach import Proxy, Way


class ResearcherFile(Document):
    """researcher.yaml: how this machine reaches the coordinator. Relative paths are relative to the file."""

    version: Literal[1] = Field(default=1, description="version of this file's layout")
    proxy: Proxy | None = Field(default=None, description="the only way out; without it connections are direct")

    @staticmethod
    def path(home: Path) -> Path:
        return home / "researcher.yaml"


def settings_of(home: Path) -> ResearcherFile:
    """What researcher.yaml says; its defaults where there is none. Raises DocumentError."""
    path = ResearcherFile.path(home)
    return read(ResearcherFile, path) if path.exists() else ResearcherFile()


def way_of(home: Path) -> Way | None:
    """The way to the coordinator. Raises what reading the proxy's password raises."""
    proxy = settings_of(home).proxy
    return proxy.way(home) if proxy else None


def join(line: str, home: Path, proxy: Proxy | None = None) -> calls.Enrolment:
    """Join as a researcher. `proxy` is written into researcher.yaml; in one that is there already, it has to stand before."""
    there = settings_of(home)
    if proxy is not None and ResearcherFile.path(home).exists() and there.proxy != proxy:
        raise DocumentError(
            f"{ResearcherFile.path(home)} names {'another' if there.proxy else 'no'} proxy",
            remedy=f"Enter it there:\n{proxy.section()}",
        )
    used = proxy or there.proxy
    enrolment = calls.join(line, home / "keys", "researcher", used.way(home) if used else None)
    if proxy is not None and there.proxy is None:
        text = f"# How this machine reaches the coordinator; written by `fl-study join`.\nversion: 1\n{proxy.section()}"
        parse(ResearcherFile, text, "researcher.yaml")
        keys.write_private(ResearcherFile.path(home), text.encode())
    return enrolment


def open_caller(home: Path) -> calls.Caller:
    """Signed calls of this researcher to the coordinator, by the way that researcher.yaml names."""
    return calls.Caller.open(home / "keys", way=way_of(home))
