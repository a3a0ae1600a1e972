"""The site: what site.yaml says. (The gate, approvals and journal are added below by the same module.)"""

from pathlib import Path

from pydantic import Field

from models.labels import LabelMap
from models.study import Document, Name


class Coordinator(Document):
    """Where the consortium is; written by `fl-client join`."""

    gateway: str = Field(pattern=r"^[^\s:]+:\d+$")
    service: str = Field(pattern=r"^[^\s:]+:\d+$")


class Source(Document):
    """Where the site's images are and what they are called there."""

    name: Name = "chest"
    folder: str = Field(min_length=1, description="folder with the images; searched with everything below it")
    format: str = Field(default="dicom", pattern="^(dicom|pictures)$")
    labels: LabelMap
    longest_side_px: int = Field(default=1024, ge=64, le=4096, description="cached images are reduced to this, never enlarged")


class Policy(Document):
    """What this site permits. A study can only be stricter."""

    permit_plain: bool = False
    minimum_patients: int = Field(default=10, ge=1)
    maximum_rounds: int = Field(default=1000, ge=1)


class Resources(Document):
    """What training may use of this machine. 0 threads: all cores."""

    cpu_threads: int = Field(default=0, ge=0, le=1024)


class SiteFile(Document):
    """site.yaml: owned by the hospital, never leaves it. Relative paths are relative to the file."""

    version: int = Field(ge=1, le=1)
    site: Name
    coordinator: Coordinator | None = None
    data: Source | None = None
    policy: Policy = Policy()
    resources: Resources = Resources()

    @staticmethod
    def path(home: Path) -> Path:
        return home / "site.yaml"
