"""Answers of this site to a study's questions: its patients and images counted, rounded down to tens, and put into a masked sum.

The gate, the masks and the journal are those of every order. Exact numbers are made here and stay here; `questions.tens` is the
one place where they become what may leave. Nothing is read but the index and the label table: no pixels.
"""

import math
from collections.abc import Iterator

import numpy as np

from fl_client.index import Index, IndexedImage
from fl_client.protection import Vault
from fl_client.site import Site
from models.attributes import AGE_BINS, AGE_EDGES, CAPPED_AGE, About, Sex
from models.contributions import NOT_RELEASED, Contribution, empty_sheet
from models.labels import LabelTable
from models.questions import Answer, Counting, Observed, count, tens, vendor_of
from models.study import Study
from privacy.errors import CohortTooSmall, LabelTableError, StepRefused
from privacy.wire import COHORT, EvaluateOrder, EvaluateReport, Order

UNTOLD_S = 0.0
"""Seconds that a report of a study that counts names: how long it takes to count says how many there are."""
_SEX: dict[str, Sex] = {"F": "F", "M": "M", "O": "O"}


def carry_out_count(vault: Vault, site: Site, study: Study, task: Counting, order: Order) -> EvaluateReport:
    """This site's numbers, in tens, for the sum that `order` names.

    Raises StepRefused for any other work on a study that counts: nothing is trained, scored or released in it.
    """
    if not isinstance(order, EvaluateOrder) or order.split != COHORT or order.model.any() or order.model.size != 1:
        raise StepRefused("the study asks for numbers of patients, and the order for something else")
    answers = tens(task, counted(site, study, task))
    sending = vault.begin(site, study, order, 0)
    vector, vouch = sending.protect(Contribution(0, empty_sheet(study), answers=answers))
    return EvaluateReport(
        **order.naming(),
        site=site.name,
        seconds=UNTOLD_S,
        vector=vector,
        vouch=vouch,
        keys=sending.keys,
        split=order.split,
        figures=np.full((1, 5), NOT_RELEASED, np.float32),
    )


def counted(site: Site, study: Study, task: Counting) -> dict[str, Answer]:
    """What this site has, exactly. Raises what `countable` raises."""
    return count(task, countable(site, study, task))


def countable(site: Site, study: Study, task: Counting) -> list[Observed]:
    """What is known of every image here. Raises CohortTooSmall below the study's or the site's minimum of patients,
    LabelTableError if the site maps none of the labels that are asked for, DataError for data that is not fit to work with.
    """
    index, source = Index.open(site.state), site.source
    index.require_fit()
    labels = LabelTable.open(site.home, source.labels)
    mapped = labels.mapping.targets
    if task.targets and not set(task.targets) & set(mapped):
        raise LabelTableError(
            f"none of the study's targets ({', '.join(task.targets)}) is in data.labels.targets ({', '.join(sorted(mapped))})"
        )
    rows = list(rows_of(index, labels))
    patients, least = len({row.patient for row in rows}), site.settings.policy.minimum_patients
    if patients < max(least, study.participation.minimum_patients):
        raise CohortTooSmall(
            f"{patients} patients are here; the study asks for {study.participation.minimum_patients}, site.yaml for {least}"
        )
    return rows


def rows_of(index: Index, labels: LabelTable) -> Iterator[Observed]:
    """What is known of each image: of the person, by the label table first, then by the header."""
    matches = labels.mapping.matches
    for image in index.images():
        key = image.key(matches)
        about = labels.about(key)
        yield Observed(
            patient=labels.patient_of(key) or labels.mapping.plain_patient(image.patient),
            modality=image.modality,
            view="none" if image.is_volume else "" if image.view == "unknown" else image.view,
            vendor=vendor_of(image.manufacturer),
            age=_age(about, image),
            sex=about.sex or _SEX.get(image.sex),
            race=about.race,
            ethnicity=about.ethnicity,
            labels=labels.lookup(key),
        )


def _age(about: About, image: IndexedImage) -> tuple[float, float] | None:
    """Completed years, from the first to below the second; the same number twice is an exact age."""
    if about.age_years is not None:
        return about.age_years, about.age_years
    if about.over_89:
        return CAPPED_AGE + 1.0, math.inf
    if about.age_bin is not None:
        place = AGE_BINS.index(about.age_bin)
        return AGE_EDGES[place], AGE_EDGES[place + 1]
    return None if image.age_years is None else (image.age_years, image.age_years)
