"""The hospital's command at the moment of approval: whose keys a study names, what the screen says, what is refused."""

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from coordinator import Coordinator, coordinator, study
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from fl_client import enrol
from fl_client.cli import app
from fl_client.consent import Consent, Offer
from fl_client.readiness import findings
from fl_client.site import Site
from models.study import Study
from privacy import consortium_pb2 as pb
from privacy import keys
from privacy.accounting import PrivacyEvent
from privacy.calls import Caller
from privacy.errors import IsocenterError, TrustError
from privacy.ledger import Caps, Charge


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    with coordinator(tmp_path_factory.mktemp("served")) as demo:
        for name in ("south", "west", "east"):
            demo.join(name)
        demo.join("rosa", "researcher")
        yield demo


_numbers = iter(range(1000))


@pytest.fixture
def site(served: Coordinator, tmp_path: Path) -> Path:
    """A joined site's home, of a name of its own."""
    name = f"site{next(_numbers)}"
    enrol.join(str(served.home.invite(name, "site")), tmp_path / name)
    path = tmp_path / name / "site.yaml"
    path.write_text(path.read_text().replace("permit_without_privacy: false", "permit_without_privacy: true"))
    return tmp_path / name


def signed_offer(served: Coordinator, asked: Study) -> pb.Offer:
    """An offer as a hostile coordinator can make it: whatever is in it, both signatures hold."""
    rosa, text = keys.load_key(served.keys_of("rosa") / "researcher.key"), asked.canonical()
    return pb.Offer(
        study=text,
        researcher="rosa",
        researcher_certificate=(served.keys_of("rosa") / "researcher.pem").read_bytes(),
        researcher_signature=keys.sign(rosa, keys.STUDY_SUBMIT, text),
        coordinator_signature=keys.sign(served.home.coordinator_key, keys.STUDY_OFFER, text),
    )


def masked(served: Coordinator, site: Path, title: str = "Masked", **roster: str) -> Study:
    """A masked study of this site with south and west, some of its keys exchanged."""
    asked = study(site.name, "south", "west", evaluate_only=["east"]).model_copy(
        update={"protection": "masked", "title": title}
    )
    whole = served.home.with_keys(asked)
    return whole.model_copy(update={"roster": {**whole.roster, **roster}})


def new_point() -> str:
    return keys.point_hex(ec.generate_private_key(ec.SECP256R1()).public_key())


Approve = Callable[..., tuple[int, str, str]]


@pytest.fixture
def approve(served: Coordinator, site: Path, monkeypatch: pytest.MonkeyPatch) -> Approve:
    """`fl-client approve` of an offered study: (exit code, screen, error). `typed`: what the person at it types."""

    def run(asked: Study, *words: str, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(Caller, "offers", lambda _: [signed_offer(served, asked)])
        monkeypatch.setattr(Caller, "decide", lambda *_: None)
        result = CliRunner().invoke(app, ["approve", asked.digest, "--home", str(site), *words], input=typed)
        screen = " ".join(result.output.split())
        if isinstance(result.exception, IsocenterError):
            return 1, screen, f"{type(result.exception).__name__}: {result.exception} {result.exception.remedy}"
        assert isinstance(result.exception, SystemExit | None), result.exception
        return result.exit_code, screen, ""

    return run


def decided(site: Path, asked: Study) -> str | None:
    found = Consent.open(site, asked.digest)
    return found.statement.decision if found else None


def test_only_a_study_with_this_sites_own_key_can_be_approved(
    served: Coordinator, site: Path, approve: Approve
) -> None:
    good = masked(served, site)
    own, south = good.roster[site.name], good.roster["south"]
    cases = [
        (good.model_copy(update={"roster": {}}), "names no key for"),
        (masked(served, site, **{site.name: new_point()}), f"another key for {site.name} than"),
        (masked(served, site, **{site.name: south, "south": own}), f"another key for {site.name} than"),
        (masked(served, site, south=own), "one key for several sites"),
        (masked(served, site, west=south), "one key for several sites"),
    ]
    for asked, sentence in cases:
        code, screen, error = approve(asked, "--yes")
        assert code == 1 and error.startswith("TrustError: ") and sentence in error
        assert "not approve it" in error and "Study" not in screen
        with pytest.raises(TrustError, match=sentence):  # nor by the function behind the command
            enrol.decide(site, Offer(asked, "rosa", b"", b"", b"", ""), "approved")
        assert decided(site, asked) is None
    incomplete = {name: key for name, key in good.roster.items() if name != "west"}
    assert "RunUnknown" in approve(good.model_copy(update={"roster": incomplete}))[2]  # left out as contradictory
    assert approve(good, "--yes")[0] == 0 and decided(site, good) == "approved"


def test_a_study_without_keys_can_still_be_declined(served: Coordinator, site: Path) -> None:
    asked = masked(served, site).model_copy(update={"roster": {}})
    with pytest.raises(TrustError, match="no study"):  # the coordinator does not have it; here it holds
        enrol.decide(site, Offer(asked, "rosa", b"", b"", b"", ""), "declined")
    assert decided(site, asked) == "declined"


def test_approving_shows_who_takes_part_with_fingerprints(served: Coordinator, site: Path, approve: Approve) -> None:
    asked = masked(served, site)
    code, screen, _ = approve(asked, typed="n\n")
    assert code == 1 and decided(site, asked) is None
    for name in ("south", "west", "east"):
        numbers = served.home.roster.party(name).public_key.public_numbers()
        point = bytes([2 + numbers.y % 2]) + numbers.x.to_bytes(32, "big")
        digits = hashlib.sha256(point).hexdigest()
        assert f"{name} {digits[:4]} {digits[4:8]} {digits[8:12]} {digits[12:16]} " in screen
    assert screen.count("evaluates only") == 1
    own = keys.load_key(site / "keys" / "site.key").public_key()
    membership = next(finding for finding in findings(site) if finding.subject == "membership")
    assert membership.good and membership.sentence.endswith(enrol.fingerprint(keys.point_hex(own)))


def test_approving_says_who_sees_what_in_plain_words(served: Coordinator, site: Path, approve: Approve) -> None:
    path, asked = site / "site.yaml", masked(served, site)
    path.write_text(path.read_text().replace("least_protection: masked", "least_protection: plain"))
    said = {
        "masked": "the coordinator sees only sums over the sites",
        "sealed": "the coordinator sees YOUR site's own update and histograms; nobody can read them on the way",
        "plain": "YOUR site's own update and histograms, and so does whoever can look into its server",
    }
    for protection, sentence in said.items():
        for figures, word in ((True, "your own test AUROC"), (False, "none of your site alone")):
            evaluation = asked.evaluation.model_copy(update={"site_figures": figures})
            shown = asked.model_copy(update={"protection": protection, "evaluation": evaluation})
            code, screen, _ = approve(shown, typed="n\n")
            assert code == 1 and sentence in screen and f"(protection: {protection})" in screen and word in screen
            assert [other for other in said.values() if other in screen] == [sentence]


@pytest.mark.parametrize("least", ["masked", "sealed", "plain"])
def test_a_study_less_protected_than_the_policy_wants_is_refused(
    served: Coordinator, site: Path, approve: Approve, least: str
) -> None:
    path, order = site / "site.yaml", ["masked", "sealed", "plain"]
    path.write_text(path.read_text().replace("least_protection: masked", f"least_protection: {least}"))
    for protection in order:
        asked = masked(served, site).model_copy(update={"protection": protection})
        code, screen, error = approve(asked, "--yes")
        if order.index(protection) <= order.index(least):
            assert code == 0 and decided(site, asked) == "approved"
            continue
        assert code == 1 and decided(site, asked) is None
        assert error.startswith("PolicyForbids: ") and f"policy.least_protection in site.yaml is {least}" in error
        assert "would see this site's own model update" in error
        assert ("look into its server" in error) == (protection == "plain")
        assert "Seen by" in screen  # the person sees what was refused


def test_a_peer_whose_key_changed_has_to_be_asked_by_telephone(
    served: Coordinator, site: Path, approve: Approve
) -> None:
    first, other = masked(served, site), new_point()
    assert approve(first, "--yes")[0] == 0
    again = masked(served, site, "The same keys again")
    code, screen, _ = approve(again, "--yes")
    assert code == 0 and "changed since" not in screen
    hostile = masked(served, site, "Other key", south=other)
    approval = Consent.open(site, again.digest)
    assert approval is not None
    day = time.strftime("%Y-%m-%d", time.gmtime(approval.statement.time_ms / 1000))
    code, screen, error = approve(hostile, "--yes")
    assert code == 1 and f"The key of south changed since {day}" in screen and "ask them by telephone" in screen
    assert error.startswith("TrustError: the key of south changed, and --yes cannot answer for that")
    for typed in ("", "y\n", "south\n", enrol.fingerprint(first.roster["south"]) + "\n", "\n"):
        code, screen, error = approve(hostile, typed=typed)
        assert code == 1 and decided(site, hostile) is None
    right = enrol.fingerprint(other)
    assert approve(hostile, typed=f"{right}\nn\n")[0] == 1 and decided(site, hostile) is None
    assert approve(hostile, typed=f" {right.upper().replace(' ', '')} \ny\n")[0] == 0
    assert decided(site, hostile) == "approved"
    # From now on the new key is the known one, and the old one would be the change.
    assert approve(masked(served, site, "Once more", south=other), "--yes")[0] == 0
    assert approve(masked(served, site, "Back to the old key"), "--yes")[0] == 1


def test_each_changed_key_is_asked_for(served: Coordinator, site: Path, approve: Approve) -> None:
    assert approve(masked(served, site), "--yes")[0] == 0
    asked = masked(served, site, "Two", south=new_point(), east=new_point())
    assert "the key of south, east changed" in approve(asked, "--yes")[2]
    right = [enrol.fingerprint(asked.roster[name]) for name in ("south", "east")]
    assert "study names for east" in approve(asked, typed=f"{right[0]}\n{right[0]}\n")[2]
    assert approve(asked, typed=f"{right[0]}\n{right[1]}\ny\n")[0] == 0


def test_a_declined_study_teaches_no_keys(served: Coordinator, site: Path, approve: Approve) -> None:
    """Otherwise an attacker's key would become the known one by the very refusal of it."""
    good, hostile = masked(served, site), masked(served, site, "Other key", south=new_point())
    assert approve(good, "--yes")[0] == 0
    enrol.decide(site, Offer(hostile, "rosa", b"", b"", b"", ""), "declined")
    assert approve(masked(served, site, "Good again"), "--yes")[0] == 0
    assert approve(masked(served, site, "Bad again", south=hostile.roster["south"]), "--yes")[0] == 1


def private(served: Coordinator, site: Path, **change: Any) -> Study:
    """A masked study with distributed noise, as `fl-study submit` leaves it."""
    asked = masked(served, site, "Private")
    plan = {"mode": "distributed", "epsilon": 5, "clip_norm": 1, "sampling_rate": 1, "noise_multiplier": 9.0} | change
    facts = asked.model_dump(mode="json") | {"privacy": plan, "strategy": {"name": "fedsgd"}}
    facts["training"] |= {"balance": False}
    return Study.model_validate(facts)


def test_approving_a_private_study_says_what_it_promises_and_what_was_spent(
    served: Coordinator, site: Path, approve: Approve
) -> None:
    path = site / "site.yaml"
    path.write_text(path.read_text().replace("permit_without_privacy: true", "permit_without_privacy: false"))
    asked = private(served, site)
    code, screen, _ = approve(asked, "--yes")
    assert code == 0 and decided(site, asked) == "approved"
    for words in (
        "noise of 9 times the clip norm in each step, distributed",
        "per patient (add or remove one patient)",
        "against everybody else combined",
        "the coordinator and 1 of the 3 sites",
        "sums of gradients with noise",
        "was spent before; site.yaml permits 8 for one study",
        "Not in ε",
        "cannot be told yet",  # this site has no images: the first order checks
    ):
        assert words in screen, words


def test_a_private_study_that_breaks_its_word_or_the_policy_cannot_be_approved(
    served: Coordinator, site: Path, approve: Approve
) -> None:
    lying = private(served, site, noise_multiplier=0.5)
    assert "RunUnknown" in approve(lying, "--yes")[2], "a contradictory offer is left out"
    path = site / "site.yaml"
    path.write_text(path.read_text().replace("epsilon_per_study: 8 ", "epsilon_per_study: 0.1 "))
    asked = private(served, site)
    code, _, error = approve(asked, "--yes")
    assert code == 1 and error.startswith("PolicyForbids: ") and "epsilon_per_study in site.yaml is 0.1" in error
    assert decided(site, asked) is None


def test_a_study_that_the_patients_have_no_budget_for_cannot_be_approved(
    served: Coordinator, site: Path, approve: Approve, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fl_client.cohort import Cohort
    from fl_client.ingest import Index
    from models.labels import LabelTable

    asked = private(served, site)
    patients = [{f"{n:032x}"} for n in range(50)]
    ledger = Site.open(site).ledger
    before = Charge("ab" * 32, "run-1", 1, 1, PrivacyEvent(1.0, 1.0, 8))
    ledger.reserve(before, patients, Caps(100, 100, 100, 1e-5, 10))
    monkeypatch.setattr(Index, "open", classmethod(lambda cls, state: None))
    monkeypatch.setattr(
        Site, "source", property(lambda self: SimpleNamespace(labels=SimpleNamespace(table="t", targets={})))
    )
    monkeypatch.setattr(LabelTable, "open", classmethod(lambda cls, *given: None))
    monkeypatch.setattr(Cohort, "identities_of", staticmethod(lambda *given: patients))
    monkeypatch.setattr("fl_client.cli._own_data", lambda *given: "")
    code, screen, error = approve(asked, "--yes")
    assert code == 1 and error.startswith("BudgetExceeded: ") and decided(site, asked) is None
    assert "of your most used patient was spent before" in screen
