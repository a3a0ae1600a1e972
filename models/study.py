"""The study protocol: one strict YAML document that says what is trained, on what, by whom, and what leaves a site.

A `Study` is immutable. Its SHA-256 over a canonical form (`digest`) is its identity in every order, checkpoint, journal line
and report, so two studies that differ in one number are two studies. A study may also ask questions in numbers
(`models.questions`): then nothing is trained, and they are under the same signatures, approvals and masks as everything else.
"""

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from models import conflicts, covariates
from models.covariates import COVARIATES_MAX, Covariate
from models.documents import YAML_BYTES_MAX, Document, Name, parse, read
from models.questions import Counting
from models.sections import (
    MASKED_SITES_MIN,
    NOISED_BINS_MAX,
    PROTECTIONS,
    Evaluation,
    Images,
    Network,
    Participation,
    Point,
    Privacy,
    PrivacyOrNone,
    Protection,
    Regression,
    Relation,
    Segmentation,
    Strategy,
    Task,
    TaskOrQuestions,
    Training,
    Volume,
)
from privacy.errors import DocumentError, PrivacyError, StudyConflict

if TYPE_CHECKING:
    from privacy.accounting import PrivacyEvent, Statement

__all__ = [
    "MASKED_SITES_MIN", "PROTECTIONS", "YAML_BYTES_MAX", "Document", "Evaluation", "Images", "Name", "Network",
    "Participation", "Point", "Privacy", "Protection", "Regression", "Strategy", "Study", "Task", "Training", "Volume", "parse",
    "read",
]  # fmt: skip

LABEL = b"isocenter/v1/study"
DRAW = "isocenter/v1/sample"
COUNTING_SECTIONS: dict[str, Any] = {"training": {"rounds": 1}, "evaluation": {"site_figures": False}}
SEGMENTATION_TRAINING: dict[str, Any] = {"balance": False}  # the loss of masks has no classes to balance


class Study(Document):
    """One study protocol.

    `protection` says what the coordinator can see of a site's update: nothing but its part in a sum (masked), or the update
    itself (sealed: the coordinator alone; plain: whoever reads the coordinator's traffic as well); the latter two must be
    permitted by each site's policy. `roster` and `aggregator` name the keys of who takes part. Researchers leave them out:
    `fl-study submit` fills them in before the study is signed, so they are part of what sites approve.
    """

    version: Literal[1] = Field(default=1, description="version of this file's layout")
    name: Name = Field(description="short name of the study")
    title: str = Field(min_length=1, max_length=200, description="title of the report")
    purpose: str = Field(min_length=1, max_length=2000, description="what sites read before they approve")
    task: TaskOrQuestions = Field(description="what is predicted; or, with `kind: counting`, questions in numbers")
    images: Images = Images()
    covariates: dict[Name, Covariate] = Field(
        default={},
        exclude_if=lambda value: not value,
        max_length=COVARIATES_MAX,
        description="what is learned from beside the image: age, sex, and numbers that sites name in data.labels.numbers",
    )
    network: Network = Network()
    training: Training
    strategy: Strategy = Strategy()
    protection: Protection = Field(
        default="masked",
        description="masked: the coordinator sees sums only; sealed: it alone sees each site's update; plain: unprotected",
    )
    encoding_bits: Literal[16, 24, 32, 64] = Field(
        default=32, description="bits that one weight of an update takes on its way; fewer are faster and less exact"
    )
    privacy: PrivacyOrNone = Field(
        description="none: no differential privacy; otherwise the settings of differential privacy, for each patient"
    )
    participation: Participation
    evaluation: Evaluation = Evaluation()
    roster: dict[Name, Point] = Field(
        default={}, max_length=1000, description="enrolled keys of the sites; filled in by `fl-study submit`"
    )
    aggregator: str = Field(
        default="",
        pattern=r"^([0-9a-f]{64})?$",
        description="X25519 key that sealed updates are encrypted to; filled in by `fl-study submit`",
    )

    @model_validator(mode="before")
    @classmethod
    def _sections_of_questions(cls, given: Any) -> Any:
        """What a kind of task has no use for is fixed: of a study that counts, whole sections; `check` refuses others."""
        task = given.get("task") if isinstance(given, dict) else None
        kind = task.get("kind") if isinstance(task, dict) else None
        if kind == "segmentation" and isinstance(given.get("training"), dict):
            return given | {"training": SEGMENTATION_TRAINING | given["training"]}
        return COUNTING_SECTIONS | given if kind == "counting" else given

    @field_validator("covariates", mode="before")
    @classmethod
    def _known_covariates(cls, given: Any) -> Any:
        return covariates.filled_in(given)

    @field_validator("title", "purpose")
    @classmethod
    def _readable(cls, text: str, info: ValidationInfo) -> str:
        # Sites read this on a terminal before they approve: no character of it may move or hide what else stands there.
        kept = text.replace("\n", " ") if info.field_name == "purpose" else text
        if any(unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp") for character in kept):
            raise ValueError("expected plain text, without control characters")
        return text

    @cached_property
    def digest(self) -> str:
        """64 hex characters: SHA-256 of the label and the canonical form. The identity of the study everywhere."""
        return hashlib.sha256(LABEL + b"\n" + self.canonical()).hexdigest()

    def canonical(self) -> bytes:
        """UTF-8 JSON with every default written out, keys sorted, no blanks; equal studies give equal bytes."""
        return self._canonical

    @cached_property
    def _canonical(self) -> bytes:
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False
        ).encode()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A study with other settings; what was derived from this one's is not taken over."""
        copied = super().model_copy(update=update, deep=deep)
        for derived in ("digest", "learned", "_canonical"):
            copied.__dict__.pop(derived, None)
        return copied

    @classmethod
    def from_canonical(cls, text: bytes) -> "Study":
        """The study behind `canonical()`; raises DocumentError if `text` is anything else, even another spelling of it."""
        try:
            study = cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            raise DocumentError(f"this is no study: {error.errors()[0]['msg']}") from None
        if study.canonical() != text:
            raise DocumentError("this study is not in its canonical form")
        return study

    def with_keys(self, roster: Mapping[str, str], aggregator: str) -> "Study":
        """This study with the keys of everyone in it; `roster` may hold more sites than the study names.

        Raises StudyConflict if a site of the study is not in `roster`.
        """
        if missing := [site for site in self.all_sites if site not in roster]:
            raise StudyConflict(
                f"not enrolled in the consortium: {', '.join(missing)}",
                remedy="Correct the names in the study's participation, or have the sites invited first.",
            )
        facts = self.model_dump(mode="json") | {
            "roster": {site: roster[site] for site in sorted(self.all_sites)},
            "aggregator": aggregator,
        }
        return Study.model_validate(facts)

    def with_noise(self) -> "Study":
        """This study with the least noise that keeps its ε, if it does not say how much. Raises PrivacyError if none does."""
        if self.privacy == "none" or self.privacy.noise_multiplier is not None:
            return self
        from privacy import accounting  # scipy takes a second to load, and most commands need no ε

        plan = self.privacy
        noise = accounting.noise_for(
            plan.epsilon, plan.delta, sampling_rate=plan.sampling_rate, steps=plan.steps * self.budgeted_rounds
        )
        return self.model_copy(update={"privacy": plan.model_copy(update={"noise_multiplier": noise})})

    @property
    def budgeted_rounds(self) -> int:
        """Rounds of training that ε has room for: those of the run, and spare ones."""
        return self.training.rounds + (0 if self.privacy == "none" else self.privacy.spare_rounds)

    @cached_property
    def learned(self) -> str:
        """Digest of the study without the sites' keys and its protection: seeds follow from it.

        So a study rehearsed on a laptop, and the same one masked or not, make the same random choices.
        """
        same = {"roster": {}, "aggregator": "", "protection": "plain", "encoding_bits": 32}
        return self.model_copy(update=same).digest

    @property
    def relation(self) -> Relation:
        """How the targets hang together; those of questions do not."""
        return self.task.relation if isinstance(self.task, Task) else "independent"

    @property
    def predicts(self) -> str:
        """The targets and how they hang together, for people."""
        if isinstance(self.task, Regression):
            low, high = self.task.range
            return f"{self.task.targets[0]} (a number, {low:g} to {high:g} {self.task.unit})"
        how = {"independent": "", "exclusive": " (one of them holds)", "ordered": " (each at least this grade)"}
        what = "outlines of " if self.segments else ""
        return what + ", ".join(self.task.targets) + how[self.relation]

    @property
    def segments(self) -> bool:
        """Whether structures are outlined, so that the reference standard are masks."""
        return isinstance(self.task, Segmentation)

    @property
    def learns_from(self) -> str:
        """Images and covariates, for people."""
        return "; ".join([self.images.words, *covariates.words(self.covariates)])

    @property
    def all_sites(self) -> list[str]:
        return [*self.participation.sites, *self.participation.evaluate_only]

    @property
    def sum_sites(self) -> int:
        """The most training sites that one sum has."""
        return min(self.participation.sample or len(self.participation.sites), len(self.participation.sites))

    def asked(self, occasion: int) -> list[str]:
        """Training sites that round `occasion` (from 1) asks: all, or `participation.sample` of them, in the study's order.

        0 is the test, and one more than the rounds the validation of the last model. Who is drawn follows from what the study
        learns and from the occasion alone, so a resumed run, a masked one and a rehearsal ask the same sites, and each site
        can check it. The draw is public: nothing of a study's privacy rests on it.
        """
        part = self.participation
        if part.sample is None or part.sample >= len(part.sites):
            return list(part.sites)
        seed = f"{DRAW}\n{self.learned}\n{occasion}\n"
        ranked = sorted(part.sites, key=lambda site: hashlib.sha256(f"{seed}{site}".encode()).digest())
        drawn = {*ranked[: part.sample]}
        return [site for site in part.sites if site in drawn]

    @property
    def tested(self) -> list[str]:
        """Sites that the test asks: the training sites drawn for it, and all that only evaluate."""
        return [*self.asked(0), *self.participation.evaluate_only]

    def check(self) -> None:
        """Raise StudyConflict with one sentence for each contradiction between settings."""
        part, split = self.participation, self.evaluation
        found = []
        if len(set(self.all_sites)) != len(self.all_sites):
            found.append("a site is named twice in participation (sites, evaluate_only)")
        if part.quorum > len(part.sites):
            found.append(
                f"quorum {part.quorum} is more than the {len(part.sites)} training sites, so no round could end"
            )
        if split.validation + split.test > 0.8:
            found.append(
                "validation and test together take more than 80 % of the patients, which leaves too few to train on"
            )
        if self.protection == "masked" and min(len(part.sites), part.quorum) < MASKED_SITES_MIN:
            found.append(
                f"protection: masked needs {MASKED_SITES_MIN} training sites and a quorum of {MASKED_SITES_MIN}: in a sum "
                "of two, each knows the other's update"
            )
        if self.roster and set(self.roster) != set(self.all_sites):
            found.append("the roster has keys of other sites than participation names")
        found += conflicts.of(self)
        found += self.counting_conflicts() if isinstance(self.task, Counting) else self.private_conflicts()
        if found:
            raise StudyConflict("; ".join(found))

    def counting_conflicts(self) -> list[str]:
        """One sentence for each setting under which questions are not asked; a site asks as well before it answers."""
        fixed = {
            "images": Images(),
            "covariates": {},
            "network": Network(),
            "training": Training.model_validate(COUNTING_SECTIONS["training"]),
            "strategy": Strategy(),
            "evaluation": Evaluation.model_validate(COUNTING_SECTIONS["evaluation"]),
            "encoding_bits": 32,
        }
        found = [
            f"{name} has no meaning in a study that counts; leave it out"
            for name, value in fixed.items()
            if getattr(self, name) != value
        ]
        if self.participation.evaluate_only:
            found.append("participation.evaluate_only has no meaning in a study that counts: name all sites in `sites`")
        if self.protection != "masked" or self.participation.quorum < MASKED_SITES_MIN:
            found.append(f"numbers leave in masked sums of {MASKED_SITES_MIN} sites or more, never of one site")
        if self.privacy != "none":
            found.append("privacy has to be none: numbers are rounded down to tens, and no ε covers them")
        return found

    def private_conflicts(self) -> list[str]:
        """One sentence for each setting that breaks the promise of `privacy`, or that it has no use for."""
        plan, found = self.privacy, []
        if plan == "none":
            return ["strategy: fedsgd is for privacy.mode: distributed"] if self.strategy.name == "fedsgd" else []
        if self.training.balance:
            found.append(
                "training.balance: true weighs by a site's class counts, which are data of its patients; say false with privacy"
            )
        if (plan.mode == "distributed") != (self.strategy.name == "fedsgd"):
            found.append("privacy.mode: distributed and strategy: fedsgd belong together")
        if plan.mode == "distributed":
            found += self._distributed_conflicts(plan)
        if plan.figures == "noised":
            found += self._noised_conflicts()
        if plan.noise_multiplier is not None and not found:
            spent = self.spends(self.budgeted_rounds)
            if spent > plan.epsilon:
                found.append(
                    f"noise_multiplier {plan.noise_multiplier:g} spends an ε of {spent:.3f} over {self.budgeted_rounds} rounds, "
                    f"more than privacy.epsilon {plan.epsilon:g}; leave it out to have it filled in"
                )
        return found

    def _distributed_conflicts(self, plan: Privacy) -> list[str]:
        found = []
        if plan.steps != 1:
            found.append(
                "privacy.mode: distributed takes one step a round: with several, the noise of other sites protects nobody"
            )
        if self.protection != "masked":
            found.append(
                "privacy.mode: distributed needs protection: masked, or each site's share of the noise stands alone"
            )
        if self.encoding_bits < 32:
            found.append("privacy.mode: distributed needs encoding_bits of 32 or 64, so that noise keeps its shape")
        if self.participation.quorum <= plan.colluding:
            found.append("privacy.colluding leaves no honest site in a sum of the quorum")
        return found

    def _noised_conflicts(self) -> list[str]:
        split, found = self.evaluation, []
        if split.select != "last":
            found.append("privacy.figures: noised tells nothing of validation, so evaluation.select has to be last")
        if split.site_figures:
            found.append("privacy.figures: noised and evaluation.site_figures: true, which releases exact figures")
        if split.bins > NOISED_BINS_MAX:
            found.append(
                f"privacy.figures: noised with {split.bins} bins: each gets noise, so {NOISED_BINS_MAX} are the most"
            )
        return found

    def spends(self, rounds: int) -> float:
        """ε at the study's own δ after so many rounds of training, against everybody else combined; 0 without privacy."""
        from privacy import accounting

        if self.privacy == "none":
            return 0.0
        return accounting.epsilon([self.event(rounds)], self.privacy.delta, fine=True)

    def event(self, rounds: int) -> "PrivacyEvent":
        """What `rounds` rounds of training do to the patients of a site. Raises PrivacyError if there is no noise yet."""
        from privacy.accounting import PrivacyEvent

        if self.privacy == "none" or self.privacy.noise_multiplier is None:
            raise PrivacyError("the study says nothing of its noise; `fl-study submit` fills it in")
        plan = self.privacy
        return PrivacyEvent(plan.noise_multiplier or 0.0, plan.sampling_rate, plan.steps * rounds)

    def statements(self) -> "list[Statement]":
        """What can be said of a patient after the whole study, spare rounds included, tier by tier; none without privacy.

        Raises PrivacyError if there is no noise yet.
        """
        from privacy import accounting

        if self.privacy == "none":
            return []
        plan, part = self.privacy, self.participation
        figures = self.figures_event()
        shared = accounting.Sites(len(part.sites), part.quorum, plan.colluding) if plan.mode == "distributed" else None
        found = accounting.statements(self.event(self.budgeted_rounds), plan.delta, shared)
        return found if figures is None else [*found, accounting.figures_statement(figures, plan.delta)]

    def figures_event(self) -> "PrivacyEvent | None":
        """What the noised release of test figures does to the patients of the test split; None if there is none."""
        from privacy import accounting

        plan = self.privacy
        if plan == "none" or plan.figures == "suppressed":
            return None
        noise = accounting.noise_for(plan.figures_epsilon, plan.delta, sampling_rate=1.0, steps=1)
        return accounting.PrivacyEvent(noise, 1.0, 1)

    @property
    def figures_deviation(self) -> float:
        """Standard deviation of a site's noise on each count of its test figures; 0 if they have none.

        A patient adds at most `images_per_patient` images to the counts of each target: their L2 norm is at most that times the
        root of the number of targets, with all of them in one bin.
        """
        event, plan = self.figures_event(), self.privacy
        if event is None or plan == "none":
            return 0.0
        return event.noise_multiplier * plan.images_per_patient * math.sqrt(len(self.task.targets))
