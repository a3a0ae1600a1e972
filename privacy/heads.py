"""Signed heads of journals: each side signs where its journal stands, and the other side writes that into its own.

A chain of hashes shows that a line was changed, unless whoever changed it made the whole chain anew. Against that, a site and
its coordinator exchange heads: (party, number of lines, hash of the last one, time), signed by the party. Own ones are lines
`head-signed`, those of the other side are lines `head-witnessed`, with the signature, so that either journal alone proves what
the other one once was. A head that does not follow the last one of its party is written down as `head-contradicted`, and refused.

What this finds: a line changed, removed, reordered or cut off after it was witnessed. Until then, only the party itself answers
for its lines.
"""

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from privacy import keys
from privacy.errors import HeadContradicted, JournalDamaged, MessageMalformed, SignatureInvalid
from privacy.journal import BEGINNING, Journal, entries

SIGNED, WITNESSED, CONTRADICTED = "head-signed", "head-witnessed", "head-contradicted"
COORDINATOR = "coordinator"  # the party under which a coordinator's heads stand in the sites' journals
HEAD_BYTES_MAX = 1024
LINES_MAX = 2**53
_witnessing = threading.Lock()  # from the look at the last head to the next line; one process serves Witness


@dataclass(frozen=True)
class SignedHead:
    """Where the journal of `party` stood. `signature`: 128 hex characters, over everything else."""

    party: str
    lines: int
    head: str
    time_s: int  # of the party's clock, seconds since 1970
    signature: str = ""

    def body(self) -> bytes:
        """What the signature with label JOURNAL_HEAD covers."""
        facts = {"version": 1, "party": self.party, "lines": self.lines, "head": self.head, "time_s": self.time_s}
        return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()

    def to_bytes(self) -> bytes:
        return json.dumps({"version": 1, **asdict(self)}, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def read(cls, content: bytes) -> "SignedHead":
        """The head behind `to_bytes`; raises MessageMalformed for anything else, even another spelling of it."""
        try:
            found = json.loads(content[: HEAD_BYTES_MAX + 1])
            head = cls(**{field: found[field] for field in cls.__dataclass_fields__})
            exact = head.to_bytes() == content
        except (ValueError, KeyError, TypeError, RecursionError):
            exact = False
        if not exact:
            raise MessageMalformed("this is no signed head of a journal")
        head.check()
        return head

    @classmethod
    def of_facts(cls, facts: Mapping[str, object]) -> "SignedHead":
        """The head in a line of a journal; raises MessageMalformed."""
        try:
            head = cls(**{field: facts[field] for field in cls.__dataclass_fields__})  # type: ignore[arg-type]
        except KeyError:
            raise MessageMalformed("this line holds no signed head") from None
        head.check()
        return head

    def check(self) -> None:
        numbers = type(self.lines) is int and type(self.time_s) is int
        if not numbers or not 0 <= self.lines < LINES_MAX or not 0 <= self.time_s < 2**40:
            raise MessageMalformed("this is no signed head of a journal")
        if not all(isinstance(text, str) for text in (self.party, self.head, self.signature)):
            raise MessageMalformed("this is no signed head of a journal")
        keys.check_name(self.party)
        keys.signature_of(self.signature)
        if len(self.head) != len(BEGINNING) or not set(self.head) <= set("0123456789abcdef"):
            raise MessageMalformed("this is no signed head of a journal")

    def verify(self, candidates: Sequence[keys.PublicKey]) -> None:
        """Raise SignatureInvalid unless one of the party's keys, of today or of earlier days, signed this."""
        for key in candidates:
            try:
                return keys.verify(key, keys.JOURNAL_HEAD, self.body(), keys.signature_of(self.signature))
            except SignatureInvalid:
                continue
        raise SignatureInvalid(f"the head of the journal of {self.party} is not signed by its key")


def own_head(journal: Journal, party: str, key: keys.PrivateKey) -> SignedHead:
    """Sign where the own journal stands; that is a line in it before this returns."""
    lines, head = journal.position
    unsigned = SignedHead(party, lines, head, int(time.time()))
    signature = keys.signature_hex(keys.sign(key, keys.JOURNAL_HEAD, unsigned.body()))
    signed = SignedHead(party, lines, head, unsigned.time_s, signature)
    journal.append(SIGNED, **asdict(signed))
    return signed


def witness(journal: Journal, head: SignedHead, candidates: Sequence[keys.PublicKey]) -> None:
    """Write another party's head into `journal`. Raises SignatureInvalid, or HeadContradicted if it does not follow the last."""
    head.verify(candidates)
    with _witnessing:
        _compare_and_note(journal, head)


def _compare_and_note(journal: Journal, head: SignedHead) -> None:
    before = journal.last(WITNESSED, party=head.party)
    if before is not None and (
        head.lines < before["lines"] or (head.lines == before["lines"] and head.head != before["head"])
    ):
        journal.append(CONTRADICTED, **asdict(head))
        raise HeadContradicted(
            f"the journal of {head.party} had {before['lines']} lines when it was witnessed last, and now shows a head of "
            f"{head.lines} lines that does not follow: it was rewritten or cut off"
        )
    journal.append(WITNESSED, **asdict(head))


# Verification, without a network -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verified:
    """What a whole journal proved: its lines, own signed heads in it, heads of others in it, and heads that others hold of it."""

    lines: int
    signed: int
    witnessed: int
    confirmed: int
    confirmed_to: int  # the last line that somebody else vouches for; 0 without a witness


def verify(
    path: Path,
    party: str,
    own: Sequence[keys.PublicKey],
    others: Mapping[str, Sequence[keys.PublicKey]],
    held: Iterable[SignedHead] = (),
) -> Verified:
    """Check the chain, each signature in it, and that each head of `held` is a head of this very journal.

    Raises JournalDamaged with the line that is not what it was, or SignatureInvalid naming the line. `others`: the keys of the
    parties whose heads this journal witnessed; heads of parties that are not in it are an error too.
    """
    chain, signed, witnessed = [BEGINNING], 0, 0
    for number, entry in enumerate(entries(path), start=1):
        chain.append(entry["hash"])
        if entry["kind"] not in (SIGNED, WITNESSED, CONTRADICTED):
            continue
        try:
            head = SignedHead.of_facts(entry["facts"])
            head.verify(own if entry["kind"] == SIGNED else others.get(head.party, ()))
        except MessageMalformed as error:
            raise JournalDamaged(f"{path}, line {number}: {error}") from None
        except SignatureInvalid as error:
            raise SignatureInvalid(f"{path}, line {number}: {error}") from None
        if entry["kind"] == SIGNED:
            signed += 1
            if head.party != party:
                raise JournalDamaged(f"{path}, line {number}: a head of {head.party} in the journal of {party}")
            _compare(path, chain, head, "signed in this journal")
        else:
            witnessed += 1
    confirmed = sorted((head for head in held if head.party == party), key=lambda head: head.lines)
    for head in confirmed:
        head.verify(own)
        _compare(path, chain, head, "witnessed by the other side")
    last = confirmed[-1].lines if confirmed else 0
    return Verified(len(chain) - 1, signed, witnessed, len(confirmed), last)


def _compare(path: Path, chain: list[str], head: SignedHead, how: str) -> None:
    stamp = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(head.time_s))
    if head.lines >= len(chain):
        raise JournalDamaged(f"{path}, line {len(chain)}: cut off here; {head.lines} lines were {how} on {stamp}")
    if chain[head.lines] != head.head:
        raise JournalDamaged(
            f"{path}, line {head.lines}: is not the line that was {how} on {stamp}; it or a line before it was rewritten"
        )


def held_of(path: Path, party: str) -> Iterator[SignedHead]:
    """The heads of `party` that another journal, whose chain is checked on the way, witnessed. Raises JournalDamaged."""
    for entry in entries(path):
        if entry["kind"] in (WITNESSED, CONTRADICTED) and entry["facts"].get("party") == party:
            try:
                yield SignedHead.of_facts(entry["facts"])
            except MessageMalformed as error:
                raise JournalDamaged(f"{path}, line {entry['n']}: {error}") from None
