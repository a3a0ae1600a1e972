"""Approval by rule: what site.yaml lets the node approve without asking anybody, carried out as if by hand.

No rule ever answers for a person: a study that was declined or withdrawn here stays so, another version of it waits for a person,
one that names another key than before for any site waits for a telephone call, and the policy holds as it does for everybody. A
paused site approves nothing by rule. What patients have left of their budgets is not looked at here, because the node reads no
images: the ledger refuses the first order that would exceed it.
"""

import datetime as dt
import logging
from collections.abc import Callable
from pathlib import Path

from fl_client import enrol
from fl_client.consent import Offer, consents
from fl_client.policy import Rule, epsilon_of, epsilon_of_figures
from fl_client.site import Site
from models.study import Study
from privacy.errors import IsocenterError, Unreachable

log = logging.getLogger("isocenter.rules")


def misses(rule: Rule, study: Study, researcher: str, delta: float, today: dt.date) -> list[str]:
    """Why `rule` does not approve `study`, one sentence for each condition that does not hold; none if it does."""
    found = []
    if today > dt.date.fromisoformat(rule.until):
        found.append(f"it ended on {rule.until}")
    if researcher not in rule.researchers:
        found.append(f"it does not name researcher {researcher}")
    if study.protection != rule.protection:
        found.append(f"the study is {study.protection}, not {rule.protection}")
    if study.network.name not in rule.networks:
        found.append(f"it does not list the network {study.network.name}")
    if rule.targets and (other := [target for target in study.task.targets if target not in rule.targets]):
        found.append(f"it does not list {', '.join(other)}")
    if study.budgeted_rounds > rule.rounds:
        found.append(f"{study.budgeted_rounds} rounds, spare ones included, are more than {rule.rounds}")
    for_people = {
        f"the study learns from {', '.join(sorted(study.covariates))} of your patients beside the images": study.covariates,
        "the study adds up test results of subgroups, which no ε covers": study.evaluation.subgroups,
        "the study outlines structures: sums of their figures, which no ε covers, are for people to approve": study.segments,
        "the study tests on all patients of sites that only evaluate, not on a share of them": study.evaluation.external
        == "all",
    }
    found += [sentence for sentence, asked in for_people.items() if asked]
    if study.participation.quorum < rule.minimum_sites:
        found.append(f"a sum over {study.participation.quorum} sites is of fewer than {rule.minimum_sites}")
    if study.privacy == "none" or study.privacy.noise_multiplier is None:
        found.append("the study has no differential privacy, which no rule approves")
    elif (spends := max(epsilon_of(study, delta), epsilon_of_figures(study, delta))) > rule.epsilon:
        found.append(f"the study spends an ε of {spends:.2f}, more than {rule.epsilon:g}")
    return found


def approving(site: Site, offer: Offer, today: dt.date) -> tuple[int | None, list[str]]:
    """(number from 1 of the rule that approves `offer`, else None; why it is not approved by rule). Changes nothing."""
    rules, delta = site.settings.approve, site.settings.policy.delta
    if not rules:
        return None, ["site.yaml has no rules"]
    if offer.decision is not None:
        return None, [f"it was {offer.decision} here"]
    reasons = []
    for number, rule in enumerate(rules, start=1):
        missed = misses(rule, offer.study, offer.researcher, delta, today)
        if not missed:
            return _if_permitted(site, offer, number)
        reasons.append(f"rule {number}: {', '.join(missed)}")
    return None, reasons


def _if_permitted(site: Site, offer: Offer, number: int) -> tuple[int | None, list[str]]:
    """What binds a person's approval binds a rule's as well, and what a person once said no to waits for one."""
    study = offer.study
    try:
        if pause := site.pause:
            return None, [f"this site is {pause}"]
        if enrol.decided_before(site.home, offer.digest):
            return None, ["this site decided about it before"]
        declined = [held.offer.study for held in consents(site.home) if held.statement.decision == "declined"]
        if any(study.name == other.name or study.learned == other.learned for other in declined):
            return None, ["another version of it was declined here, so a person has to read this one"]
        changed = [peer.name for peer in enrol.peers(site.home, offer.study) if peer.changed]
        if changed:
            return None, [f"the key of {', '.join(changed)} changed, and a person has to ask by telephone"]
        site.check_policy(offer.study)
    except IsocenterError as error:
        return None, [str(error)]
    return number, []


def carry_out(home: Path, tell: Callable[[str], None]) -> list[str]:
    """Approve what the rules of site.yaml approve, among all that is offered; the digests. Without rules nobody is even asked."""
    site = Site.open(home)
    if not site.settings.approve:
        return []
    done = []
    for offer in enrol.fetch_offers(home):
        try:
            number, _ = approving(site, offer, dt.date.today())
            if number is None:
                continue
            enrol.decide(home, offer, "approved", rule=number)
        except Unreachable:
            pass  # it holds here, and upkeep sends it later
        except IsocenterError as error:  # the others are looked at all the same
            log.warning("study %s is not approved by rule: %s", offer.digest[:12], error)
            continue
        tell(f"Approved {offer.digest[:12]} ({offer.study.title}) by rule {number} of site.yaml.")
        done.append(offer.digest)
    return done
