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
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from models.documents import YAML_BYTES_MAX, Document, Name, parse, read
from models.questions import Counting
from privacy.errors import DocumentError, PrivacyError, StudyConflict

if TYPE_CHECKING:
    from privacy.accounting import PrivacyEvent, Statement

__all__ = ["PROTECTIONS", "YAML_BYTES_MAX", "Document", "Name", "Point", "Protection", "Study", "parse", "read"]

LABEL = b"isocenter/v1/study"
WARM_UP_ROUNDS = 2  # fresh GroupNorm networks take a full first step badly: half the rate in the first round
NOISED_BINS_MAX = 100  # of a histogram whose every bin gets noise

Point = Annotated[str, StringConstraints(pattern=r"^0[23][0-9a-f]{64}$")]
"""An enrolled P-256 key as `keys.point_hex` writes it."""
Protection = Literal["masked", "sealed", "plain"]
PROTECTIONS: tuple[Protection, ...] = ("masked", "sealed", "plain")
"""From the strongest to the weakest."""
MASKED_SITES_MIN = 3  # in a sum of two, each of the two knows the other's part


class Task(Document):
    """What is predicted: one binary target, or several at once (multi-label). Missing labels are masked, never negative."""

    kind: Literal["classification"] = Field(default="classification", description="what kind of prediction")
    targets: list[Name] = Field(
        min_length=1, max_length=32, description="names of what is predicted; each site maps its own words to them"
    )

    @model_validator(mode="after")
    def _distinct(self) -> "Task":
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("targets must differ from each other")
        return self


def _kind_of_task(given: Any) -> str:
    kind = given.get("kind") if isinstance(given, dict) else getattr(given, "kind", "")
    return "[counting]" if kind == "counting" else "[classification]"


TaskOrQuestions = Annotated[
    Annotated[Task, Tag("[classification]")] | Annotated[Counting, Tag("[counting]")], Discriminator(_kind_of_task)
]


Triple = Annotated[list[float], Field(min_length=3, max_length=3)]
DENSENET_LEAST = 32
VOXELS_MAX = 16_777_216  # of one volume: 256 x 256 x 256; a network in three dimensions trains on far fewer


class Volume(Document):
    """The grid that CT series are resampled to, centred on each: along the body, front to back, right to left.

    Axes are the patient's (slices from the feet upwards), whatever the scanner's table, tilt or plane was. What lies outside a
    series is air.
    """

    spacing_mm: Triple = Field(default=[4.0, 3.0, 3.0], description="millimetres between voxels: along, down, across")
    size: Annotated[list[int], Field(min_length=3, max_length=3)] = Field(
        default=[80, 112, 128], description="voxels: along, down, across"
    )
    window_hu: Annotated[list[float], Field(min_length=2, max_length=2)] = Field(
        default=[-1000.0, 400.0], description="Hounsfield units that become 0 and 1; lungs: -1000 to 400"
    )

    @model_validator(mode="after")
    def _possible(self) -> "Volume":
        if not all(0.25 <= value <= 20 for value in self.spacing_mm):
            raise ValueError("spacing_mm must lie between 0.25 and 20")
        if not all(8 <= value <= 512 for value in self.size) or math.prod(self.size) > VOXELS_MAX:
            raise ValueError(f"size must lie between 8 and 512 on each axis, with at most {VOXELS_MAX} voxels")
        low, high = self.window_hu
        if not -2000 <= low < high <= 10_000:
            raise ValueError("window_hu must be two rising numbers between -2000 and 10000")
        return self


class Images(Document):
    """Which images take part and the grid they are brought to: radiographs float32 (1, size_px, size_px), or CT volumes."""

    modalities: list[Literal["CR", "DX", "CT"]] = Field(
        default=["CR", "DX"], min_length=1, description="DICOM modalities that take part; CT stands alone"
    )
    view: Literal["frontal"] = Field(default="frontal", description="projection of radiographs that takes part")
    size_px: int = Field(
        default=96, ge=32, le=512, description="side of the square grid that radiographs are brought to"
    )
    scaling: Literal["percentiles", "window"] = Field(
        default="percentiles",
        description="what becomes 0 and 1 of a radiograph. percentiles: 0.5 and 99.5 of its values; window: the display that its "
        "file names, else percentiles; windows are a site's taste",
    )
    volume: Volume | None = Field(
        default=None, description="CT only: the grid of voxels and the window; {} for its defaults"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "Images":
        if ("CT" in self.modalities) != (self.volume is not None) or (
            "CT" in self.modalities and len(set(self.modalities)) > 1
        ):
            raise ValueError("modalities: [CT] and volume belong together, and CT takes part alone")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """(1, S, S) of a radiograph, (1, D, H, W) of a volume."""
        return (1, self.size_px, self.size_px) if self.volume is None else (1, *self.volume.size)

    @property
    def words(self) -> str:
        """What takes part, for people."""
        if self.volume is None:
            return f"{self.view} {'/'.join(self.modalities)}, {self.size_px} px"
        size, spacing = (
            " x ".join(f"{value:g}" for value in row) for row in (self.volume.size, self.volume.spacing_mm)
        )
        return f"CT volumes, {size} voxels of {spacing} mm"


class Network(Document):
    """Which network of `models.networks` is trained; none keeps statistics of a batch."""

    name: Literal["small_cnn", "densenet121", "linear"] = Field(
        default="small_cnn",
        description="small_cnn for CPUs; densenet121 (MONAI) for GPUs; linear: for differential privacy with few patients",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of features dropped while training")


class Training(Document):
    """The local loop of one round at one site."""

    rounds: int = Field(ge=1, le=10_000, description="rounds of the whole run")
    local_epochs: int = Field(default=1, ge=1, le=100, description="passes over a site's images in one round")
    batch_size: int = Field(default=16, ge=1, le=1024, description="images in one step")
    optimizer: Literal["sgd", "adamw"] = Field(
        default="adamw", description="optimizer of the local loop; its state starts anew each round"
    )
    learning_rate: float = Field(default=1e-3, gt=0, le=10, description="step size of the first round")
    schedule: Literal["constant", "cosine"] = Field(
        default="cosine", description="the rate over the rounds: the same in all, or falling along half a cosine to 0"
    )
    weight_decay: float = Field(default=1e-4, ge=0, le=1, description="decay of the weights")
    augmentation: Literal["none", "light"] = Field(
        default="light", description="light: small shifts, turns and exposures; never mirrored"
    )
    balance: bool = Field(default=True, description="weigh the two classes of a target equally in the local loss")
    seed: int = Field(
        default=1,
        ge=0,
        lt=2**31,
        description="makes initial weights and every random choice repeatable, but for those of differential privacy",
    )

    def rate(self, round_number: int) -> float:
        """The rate of a whole round (from 1): constant, or falling along half a cosine to almost 0, after a short warm-up."""
        warm = min(1.0, round_number / WARM_UP_ROUNDS)
        if self.schedule == "constant":
            return self.learning_rate * warm
        passed = (round_number - 1) / self.rounds
        return self.learning_rate * warm * (1 + math.cos(math.pi * min(passed, 1.0))) / 2


class Strategy(Document):
    """How what the sites send becomes the next model.

    FedAvg: the mean of their updates, weighted by cases. FedSGD: the mean of their gradients, one step of gradient descent with
    momentum at the coordinator (both McMahan et al. 2017; momentum Hsu et al. 2019).
    """

    name: Literal["fedavg", "fedsgd"] = Field(
        default="fedavg",
        description="fedavg: mean of updates; fedsgd: mean of gradients, for `privacy.mode: distributed`",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of fedsgd's step at the coordinator")


class Privacy(Document):
    """Differential privacy of every patient in training: DP-SGD (Abadi et al. 2016) at each site, noise from each site.

    Patients are drawn by Poisson sampling; the mean loss over a patient's images gives one gradient, clipped to `clip_norm`; the
    sum gets Gaussian noise of `noise_multiplier` times `clip_norm`. Two sets of patients are neighbours if one has one more.
    """

    mode: Literal["local", "distributed"] = Field(
        default="local",
        description="local: several private steps a round, each with the site's full noise; distributed: one step a round, under "
        "masks, so that the noise of all sites protects each patient from the coordinator",
    )
    epsilon: float = Field(
        gt=0,
        le=100,
        description="most ε that this study may spend of any patient, against everybody else combined, spare rounds included",
    )
    delta: float = Field(default=1e-5, gt=0, lt=0.01, description="δ of that ε; below 1 / patients of every site")
    clip_norm: float = Field(gt=0, le=1e6, description="longest gradient of a patient; a longer one is shortened to it")
    noise_multiplier: float | None = Field(
        default=None,
        ge=0.05,
        le=10_000,
        description="standard deviation of a site's noise over clip_norm; `fl-study submit` fills in the least that keeps ε",
    )
    sampling_rate: float = Field(gt=0, le=1, description="chance of each patient of a site to be in a step")
    steps: int = Field(default=1, ge=1, le=10_000, description="private steps in a round; distributed: 1")
    images_per_patient: int = Field(
        default=2, ge=1, le=16, description="images, or differently augmented views, of a patient in a step"
    )
    spare_rounds: int = Field(
        default=2, ge=0, le=10_000, description="rounds that may be trained a second time, after a crash, within ε"
    )
    colluding: int = Field(
        default=1,
        ge=0,
        le=999,
        description="distributed: sites that may work with the coordinator, in what is said of ε",
    )

    figures: Literal["suppressed", "noised"] = Field(
        default="suppressed",
        description="evaluations. suppressed: histograms leave if both classes have 10 images, and are not in ε; noised: only "
        "those of the test split leave, once, with noise of their own",
    )
    figures_epsilon: float = Field(
        default=1.0, gt=0, le=100, description="noised: ε of each test patient at delta, from the figures alone"
    )

    def batch_max(self, patients: int) -> int:
        """Most of `patients` in one step. Eight standard deviations above the expected number: a draw is cut about once in 10**15
        steps, and the site's accounting knows of the cut (truncated Poisson sampling).
        """
        expected = patients * self.sampling_rate
        spread = math.sqrt(expected * (1 - self.sampling_rate))
        return max(1, min(patients, math.ceil(expected + 8 * spread + 8)))


def _kind_of_privacy(given: Any) -> str:
    return "[settings]" if isinstance(given, dict | Privacy) else "[none]"


# With a tag, an error is about what was meant; `_explain` leaves parts of a place with a bracket out.
PrivacyOrNone = Annotated[
    Annotated[Literal["none"], Tag("[none]")] | Annotated[Privacy, Tag("[settings]")], Discriminator(_kind_of_privacy)
]


class Participation(Document):
    """Who takes part. A round needs `quorum` training sites; a site later than `round_timeout_s` is left out, by name."""

    sites: list[Name] = Field(min_length=1, max_length=1000, description="sites that train and evaluate")
    evaluate_only: list[Name] = Field(default=[], max_length=1000, description="sites that evaluate and do not train")
    quorum: int = Field(ge=1, description="training sites whose reports a round needs")
    minimum_patients: int = Field(default=10, ge=1, description="least patients in each split of a site")
    round_timeout_s: int = Field(
        default=3600, ge=5, le=7 * 86400, description="seconds after which a site is left out of a round, by name"
    )


class Evaluation(Document):
    """Splits by patient, and the resolution of the score histograms that leave a site."""

    validation: float = Field(
        default=0.15, ge=0.05, le=0.4, description="share of a site's patients that chooses the round"
    )
    test: float = Field(
        default=0.2, ge=0.05, le=0.5, description="share of a site's patients looked at once, for the report"
    )
    bins: int = Field(default=1000, ge=10, le=10_000, description="bins of the score histograms that leave a site")
    select: Literal["best_validation", "last"] = Field(
        default="best_validation", description="the round whose model is evaluated on the test split and released"
    )
    site_figures: bool = Field(
        default=True,
        description="true: each site releases its own test AUROC, interval and class counts in tens, from 10 images of each on",
    )


COUNTING_SECTIONS: dict[str, Any] = {"training": {"rounds": 1}, "evaluation": {"site_figures": False}}


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
        """A study that counts says nothing of training: these sections are fixed then, and `check` refuses others."""
        task = given.get("task") if isinstance(given, dict) else None
        return COUNTING_SECTIONS | given if isinstance(task, dict) and task.get("kind") == "counting" else given

    @field_validator("title", "purpose")
    @classmethod
    def _readable(cls, text: str, info: ValidationInfo) -> str:
        # Sites read this on a terminal before they approve: no character of it may move or hide what else stands there.
        kept = text.replace("\n", " ") if info.field_name == "purpose" else text
        if any(unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp") for character in kept):
            raise ValueError("expected plain text, without control characters")
        return text

    @property
    def digest(self) -> str:
        """64 hex characters: SHA-256 of the label and the canonical form. The identity of the study everywhere."""
        return hashlib.sha256(LABEL + b"\n" + self.canonical()).hexdigest()

    def canonical(self) -> bytes:
        """UTF-8 JSON with every default written out, keys sorted, no blanks; equal studies give equal bytes."""
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False
        ).encode()

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

    @property
    def learned(self) -> str:
        """Digest of the study without the sites' keys and its protection: seeds follow from it.

        So a study rehearsed on a laptop, and the same one masked or not, make the same random choices.
        """
        same = {"roster": {}, "aggregator": "", "protection": "plain", "encoding_bits": 32}
        return self.model_copy(update=same).digest

    @property
    def all_sites(self) -> list[str]:
        return [*self.participation.sites, *self.participation.evaluate_only]

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
        if self.network.name == "densenet121" and min(self.images.shape[1:]) < DENSENET_LEAST:
            found.append(f"network: densenet121 halves images five times and needs {DENSENET_LEAST} on each axis")
        if self.roster and set(self.roster) != set(self.all_sites):
            found.append("the roster has keys of other sites than participation names")
        found += self.counting_conflicts() if isinstance(self.task, Counting) else self.private_conflicts()
        if found:
            raise StudyConflict("; ".join(found))

    def counting_conflicts(self) -> list[str]:
        """One sentence for each setting under which questions are not asked; a site asks as well before it answers."""
        fixed = {
            "images": Images(),
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
