"""Released packages: whole ones are read, and no altered, cut, enlarged or foreign one is."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from models import registry
from models.registry import FILES, SEALS, Package, pack
from models.study import Study
from privacy import keys
from privacy.errors import PackageRefused

KEY = ec.derive_private_key(7, ec.SECP256R1())
STUDY = Study.model_validate(
    {
        "name": "s",
        "title": "t",
        "purpose": "p",
        "task": {"targets": ["opacity"]},
        "training": {"rounds": 1},
        "protection": "plain",
        "privacy": "none",
        "participation": {"sites": ["north"], "quorum": 1},
    }
)
FACTS = {
    "name": "s",
    "version": "1.0.0",
    "digest": STUDY.digest,
    "run_id": "run-1",
    "lineage": {"parent": None, "round": 1},
    "heads": [],
    "created": "2026-01-01T00:00:00Z",
}


def files(**change: bytes) -> dict[str, bytes]:
    found = {
        "card.json": json.dumps({"digest": STUDY.digest, "run_id": "run-1", "selected_round": 1}).encode(),
        "card.md": b"# s\n",
        "model.safetensors": save({"layer": np.arange(6, dtype=np.float32)}),
        "sbom.cdx.json": b"{}",
        "study.json": STUDY.canonical(),
    }
    return found | {name.replace("__", "."): data for name, data in change.items()}


WHOLE = pack(FACTS, files(), KEY)


def contents(package: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(content: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", how) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return whole.getvalue()


def test_a_whole_package_gives_back_what_went_in() -> None:
    package = Package.read(WHOLE, trusted={registry.fingerprint(KEY.public_key())})
    assert (package.study, package.trusted, package.file_name) == (STUDY, True, "s-1.0.0.isocenter")
    assert package.tensors["layer"].tolist() == [0, 1, 2, 3, 4, 5]
    assert not Package.read(WHOLE).trusted, "nobody was named, so nobody is trusted"


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_no_byte_can_be_changed(place: int, change: int) -> None:
    altered = bytearray(WHOLE)
    altered[place] ^= change
    with pytest.raises(PackageRefused):
        Package.read(bytes(altered))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(WHOLE) - 1))
def test_no_byte_can_be_missing_at_the_end(length: int) -> None:
    with pytest.raises(PackageRefused):
        Package.read(WHOLE[:length])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_bytes_of_anything_else_are_refused(content: bytes) -> None:
    for whole in (content, WHOLE + content[:1] + b"x", b"x" + WHOLE):
        with pytest.raises(PackageRefused):
            Package.read(whole)


@pytest.mark.parametrize("name", [*SEALS, *FILES])
def test_every_file_is_needed_and_none_may_be_added(name: str) -> None:
    for content in (
        {kept: data for kept, data in contents(WHOLE).items() if kept != name},
        contents(WHOLE) | {f"../{name}": b"x"},
    ):
        with pytest.raises(PackageRefused, match="exactly the files"):
            Package.read(zipped(content))


def test_a_bomb_is_not_opened() -> None:
    with pytest.raises(PackageRefused, match="compressed"):
        Package.read(zipped(contents(WHOLE) | {"card.md": bytes(50_000_000)}, zipfile.ZIP_DEFLATED))


def test_another_signer_is_refused_where_one_is_named() -> None:
    other = ec.derive_private_key(8, ec.SECP256R1())
    with pytest.raises(PackageRefused, match="whom you do not trust"):
        Package.read(pack(FACTS, files(), other), trusted={registry.fingerprint(KEY.public_key())})
    with pytest.raises(PackageRefused, match="whom you do not trust"):
        Package.read(WHOLE, trusted=())


def test_a_manifest_signed_for_another_use_is_refused() -> None:
    content = contents(WHOLE)
    content["signature"] = keys.sign(KEY, keys.STUDY_SUBMIT, content["manifest.json"])
    with pytest.raises(PackageRefused, match="signature"):
        Package.read(registry._zipped(content))


@pytest.mark.parametrize("weights", [[np.nan], [np.inf], [], np.zeros(2, np.float64), np.zeros(2, np.int32)], ids=str)
def test_weights_that_are_not_finite_float32_are_neither_written_nor_read(weights: list[float]) -> None:
    array = np.array(weights, np.float32) if isinstance(weights, list) else weights
    model = save({"layer": array}) if array.size else save({})
    with pytest.raises(PackageRefused, match="weights"):
        pack(FACTS, files(model__safetensors=model), KEY)


def test_a_package_of_two_studies_is_refused() -> None:
    other = STUDY.model_copy(update={"title": "another"})
    for facts, content in (
        (FACTS, files(study__json=other.canonical())),
        (FACTS | {"name": "x"}, files()),
        (FACTS, files(card__json=json.dumps({"digest": other.digest}).encode())),
        (FACTS | {"version": "../1"}, files()),
    ):
        with pytest.raises(PackageRefused):
            pack(facts, content, KEY)


def test_a_registry_lists_by_version_and_says_which_are_refused(tmp_path: Path) -> None:
    for version in ("10.0.0", "9.0.0"):
        (tmp_path / f"s-{version}.isocenter").write_bytes(pack(FACTS | {"version": version}, files(), KEY))
    (tmp_path / "s-9.5.0.isocenter").write_bytes(b"x")
    found = registry.listing(tmp_path)
    whole = [package.manifest["version"] for _, package in found if isinstance(package, Package)]
    assert whole == ["9.0.0", "10.0.0"] and len(found) == 3
    with pytest.raises(PackageRefused):
        Package.open(tmp_path / "absent.isocenter")
