"""What a hospital permits: the policy of site.yaml, its hours, and the rules by which a study is approved without asking.

`broken` is the whole policy about a study, one sentence for each rule that it breaks. Only `Site.admit` and those who ask on a
person's behalf (`fl-client approve`, `fl_client.rules`) call it; nothing else in this package decides what is permitted.
"""

import datetime as dt
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from models.sections import NETWORKS, NetworkName
from models.study import PROTECTIONS, Document, Name, Protection, Study
from privacy import disk, keys
from privacy.errors import DocumentError, NewerVersion

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
TaskKind = Literal["classification", "regression", "segmentation", "counting"]
PAUSE_VERSION = 1  # of paused.json
SECONDS_MOST = 2**36  # of a moment that can be shown, in the year 4147; what is beyond is no time


def _minutes(text: str) -> int:
    hours, minutes = text.split(":")
    return int(hours) * 60 + int(minutes)


class Hours(Document):
    """When orders may be worked on, in the local time of this machine. An end before the begin is on the next day."""

    days: list[Day] = Field(default=list(DAYS), min_length=1, description="days on which work may begin")
    begin: str = Field(default="00:00", description="first minute, such as 19:00")
    end: str = Field(default="24:00", description="first minute that is too late, such as 06:30; 24:00 is midnight")

    @field_validator("begin", "end", mode="before")
    @classmethod
    def _time(cls, given: object, info: ValidationInfo) -> object:
        # YAML reads 19:00 without quotation marks as 1140, and 20 may mean an hour: a number is never guessed at.
        midnight = "|24:00" if info.field_name == "end" else ""
        if not isinstance(given, str) or not re.fullmatch(rf"([01]?\d|2[0-3]):[0-5]\d{midnight}", given):
            raise ValueError('expected a time of day in quotation marks, such as "19:00"')
        return given

    @model_validator(mode="after")
    def _not_empty(self) -> "Hours":
        if _minutes(self.begin) == _minutes(self.end):
            raise ValueError("begin and end are the same minute, so no work could ever be done")
        return self

    def permit(self, moment: dt.datetime) -> bool:
        """Whether work may be done at `moment`, a local time."""
        now, today = moment.hour * 60 + moment.minute, DAYS[moment.weekday()]
        yesterday, begin, end = DAYS[moment.weekday() - 1], _minutes(self.begin), _minutes(self.end)
        if begin < end:
            return today in self.days and begin <= now < end
        return (today in self.days and now >= begin) or (yesterday in self.days and now < end)

    def __str__(self) -> str:
        return f"{'/'.join(self.days)} from {self.begin} to {self.end}"


class Policy(Document):
    """What this site permits. A study can only be stricter."""

    least_protection: Protection = Field(
        default="masked", description="the least protection of this site's updates that a study may have"
    )
    minimum_patients: int = Field(
        default=10, ge=1, description="least patients in each split; a study may ask for more"
    )
    maximum_rounds: int = Field(default=1000, ge=1, description="most rounds of a study")
    tasks: list[TaskKind] = Field(
        default=["classification"],
        description="kinds of task that are permitted; regression: a number is predicted; segmentation: structures are outlined, "
        "with `data.masks`; counting: numbers of patients in tens, in masked sums only",
    )
    networks: list[NetworkName] = Field(default=list(NETWORKS), description="networks that may be trained here")
    targets: list[Name] = Field(
        default=[], description="targets that may be learned; none listed: whatever `data` maps labels for"
    )
    data_sets: list[Name] = Field(
        default=[], description="collections, by `data.name`, that studies may use; none listed: the one in `data`"
    )
    hours: Hours = Field(default=Hours(), description="when orders may be worked on")
    epsilon_per_study: float = Field(
        default=8, gt=0, le=1000, description="most ε that one study may spend of any patient here"
    )
    epsilon_per_year: float = Field(
        default=10, gt=0, le=1000, description="most ε that all studies together may spend of any patient in 365 days"
    )
    epsilon_total: float = Field(
        default=20, gt=0, le=1000, description="most ε that all studies together may spend of any patient, for ever"
    )
    delta: float = Field(
        default=1e-5, gt=0, lt=0.01, description="δ at which these ε are counted; below 1 / patients of this site"
    )
    permit_without_privacy: bool = Field(
        default=False,
        description="whether studies without differential privacy may train here; no ε covers what they reveal",
    )


class Rule(Document):
    """Studies that are approved without asking. All of it has to hold, and the policy as well."""

    researchers: list[Name] = Field(min_length=1, description="who may have submitted the study")
    networks: list[NetworkName] = Field(default=list(NETWORKS), description="networks that it may train")
    targets: list[Name] = Field(default=[], description="targets that it may learn; none listed: any that is permitted")
    protection: Literal["masked"] = Field(
        default="masked", description="its protection; nothing less is approved by rule"
    )
    epsilon: float = Field(gt=0, le=1000, description="most ε that it may spend of any patient here")
    rounds: int = Field(ge=1, le=10_000, description="most rounds")
    minimum_sites: int = Field(default=3, ge=3, description="least training sites that each of its sums needs")
    until: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$", description="last day on which this rule approves, 2027-01-31")

    @field_validator("until")
    @classmethod
    def _day(cls, text: str) -> str:
        dt.date.fromisoformat(text)
        return text


def broken(policy: Policy, study: Study, name: str, data_set: str) -> list[str]:
    """One sentence for each rule of `policy` that `study` breaks at site `name`, whose images are the collection `data_set`."""
    found = []
    if PROTECTIONS.index(study.protection) > PROTECTIONS.index(policy.least_protection):
        too = ", and so would whoever can look into its server" if study.protection == "plain" else ""
        found.append(
            f"protection: {study.protection}: the coordinator would see this site's own model update, not only a sum "
            f"over sites{too}; policy.least_protection in site.yaml is {policy.least_protection}"
        )
    if study.training.rounds > policy.maximum_rounds:
        found.append(f"{study.training.rounds} rounds are more than policy.maximum_rounds ({policy.maximum_rounds})")
    if study.task.kind not in policy.tasks:
        found.append(f"the task {study.task.kind} is not among policy.tasks ({', '.join(policy.tasks)})")
    if study.task.kind != "counting" and study.network.name not in policy.networks:
        found.append(f"the network {study.network.name} is not among policy.networks ({', '.join(policy.networks)})")
    if policy.targets and (other := [target for target in study.task.targets if target not in policy.targets]):
        found.append(f"{', '.join(other)} may not be learned here: policy.targets lists {', '.join(policy.targets)}")
    if policy.data_sets and data_set not in policy.data_sets:
        found.append(f"the collection {data_set} is not among policy.data_sets")
    return found + _broken_privacy(policy, study, name)


def _broken_privacy(policy: Policy, study: Study, name: str) -> list[str]:
    """What `study` says or leaves out about differential privacy, held against site.yaml and against itself."""
    plan = study.privacy
    if study.task.kind == "counting":
        return study.counting_conflicts()
    if name not in study.participation.sites:
        return []  # nothing is trained on its patients
    if plan == "none":
        sentence = (
            "privacy: none: nothing bounds what the model reveals of a patient; policy.permit_without_privacy in site.yaml "
            "is false"
        )
        return [] if policy.permit_without_privacy else [sentence]
    if plan.noise_multiplier is None:
        return ["privacy has no noise_multiplier, so nothing can be said of its ε"]
    found, spends = study.private_conflicts(), epsilon_of(study, policy.delta)
    if spends > policy.epsilon_per_study:
        found.append(
            f"the study spends an ε of {spends:.2f} of a patient at δ = {policy.delta:g}, and policy.epsilon_per_study in "
            f"site.yaml is {policy.epsilon_per_study:g}"
        )
    return found


def epsilon_of(study: Study, delta: float) -> float:
    """The ε that a private study spends of a patient in all of its rounds, the spare ones included."""
    from privacy import accounting  # its mathematics takes a second to load

    return accounting.epsilon([study.event(study.budgeted_rounds)], delta)


def epsilon_of_figures(study: Study, delta: float) -> float:
    """The ε that a noised release of test figures spends of a patient of the test split; 0 without one."""
    from privacy import accounting

    event = study.figures_event()
    return 0.0 if event is None else accounting.epsilon([event], delta)


# Pause ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pause:
    """A site that takes no new work, of all studies or of one, until a moment or until it is told to resume."""

    since_s: float
    until_s: float | None

    @staticmethod
    def path(home: Path, digest: str = "") -> Path:
        """The file of the pause of the study `digest`, which a person's decision put there; without it, of all studies."""
        return home / "studies" / f"{digest}.paused.json" if digest else home / "paused.json"

    @classmethod
    def open(cls, home: Path, now_s: float, digest: str = "") -> "Pause | None":
        """The pause that holds at `now_s`, None if there is none. Raises DocumentError for a damaged file: no work."""
        path = cls.path(home, digest)
        try:
            found = json.loads(path.read_bytes())
            disk.require_known(path, found.get("version"), PAUSE_VERSION)
            pause = cls(float(found["since_s"]), None if found["until_s"] is None else float(found["until_s"]))
            if not 0 <= (pause.until_s or 0) <= SECONDS_MOST:  # nor what is not a number
                raise ValueError("no time")
        except FileNotFoundError:
            return None
        except NewerVersion:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            raise DocumentError(
                f"{path} is damaged, so this site does no work" + (" for this study" if digest else ""),
                remedy=f"Run `fl-client resume{f' {digest[:12]}' if digest else ''}`, or pause it anew.",
            ) from None
        return None if pause.until_s is not None and now_s >= pause.until_s else pause

    def store(self, home: Path, digest: str = "") -> None:
        content = {"version": PAUSE_VERSION, "since_s": self.since_s, "until_s": self.until_s}
        keys.write_private(self.path(home, digest), json.dumps(content).encode())

    def __str__(self) -> str:
        if self.until_s is None:
            return "paused until `fl-client resume`"
        return f"paused until {dt.datetime.fromtimestamp(self.until_s).astimezone():%Y-%m-%d %H:%M %Z}"
