"""What a site signs when it decides about a study, in one spelling, read by the coordinator and by the site itself.

Apart from `privacy.calls`, which sends it: a process that only reads a decision needs no gRPC in memory.
"""

import json
import re
from dataclasses import asdict, dataclass
from typing import Literal

from privacy.errors import MessageMalformed

Decision = Literal["approved", "declined"]


@dataclass(frozen=True)
class Statement:
    """A site's decision about one study: what `fl-client approve` and `decline` sign."""

    digest: str
    site: str
    decision: Decision
    time_ms: int  # of the site's clock; a later statement replaces an earlier one

    def body(self) -> bytes:
        """Canonical JSON: what the signature with label STUDY_DECISION covers."""
        return json.dumps({"version": 1, **asdict(self)}, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def read(cls, body: bytes) -> "Statement":
        """The statement behind `body()`; raises MessageMalformed for anything else, even another spelling of it."""
        try:
            found = json.loads(body)
            statement = cls(found["digest"], found["site"], found["decision"], found["time_ms"])
            exact = statement.body() == body
        except (ValueError, KeyError, TypeError, RecursionError):
            exact = False
        if not exact or type(statement.time_ms) is not int or not 0 <= statement.time_ms < 2**53:
            raise MessageMalformed("this is no decision about a study")
        if statement.decision not in ("approved", "declined") or not re.fullmatch(
            "[0-9a-f]{64}", str(statement.digest)
        ):
            raise MessageMalformed("this is no decision about a study")
        return statement
