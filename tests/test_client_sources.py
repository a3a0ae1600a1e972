"""Zips are folders: every member is counted, damaged and hostile ones have a reason, and nothing is unpacked by their word."""

import io
import struct
import zipfile
from pathlib import Path

import pytest

from fl_client import sources
from fl_client.sources import Folder, Item, Reason
from privacy.errors import ImageLeftOut


def items(root: Path) -> dict[str, Item]:
    found = list(Folder(root).items())
    assert len({item.name for item in found}) == len(found)
    return {item.name: item for item in found}


def packed(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return buffer.getvalue()


def test_members_are_items_and_zips_in_zips_are_opened(tmp_path: Path) -> None:
    series = packed({"1.2.3/1.dcm": b"first", "1.2.3/2.dcm": b"second"})
    case = packed({"study/1.2.3.zip": series, "note.txt": b"words"}, zipfile.ZIP_STORED)
    (tmp_path / "case.ZIP").write_bytes(case)
    (tmp_path / "plain.dcm").write_bytes(b"third")
    found = items(tmp_path)
    expected = {
        "case.ZIP/note.txt": b"words",
        "case.ZIP/study/1.2.3.zip/1.2.3/1.dcm": b"first",
        "case.ZIP/study/1.2.3.zip/1.2.3/2.dcm": b"second",
        "plain.dcm": b"third",
    }
    assert {name: item.read() for name, item in found.items()} == expected
    assert all(item.reason is None for item in found.values())
    assert list(tmp_path.rglob("*.dcm")) == [tmp_path / "plain.dcm"]  # nothing was unpacked beside it


def test_a_replaced_zip_is_seen_as_changed(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(packed({"x": b"one"}))
    before = items(tmp_path)["a.zip/x"]
    (tmp_path / "a.zip").write_bytes(packed({"x": b"two"}))
    after = items(tmp_path)["a.zip/x"]
    assert after.modified_ns != before.modified_ns and after.read() == b"two"


def test_names_that_climb_out_of_the_folder_are_names_and_no_places(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "a.zip").write_bytes(
        packed(
            {
                "../../evil": b"1",
                "/etc/evil": b"2",
                "..\\evil": b"3",
                "bad\udcffname".encode("utf-8", "replace").decode(): b"4",
            }
        )
    )
    found = items(home)
    assert len(found) == 4 and sorted(item.read() for item in found.values()) == [b"1", b"2", b"3", b"4"]
    assert [path.name for path in tmp_path.rglob("*")] == ["home", "a.zip"]


def patched(content: bytes, offset: int, form: str, value: int) -> bytes:
    """`content` with a field of the central directory's first entry changed."""
    at = content.index(b"PK\x01\x02") + offset
    return content[:at] + struct.pack(form, value) + content[at + struct.calcsize(form) :]


PLAIN = packed({"x.dcm": b"content" * 100})


@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        (b"PK\x03\x04 and no more", "a.zip", Reason.DAMAGED_ZIP),
        (PLAIN[:-30], "a.zip", Reason.DAMAGED_ZIP),
        (b"text", "a.zip", Reason.DAMAGED_ZIP),
        (packed({}), "a.zip", Reason.EMPTY_FILE),
        (packed({"x": b""}), "a.zip/x", Reason.EMPTY_FILE),
        (patched(PLAIN, 8, "<H", 1), "a.zip/x.dcm", Reason.LOCKED_ZIP),
        (packed({"x": b"1" * 99}, zipfile.ZIP_LZMA), "a.zip/x", Reason.DAMAGED_ZIP),
        (packed({"x": b"1" * 99}, zipfile.ZIP_BZIP2), "a.zip/x", Reason.DAMAGED_ZIP),
        (patched(PLAIN, 24, "<I", 2**31), "a.zip", Reason.TOO_LARGE),
        (
            packed({"b.zip": packed({"c.zip": packed({"d.zip": packed({"e.zip": PLAIN})})})}),
            "a.zip/b.zip/c.zip/d.zip",
            Reason.DAMAGED_ZIP,
        ),
        (packed({"b.zip": b"no zip"}), "a.zip/b.zip", Reason.DAMAGED_ZIP),
        (packed({"x": bytes(300 * 2**20)}), "a.zip/x", Reason.TOO_LARGE),
    ],
    # The bytes of a zip hold the time; names made of them would differ from one process to the next.
    ids=lambda value: type(value).__name__ if isinstance(value, bytes) else str(value),
)
def test_a_zip_that_is_none_has_a_reason(tmp_path: Path, content: bytes, name: str, reason: Reason) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    assert {n: i.reason for n, i in items(tmp_path).items()} == {name: reason}


def test_a_member_that_does_not_fit_its_checksum_is_damaged_when_read(tmp_path: Path) -> None:
    stored = packed({"x.dcm": b"content" * 100}, zipfile.ZIP_STORED)
    (tmp_path / "a.zip").write_bytes(stored.replace(b"content", b"c0ntent", 1))
    (found,) = items(tmp_path).values()
    with pytest.raises(ImageLeftOut) as caught:
        found.read()
    assert caught.value.reason == Reason.DAMAGED_ZIP


def test_a_name_that_stands_twice_is_read_once(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made, pytest.warns(UserWarning, match="Duplicate name"):
        made.writestr("x", b"first")
        made.writestr("x", b"last")
    (tmp_path / "a.zip").write_bytes(buffer.getvalue())
    found = items(tmp_path)
    assert {name: item.reason for name, item in found.items()} == {"a.zip/x": None, "a.zip/x (again)": Reason.DUPLICATE}
    assert found["a.zip/x"].read() == b"last"


def test_the_same_bytes_under_many_names_are_no_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlapping members promise more than deflate can pack; many members are more than a hospital files."""
    monkeypatch.setattr(sources, "ZIP_MEMBERS_MAX", 5)
    (tmp_path / "a.zip").write_bytes(packed({str(n): b"1" for n in range(6)}))
    assert [item.reason for item in items(tmp_path).values()] == [Reason.TOO_LARGE]


def test_few_zips_are_open_at_once(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.zip").write_bytes(packed({"x": str(number).encode()}))
    found = list(items(tmp_path).values())
    for _ in range(2):
        assert [item.read() for item in found] == [item.path.stem.encode() for item in found]
    assert len(sources._zips.open) <= sources.ZIPS_OPEN


def test_a_file_that_grew_since_it_was_listed_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"1")
    (found,) = items(tmp_path).values()
    monkeypatch.setattr(sources, "FILE_BYTES_MAX", 10)
    (tmp_path / "x").write_bytes(b"1" * 11)
    with pytest.raises(ImageLeftOut) as caught:
        found.read()
    assert caught.value.reason == Reason.TOO_LARGE


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_is_explained_and_damage_has_a_remedy(reason: Reason) -> None:
    assert reason.explanation and (reason.remedy or not reason.damage)


def test_what_is_still_arriving_is_not_looked_at(tmp_path: Path) -> None:
    for name in (".fetching/part", "a/.fetching/x", "b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    assert set(items(tmp_path)) == {"a/.fetching/x", "b"}
