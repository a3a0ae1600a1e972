"""What a node does beside orders, in a thread of its own: greeting, certificate, statements, rules, heads of journals.

Each round of upkeep is one connection to the consortium service. Whatever fails is tried again at the next; nothing here holds up
an order, and nothing here is needed to refuse one.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fl_client import enrol, rules, standing
from privacy import calls, heads, keys
from privacy.errors import IsocenterError, TrustError, Unreachable
from privacy.greeting import Readiness, own, skew
from privacy.journal import Journal

PERIOD_S = 60.0
READY_S = 600.0  # readiness is looked at this often: the journal is verified for it
EXCHANGE_S = 900.0  # heads are exchanged this often while the journal grows
EXCHANGE_MOST_S = 86_400.0  # and this often while it does not
log = logging.getLogger("isocenter.upkeep")


@dataclass
class Upkeep:
    """Run `start`, and `stop` at the end. `renewed` is set when there is a new certificate for the next connection."""

    home: Path
    tell: Callable[[str], None]
    renewed: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)
        self._told = ""
        self._held = self._certificate()  # what the node connects with, until `renewed` is set
        self._exchanged_s, self._exchanged_head = -EXCHANGE_MOST_S, ""
        self._looked_s, self._skew = -READY_S, ""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Return when the thread has ended, or is stuck in a call that its own deadline ends."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)

    def _run(self) -> None:
        while True:
            try:
                self.once()
                self._told = ""
            except Unreachable as error:
                log.info("upkeep waits: %s", error.code)
            except IsocenterError as error:
                if error.code != self._told:  # once, not every minute
                    self.tell(f"{error} {error.remedy}")
                self._told = error.code
            except Exception:
                log.exception("upkeep failed and is tried again")
            if self._stopping.wait(PERIOD_S):
                return

    def once(self) -> None:
        """One round of upkeep. Raises what the first failing part raises; the parts after it have to wait."""
        with enrol.open_caller(self.home) as caller:
            if (now := self._certificate()) != self._held:  # by this call, or by a command of somebody here
                self._held = now
                self.tell("The certificate was renewed.")
                fingerprint = keys.fingerprint(keys.load_certificate(now))
                Journal(self.home / "journal.jsonl").append("renewed", certificate=fingerprint)
                self.renewed.set()
            self._greet(caller)
            enrol.redeliver(self.home, caller)
            for digest in rules.carry_out(self.home, self.tell):
                log.info("study %s was approved by rule", digest[:12])
            self._exchange(caller)

    def _greet(self, caller: calls.Caller) -> None:
        """Exchange versions, and tell whether this site is ready; people here hear once of a skew."""
        found = skew(own(), caller.greet(self._readiness()), "this site", "the coordinator")
        said = f"{found.sentence} {found.remedy}" if found else ""
        if said and said != self._skew:
            self.tell(said)
        self._skew = said

    def _readiness(self) -> Readiness | None:
        """Whether this site is ready, if it is time to look; in the journal before it is told, where it is news."""
        if time.monotonic() - self._looked_s < READY_S:
            return None
        self._looked_s = time.monotonic()
        found, journal = standing.told(self.home), Journal(self.home / "journal.jsonl")
        before = journal.last("readiness")
        if before is None or (before["ready"], before["reasons"]) != (int(found.ready), list(found.reasons)):
            journal.append("readiness", ready=int(found.ready), reasons=list(found.reasons))
        return found

    def _certificate(self) -> bytes:
        path = self.home / "keys" / "site.pem"
        return path.read_bytes() if path.is_file() else b""  # a site without one is told by its first connection

    def _exchange(self, caller: calls.Caller) -> None:
        """Have the coordinator witness the head of this journal, and witness the head of the coordinator's."""
        mine, now = Journal(self.home / "journal.jsonl"), time.monotonic()
        waited, grown = now - self._exchanged_s, mine.head != self._exchanged_head
        if waited < (EXCHANGE_S if grown else EXCHANGE_MOST_S):
            return
        self._exchanged_s = now  # whatever comes of it: each try is a line in this journal, and perhaps in the other
        theirs = caller.witness(heads.own_head(mine, caller.name, keys.load_key(self.home / "keys" / "site.key")))
        if theirs.party != heads.COORDINATOR:
            raise TrustError("the coordinator answered with the head of another party's journal")
        pinned = keys.load_public((self.home / "keys" / "coordinator.pem").read_bytes())
        heads.witness(mine, theirs, [pinned])
        self._exchanged_head = mine.head
