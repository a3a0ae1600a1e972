"""server.yaml: what the coordinator's operator sets."""

import ipaddress
import re
from typing import Literal

from pydantic import Field, field_validator

from fl_server.notify import Target
from models.study import Document, Name
from privacy.logs import LogFiles
from privacy.syslog import TargetText
from privacy.tracing import Traces

_HOST = re.compile(r"(?=.*[a-z.])[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


class ServerFile(Document):
    """server.yaml: owned by the coordinator."""

    version: Literal[1] = Field(description="version of this file's layout")
    name: Name = Field(description="the consortium's name, as sites and researchers see it")
    host: str = Field(description="what the hospitals connect to: a DNS name in lower case or an IPv4 address")
    listen: str = Field(default="127.0.0.1", description="address of this machine on which the two ports listen")
    gateway_port: int = Field(default=9440, ge=1, le=65535, description="port for training (mutual TLS)")
    service_port: int = Field(default=9441, ge=1, le=65535, description="port for joining, studies, approvals, results")
    invitation_hours: int = Field(default=72, ge=1, le=24 * 30, description="how long an invitation can be used")
    certificate_days: int = Field(
        default=30,
        ge=1,
        le=3650,
        description="how long a certificate of a site or researcher is valid; it is renewed in its last third",
    )
    runs_at_once: int = Field(default=1, ge=1, le=16, description="runs that are carried out side by side")
    syslog: TargetText | None = Field(
        default=None,
        description="where journal lines are sent as well: udp://host:514, tcp://host:601 or unix:///dev/log",
    )

    log: LogFiles = Field(default=LogFiles(), description="log files of coordinator, executor and dashboard")

    traces: Traces | None = Field(default=None, description="where spans of runs are sent; nowhere without it")

    notify: list[Target] = Field(default=[], max_length=16, description="who is told of news, and of which")

    @field_validator("host")
    @classmethod
    def _host(cls, host: str) -> str:
        if not _HOST.fullmatch(host):
            raise ValueError("expected a DNS name in lower case or an IPv4 address")
        return host

    @field_validator("listen")
    @classmethod
    def _address(cls, listen: str) -> str:
        try:
            return str(ipaddress.IPv4Address(listen))
        except ValueError:
            raise ValueError("expected an IPv4 address of this machine, such as 127.0.0.1 or 0.0.0.0") from None
