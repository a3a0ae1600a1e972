"""The software bill of materials: CycloneDX 1.6 (JSON), made from the lock, for docs/sbom.cdx.json.

`make sbom` writes it. Components are the pins of constraints.txt that Isocenter needs to run, found by following what each
installed distribution says it requires; tools for development are left out. Versions are the lock's, so a build of torch that is
installed as 2.13.0+cpu is 2.13.0 here. Markers are read for Linux on x86-64 with Python 3.11. The same lock always gives the same
bytes: there is no time in it, and the serial number is derived from the content.

Not in it: libraries that are compiled into wheels (OpenSSL in cryptography, OpenBLAS in numpy, GDCM in python-gdcm), which is
why the components are marked as incomplete; and what the default torch wheel of PyPI brings for GPUs (nvidia-*).
"""

import json
import re
import sys
import tomllib
import uuid
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
WRITTEN = ROOT / "docs" / "sbom.cdx.json"
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://cyclonedx.org/isocenter")
PLATFORM = {
    "implementation_name": "cpython",
    "implementation_version": "3.11.0",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": "3.11.0",
    "python_version": "3.11",
    "sys_platform": "linux",
}
SPDX = {
    "3-clause bsd license": "BSD-3-Clause",
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "apache-2.0": "Apache-2.0",
    "bsd-3-clause": "BSD-3-Clause",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "mit": "MIT",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "mpl-2.0": "MPL-2.0",
}
"""What distributions write -> its SPDX identifier, where that is certain. "BSD License" is not: there are several."""


def pins(lock: str) -> dict[str, str]:
    """Name, as PyPI normalises it -> version, of every `name==version` line of constraints.txt."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", lock, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def graph(project: dict[str, Any], locked: dict[str, str]) -> dict[str, set[str]]:
    """Name -> names it needs to run, for the project ("") and everything below it. Raises ValueError if the lock lacks one,
    or if another version than the lock's is installed.
    """
    needs: dict[str, set[str]] = {"": set()}
    seen, todo = set(), [("", Requirement(line)) for line in project["dependencies"]]
    while todo:
        parent, requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        needs[parent].add(name)
        needs.setdefault(name, set())
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                todo += [(name, wanted) for wanted in _required(name, extra, locked)]
    return needs


def _required(name: str, extra: str, locked: dict[str, str]) -> Iterable[Requirement]:
    if name not in locked:
        raise ValueError(f"constraints.txt pins no {name}, which Isocenter needs")
    distribution = metadata.distribution(name)
    if Version(distribution.version).public != locked[name]:
        raise ValueError(
            f"constraints.txt says {name} {locked[name]}, installed is {distribution.version}: run `make env`"
        )
    for line in distribution.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({**PLATFORM, "extra": extra}):
            yield requirement


def licences(name: str) -> list[dict[str, Any]]:
    """What the distribution says of its licence: an SPDX expression or identifiers, else its own words."""
    facts = metadata.metadata(name)
    if expression := facts.get("License-Expression"):
        return [{"expression": expression}]
    said = (facts.get("License") or "").strip()
    classes = [line.rpartition(" :: ")[2] for line in facts.get_all("Classifier", []) if line.startswith("License ::")]
    if said.lower() in SPDX:
        classes = [said, *(line for line in classes if line.lower() in SPDX)]
    elif not classes:
        classes = [said.splitlines()[0]] if said else ["not stated"]
    shown = {SPDX.get(line.lower(), line): line.lower() in SPDX for line in classes}
    return [{"license": {"id" if exact else "name": word}} for word, exact in sorted(shown.items())]


def document(pyproject: str, lock: str) -> str:
    """The bill of materials as text. Raises ValueError where lock, project and environment do not fit together."""
    project, locked = tomllib.loads(pyproject)["project"], pins(lock)
    needs = graph(project, locked)
    root = f"isocenter@{project['version']}"
    refs = {"": root} | {name: f"pkg:pypi/{name}@{quote(locked[name])}" for name in needs if name}
    components = [
        {
            "type": "library",
            "bom-ref": refs[name],
            "name": name,
            "version": locked[name],
            "scope": "required",
            "licenses": licences(name),
            "purl": refs[name],
        }
        for name in sorted(needs)
        if name
    ]
    content = {
        "metadata": {
            "lifecycles": [{"phase": "pre-build"}],
            "component": {
                "type": "application",
                "bom-ref": root,
                "name": project["name"],
                "version": project["version"],
                "description": project["description"],
                "licenses": [{"license": {"id": project["license"]}}],
            },
        },
        "components": components,
        "dependencies": [
            {"ref": refs[name], "dependsOn": sorted(refs[other] for other in needs[name])} for name in sorted(needs)
        ],
        "compositions": [{"aggregate": "incomplete", "assemblies": [part["bom-ref"] for part in components]}],
    }
    serial = uuid.uuid5(NAMESPACE, json.dumps(content, sort_keys=True))
    head = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
    }
    return json.dumps({**head, **content}, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    try:
        text = document((ROOT / "pyproject.toml").read_text("utf-8"), (ROOT / "constraints.txt").read_text("utf-8"))
    except (ValueError, metadata.PackageNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    WRITTEN.write_text(text, encoding="utf-8")
    print(f"{WRITTEN.relative_to(ROOT)}: {len(json.loads(text)['components'])} components")
    return 0


if __name__ == "__main__":
    sys.exit(main())
