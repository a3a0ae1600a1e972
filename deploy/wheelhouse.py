"""A release folder: everything that a machine without a package index needs to install Isocenter, under hashes.

    python deploy/wheelhouse.py [FOLDER]       (`make wheelhouse`: dist/isocenter-VERSION)

It holds the wheel of this checkout and of every package that it needs, at the versions of constraints.txt; requirements.txt with
the SHA-256 of each; constraints.txt and the service files; and SHA256SUMS over all of them. Whoever compared the hash of
SHA256SUMS by another way has compared every byte. It installs on machines with the Python version, the operating system and the
processor of the machine that made it.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.utils import canonicalize_name, parse_wheel_filename
from sbom import pins

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ("constraints.txt", "deploy/systemd/fl-client.service", "deploy/systemd/fl-server.service")
OWN = "isocenter"


def main() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist" / f"{OWN}-{version[1] if version else ''}"
    make(folder)
    files = list(folder.iterdir())
    size = sum(path.stat().st_size for path in files) / 1e6
    print(
        f"{folder}: {len(files)} files, {size:.0f} MB. Fingerprint, for the telephone:\n  {sha256(folder / 'SHA256SUMS')}"
    )


def make(folder: Path) -> None:
    """Write the release folder; what was in it is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    build(folder)
    (folder / "requirements.txt").write_text(
        requirements(folder, (ROOT / "constraints.txt").read_text("utf-8")), "utf-8"
    )
    for name in BESIDE:
        shutil.copy(ROOT / name, folder)
    (folder / "SHA256SUMS").write_text(sums(folder), encoding="utf-8")


def build(folder: Path) -> None:
    """The wheels, of a copy of the sources: what an earlier build left in the checkout would get into the wheel."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / OWN
        copy.mkdir()
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        words = [
            "pip",
            "--quiet",
            "--quiet",
            "wheel",
            "--wheel-dir",
            str(folder),
            "--constraint",
            "constraints.txt",
            ".",
        ]
        subprocess.run([sys.executable, "-m", *words], cwd=copy, check=True)


def requirements(folder: Path, lock: str) -> str:
    """`name==version --hash=sha256:...` of each wheel. Raises ValueError if one has no pin, or another version than it."""
    locked, lines = pins(lock), []
    for wheel in sorted(folder.glob("*.whl")):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        # torch 2.13.0+cpu is a build of the 2.13.0 that is pinned.
        if canonicalize_name(name) != OWN and locked.get(name) != version.public:
            raise ValueError(f"{wheel.name} is not what constraints.txt pins ({locked.get(name, 'no version')})")
        lines.append(f"{name}=={version} --hash=sha256:{sha256(wheel)}\n")
    return "".join(lines)


def sums(folder: Path) -> str:
    """A line for each file but SHA256SUMS itself, as `sha256sum --check` reads them."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "SHA256SUMS")
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in names)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
