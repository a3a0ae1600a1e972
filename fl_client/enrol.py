"""The site's half of the consortium service: join, see what is offered, answer with a signed statement."""

import logging
import re
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from cryptography import x509

from fl_client.consent import Consent, Offer, consents, deciding
from fl_client.site import SiteFile
from models.study import Study, parse, read
from privacy import calls, keys
from privacy import consortium_pb2 as pb
from privacy.calls import Enrolment, InvitationLine
from privacy.errors import DocumentError, IsocenterError, MessageMalformed, RunUnknown, TrustError, Unreachable
from privacy.greeting import Versions
from privacy.journal import Journal
from privacy.reach import Proxy
from privacy.statements import Decision, Statement

DIGEST_LEAST = 6  # characters of a digest that a person has to type
FINGERPRINT_CHARACTERS = 16  # few enough to read out for each of twenty sites, too many to find a second key for
_PROXY_EXAMPLE = re.compile(r"^  # proxy:.*\n(?:  #   .*\n)+", re.MULTILINE)  # in the template
_log = logging.getLogger(__name__)


def join(line: str, home: Path, proxy: Proxy | None = None) -> Enrolment:
    """Join with an invitation line: the key is made in HOME/keys and stays there, and a commented site.yaml is written.

    `proxy` is the way out, and stands in the site.yaml that is written; in one that is there already, it has to stand before.

    An existing site.yaml is kept; only a missing `coordinator` section is added to it. Can be repeated with the same
    line until it has succeeded. Raises what `privacy.calls.join` raises, and DocumentError for another site's site.yaml.
    """
    invitation, path = InvitationLine.parse(line), SiteFile.path(home)
    settings = read(SiteFile, path) if path.exists() else None
    if settings is not None and settings.site != invitation.name:
        raise DocumentError(
            f"{path} is of site {settings.site}, and the invitation is for {invitation.name}",
            remedy="Use another home folder, or correct `site` in the file.",
        )
    if settings is not None and settings.coordinator is not None:
        if proxy not in (None, settings.coordinator.proxy):
            raise DocumentError(
                f"{path} names {'another' if settings.coordinator.proxy else 'no'} proxy",
                remedy=f"Enter it there, below `coordinator`:\n{proxy.section('  ')}" if proxy else None,
            )
        proxy = settings.coordinator.proxy
    way = proxy.way(home) if proxy else None
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    first = not (home / "keys" / "enrolment.json").exists()
    enrolment = calls.join(line, home / "keys", way=way)
    if first:
        Journal(home / "journal.jsonl").append("joined", site=enrolment.name, authority=enrolment.ca_fingerprint)
    if settings is None:
        keys.write_private(path, _template(enrolment, proxy).encode())
    elif settings.coordinator is None:
        keys.write_private(path, _completed(path, enrolment, proxy).encode())
    return enrolment


def greet(home: Path) -> Versions | None:
    """What the coordinator runs, None if it is too old to tell; it is told what runs here. Raises what a call raises."""
    with open_caller(home) as caller:
        return caller.greet()


def fetch_offers(home: Path) -> list[Offer]:
    """The studies offered to this site, newest first, each with every signature checked and what this site decided.

    An offer that fails a check is left out, logged and noted in the journal: one bad study does not hide the others.
    """
    site = Enrolment.open(home / "keys").name
    with open_caller(home) as caller:
        found = caller.offers()
    ca = keys.load_certificate((home / "keys" / "ca.pem").read_bytes())
    coordinator = keys.load_public((home / "keys" / "coordinator.pem").read_bytes())
    offers = []
    for number, received in enumerate(found):
        try:
            offers.append(_checked(received, site, ca, coordinator))
        except IsocenterError as error:
            _log.warning("offer %d of the coordinator is not genuine and is left out: %s", number + 1, error)
            journal, which = (
                Journal(home / "journal.jsonl"),
                keys.digest(received.SerializeToString(deterministic=True)),
            )
            if journal.last("offer-refused", offer=which) is None:  # a node asks every minute
                journal.append("offer-refused", code=error.code, offer=which)
    return [replace(offer, decision=_decision(home, offer.digest)) for offer in offers]


def find_offer(home: Path, digest: str) -> Offer:
    """The one offer whose digest begins with `digest`; raises RunUnknown for none or several.

    Without a connection, a study that was answered before is still found, so that an approval can always be withdrawn.
    """
    try:
        offers = fetch_offers(home)
    except Unreachable:
        offers = [consent.offer for consent in consents(home)]
        if not any(offer.digest.startswith(digest) for offer in offers):
            raise
    found = [offer for offer in offers if offer.digest.startswith(digest)]
    if len(found) != 1 or len(digest) < DIGEST_LEAST:
        what = "no study" if not found else "more than one study, or too little of its digest is given:"
        raise RunUnknown(
            f"{what} offered to this site begins with {digest!r}",
            remedy="See `fl-client studies`. A study is offered to the sites that it names with their keys, and no other can "
            "join it: the researcher submits a new one for that.",
        )
    return found[0]


@dataclass(frozen=True)
class Peer:
    """Another site of an offered study, and what people at this site should know of its key."""

    name: str
    fingerprint: str  # of the key that the study names, as `fingerprint` writes it
    changed: str | None  # day (UTC, 2026-01-31) on which this site approved a study with another key of that site


def fingerprint(point: str) -> str:
    """The beginning of a site's key's SHA-256 in groups of four, as people read it to each other over the telephone."""
    return keys.grouped(keys.digest(bytes.fromhex(point))[:FINGERPRINT_CHARACTERS])


def check_roster(home: Path, study: Study) -> None:
    """Raise TrustError unless `study` names a key of its own for each site, and for this one the key enrolled here.

    What peers send each other during a run is believed if it is signed with the keys of this roster, so another key
    under this site's name would let its holder speak for this site. As each site looks at its own key and all approve
    the same digest, a false key stays unseen only if its site was never shown the study.
    """
    name, own = Enrolment.open(home / "keys").name, keys.load_key(home / "keys" / "site.key").public_key()
    if missing := [site for site in study.all_sites if site not in study.roster]:
        raise TrustError(
            f"the study names no key for {', '.join(missing)}",
            remedy="Do not approve it. Ask the researcher to submit it again: `fl-study submit` fills them in.",
        )
    if study.roster.get(name) != keys.point_hex(own):
        raise TrustError(
            f"the study names another key for {name} than the one that this site enrolled",
            remedy="Do not approve it: somebody else could speak as your site. Telephone the coordinator.",
        )
    if len(set(study.roster.values())) != len(study.roster):
        raise TrustError(
            "the study names one key for several sites",
            remedy="Do not approve it: one party would count as several. Telephone the coordinator.",
        )


def peers(home: Path, study: Study) -> list[Peer]:
    """The other sites of a study, each with whether its key differs from the latest study approved here with it.

    Raises what `check_roster` raises, and DocumentError if the record of an earlier decision is damaged.
    """
    check_roster(home, study)
    pinned: dict[
        str, tuple[str, int]
    ] = {}  # site -> its key and when that was approved, later approvals over earlier ones
    before = [consent for consent in consents(home) if consent.statement.decision == "approved"]
    for consent in sorted(before, key=lambda consent: consent.statement.time_ms):
        pinned |= {site: (key, consent.statement.time_ms) for site, key in consent.offer.study.roster.items()}
    name, found = Enrolment.open(home / "keys").name, []
    for site in study.all_sites:
        key, time_ms = pinned.get(site, (study.roster[site], 0))
        changed = _day(time_ms) if key != study.roster[site] else None
        if site != name:
            found.append(Peer(site, fingerprint(study.roster[site]), changed))
    return found


def _day(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d")


def decide(home: Path, offer: Offer, decision: Decision, rule: int = 0) -> None:
    """Sign the decision, make it hold here, note it in the journal, then send it. `rule`: of site.yaml, 0 for a person.

    It holds at this site even when sending fails: then Unreachable is raised, and the command can be repeated.
    Nothing is approved whose roster `check_roster` refuses, and nothing by rule that this site ever decided about: TrustError.
    """
    if decision == "approved":
        check_roster(home, offer.study)
    enrolment = Enrolment.open(home / "keys")
    key = keys.load_key(home / "keys" / "site.key")
    with deciding(home):
        if rule and decided_before(home, offer.digest):
            raise TrustError("this site decided about the study before", remedy="Nothing to do: that decision holds.")
        before = Consent.open(home, offer.digest)
        # Later than the last one even if the clock was set back, or the coordinator would take this for the older statement.
        least = before.statement.time_ms + 1 if before else 0
        statement = Statement(offer.digest, enrolment.name, decision, max(time.time_ns() // 1_000_000, least))
        signature = keys.sign(key, keys.STUDY_DECISION, statement.body())
        unsent = _unsent(home, offer.digest)  # before the decision, so that one that holds is never left unsent
        unsent.touch(mode=0o600)
        Consent(replace(offer, decision=decision), statement, signature).store(home)
        Journal(home / "journal.jsonl").append(decision, study=offer.digest, rule=rule)
    try:
        with open_caller(home) as caller:
            caller.decide(statement.body(), signature)
    except Unreachable as error:
        raise Unreachable(
            f"{error}. The study counts as {decision} at this site from now on, but the coordinator does not know it yet",
            remedy="A running node sends it as soon as the coordinator can be reached; or run the command again then.",
        ) from None
    _acknowledged(home, statement)


def decided_before(home: Path, digest: str) -> bool:
    """Whether this site ever decided about the study: by the decision that holds, or by the journal where that was removed."""
    journal = Journal(home / "journal.jsonl")
    lines = (journal.last(decision, study=digest) for decision in ("approved", "declined"))
    return Consent.open(home, digest) is not None or any(line is not None for line in lines)


def redeliver(home: Path, caller: calls.Caller) -> None:
    """Send every decision that did not reach the coordinator when it was made. What it refuses for good is not sent again."""
    for path in sorted((home / "studies").glob("*.unsent")):
        try:
            consent = Consent.open(home, path.stem)
        except DocumentError as error:  # its person is told by every other command; the other decisions are sent
            _log.warning("a decision cannot be sent: %s", error.code)
            continue
        if consent is None:
            path.unlink(missing_ok=True)
            continue
        try:
            caller.decide(consent.statement.body(), consent.signature)
        except TrustError as error:
            _log.warning("the coordinator does not take a decision: %s", error.code)
        _acknowledged(home, consent.statement)


def _acknowledged(home: Path, statement: Statement) -> None:
    """Note that the coordinator has `statement`. One that replaced it meanwhile is still to be sent."""
    with deciding(home):
        present = Consent.open(home, statement.digest)
        if present is None or present.statement == statement:
            _unsent(home, statement.digest).unlink(missing_ok=True)


def _unsent(home: Path, digest: str) -> Path:
    """There while the coordinator has not acknowledged the decision that studies/<digest>.json holds."""
    return home / "studies" / f"{digest}.unsent"


def open_caller(home: Path) -> calls.Caller:
    """Signed calls of this site to its coordinator, at the address of site.yaml and by the way that it names."""
    coordinator = read(SiteFile, SiteFile.path(home)).coordinator
    if coordinator is None:
        return calls.Caller.open(home / "keys")
    return calls.Caller.open(home / "keys", coordinator.service, coordinator.way(home))


def _checked(received: pb.Offer, site: str, ca: x509.Certificate, coordinator: keys.PublicKey) -> Offer:
    """The offer, if coordinator and researcher signed this very study and it is for this site; raises otherwise."""
    keys.verify(coordinator, keys.STUDY_OFFER, received.study, received.coordinator_signature)
    certificate = keys.load_certificate(received.researcher_certificate)
    keys.check_issued(ca, certificate, received.researcher, "researcher")
    keys.verify(keys.public_key_of(certificate), keys.STUDY_SUBMIT, received.study, received.researcher_signature)
    study = Study.from_canonical(received.study)
    study.check()
    if site not in study.all_sites:
        raise MessageMalformed("the study does not name this site")
    return Offer(
        study,
        received.researcher,
        keys.certificate_pem(certificate),
        received.researcher_signature,
        received.coordinator_signature,
        received.submitted,
    )


def _decision(home: Path, digest: str) -> Decision | None:
    consent = Consent.open(home, digest)
    return consent.statement.decision if consent else None


def _template(enrolment: Enrolment, proxy: Proxy | None) -> str:
    text = resources.files("configs").joinpath("site.yaml").read_text(encoding="utf-8")
    for key, value in (("site", enrolment.name), ("gateway", enrolment.gateway), ("service", enrolment.service)):
        text = text.replace("{" + key + "}", value)
    if proxy:
        text = _PROXY_EXAMPLE.sub(lambda _: proxy.section("  "), text)
    parse(SiteFile, text, "configs/site.yaml")
    return text


def _completed(path: Path, enrolment: Enrolment, proxy: Proxy | None) -> str:
    """site.yaml with the consortium's addresses added at its end; raises DocumentError if that cannot be done."""
    section = f'coordinator:\n  gateway: "{enrolment.gateway}"\n  service: "{enrolment.service}"\n'
    section += proxy.section("  ") if proxy else ""
    text = (
        path.read_text(encoding="utf-8").rstrip()
        + "\n\n# Where the consortium is; added by `fl-client join`.\n"
        + section
    )
    try:
        parse(SiteFile, text, str(path))
    except DocumentError:
        raise DocumentError(
            f"{path} needs a coordinator section, which could not be added", remedy=f"Add by hand:\n{section}"
        ) from None
    return text
