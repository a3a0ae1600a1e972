"""`fl-server doctor` and `fl-study doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from privacy.console import ProxyPassword, ProxyUrl, ProxyUser, proxy_of

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of lines.")]


def coordinator(
    home: Annotated[
        Path, typer.Option("--home", "-H", help="Folder of the consortium, made by `fl-server init`.")
    ] = Path(),
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with this machine, its ports, keys and certificates, and what to do; exit code 1 if something is.

    Sends handshakes to its own ports and nothing else, and ends within 15 seconds. What it prints names hosts, paths and
    versions of this machine, and sites.
    """
    from fl_server.doctor import of_coordinator
    from privacy.doctor_cli import report

    report(of_coordinator(home), as_json)


def researcher(
    line: Annotated[
        str | None, typer.Argument(help="Before joining: the invitation, to try the way it names; it stays unused.")
    ] = None,
    home: Annotated[
        Path, typer.Option("--home", "-H", help="Folder with your keys; made by `fl-study join`.")
    ] = Path(),
    proxy: ProxyUrl = None,
    proxy_user: ProxyUser = None,
    proxy_password_file: ProxyPassword = None,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with this machine or its way to the coordinator, and what to do; exit code 1 if something is.

    Sends handshakes and a greeting, changes nothing, and ends within 15 seconds. What it prints names hosts, paths and
    versions of this machine. --proxy tries another proxy.
    """
    from fl_server.doctor import of_researcher
    from privacy.doctor_cli import report

    report(of_researcher(home, line, proxy_of(proxy, proxy_user, proxy_password_file)), as_json)
