"""The study: one identity for one protocol, and one strict reader for every document."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.study import YAML_BYTES_MAX, Study, parse, read
from privacy.errors import DocumentError, StudyConflict

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


CONFLICTS = [
    ("quorum: 2", "quorum: 3", "quorum 3 is more than the 2 training sites"),
    ("quorum: 2", "quorum: 2, evaluate_only: [north]", "a site is named twice"),
    ("privacy: none", "privacy: none\nevaluation: {validation: 0.4, test: 0.5}", "too few to train on"),
]


@pytest.mark.parametrize(("before", "after", "said"), CONFLICTS)
def test_contradictions_are_refused_with_a_sentence(before: str, after: str, said: str) -> None:
    study().check()
    with pytest.raises(StudyConflict, match=said):
        study(TEXT.replace(before, after)).check()


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
