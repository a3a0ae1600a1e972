"""Rules of consent under ill will and in haste: no rule overtakes or gets around what a person decided, no file does harm."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from coordinator import Coordinator, coordinator, study
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from hospital import Hospital

from fl_client import enrol, node, rules
from fl_client.consent import Consent, Offer
from fl_client.policy import Pause, Rule
from fl_client.site import Site, SiteFile
from fl_client.worker import Worker
from models.study import Study, parse
from privacy import consortium_pb2 as pb
from privacy import wire
from privacy.calls import Caller
from privacy.errors import DocumentError, PrivacyError, TrustError, Unreachable

RULE: dict[str, Any] = {"researchers": ["rosa"], "epsilon": 6, "rounds": 10, "until": "2999-12-31"}
PLAN = {"epsilon": 5, "clip_norm": 1.0, "noise_multiplier": 2.0, "sampling_rate": 0.1}


def asked(name: str = "opacity", title: str = "Opacities", evaluation: Any = None, **plan: Any) -> Study:
    facts = study("north", "south", "west").model_dump(mode="json")
    facts |= {"name": name, "title": title, "protection": "masked", "privacy": PLAN | plan}
    facts["training"] |= {"balance": False}
    facts["evaluation"] |= evaluation or {}
    made = Study.model_validate(facts)
    made.check()
    return made


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Coordinator]:
    with coordinator(tmp_path) as demo:
        for name in ("south", "west"):
            demo.join(name)
        demo.join("rosa", "researcher")
        yield demo


@pytest.fixture
def home(served: Coordinator, tmp_path: Path) -> Path:
    enrol.join(str(served.home.invite("north", "site")), tmp_path / "site")
    path = tmp_path / "site" / "site.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"approve": [RULE]}))
    return tmp_path / "site"


def carried_out(home: Path) -> list[str]:
    return rules.carry_out(home, lambda sentence: None)


def decided(home: Path, offered: Study) -> str | None:
    found = Consent.open(home, offered.digest)
    return found.statement.decision if found else None


def decline(home: Path, offered: Study) -> None:
    enrol.decide(home, enrol.find_offer(home, offered.digest), "declined")


def test_a_rule_does_not_overtake_a_person_who_declines_meanwhile(
    served: Coordinator, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered, real = served.submit(asked()), rules.approving

    def slowly(site: Site, offer: Offer, today: Any) -> Any:
        found = real(site, offer, today)
        enrol.decide(home, offer, "declined")
        return found

    monkeypatch.setattr(rules, "approving", slowly)
    assert carried_out(home) == [] and decided(home, offered) == "declined"
    assert served.home.roster.decisions(offered.digest) == {"north": "declined"}


def test_a_refusal_outlives_its_file(served: Coordinator, home: Path) -> None:
    """The remedy for a damaged file is to remove it; the journal still knows what was decided."""
    offered = served.submit(asked())
    decline(home, offered)
    (home / "studies" / f"{offered.digest}.json").unlink()
    assert carried_out(home) == [] and decided(home, offered) is None
    with pytest.raises(TrustError, match="decided about the study before"):
        enrol.decide(home, enrol.find_offer(home, offered.digest), "approved", rule=1)


def test_a_declined_study_with_one_word_changed_waits_for_a_person(served: Coordinator, home: Path) -> None:
    decline(home, served.submit(asked()))
    again, other = served.submit(asked(title="Once more")), served.submit(asked("other"))
    assert carried_out(home) == [other.digest] and decided(home, again) is None


def test_a_paused_site_approves_nothing_by_rule(served: Coordinator, home: Path) -> None:
    offered = served.submit(asked())
    Pause(0.0, None).store(home)
    assert carried_out(home) == []
    Pause.path(home).unlink()
    assert carried_out(home) == [offered.digest]


def test_spare_rounds_and_noised_figures_count_against_a_rule(served: Coordinator, home: Path) -> None:
    spare = served.submit(asked("spare", spare_rounds=9, noise_multiplier=50.0))
    figures = {"select": "last", "site_figures": False, "bins": 50}
    noised = served.submit(asked("noised", evaluation=figures, figures="noised", figures_epsilon=100.0))
    fine = served.submit(asked("fine", evaluation=figures, figures="noised", figures_epsilon=2.0))
    assert carried_out(home) == [fine.digest]
    assert (decided(home, spare), decided(home, noised)) == (None, None)


def test_one_study_that_cannot_be_judged_or_answered_does_not_stop_the_others(
    served: Coordinator, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered, real = [served.submit(asked(name)) for name in ("one", "two", "three")], rules.approving

    def judge(site: Site, offer: Offer, today: Any) -> Any:
        if offer.study.name == "two":
            raise PrivacyError("cannot be computed")
        return real(site, offer, today)

    def unheard(*_: Any) -> None:
        raise Unreachable("nothing answers")

    monkeypatch.setattr(rules, "approving", judge)
    with monkeypatch.context() as patch:
        patch.setattr(Caller, "decide", unheard)
        assert set(carried_out(home)) == {offered[0].digest, offered[2].digest}
    assert [decided(home, one) for one in offered] == ["approved", None, "approved"]
    with Caller.open(home / "keys") as caller:
        enrol.redeliver(home, caller)
    assert served.home.roster.decisions(offered[0].digest) == {"north": "approved"}


def test_an_offer_that_is_not_genuine_is_one_line_however_often_it_is_asked_for(
    served: Coordinator, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offers = [pb.Offer(study=b"one"), pb.Offer(study=b"two")]
    monkeypatch.setattr(Caller, "offers", lambda _: offers)
    for _ in range(3):
        assert carried_out(home) == []
    lines = [json.loads(line)["kind"] for line in (home / "journal.jsonl").read_bytes().splitlines()]
    assert lines.count("offer-refused") == 2


def test_the_examples_of_the_template_are_read() -> None:
    lines = Path(__file__).parent.parent.joinpath("configs", "site.yaml").read_text().splitlines()
    begin = lines.index("# approve:")
    end = next(number for number in range(begin, len(lines)) if not lines[number].startswith("#"))
    settings = parse(SiteFile, "\n".join(["site: north", *(line[2:] for line in lines[begin:end])]), "example")
    assert settings.approve[0] == Rule(
        researchers=["alice"], epsilon=4, rounds=100, until="2027-01-31", networks=["small_cnn"]
    )
    hours = lines.index("  # hours:")
    text = ["site: north", "policy:", *(f"  {line[4:]}" for line in lines[hours : hours + 4])]
    assert str(parse(SiteFile, "\n".join(text), "example").policy.hours) == "mon/tue/wed/thu/fri from 19:00 to 06:00"


UNCONVERTIBLE = {
    "many digits": "site: north\npolicy: {maximum_rounds: " + "9" * 5000 + "}",
    "a number that is none": "site: !!int north",
    "a time that is none": "site: !!timestamp north",
    "a truth that is none": "site: !!bool north",
    "a map that is none": "site: !!map north",
    "binary digits without one": "site: 0b_",
    "code": "site: !!python/object/apply:os.system ['true']",
    "deep nesting": "site: " + "[" * 1100,
}


@pytest.mark.parametrize("name", UNCONVERTIBLE)
def test_a_site_yaml_that_the_parser_chokes_on_is_a_refusal_and_not_the_end_of_the_node(
    tmp_path: Path, name: str
) -> None:
    hospital = Hospital.open(tmp_path)
    before, idle = hospital.site, cast(Worker, SimpleNamespace(carry_out=lambda *_: pytest.fail("work")))
    (hospital.home / "site.yaml").write_text(UNCONVERTIBLE[name])
    with pytest.raises(DocumentError, match=r"site\.yaml"):
        Site.open(hospital.home)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    order = hospital.order()
    message = Message(order.to_records(), dst_node_id=5, message_type=order.message_type)
    message.metadata.__dict__["_message_id"] = "m1"
    report = wire.decode(node.answer(message, before, idle), *wire.REPORTS)
    assert isinstance(report, wire.Refusal) and report.code == "bad-document"
