"""Answers of this site to a study's questions: its patients and images counted, rounded down to tens, and put into a masked sum.

The gate, the masks and the journal are those of every order. Exact numbers are made here and stay here; `questions.tens` is the
one place where they become what may leave. Nothing is read but the index and the label table: no pixels.
"""

import numpy as np

from fl_client.index import Index
from fl_client.observed import observe
from fl_client.protection import Vault
from fl_client.site import Site
from models.contributions import FIGURE_COLUMNS, NOT_RELEASED, Contribution, empty_sheet
from models.labels import LabelTable
from models.questions import Answer, Counting, Observed, count, tens
from models.study import Study
from privacy.errors import CohortTooSmall, LabelTableError, StepRefused
from privacy.wire import COHORT, EvaluateOrder, EvaluateReport, Order

UNTOLD_S = 0.0
"""Seconds that a report of a study that counts names: how long it takes to count says how many there are."""


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
        figures=np.full((1, FIGURE_COLUMNS), NOT_RELEASED, np.float32),
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
    rows = [observe(image, labels) for image in index.images()]
    patients, least = len({row.patient for row in rows}), site.settings.policy.minimum_patients
    if patients < max(least, study.participation.minimum_patients):
        raise CohortTooSmall(
            f"{patients} patients are here; the study asks for {study.participation.minimum_patients}, site.yaml for {least}"
        )
    return rows
