"""Settings of a study that cannot go together, one sentence each: task, network, strategy and evaluation against each other.

What privacy and questions forbid stands in `models.study`, beside what they promise.
"""

import math
from typing import Protocol

from models import subgroups
from models.covariates import Covariates
from models.questions import Counting
from models.sections import (
    OUTLINING,
    ROBUST_SITES_MAX,
    STRATEGY_PARAMETERS,
    Evaluation,
    Images,
    Network,
    Participation,
    PrivacyOrNone,
    Protection,
    Regression,
    Relation,
    Segmentation,
    Strategy,
    TaskOrQuestions,
    Training,
)

GROUP_COUNTS_MAX = 4_000_000  # 16 MB in words of 32 bits, once in a run
HALVING, HALVING_LEAST = ("densenet121", "densenet169", "efficientnet_b0"), 32
VIT_PATCH = 16
OUTLINING_STEP = 8  # networks that outline halve an image three times and must meet the same grid on the way back
SCAFFOLD_BITS_MIN = 32


class Settings(Protocol):
    """The sections that are held against each other: what a study is here, because `models.study` imports this file."""

    @property
    def task(self) -> TaskOrQuestions: ...
    @property
    def images(self) -> Images: ...
    @property
    def covariates(self) -> Covariates: ...
    @property
    def network(self) -> Network: ...
    @property
    def training(self) -> Training: ...
    @property
    def strategy(self) -> Strategy: ...
    @property
    def protection(self) -> Protection: ...
    @property
    def privacy(self) -> PrivacyOrNone: ...
    @property
    def participation(self) -> Participation: ...
    @property
    def evaluation(self) -> Evaluation: ...
    @property
    def relation(self) -> Relation: ...
    @property
    def encoding_bits(self) -> int: ...


def of(study: Settings) -> list[str]:
    """One sentence for each contradiction."""
    parts = (_of_covariates, _of_network, _of_strategy, _of_evaluation, _of_segmentation, _of_sampling)
    return [sentence for part in parts for sentence in part(study)]


def _of_covariates(study: Settings) -> list[str]:
    both = sorted(set(study.covariates) & set(study.task.targets))
    found = [f"{', '.join(both)}: what is predicted cannot be a covariate as well"] if both else []
    if study.covariates and isinstance(study.task, Segmentation):
        found.append(
            "covariates and task.kind: segmentation, whose outlines are drawn from the image alone; leave them out"
        )
    return found


def _of_network(study: Settings) -> list[str]:
    found, name, sides = [], study.network.name, study.images.shape[1:]
    if name in HALVING and min(sides) < HALVING_LEAST:
        found.append(f"network: {name} halves images five times and needs {HALVING_LEAST} on each axis")
    if name == "vit" and any(side % VIT_PATCH for side in sides):
        shown = " x ".join(str(side) for side in sides)
        found.append(f"network: vit reads patches of {VIT_PATCH}, which do not divide images of {shown}")
    if name in OUTLINING and any(side % OUTLINING_STEP for side in sides):
        shown = " x ".join(str(side) for side in sides)
        found.append(f"network: {name} needs sides that are multiples of {OUTLINING_STEP}, and images are {shown}")
    return found


def _of_segmentation(study: Settings) -> list[str]:
    """Networks and settings that belong to one kind of task alone."""
    name, outlines = study.network.name, name_list(OUTLINING)
    if not isinstance(study.task, Segmentation):
        if name in OUTLINING and not isinstance(study.task, Counting):
            return [
                f"network: {name} outlines structures, and task.kind: {study.task.kind} needs one score for an image"
            ]
        return []
    found = []
    if name not in OUTLINING:
        found.append(f"network: {name} gives one score for an image, and task.kind: segmentation needs {outlines}")
    if study.training.balance:
        found.append(
            "training.balance has no meaning for task.kind: segmentation, whose loss has no classes; leave it out"
        )
    if study.evaluation.bins != Evaluation().bins:
        found.append("evaluation.bins has no meaning for task.kind: segmentation: no histogram of scores is made")
    if study.evaluation.subgroups:
        found.append("evaluation.subgroups divides histograms of scores, and task.kind: segmentation has none")
    if study.privacy != "none" and study.privacy.figures == "noised":
        found.append(
            "privacy.figures: noised puts noise on histograms of scores; say suppressed for task.kind: segmentation"
        )
    return found


def _of_sampling(study: Settings) -> list[str]:
    """What each round has to ask every site for. The accounting of privacy credits nothing for the draw, which is public."""
    part, found = study.participation, []
    if part.sample is None:
        return []
    if part.sample > len(part.sites):
        found.append(f"participation.sample: {part.sample} of {len(part.sites)} training sites cannot be drawn")
    if part.quorum > part.sample:
        found.append(f"quorum {part.quorum} is more than the {part.sample} sites that a round asks")
    if isinstance(study.task, Counting) or study.training.rounds == 0:
        found.append("participation.sample draws sites for rounds of training, and the study has none; leave it out")
    if study.strategy.steered:
        found.append("strategy: scaffold and participation.sample: the common control variate is a mean over all sites")
    if study.strategy.local_norms:
        found.append("strategy: fedbn and participation.sample: a site that was never drawn has no norm layers to test")
    return found


def name_list(names: tuple[str, ...]) -> str:
    return " or ".join(names)


def _of_strategy(study: Settings) -> list[str]:
    """What a strategy has no use for, or cannot keep its promise under."""
    plan, part = study.strategy, study.participation
    found = [
        f"strategy.{name} has no use in {plan.name}; leave it out"
        for name in plan.parameters
        if name not in STRATEGY_PARAMETERS[plan.name]
    ]
    if plan.name == "fedprox" and study.privacy != "none":
        found.append("strategy: fedprox holds ordinary training near the common model; private steps have no such term")
    if plan.steered:
        found += _of_scaffold(study)
    if plan.local_norms:
        found += _of_local_norms(study)
    if not plan.robust:
        return found
    if study.protection == "masked":
        found.append(
            f"strategy: {plan.name} compares the sites' updates, and with protection: masked the coordinator sees sums only; "
            "say sealed or plain"
        )
    if len(part.sites) > ROBUST_SITES_MAX:
        found.append(f"strategy: {plan.name} keeps every update in memory and takes {ROBUST_SITES_MAX} sites at most")
    if plan.name == "krum":
        return found + _of_krum(study, plan.byzantine or 0, plan.selected or 0)
    least = 3 if plan.name == "median" else math.ceil(round(1 / (plan.trimmed_share or 1), 9))
    if part.quorum < least:
        found.append(f"strategy: {plan.name} leaves nobody out of a quorum of {part.quorum}; it needs {least}")
    return found


def _of_local_norms(study: Settings) -> list[str]:
    """A model without norms is no model: whoever has trained none has nothing to evaluate or release."""
    found = []
    if study.privacy != "none":
        found.append(
            "strategy: fedbn keeps weights that learned from patients outside what the accounting of privacy covers"
        )
    if study.network.name == "linear":
        found.append("strategy: fedbn keeps norm layers at the sites, and the linear network has none")
    if study.participation.evaluate_only:
        found.append(
            "strategy: fedbn and participation.evaluate_only: a site that trains nothing has no norm layers, and those of "
            "others stay with them"
        )
    return found


def _of_scaffold(study: Settings) -> list[str]:
    found = []
    if study.privacy != "none":
        found.append("strategy: scaffold sends a mean of gradients beside the update, which no noise of privacy covers")
    if study.training.optimizer != "sgd":
        found.append("strategy: scaffold corrects plain steps along gradients; say training.optimizer: sgd")
    if study.encoding_bits < SCAFFOLD_BITS_MIN:
        found.append(
            f"strategy: scaffold needs encoding_bits of {SCAFFOLD_BITS_MIN} or 64: an update shares its scale with "
            "gradients, which are larger"
        )
    return found


def _of_krum(study: Settings, byzantine: int, selected: int) -> list[str]:
    """The condition 2 f + 2 < n of Blanchard et al. 2017, for the smallest sum that a round may rest on."""
    quorum, found = study.participation.quorum, []
    nearest = quorum - byzantine - 2
    if quorum < 2 * byzantine + 3:
        found.append(
            f"strategy: krum withstands {byzantine} hostile among {2 * byzantine + 3} sites or more, and the quorum is {quorum}"
        )
    elif selected > nearest:
        found.append(f"strategy.selected: krum can trust {nearest} of {quorum} updates, not {selected}")
    if selected == 1 and study.protection == "sealed":
        found.append(
            "strategy.selected: 1 hands one site's update to all others as the next model, and protection: sealed promises that "
            "the coordinator alone sees it; say 2 or more, or plain"
        )
    return found


def _of_evaluation(study: Settings) -> list[str]:
    found, counts = [], subgroups.size(study)
    if counts > GROUP_COUNTS_MAX:
        found.append(
            f"evaluation.subgroups asks for {counts} counts, and {GROUP_COUNTS_MAX} are the most: name fewer, or fewer bins"
        )
    if study.training.rounds == 0 and not isinstance(study.task, Counting):
        if study.network.initial is None:
            found.append("training.rounds: 0 evaluates given weights, and network.initial names none")
        if study.privacy != "none" or study.strategy != Strategy():
            found.append("training.rounds: 0 trains nothing, so privacy is none, and strategy is left out")
    if isinstance(study.task, Regression):
        found += _of_regression(study)
    if study.privacy != "none" and study.privacy.figures == "noised" and study.evaluation.subgroups:
        found.append("privacy.figures: noised and evaluation.subgroups, whose counts have no noise")
    return found


def _of_regression(study: Settings) -> list[str]:
    """What adds up score histograms has nothing to add up for a number."""
    found = []
    if study.evaluation.subgroups:
        found.append("task.kind: regression and evaluation.subgroups, which compare classes; leave the subgroups out")
    if study.privacy != "none" and study.privacy.figures == "noised":
        found.append(
            "task.kind: regression and privacy.figures: noised, which is about histograms of classes; say suppressed"
        )
    return found
