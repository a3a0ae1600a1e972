"""The sections of a study protocol: what is predicted, from which images, by which network, how it is trained and measured.

`models.study` puts them together, gives the whole its digest, and refuses settings that contradict each other.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator

from models.documents import Document, Name
from models.questions import CELLS, Counting

WARM_UP_ROUNDS = 2  # fresh GroupNorm networks take a full first step badly: half the rate in the first round
RELEASE_MIN = 10  # images of each class, as in the house rules for released counts
ATTRIBUTES = tuple(CELLS)  # what test results can be divided by
CROSS = " x "  # between two of them
NOISED_BINS_MAX = 100  # of a histogram whose every bin gets noise

Point = Annotated[str, StringConstraints(pattern=r"^0[23][0-9a-f]{64}$")]
"""An enrolled P-256 key as `keys.point_hex` writes it."""
Protection = Literal["masked", "sealed", "plain"]
PROTECTIONS: tuple[Protection, ...] = ("masked", "sealed", "plain")
"""From the strongest to the weakest."""
LONGEST_SIDE_PX = 1024  # to which sites reduce radiographs in their caches, unless site.yaml says otherwise
LONGEST_SIDE_RANGE = (64, 4096)
MASKED_SITES_MIN = 3  # in a sum of two, each of the two knows the other's part


Relation = Literal["independent", "exclusive", "ordered"]


class Task(Document):
    """What is predicted: one binary target, or several at once. Missing labels are masked, never negative."""

    kind: Literal["classification"] = Field(default="classification", description="what kind of prediction")
    targets: list[Name] = Field(
        min_length=1, max_length=32, description="names of what is predicted; each site maps its own words to them"
    )
    relation: Relation = Field(
        default="independent",
        description="independent: each target by itself; exclusive: classes of which one holds; ordered: steps of a grade, "
        "lowest first, each meaning at least this grade",
    )

    @model_validator(mode="after")
    def _distinct(self) -> "Task":
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("targets must differ from each other")
        if self.relation != "independent" and len(self.targets) < 2:
            raise ValueError(f"relation: {self.relation} is about two targets or more")
        return self

    def admits(self, row: Sequence[float | None]) -> bool:
        """Whether the labels of one image (1, 0 or None for each target) can all be true at once.

        exclusive: one class holds and every label is known; ordered: nothing holds above a step that does not.
        """
        if self.relation == "exclusive":
            return None not in row and sum(label or 0 for label in row) == 1
        if self.relation == "ordered":
            known = [label for label in row if label is not None]
            return known == sorted(known, reverse=True)
        return True


class Regression(Document):
    """What is predicted: one number of each image, within a range that the study declares."""

    kind: Literal["regression"] = Field(description="a number is predicted")
    targets: Annotated[list[Name], Field(min_length=1, max_length=1)] = Field(
        description="name of the number; each site names its column in data.labels.numbers"
    )
    range: Annotated[list[float], Field(min_length=2, max_length=2)] = Field(
        description="least and greatest value; an image with a reference outside is left out, and counted"
    )
    unit: str = Field(
        pattern=r"^[A-Za-z0-9 %/^*.,()µ°-]{1,40}$", description="unit of the number, such as points, mm or mL"
    )

    @model_validator(mode="after")
    def _possible(self) -> "Regression":
        low, high = self.range
        if not -1e6 <= low < high <= 1e6:
            raise ValueError("range must be two rising numbers between -1e6 and 1e6")
        return self

    def admits(self, value: float | None) -> bool:
        """Whether a value lies in the range, or is missing."""
        return value is None or self.range[0] <= value <= self.range[1]

    def place(self, value: float) -> float:
        """Where a value lies in the range, 0 to 1."""
        return (value - self.range[0]) / (self.range[1] - self.range[0])


STRUCTURES_MAX = 8  # one bit each in a site's stored masks


class Segmentation(Document):
    """What is outlined: named structures, each with a mask of its own, so that a lesion may lie within a lung.

    A site that has no masks of a structure trains and tests the others: what is not annotated is never taken for absent.
    """

    kind: Literal["segmentation"] = Field(description="structures are outlined, voxel by voxel")
    targets: list[Name] = Field(
        min_length=1,
        max_length=STRUCTURES_MAX,
        description="names of the structures; each site says what they are in its own masks (`data.masks`)",
    )
    tolerance_mm: float = Field(
        default=3.0, gt=0, le=50, description="distance up to which two surfaces agree, for surface Dice"
    )

    @model_validator(mode="after")
    def _distinct(self) -> "Segmentation":
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("targets must differ from each other")
        return self


def _kind_of_task(given: Any) -> str:
    kind = given.get("kind") if isinstance(given, dict) else getattr(given, "kind", "")
    return f"[{kind}]" if kind in ("counting", "regression", "segmentation") else "[classification]"


TaskOrQuestions = Annotated[
    Annotated[Task, Tag("[classification]")]
    | Annotated[Regression, Tag("[regression]")]
    | Annotated[Segmentation, Tag("[segmentation]")]
    | Annotated[Counting, Tag("[counting]")],
    Discriminator(_kind_of_task),
]


Triple = Annotated[list[float], Field(min_length=3, max_length=3)]
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


NetworkName = Literal[
    "small_cnn",
    "linear",
    "densenet121",
    "densenet169",
    "resnet18",
    "resnet50",
    "efficientnet_b0",
    "vit",
    "unet",
    "segresnet",
]
NETWORKS: tuple[NetworkName, ...] = get_args(NetworkName)
OUTLINING: tuple[NetworkName, ...] = ("unet", "segresnet")
"""Networks that give a score for each voxel; the others give one for each image."""


class Initial(Document):
    """A file of weights to start from. Only the coordinator reads it; sites get what was made of it with their first order."""

    sha256: str = Field(
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 of the file, which the coordinator holds (`fl-server weights add FILE`)",
    )
    study: str = Field(
        default="",
        exclude_if=lambda value: not value,
        pattern=r"^([0-9a-f]{64})?$",
        description="digest of the study that trained these weights at these sites (`fl-server extend`): each patient stays on "
        "the same side of the split, so that nobody who was trained on is tested on",
    )


class Network(Document):
    """Which network of `models.networks` is trained, from where and how much of it; none keeps statistics of a batch."""

    name: NetworkName = Field(
        default="small_cnn",
        description="small_cnn for CPUs; linear: for differential privacy with few patients; the others for GPUs; unet and "
        "segresnet: for `kind: segmentation`, and for nothing else",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of features dropped while training")
    initial: Initial | None = Field(default=None, description="weights to start from; without them, the seed's")
    trained: Literal["all", "last_block", "head"] = Field(
        default="all",
        description="what training moves: all of it, the last block with the head, or the head (the last layer) alone",
    )

    @property
    def words(self) -> str:
        """Network, start, and what of it is trained, for people."""
        start = f", from weights {self.initial.sha256[:12]}" if self.initial is not None else ""
        start += f" of study {self.initial.study[:12]}" if self.initial is not None and self.initial.study else ""
        return f"{self.name}{start}{'' if self.trained == 'all' else f', {self.trained} alone trained'}"


class Training(Document):
    """The local loop of one round at one site."""

    rounds: int = Field(
        ge=0,
        le=10_000,
        description="rounds of the whole run; 0: nothing is trained, and the weights of network.initial are evaluated",
    )
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
    balance: bool = Field(
        default=True,
        description="weigh the two classes of a target equally in the local loss; false and fixed for `kind: segmentation`",
    )
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


StrategyName = Literal[
    "fedavg",
    "fedprox",
    "fedbn",
    "scaffold",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedsgd",
    "median",
    "trimmed_mean",
    "krum",
]
STRATEGY_PARAMETERS: dict[str, dict[str, float]] = {
    "fedavg": {},
    "fedprox": {"proximal_mu": 0.01},
    "fedbn": {},
    "scaffold": {},
    "fedavgm": {"server_rate": 1.0, "momentum": 0.9},
    "fedadam": {"server_rate": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
    "fedyogi": {"server_rate": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
    "fedsgd": {"momentum": 0.9},
    "median": {},
    "trimmed_mean": {"trimmed_share": 0.25},
    "krum": {"byzantine": 1, "selected": 2},
}
"""What each strategy uses, and what is filled in: betas, tau and momentum are those of the papers; an adaptive step moves each
weight by up to about `server_rate`, so a hundredth suits weights below one; a quarter is one site in four."""
ROBUST = ("median", "trimmed_mean", "krum")
ROBUST_SITES_MAX = 64  # all updates are in the coordinator's memory at once: 1.8 GB of densenet121's, 4 bytes a weight


class Strategy(Document):
    """How what the sites send becomes the next model.

    Averages, weighted by cases: FedAvg and FedSGD (McMahan et al. 2017), FedProx (Li et al. 2020), FedBN (Li et al. 2021),
    SCAFFOLD (Karimireddy et al. 2020), FedAvgM (Hsu et al. 2019), FedAdam and FedYogi (Reddi et al. 2021). Robust, each site
    counting the same and seen by itself: median and trimmed mean of each weight (Yin et al. 2018), Krum (Blanchard et al. 2017).
    A parameter that is left out gets the value of STRATEGY_PARAMETERS, so that it is part of what is signed; `check` refuses one
    that the strategy has no use for.
    """

    name: StrategyName = Field(
        default="fedavg",
        description="fedavg: mean of updates; fedprox: the same, sites held near the common model; "
        "fedbn: each site keeps its own norm layers, and there is no common model to release; "
        "scaffold: the same, each step corrected by what the site's gradients differ from all sites'; fedavgm, fedadam, fedyogi: "
        "momentum or adaptive steps at the coordinator; fedsgd: mean of gradients, for `privacy.mode: distributed`; median, "
        "trimmed_mean, krum: withstand hostile or broken sites, for protection sealed or plain",
    )
    proximal_mu: float | None = Field(
        default=None,
        ge=0,
        le=1000,
        description="fedprox: mu of the term mu/2 |w - w_round|^2 in the local loss; 0.01 unless given",
    )
    server_rate: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="the coordinator's step size; unless given, 1 in fedavgm, 0.01 in fedadam and fedyogi",
    )
    momentum: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="fedavgm, fedsgd: share of the last step that is kept in the next; 0.9 unless given",
    )
    beta1: float | None = Field(
        default=None, ge=0, lt=1, description="fedadam, fedyogi: decay of the mean of the updates; 0.9 unless given"
    )
    beta2: float | None = Field(
        default=None, ge=0, lt=1, description="fedadam, fedyogi: decay of the mean of their squares; 0.99 unless given"
    )
    tau: float | None = Field(
        default=None,
        ge=1e-9,
        le=1,
        description="fedadam, fedyogi: added to its root; larger adapts less; 0.001 unless given",
    )
    trimmed_share: float | None = Field(
        default=None,
        gt=0,
        lt=0.5,
        description="trimmed_mean: share of sites cut off at each end of each weight; 0.25 unless given",
    )
    byzantine: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="krum: hostile sites (f) to withstand; needs a quorum of 2 f + 3; 1 unless given",
    )
    selected: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="krum: updates nearest to the others whose mean is taken; 2 unless given",
    )

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("name", ""), str):
            return given
        own = STRATEGY_PARAMETERS.get(given.get("name", "fedavg"), {})
        return given | {name: value for name, value in own.items() if given.get(name) is None}

    @property
    def robust(self) -> bool:
        """Whether it needs each site's update by itself."""
        return self.name in ROBUST

    @property
    def steered(self) -> bool:
        """Whether a round brings control variates as well: a second half of the model that is sent, and of the update."""
        return self.name == "scaffold"

    @property
    def local_norms(self) -> bool:
        """Whether gains and biases of norm layers stay at the sites, and are in no vector."""
        return self.name == "fedbn"

    @property
    def parameters(self) -> dict[str, float]:
        """Those that were given or filled in, by name."""
        return self.model_dump(exclude={"name"}, exclude_none=True)


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
    sample: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        exclude_if=lambda value: value is None,
        description="training sites that each round asks, and the test; drawn anew by public randomness; all unless given",
    )
    minimum_patients: int = Field(default=10, ge=1, description="least patients in each split of a site")
    round_timeout_s: int = Field(
        default=3600,
        ge=5,
        le=7 * 86400,
        description="most seconds that a site is waited for in a step of a round; less where its usual speed is known",
    )


class Evaluation(Document):
    """Splits by patient, and the resolution of the score histograms that leave a site.

    What a later version added stays out of the canonical form while it has its default, and the default is what there was before:
    so a study that was approved by then keeps its digest and its meaning.
    """

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
        description="true: each site releases its own test AUROC, intervals and class counts in tens, from 10 images of each on",
    )
    external: Literal["all", "test_split"] = Field(
        default="test_split",
        exclude_if=lambda value: value == "test_split",
        description="what sites of participation.evaluate_only are tested on: evaluation.test of their patients, or all of them",
    )
    subgroups: list[Annotated[str, StringConstraints(max_length=40)]] = Field(
        default=[],
        exclude_if=lambda value: not value,
        max_length=12,
        description="groups whose test results are added up by themselves: age, sex, race, ethnicity, modality, manufacturer, or "
        "two of them: `sex x age`; a site adds none with fewer than 10 patients, or 10 images of either class",
    )

    @model_validator(mode="after")
    def _known_subgroups(self) -> "Evaluation":
        if len({frozenset(name.split(CROSS)) for name in self.subgroups}) != len(self.subgroups):
            raise ValueError("subgroups must not name the same groups twice")
        for name in self.subgroups:
            parts = name.split(CROSS)
            if len(parts) > 2 or len(set(parts)) != len(parts) or not set(parts) <= set(ATTRIBUTES):
                raise ValueError(
                    f"subgroups: {name!r} is none of {', '.join(ATTRIBUTES)}, nor two of them as in `sex{CROSS}age`"
                )
        return self
