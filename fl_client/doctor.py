"""What keeps this site from its consortium: the checks of `fl-client doctor`, before joining and after, and when half is broken.

Of the hospital's images and labels nothing is opened here: what is known of them are words that `fl-client check` left behind.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cryptography.x509 import Certificate

from fl_client import standing
from fl_client.site import Site, SiteFile
from privacy import calls, doctor, keys, reach
from privacy.doctor import Advice, Check
from privacy.errors import DocumentError, IsocenterError
from privacy.reach import Proxy, Way

GPU_S = 12.0
GPU_TRY = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
_LINE = re.compile(r", line [0-9]+")


def checks(home: Path, line: str | None = None, proxy: Proxy | None = None) -> list[Check]:
    """All checks of the site in `home`. `line`: an invitation to try before joining; `proxy`: one instead of site.yaml's."""
    settings = doctor.attempt(lambda: Site.settings_of(home))
    enrolled = doctor.attempt(lambda: calls.Enrolment.open(home / "keys"))
    invitation = calls.InvitationLine.parse(line) if line else None
    found = doctor.of_machine(home, [home / "state"])
    if SiteFile.path(home).exists():
        found.append(("site.yaml", partial(standing.settings, home)))
    if settings is not None:
        found[[subject for subject, _ in found].index("memory")] = ("memory", partial(_memory, settings))
        found.append(("gpu", partial(_gpu, settings)))
    if enrolled is None:
        found.append(("membership", partial(_not_joined, home, invitation)))
    else:
        found += [("membership", partial(standing.membership, home)), ("certificate", partial(_certificate, home))]
    found += _way_out(home, settings, enrolled, invitation, proxy)
    found += [("node program", _program), ("confinement", partial(_confinement, home))]
    if settings is not None and enrolled is not None:
        found += [
            ("data", partial(_data, home)),
            ("policy", partial(standing.policy, home)),
            ("journal", partial(standing.journal, home)),
            ("pause", partial(_pause, home)),
        ]
    return [(subject, partial(_without_words, look)) for subject, look in found]


def _way_out(
    home: Path,
    settings: SiteFile | None,
    enrolled: calls.Enrolment | None,
    invitation: calls.InvitationLine | None,
    proxy: Proxy | None,
) -> list[Check]:
    """Checks of the way to the coordinator, as far as it is known where that is."""
    coordinator = settings.coordinator if settings else None
    chosen = proxy or (coordinator.proxy if coordinator else None)

    def way() -> Way | None:
        return chosen.way(home) if chosen else None

    if coordinator:
        gateway, service = coordinator.gateway, coordinator.service
    elif enrolled:
        gateway, service = enrolled.gateway, enrolled.service
    else:
        gateway, service = "", f"{invitation.host}:{invitation.service_port}" if invitation else ""
    found: list[Check] = [("proxy", lambda: doctor.proxy(way(), service or None, "site.yaml"))]
    if service:
        found.append(("dns", lambda: doctor.name(service.rpartition(":")[0], way())))
    if enrolled is None:
        if invitation:
            found.append(("service", lambda: doctor.invited(invitation, way())))
        return found
    greeting = doctor.Greeting(lambda: _caller(home, enrolled, service, way()), "this site")
    return [
        *found,
        ("gateway", lambda: doctor.door(gateway, way(), _authority(home), reach.mutual(home / "keys", "site"))),
        ("service", lambda: doctor.door(service, way(), _authority(home))),
        ("greeting", greeting.membership),
        ("clock", greeting.clock),
        ("versions", greeting.versions),
    ]


def _authority(home: Path) -> Certificate:
    return keys.load_certificate((home / "keys" / "ca.pem").read_bytes())


def _caller(home: Path, enrolled: calls.Enrolment, service: str, way: Way | None) -> calls.Caller:
    """Without the renewal on the way that other commands make: nothing is changed by looking."""
    key = keys.load_key(home / "keys" / "site.key")
    return calls.Caller(service, (home / "keys" / "ca.pem").read_bytes(), enrolled.name, key, way)


def _program() -> str:
    """Loads what `fl-client start` loads and no other command does: what is missing there would be told by nothing else."""
    try:
        from fl_client import node, worker
    except ImportError as error:
        raise IsocenterError(
            f"a package that the node needs cannot be loaded: {error}", remedy=doctor.REINSTALL
        ) from None
    return f"{node.__name__} and {worker.__name__} can be loaded"


def _without_words(look: Callable[[], str]) -> str:
    """`look`, which repeats no word of site.yaml: its map of labels may hold anything, and findings may be sent away."""
    try:
        return look()
    except DocumentError as error:
        line = _LINE.search(str(error))
        raise DocumentError(
            f"site.yaml{line[0] if line else ''}: something there is not as it should be",
            remedy="Run `fl-client check`, which says what, and stays here.",
        ) from None


def _not_joined(home: Path, invitation: calls.InvitationLine | None) -> str:
    folder = home.absolute()
    if invitation:
        raise Advice(f"{folder} has not joined a consortium yet", "If the rest is well: `fl-client join LINE`.")
    raise Advice(
        f"{folder} has not joined a consortium yet, or is not the site's folder",
        "Name the folder with --home. Before joining, `fl-client doctor LINE` also tries the way to the coordinator; the "
        "invitation stays unused.",
    )


def _confinement(home: Path) -> str:
    try:
        return standing.worker(home)
    except IsocenterError as error:  # each gap says what does not hold, and then what helps
        gap, _, remedy = f"{error} {error.remedy}".strip().partition(". ")
        raise IsocenterError(gap, remedy=remedy) from None


def _certificate(home: Path) -> str:
    return doctor.certificate(home / "keys" / "site.pem", "site")


def _memory(settings: SiteFile) -> str:
    said, most = doctor.memory(), settings.resources.memory_gb
    if not most:
        return f"{said}; training has no limit (resources.memory_gb)"
    if most * 1024**3 > doctor.memory_bytes()[0]:
        raise Advice(
            f"{said}; resources.memory_gb permits training {most:g} GiB, which is more than there is",
            "Lower it in site.yaml: an order that needs more is then refused, instead of the whole machine running short.",
        )
    return f"{said}; training may take {most:g} GiB"


def _gpu(settings: SiteFile) -> str:
    there = Path("/dev/nvidia0").exists()
    if not settings.resources.gpu:
        return f"{'there is one, and it' if there else 'none'} is not asked for (resources.gpu)"
    try:
        tried = subprocess.run(
            [sys.executable, "-P", "-c", GPU_TRY], capture_output=True, text=True, timeout=GPU_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise Advice(
            "torch took too long to say what it finds", "Run it again when the machine is less busy."
        ) from None
    count = int(tried.stdout) if tried.stdout.strip().isdecimal() else 0
    if not count:
        raise Advice(
            f"resources.gpu is true, and torch finds none{' although /dev/nvidia0 is there' if there else ''}",
            "Nothing is lost: this version trains on the processor. Set resources.gpu to false, or look at `nvidia-smi`.",
        )
    return f"{count} GPU{'s' if count > 1 else ''} can be seen; this version trains on the processor all the same"


def _data(home: Path) -> str:
    """What the last `fl-client check` found, in words of a fixed list."""
    words = standing.checked(home)
    if "unchecked" in words:
        raise Advice("nobody looked yet whether images and labels are ready", "Run `fl-client check`.")
    if words:
        raise IsocenterError(
            f"at the last `fl-client check` these were not good: {', '.join(words)}",
            remedy="Run `fl-client check`: it says what to do about each.",
        )
    return "images, labels, policy and budget were good at the last `fl-client check`"


def _pause(home: Path) -> str:
    try:
        return standing.paused(home)
    except IsocenterError as error:
        raise Advice(str(error), "`fl-client resume` ends it.") from None
