"""The study: one identity for one protocol, and one strict reader for every document."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models.study import YAML_BYTES_MAX, Study, parse, read
from privacy.errors import DocumentError, StudyConflict

UNHURRIED = settings(max_examples=50, deadline=None)  # a machine under load is no defect

TEXT = """
name: opacity
title: Opacity
purpose: A test.
task: {targets: [opacity]}
training: {rounds: 4}
protection: plain
privacy: none
participation: {sites: [north, south], quorum: 2}
"""


def study(text: str = TEXT) -> Study:
    return parse(Study, text, "study.yaml")


def test_the_digest_is_the_documented_hash_of_the_canonical_form() -> None:
    """Rebuilt here from the documentation: SHA-256 over a label, a line feed and sorted JSON with every default."""
    plain = json.dumps(study().model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert study().digest == hashlib.sha256(b"isocenter/v1/study\n" + plain.encode()).hexdigest()


def test_defaults_written_out_and_the_order_of_keys_do_not_change_the_identity() -> None:
    lines = TEXT.strip().splitlines()
    assert study("\n".join(reversed(lines))).digest == study().digest
    assert study(TEXT + "version: 1\nstrategy: {name: fedavg}\n").digest == study().digest


@pytest.mark.parametrize(
    ("before", "after"),
    [("rounds: 4", "rounds: 5"), ("quorum: 2", "quorum: 1"), ("title: Opacity", "title: Opacities"), ("south", "east")],
)
def test_one_changed_value_is_another_study(before: str, after: str) -> None:
    assert study(TEXT.replace(before, after)).digest != study().digest


def test_a_canonical_form_is_read_back_and_nothing_else_is() -> None:
    text = study().canonical()
    assert Study.from_canonical(text) == study()
    facts = json.loads(text)
    others: list[bytes] = [
        text + b" ",
        b" " + text,
        json.dumps(facts).encode(),
        json.dumps(dict(reversed(facts.items())), separators=(",", ":")).encode(),
        text.replace(b'"rounds":4', b'"rounds":4.0'),
        text.replace(b'"rounds":4', b'"rounds":"4"'),
        text.replace(b'"balance":true,', b""),
        text.replace(b'"name":"opacity"', b'"name":"opacity","name":"opacity"', 1),
        text[:-1],
        b"",
        b"[]",
        b"null",
        b"\xff",
    ]
    for other in others:
        with pytest.raises(DocumentError):
            Study.from_canonical(other)


@UNHURRIED
@given(
    rounds=st.integers(1, 10_000),
    rate=st.floats(1e-9, 10, exclude_min=True),
    title=st.text(min_size=1, max_size=200).filter(lambda text: text.isprintable()),
    sites=st.lists(st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True), min_size=1, max_size=5, unique=True),
)
def test_every_study_survives_its_canonical_form(rounds: int, rate: float, title: str, sites: list[str]) -> None:
    facts = study().model_dump(mode="json") | {"title": title}
    facts["training"] |= {"rounds": rounds, "learning_rate": rate}
    facts["participation"] |= {"sites": sites, "quorum": 1}
    made = Study.model_validate(facts)
    again = Study.from_canonical(made.canonical())
    assert again == made and again.digest == made.digest


KEYS = {
    "north": "02" + "ab" * 32,
    "south": "03" + "cd" * 32,
    "west": "02" + "ef" * 32,
}
ROSTER = "roster: {north: '" + KEYS["north"] + "', south: '" + KEYS["south"] + "'}"
MASKED = TEXT.replace("plain", "masked").replace("[north, south], quorum: 2", "[north, south, west], quorum: 3")

CONFLICTS = [
    ("quorum: 2", "quorum: 3", "quorum 3 is more than the 2 training sites"),
    ("quorum: 2", "quorum: 2, evaluate_only: [north]", "a site is named twice"),
    ("privacy: none", "privacy: none\nevaluation: {validation: 0.4, test: 0.5}", "too few to train on"),
    ("protection: plain\n", "", "masked needs 3 training sites and a quorum of 3"),
    ("privacy: none", "privacy: none\nroster: {north: '" + KEYS["north"] + "'}", "keys of other sites"),
    ("privacy: none", "privacy: none\n" + ROSTER.replace("south", "west"), "keys of other sites"),
    ("privacy: none", "privacy: none\n" + ROSTER.replace("}", f", west: '{KEYS['west']}'}}"), "keys of other sites"),
    (
        "plain\nprivacy: none\nparticipation: {sites: [north, south], quorum: 2",
        "masked\nprivacy: none\nparticipation: {sites: [north, south], evaluate_only: [west], quorum: 3",
        "masked needs 3 training sites",
    ),
]


@pytest.mark.parametrize(("before", "after", "said"), CONFLICTS)
def test_contradictions_are_refused_with_a_sentence(before: str, after: str, said: str) -> None:
    study().check()
    with pytest.raises(StudyConflict, match=said):
        study(TEXT.replace(before, after)).check()


@pytest.mark.parametrize(
    ("sites", "quorum", "more", "sound"),
    [
        ("[north, south, west]", 3, "", True),
        ("[north, south, west, east]", 3, "", True),
        ("[north, south, west, east]", 2, "", False),
        ("[north, south, west]", 2, "", False),
        ("[north, south]", 2, "", False),
        ("[north]", 1, "", False),
        ("[north, south]", 2, ", evaluate_only: [west, east]", False),
    ],
)
def test_a_masked_sum_of_fewer_than_three_is_no_secret(sites: str, quorum: int, more: str, sound: bool) -> None:
    """Sites that only evaluate do not count: they are in no sum of updates."""
    part = f"{{sites: {sites}, quorum: {quorum}{more}}}"
    text = TEXT.replace("{sites: [north, south], quorum: 2}", part)
    study(text).check()
    study(text.replace("plain", "sealed")).check()
    if sound:
        study(text.replace("plain", "masked")).check()
    else:
        with pytest.raises(StudyConflict, match="protection: masked needs 3"):
            study(text.replace("plain", "masked")).check()


def test_a_study_that_says_nothing_of_protection_is_masked_with_words_of_32_bits() -> None:
    quiet = study(TEXT.replace("protection: plain\n", ""))
    assert (quiet.protection, quiet.encoding_bits, quiet.roster, quiet.aggregator) == ("masked", 32, {}, "")
    assert quiet.evaluation.site_figures is True


@pytest.mark.parametrize("protection", ["none", "Masked", "encrypted", "", "true", "[masked]", "masked, plain"])
def test_another_word_for_protection_is_refused(protection: str) -> None:
    with pytest.raises(DocumentError, match="protection"):
        study(TEXT.replace("protection: plain", f"protection: {protection}"))


def test_words_have_16_24_32_or_64_bits() -> None:
    for bits in (16, 24, 32, 64):
        assert study(TEXT + f"encoding_bits: {bits}\n").encoding_bits == bits
    for bits in ("8", "31", "0", "-32", "128", "31.5", "'32'", "true", "[32]"):
        with pytest.raises(DocumentError, match="encoding_bits"):
            study(TEXT + f"encoding_bits: {bits}\n")


BAD_POINTS = [
    *("", "02" + "ab" * 31, "02" + "ab" * 33, "04" + "ab" * 32, "02" + "AB" * 32, "02" + "zz" * 32, "ab" * 32),
    *(" 02" + "ab" * 32, "02" + "ab" * 32 + "\n", "John Smith"),
]


def test_a_roster_holds_names_and_compressed_points_and_nothing_else() -> None:
    facts = study().model_dump(mode="json")
    assert Study.model_validate(facts | {"roster": KEYS}).roster == KEYS
    for point in BAD_POINTS:
        with pytest.raises(ValidationError):
            Study.model_validate(facts | {"roster": {"north": point}})
    for name in ("North", "st. mary", "", "north\n", "1st", "n" * 33):
        with pytest.raises(ValidationError):
            Study.model_validate(facts | {"roster": {name: KEYS["north"]}})
    with pytest.raises(ValidationError):
        Study.model_validate(facts | {"roster": {f"s{i}": KEYS["north"] for i in range(1001)}})


def test_the_aggregators_key_is_32_bytes_in_hex_or_not_there() -> None:
    facts = study().model_dump(mode="json")
    for key in ("", "0f" * 32):
        assert Study.model_validate(facts | {"aggregator": key}).aggregator == key
    for key in ("0F" * 32, "0f" * 31, "0f" * 33, "0f" * 32 + "\n", "\n", " ", None, "xy" * 32):
        with pytest.raises(ValidationError):
            Study.model_validate(facts | {"aggregator": key})


# Keys in the study ---------------------------------------------------------------------------------------------------


def test_with_keys_names_the_key_of_everyone_in_the_study_and_of_nobody_else() -> None:
    everybody = KEYS | {"east": "03" + "00" * 32, "stranger": "02" + "11" * 32}
    plan = study(MASKED.replace("quorum: 3", "quorum: 3, evaluate_only: [east]"))
    keyed = plan.with_keys(everybody, "0f" * 32)
    keyed.check()
    assert keyed.roster == {name: everybody[name] for name in ("east", "north", "south", "west")}
    assert keyed.aggregator == "0f" * 32
    assert (plan.roster, plan.aggregator) == ({}, "")
    rest = {"roster", "aggregator"}
    assert keyed.model_dump(exclude=rest) == plan.model_dump(exclude=rest)
    assert Study.from_canonical(keyed.canonical()) == keyed


def test_one_site_that_is_not_enrolled_is_named_with_all_others() -> None:
    plan = study(MASKED.replace("quorum: 3", "quorum: 3, evaluate_only: [east]"))
    with pytest.raises(StudyConflict, match="not enrolled in the consortium: south, east"):
        plan.with_keys({"north": KEYS["north"], "west": KEYS["west"]}, "0f" * 32)


def test_every_key_is_part_of_the_studys_identity_and_the_order_of_the_roster_is_not() -> None:
    plan = study(MASKED)
    keyed = plan.with_keys(KEYS, "0f" * 32)
    assert plan.with_keys(dict(reversed(KEYS.items())), "0f" * 32).digest == keyed.digest
    assert keyed.with_keys(KEYS, "0f" * 32) == keyed
    swapped = KEYS | {"north": KEYS["south"], "south": KEYS["north"]}
    others = [plan, plan.with_keys(KEYS, "0e" * 32), plan.with_keys(swapped, "0f" * 32)]
    others += [plan.with_keys(KEYS | {name: "02" + "77" * 32}, "0f" * 32) for name in KEYS]
    assert len({other.digest for other in [*others, keyed]}) == len(others) + 1


def test_a_canonical_form_with_its_roster_out_of_order_is_no_study() -> None:
    text = study(MASKED).with_keys(KEYS, "0f" * 32).canonical().decode()
    facts = json.loads(text)
    facts["roster"] = dict(reversed(facts["roster"].items()))
    keys_first = json.dumps(dict(sorted(facts.items())), separators=(",", ":"), ensure_ascii=False)
    assert json.loads(keys_first) == json.loads(text) and keys_first != text
    with pytest.raises(DocumentError, match="canonical"):
        Study.from_canonical(keys_first.encode())


def test_what_is_learned_does_not_depend_on_keys_or_protection_but_on_everything_else() -> None:
    plan = study(MASKED)
    same = [plan.with_keys(KEYS, "0f" * 32), plan.with_keys(KEYS, "0e" * 32)]
    same += [study(MASKED.replace("masked", word)) for word in ("sealed", "plain")]
    same += [study(MASKED + f"encoding_bits: {bits}\n") for bits in (16, 24, 64)]
    assert {each.learned for each in same} == {plan.learned}
    assert len({each.digest for each in [*same, plan]}) == len(same) + 1
    others = [("rounds: 4", "rounds: 5"), ("west]", "east]"), ("quorum: 3", "quorum: 2"), ("[opacity]", "[effusion]")]
    assert len({study(MASKED.replace(*other)).learned for other in others} | {plan.learned}) == len(others) + 1


@pytest.mark.parametrize("deep", [False, True])
def test_a_copy_with_other_settings_has_an_identity_of_its_own(deep: bool) -> None:
    """Identities are computed once for each study; a copy must not keep those of its original."""
    plan = study(MASKED)
    before = (plan.digest, plan.learned, plan.canonical())
    other = plan.model_copy(update={"title": "Another"}, deep=deep)
    written = study(MASKED.replace("title: Opacity", "title: Another"))
    assert (other.digest, other.learned, other.canonical()) == (written.digest, written.learned, written.canonical())
    assert other == written and other != plan
    assert (plan.digest, plan.learned, plan.canonical()) == before
    assert (other.digest, other.learned) != before[:2]


MALFORMED: list[tuple[str, str]] = [
    ("", "line 1"),
    ("- a\n- b", "expected keys and values"),
    ("name: [", "line"),
    ("name: !!python/object/apply:os.system ['id']", "line 1"),
    ("? [a, b]\n: c", "plain word"),
    ("a: &x [1]\nb: *x", "aliases"),
    ("name: a\nname: b", "stands twice"),
    ("[" * 5000, "not YAML"),
    ("{" * 3000, "not YAML"),
    ("name: \x00", "study.yaml"),
]


@pytest.mark.parametrize(("text", "said"), MALFORMED, ids=range(len(MALFORMED)))
def test_what_is_no_document_is_refused(text: str, said: str) -> None:
    with pytest.raises(DocumentError, match=said):
        study(text)


def test_files_that_cannot_be_documents_are_refused(tmp_path: Path) -> None:
    large, binary = tmp_path / "large.yaml", tmp_path / "binary.yaml"
    large.write_text("#" * (YAML_BYTES_MAX + 1))
    binary.write_bytes(b"name: \xff\xfe")
    for path in (large, binary, tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(DocumentError, match=path.name):
            read(Study, path)


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "2026-01-01"])
def test_words_that_other_yaml_readers_change_stay_words(word: str) -> None:
    assert study(TEXT.replace("title: Opacity", f"title: {word}")).title == word


@pytest.mark.parametrize(("given", "known"), [("lerning_rate", "learning_rate"), ("epochs", "local_epochs")])
def test_an_unknown_key_names_the_nearest_known_one(given: str, known: str) -> None:
    with pytest.raises(DocumentError, match=rf"study.yaml, line 6: unknown key 'training.{given}'.*{known}"):
        study(TEXT.replace("rounds: 4", f"rounds: 4, {given}: 1"))


@UNHURRIED
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda x: st.dictionaries(st.text(max_size=5), x, max_size=4) | st.lists(x, max_size=4),
        max_leaves=12,
    )
)
def test_any_value_in_any_place_is_read_or_refused_and_never_crashes(value: Any) -> None:
    for key in ("task", "training", "participation", "protection", "evaluation"):
        facts = study().model_dump(mode="json") | {key: value}
        try:
            parse(Study, json.dumps(facts), "study.yaml").check()
        except DocumentError as error:
            assert "study.yaml" in str(error) or isinstance(error, StudyConflict)


# Differential privacy.

PRIVATE = """
name: private
title: Private
purpose: A test.
task: {targets: [opacity]}
training: {rounds: 10, balance: false}
privacy: {mode: local, epsilon: 4, clip_norm: 1.0, sampling_rate: 0.25, steps: 2}
participation: {sites: [north, south, east, west], quorum: 3}
"""
SHARED = PRIVATE.replace("mode: local", "mode: distributed").replace("steps: 2", "steps: 1")
SHARED += "strategy: {name: fedsgd}\n"


def test_no_privacy_still_has_to_be_said_and_nothing_else_counts_as_no() -> None:
    with pytest.raises(DocumentError, match="privacy"):
        study(TEXT.replace("privacy: none\n", ""))
    for other in ("no", "false", "0", "{}", "[]", "{mode: local}"):
        with pytest.raises(DocumentError):
            study(TEXT.replace("privacy: none", f"privacy: {other}"))
    with pytest.raises(DocumentError, match="line 7"):
        study(PRIVATE.replace("epsilon: 4", "epsilonn: 4"))


@pytest.mark.parametrize(
    "change",
    [
        "epsilon: 0", "epsilon: -1", "epsilon: .nan", "epsilon: .inf", "delta: 0", "delta: 1", "delta: 0.01", "clip_norm: 0",
        "clip_norm: -1", "clip_norm: .inf", "sampling_rate: 0", "sampling_rate: 1.1", "noise_multiplier: 0", "steps: 0",
        "noise_multiplier: .nan", "images_per_patient: 0", "mode: central", "colluding: -1",
    ],
)  # fmt: skip
def test_settings_of_privacy_out_of_range_are_refused(change: str) -> None:
    key = change.split(":", maxsplit=1)[0]
    text = (
        PRIVATE.replace("epsilon: 4", change)
        if key == "epsilon"
        else PRIVATE.replace("clip_norm: 1.0", f"clip_norm: 1.0, {change}")
    )
    if key in ("clip_norm", "mode", "sampling_rate", "steps"):
        old = {
            "clip_norm": "clip_norm: 1.0",
            "mode": "mode: local",
            "sampling_rate": "sampling_rate: 0.25",
            "steps": "steps: 2",
        }
        text = PRIVATE.replace(old[key], change)
    with pytest.raises(DocumentError, match="line 7"):
        study(text)


def test_the_noise_that_is_filled_in_keeps_epsilon_and_is_the_least() -> None:
    made = study(PRIVATE).with_noise()
    assert made.privacy != "none" and made.privacy.noise_multiplier is not None
    made.check()
    assert 3.95 < made.spends(made.budgeted_rounds) <= 4 and made.budgeted_rounds == 12
    assert made.with_noise() == made, "a noise that is said is kept"
    assert study(TEXT).with_noise() == study(TEXT) and study(TEXT).spends(4) == 0
    less = made.privacy.model_copy(update={"noise_multiplier": 0.95 * made.privacy.noise_multiplier})
    with pytest.raises(StudyConflict, match=r"spends an ε of 4\.\d+ over 12 rounds, more than privacy\.epsilon 4"):
        made.model_copy(update={"privacy": less}).check()


def test_the_noise_belongs_to_the_identity_of_a_study_and_is_read_back() -> None:
    made = study(PRIVATE).with_noise()
    assert made.digest != study(PRIVATE).digest
    assert Study.from_canonical(made.canonical()) == made


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("balance: false", "balance: true", "class counts"),
        ("steps: 1", "steps: 2", "one step a round"),
        ("strategy: {name: fedsgd}", "strategy: {name: fedavg}", "belong together"),
        ("mode: distributed", "mode: local", "belong together"),
        ("sampling_rate: 0.25", "sampling_rate: 0.25, colluding: 3", "no honest site"),
        ("quorum: 3}", "quorum: 3}\nprotection: sealed", "needs protection: masked"),
        ("quorum: 3}", "quorum: 3}\nencoding_bits: 16", "encoding_bits"),
    ],
)
def test_what_would_break_the_promise_is_a_conflict(before: str, after: str, sentence: str) -> None:
    """Pitfalls 3, 8: class weights from private counts, distributed noise credited to local steps."""
    study(SHARED).check()
    with pytest.raises(StudyConflict, match=sentence):
        study(SHARED.replace(before, after)).check()


def test_fedsgd_without_privacy_is_a_conflict() -> None:
    with pytest.raises(StudyConflict, match="fedsgd"):
        study(TEXT + "strategy: {name: fedsgd}\n").check()


def test_statements_name_everything_that_an_epsilon_needs() -> None:
    """Pitfall 13."""
    local, shared = study(PRIVATE).with_noise().statements(), study(SHARED).with_noise().statements()
    assert [s.tier for s in local] == ["everybody"]
    assert [s.tier for s in shared] == ["everybody", "coordinator", "lying-coordinator"]
    for statement in [*local, *shared]:
        sentence = statement.sentence()
        for word in (
            "per patient",
            "add or remove one patient",
            "δ = 1e-05",
            "Poisson sampling at the rate 0.25",
            "against",
        ):
            assert word in sentence
    assert shared[1].epsilon < shared[0].epsilon <= 4
    assert study(TEXT).statements() == []


@pytest.mark.parametrize(("patients", "rate"), [(1, 0.01), (50, 0.5), (2000, 0.032), (3, 1.0), (100_000, 0.001)])
def test_the_cap_of_a_batch_is_eight_deviations_above_what_is_expected(patients: int, rate: float) -> None:
    text = PRIVATE.replace("sampling_rate: 0.25", f"sampling_rate: {rate}")
    plan = study(text).privacy
    assert plan != "none"
    cap = plan.batch_max(patients)
    assert 1 <= cap <= patients
    assert cap == patients or cap >= patients * rate + 8 * (patients * rate * (1 - rate)) ** 0.5


@pytest.mark.parametrize("hidden", ["\x1b[2J", "\r", "\x07", "\u202e", "\u200b", "\x9b", "\u2028", "\ue000"])
@pytest.mark.parametrize("field", ["title", "purpose"])
def test_no_character_of_a_study_can_rewrite_the_screen_on_which_it_is_approved(field: str, hidden: str) -> None:
    made = study().model_copy(update={field: f"harmless{hidden}text"})
    with pytest.raises(DocumentError):
        Study.from_canonical(made.canonical())
    lines = study().model_copy(update={"purpose": "Two lines,\nas YAML makes them. Größe \u2265 5 mm."})
    assert Study.from_canonical(lines.canonical()) == lines
