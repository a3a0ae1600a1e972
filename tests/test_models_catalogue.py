"""Pulling published models: what is whole gets its place in one step, and nothing else ever does."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from models import catalogue, exporting, networks, registry
from models.catalogue import Notice
from models.registry import Package, pack
from models.study import Study
from privacy import heads, keys
from privacy.errors import (
    DocumentError,
    IsocenterError,
    MessageMalformed,
    PackageRefused,
    RunUnknown,
    SignatureInvalid,
    Unreachable,
)
from privacy.journal import Journal

RESEARCHER = ec.derive_private_key(7, ec.SECP256R1())
COORDINATOR = ec.derive_private_key(8, ec.SECP256R1())
STRANGER = ec.derive_private_key(9, ec.SECP256R1())
STUDY = Study.model_validate(
    {
        "name": "small",
        "title": "t",
        "purpose": "p",
        "task": {"targets": ["opacity"]},
        "images": {"size_px": 32},
        "network": {"name": "linear"},
        "training": {"rounds": 1},
        "protection": "plain",
        "privacy": "none",
        "participation": {"sites": ["north"], "quorum": 1},
    }
)
WEIGHTS = exporting.named_weights(STUDY, networks.to_vector(networks.build(STUDY)))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    journal = Journal(tmp_path_factory.mktemp("journal") / "journal.jsonl")
    journal.append("founded")
    return vars(heads.own_head(journal, heads.COORDINATOR, COORDINATOR))


def make(head: dict[str, Any], version: str = "1.0.0", key: Any = RESEARCHER, **changed: Any) -> bytes:
    facts = {
        "name": "small",
        "version": version,
        "digest": STUDY.digest,
        "run_id": "run-1",
        "lineage": {"parent": None, "round": 1},
        "heads": [head],
        "coordinator": keys.point_hex(COORDINATOR.public_key()),
        "created": "2026-01-01T00:00:00Z",
    }
    card = {"digest": STUDY.digest, "run_id": "run-1", "selected_round": 1}
    files = {
        "card.json": json.dumps(card).encode(),
        "card.md": b"# small\n",
        "model.safetensors": WEIGHTS,
        "sbom.cdx.json": b"{}",
        "study.json": STUDY.canonical(),
    }
    return pack(facts | changed, files, key)


def notice_of(package: bytes, **changed: Any) -> Notice:
    made = Notice.of(Package.read(package), len(package), "rosa", "2026-01-31T12:00:00Z")
    return replace(made, **changed)


@dataclass
class Shop:
    """A coordinator that serves what a test wants it to. `cuts`: after so many bytes of a call the line breaks, call by call."""

    notices: list[tuple[bytes, bytes]]
    content: dict[str, bytes]
    cuts: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, *packages: bytes) -> "Shop":
        notices = [notice_of(package) for package in packages]
        return cls(
            [(one.body(), keys.sign(COORDINATOR, keys.MODEL_NOTICE, one.body())) for one in notices],
            {keys.digest(package): package for package in packages},
        )

    def published(self) -> list[tuple[bytes, bytes]]:
        return self.notices

    def fetch(self, sha256: str, first: int) -> Iterator[bytes]:
        self.asked.append(first)
        rest = self.content[sha256][first:]
        end = self.cuts.pop(0) if self.cuts else len(rest)
        for place in range(0, min(end, len(rest)), 100):
            yield rest[place : min(place + 100, end)]
        if end < len(rest):
            raise Unreachable("the line broke")


def fetch(shop: Shop, folder: Path, notice: Notice | None = None, **how: Any) -> tuple[Path, Package]:
    public = COORDINATOR.public_key()
    found = notice or catalogue.find(shop, public, "small")
    return catalogue.fetch(shop, found, public, folder, **how)


def nothing_there(folder: Path) -> bool:
    return not folder.exists() or not any(folder.iterdir())


def test_a_published_model_is_pulled_whole_and_only_once(head: dict[str, Any], tmp_path: Path) -> None:
    package = make(head)
    shop, seen = Shop.of(package), list[int]()
    path, found = fetch(shop, tmp_path / "models", tell=seen.append)
    assert path.read_bytes() == package and found.trusted and seen == sorted(seen) and seen[-1] == len(package)
    assert [entry.name for entry in path.parent.iterdir()] == ["small-1.0.0.isocenter"]
    fetch(shop, tmp_path / "models")
    assert shop.asked == [0], "what is there is checked, and not fetched again"


def test_the_latest_version_is_the_one_with_the_greatest_number(head: dict[str, Any]) -> None:
    shop, public = Shop.of(*(make(head, version) for version in ("9.0.0", "10.0.0", "2.1"))), COORDINATOR.public_key()
    assert catalogue.find(shop, public, "small").version == "10.0.0"
    assert catalogue.find(shop, public, "small@2.1").version == "2.1"
    for wanted in ("small@3", "large", "small@", "../small", ""):
        with pytest.raises(RunUnknown):
            catalogue.find(shop, public, wanted)


def test_a_fetch_goes_on_after_every_cut_and_after_a_kill(head: dict[str, Any], tmp_path: Path) -> None:
    package = make(head)
    shop = Shop.of(package)
    shop.cuts = [1000, 250, 0]
    with pytest.raises(Unreachable, match="no more came") as caught:
        fetch(shop, tmp_path)
    assert "goes on" in caught.value.remedy and shop.asked == [0, 1000, 1250]
    assert not (tmp_path / "small-1.0.0.isocenter").exists()
    path, _ = fetch(shop, tmp_path)
    assert shop.asked[3:] == [1250] and path.read_bytes() == package
    assert len(list(tmp_path.iterdir())) == 1


def test_what_lay_there_from_an_attack_is_not_built_upon(head: dict[str, Any], tmp_path: Path) -> None:
    """A changed part of an earlier fetch is found by the hash of the whole, removed, and the next fetch begins anew."""
    package = make(head)
    shop = Shop.of(package)
    shop.cuts = [1000, 0]
    with pytest.raises(Unreachable):
        fetch(shop, tmp_path)
    (part,) = tmp_path.iterdir()
    part.write_bytes(bytes(1000))
    with pytest.raises(PackageRefused, match="SHA-256"):
        fetch(shop, tmp_path)
    assert nothing_there(tmp_path)
    fetch(shop, tmp_path)


@pytest.mark.parametrize("how", ["truncated", "swapped", "longer", "flipped", "empty"])
def test_other_bytes_than_those_announced_never_get_a_place(how: str, head: dict[str, Any], tmp_path: Path) -> None:
    package, other = make(head), make(head, "2.0.0")
    shop, sha256 = Shop.of(package), keys.digest(package)
    shop.content[sha256] = {
        "truncated": package[:-1],
        "swapped": (other + bytes(10))[: len(package)],
        "longer": package + b"x",
        "flipped": package[:500] + bytes([package[500] ^ 1]) + package[501:],
        "empty": b"",
    }[how]
    with pytest.raises(Unreachable if how in ("truncated", "empty") else PackageRefused):
        fetch(shop, tmp_path)
    assert not (tmp_path / "small-1.0.0.isocenter").exists()
    assert how in ("truncated", "empty") or nothing_there(tmp_path)


def test_more_than_is_permitted_or_announced_is_not_written(head: dict[str, Any], tmp_path: Path) -> None:
    package = make(head)
    shop = Shop.of(package)
    with pytest.raises(PackageRefused, match="at most") as caught:
        fetch(shop, tmp_path, most=len(package) - 1)
    assert "--max-mib" in caught.value.remedy and shop.asked == []

    class Endless(Shop):
        sent = 0

        def fetch(self, sha256: str, first: int) -> Iterator[bytes]:
            while True:
                self.sent += 1000
                yield bytes(1000)

    endless = Endless(shop.notices, {})
    with pytest.raises(PackageRefused, match="more bytes"):
        fetch(endless, tmp_path)
    assert endless.sent <= len(package) + 1000 and nothing_there(tmp_path)


def test_an_older_version_is_not_passed_off_as_a_newer_one(head: dict[str, Any], tmp_path: Path) -> None:
    """Even by the coordinator's own signature: the researcher signed name and version, too."""
    package = make(head)
    for changed in (
        {"version": "2.0.0"},
        {"name": "large"},
        {"run_id": "run-2"},
        {"digest": "0" * 64},
        {"parent": "0" * 64},
    ):
        with pytest.raises(PackageRefused, match=next(iter(changed))):
            fetch(Shop.of(package), tmp_path, notice_of(package, **changed))
    assert nothing_there(tmp_path)


def test_a_package_of_another_signer_or_coordinator_is_refused(head: dict[str, Any], tmp_path: Path) -> None:
    package = make(head, key=STRANGER)
    signer = registry.fingerprint(RESEARCHER.public_key())
    with pytest.raises(PackageRefused, match="whom you do not trust"):
        fetch(Shop.of(package), tmp_path, notice_of(package, signer=signer))
    untied = make(head, heads=[], coordinator="")
    with pytest.raises(PackageRefused, match="not tied"):
        fetch(Shop.of(untied), tmp_path)
    assert nothing_there(tmp_path)


def test_heads_are_checked_when_a_package_is_read(head: dict[str, Any]) -> None:
    for changed in (
        {"heads": [head | {"lines": 5}]},
        {"coordinator": keys.point_hex(STRANGER.public_key())},
        {"coordinator": ""},
        {"coordinator": "no key"},
        {"heads": []},
        {"heads": [head | {"signature": "x"}]},
        {"heads": ["x"]},
    ):
        with pytest.raises(PackageRefused):
            make(head, **changed)


def test_lineage_holds_together_or_nothing_is_read(head: dict[str, Any]) -> None:
    for changed in (
        {"lineage": {"parent": "0" * 64, "round": 1}},
        {"lineage": {"parent": None, "round": 2}},
        {"run_id": "run-2"},
        {"lineage": {}},
    ):
        with pytest.raises(PackageRefused):
            make(head, **changed)


def test_unsigned_notices_and_two_of_one_version_are_refused(head: dict[str, Any]) -> None:
    package, public = make(head), COORDINATOR.public_key()
    shop = Shop.of(package)
    body = notice_of(package).body()
    for signature in (
        b"",
        keys.sign(STRANGER, keys.MODEL_NOTICE, body),
        keys.sign(COORDINATOR, keys.STUDY_OFFER, body),
    ):
        with pytest.raises(SignatureInvalid):
            catalogue.published(Shop([(body, signature)], {}), public)
    with pytest.raises(MessageMalformed, match="two models"):
        catalogue.published(Shop(shop.notices * 2, {}), public)


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "../../etc/cron"},
        {"name": "a/b"},
        {"name": ""},
        {"version": "../1"},
        {"version": "1/2"},
        {"version": "1.0.0.0"},
        {"sha256": "../" + "0" * 61},
        {"size": 0},
        {"size": 2**60},
        {"size": True},
        {"size": "5"},
        {"researcher": "ro sa"},
        {"published": "2026"},
        {"run_id": "../r"},
        {"parent": "x"},
    ],
    ids=str,
)
def test_a_notice_with_a_path_or_a_false_number_is_none(changed: dict[str, Any], head: dict[str, Any]) -> None:
    body = notice_of(make(head), **changed).body()
    signed = (body, keys.sign(COORDINATOR, keys.MODEL_NOTICE, body))
    with pytest.raises(MessageMalformed):
        catalogue.published(Shop([signed], {}), COORDINATOR.public_key())


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"[" * 5000, b'{"form":1}'])
def test_bytes_that_are_no_notice_are_refused(body: bytes) -> None:
    with pytest.raises(MessageMalformed):
        Notice.read(body)


def test_another_file_of_the_name_is_never_overwritten(head: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "small-1.0.0.isocenter"
    path.write_bytes(b"somebody's own file")
    with pytest.raises(PackageRefused):
        fetch(Shop.of(make(head)), tmp_path)
    assert path.read_bytes() == b"somebody's own file"


def test_a_link_in_place_of_the_part_is_not_followed(head: dict[str, Any], tmp_path: Path) -> None:
    package, elsewhere = make(head), tmp_path / "elsewhere"
    elsewhere.write_bytes(b"")
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / f".small-1.0.0.isocenter.{keys.digest(package)[:12]}.part").symlink_to(elsewhere)
    with pytest.raises((OSError, IsocenterError)):
        fetch(Shop.of(package), folder)
    assert elsewhere.read_bytes() == b""


def test_two_at_a_time_do_not_write_into_one_file(head: dict[str, Any], tmp_path: Path) -> None:
    package = make(head)

    class Greedy(Shop):
        def fetch(self, sha256: str, first: int) -> Iterator[bytes]:
            with pytest.raises(DocumentError, match="another process"):
                fetch(Shop(self.notices, self.content), tmp_path)
            yield from super().fetch(sha256, first)

    shop = Shop.of(package)
    path, _ = fetch(Greedy(shop.notices, shop.content), tmp_path)
    assert path.read_bytes() == package
