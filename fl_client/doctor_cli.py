"""`fl-client doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from privacy.console import ProxyPassword, ProxyUrl, ProxyUser, proxy_of


def doctor(
    line: Annotated[
        str | None, typer.Argument(help="Before joining: the invitation, to try the way it names; it stays unused.")
    ] = None,
    home: Annotated[Path, typer.Option("--home", "-H", help="The site's folder, with site.yaml and keys.")] = Path(),
    proxy: ProxyUrl = None,
    proxy_user: ProxyUser = None,
    proxy_password_file: ProxyPassword = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of lines.")] = False,
) -> None:
    """Say what is wrong with this machine, its way to the coordinator, or its keys, and what to do; exit code 1 if something is.

    Sends handshakes and a greeting, changes nothing, and ends within 15 seconds. What it prints names hosts, paths and
    versions of this machine and nothing of a patient, so you may send it to the coordinator. --proxy tries another proxy.
    """
    from fl_client.doctor import checks
    from privacy.doctor_cli import report

    report(checks(home, line, proxy_of(proxy, proxy_user, proxy_password_file)), as_json)
