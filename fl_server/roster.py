"""The consortium's home folder, and who may take part: invitations, parties, studies and the sites' decisions.

    HOME/
    ├── server.yaml          settings; written last, so it marks a finished founding
    ├── keys/                ca.key (unless it is offline, see fl_server.authority) ca.pem, coordinator.key (statements),
    │                        aggregator.key (opens sealed updates), tls.key tls.pem (server certificate and ca.pem)
    ├── roster.sqlite        this module's tables (0600)
    ├── journal.jsonl        what the coordinator did, hash-chained
    ├── runs/<run_id>/       durable state of each run
    ├── logs/, crashes/      what the processes did, and reports of errors that nobody foresaw, without identifiers
    └── nodes.json           until when each node counts as online

Rules: a token is stored only as its hash; an invitation makes one party and no second one; a name belongs to one key, and
to another one only after the first was revoked, which is for ever; a study is offered and launched only if it names
exactly the keys that its sites are enrolled with; every change is one SQLite transaction that is on the disk before
anything is answered.
"""

import datetime as dt
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fl_server import standings
from fl_server.settings import ServerFile
from fl_server.standings import Told
from models.study import Study, read
from privacy import disk, keys
from privacy.calls import InvitationLine, PartyRole, token_hash
from privacy.errors import (
    CertificateRevoked,
    DiskUnusable,
    DocumentError,
    InvitationRefused,
    IsocenterError,
    MessageMalformed,
    NotEnrolled,
    RunUnknown,
    SignatureInvalid,
    StudyConflict,
    TrustError,
)
from privacy.greeting import Readiness, Versions
from privacy.journal import Journal
from privacy.statements import Decision, Statement

VERSION = 3  # SQLite's user_version of roster.sqlite
SECONDS_BUSY = 20.0  # how long a writer waits for another process's transaction
_PARTY = "name, role, certificate, node_id, joined, last_seen, revoked"
NONCES_PER_PARTY = 20_000  # of the last minutes: more than 80 calls a second from one party is no honest use


@dataclass(frozen=True)
class Home:
    """An opened consortium: settings, keys, roster, journal and the folders of its runs."""

    root: Path
    settings: ServerFile
    ca_pem: bytes
    coordinator_key: keys.PrivateKey
    roster: "Roster"
    journal: Journal

    @classmethod
    def found(cls, root: Path, settings: ServerFile) -> "Home":
        """Create a consortium in an empty or new folder. Raises TrustError rather than touch a folder with content."""
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise TrustError(f"{root} is not empty", remedy="Choose a new folder; nothing in this one was changed.")
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        root.chmod(0o700)
        secret = root / "keys"
        authority = keys.make_ca(keys.make_key(secret / "ca.key"), settings.name)
        keys.make_key(secret / "coordinator.key")
        keys.make_sealing_key(secret / "aggregator.key")
        tls_key = keys.make_key(secret / "tls.key")
        request = keys.make_csr(tls_key, settings.name)
        server = keys.issue(authority, request, settings.name, "server", keys.CA_DAYS, settings.host)
        ca_pem = keys.certificate_pem(authority.certificate)
        keys.write_public(secret / "ca.pem", ca_pem)
        keys.write_public(secret / "tls.pem", keys.certificate_pem(server) + ca_pem)
        (root / "runs").mkdir(mode=0o700)
        Roster(root / "roster.sqlite")
        Journal(root / "journal.jsonl").append("founded", authority=keys.fingerprint(authority.certificate))
        keys.write_private(root / "server.yaml", _rendered(settings).encode())
        return cls.open(root)

    @classmethod
    def open(cls, root: Path) -> "Home":
        """The consortium in `root`; raises DocumentError if there is none, and errors of its parts."""
        path = root / "server.yaml"
        if not path.is_file():
            raise DocumentError(
                f"there is no consortium in {root} (no server.yaml)",
                remedy="Give its folder with --home, or found one with `fl-server init HOME`.",
            )
        settings = read(ServerFile, path)
        ca_path = root / "keys" / "ca.pem"
        if not ca_path.is_file() or not (root / "roster.sqlite").is_file():
            raise DocumentError(
                f"{root} has lost keys/ca.pem or roster.sqlite", remedy="Restore the folder from your backup."
            )
        coordinator_key = keys.load_key(root / "keys" / "coordinator.key")
        aggregator = root / "keys" / "aggregator.key"
        if not aggregator.exists():
            # A consortium founded before studies named this key. If it was lost instead, the studies that name the old
            # one cannot be launched any more (`check_keys`), so nothing is encrypted to a key that nobody has.
            with suppress(FileExistsError):  # another process opened the same home at the same time
                keys.make_sealing_key(aggregator)
        roster, journal = Roster(root / "roster.sqlite"), Journal(root / "journal.jsonl")
        return cls(root, settings, ca_path.read_bytes(), coordinator_key, roster, journal)

    @property
    def ca_fingerprint(self) -> str:
        """64 hex characters; `privacy.keys.grouped` makes them readable."""
        return keys.fingerprint(keys.load_certificate(self.ca_pem))

    @property
    def tls_key(self) -> Path:
        return self.root / "keys" / "tls.key"

    @property
    def tls_pem(self) -> Path:
        return self.root / "keys" / "tls.pem"

    @cached_property
    def aggregator_key(self) -> X25519PrivateKey:
        """The key that opens sealed updates; raises KeyFileUnsafe if others can use its file."""
        return keys.load_sealing_key(self.root / "keys" / "aggregator.key")

    @property
    def aggregator(self) -> str:
        """64 hex characters: the public half of `aggregator_key`, as studies name it."""
        return self.aggregator_key.public_key().public_bytes_raw().hex()

    def with_keys(self, study: Study) -> Study:
        """`study` with the enrolled keys of its sites and this coordinator's own. Raises NotEnrolled."""
        return study.with_keys(self.roster.site_keys(study.all_sites), self.aggregator)

    def check_keys(self, study: Study) -> None:
        """Raise NotEnrolled or StudyConflict unless `study` names exactly the keys that `with_keys` fills in.

        Sites that were revoked since take no part in anything, whatever key a study names for them.
        """
        revoked = self.roster.revoked()
        here = [site for site in study.all_sites if site not in revoked]
        right = self.roster.site_keys(here)
        wrong = [site for site in here if study.roster.get(site) != right[site]]
        parts = [f"the keys that are enrolled here for {', '.join(wrong)}"] if wrong else []
        parts += (
            ["the key that this coordinator opens sealed updates with"] if study.aggregator != self.aggregator else []
        )
        if parts:
            raise StudyConflict(
                f"the study does not name {' and '.join(parts)}",
                remedy="Take `roster` and `aggregator` out of the file; `fl-study submit` fills in the present keys.",
            )

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def invite(self, name: str, role: PartyRole) -> InvitationLine:
        """A new one-use invitation; raises InvitationRefused if the name is taken."""
        token = self.roster.invite(name, role, self.settings.invitation_hours)
        self.journal.append("invited", party=name, role=role)
        return InvitationLine(name, self.settings.host, self.settings.service_port, self.ca_fingerprint, token)

    def note_settings(self) -> None:
        """A line in the journal if server.yaml is not what it was at the last such line: its SHA-256."""
        now, before = keys.digest((self.root / "server.yaml").read_bytes()), self.journal.last("settings")
        if before is None or before["digest"] != now:
            self.journal.append("settings", digest=now)

    def revoke(self, name: str) -> None:
        """From now on nothing that `name` says or shows is believed; raises NotEnrolled, TrustError if it was revoked before."""
        role = self.roster.role_of(name)
        self.roster.revoke(name)
        self.journal.append("revoked", party=name, role=role)


def _rendered(settings: ServerFile) -> str:
    text = resources.files("configs").joinpath("server.yaml").read_text(encoding="utf-8")
    for key in ("name", "host", "listen", "gateway_port", "service_port"):
        text = text.replace("{" + key + "}", str(getattr(settings, key)))
    return text


@dataclass(frozen=True)
class Party:
    """One enrolled site or researcher."""

    name: str
    role: PartyRole
    certificate: x509.Certificate
    node_id: int | None  # of Flower; sites only
    joined: str  # UTC, 2026-01-31T12:00:00Z
    last_seen: str | None  # of its last signed call
    revoked: str | None = None

    @property
    def public_key(self) -> keys.PublicKey:
        return keys.public_key_of(self.certificate)


@dataclass(frozen=True)
class OpenInvitation:
    name: str
    role: str
    expires: str


@dataclass(frozen=True)
class Offered:
    """A study as it was handed in and countersigned."""

    digest: str
    canonical: bytes
    researcher: str
    researcher_signature: bytes
    coordinator_signature: bytes
    submitted: str

    @property
    def study(self) -> Study:
        return Study.from_canonical(self.canonical)


_TABLES = """
CREATE TABLE IF NOT EXISTS invitations (
    token_hash BLOB PRIMARY KEY, name TEXT NOT NULL, role TEXT NOT NULL, expires REAL NOT NULL, used_by_key BLOB);
CREATE TABLE IF NOT EXISTS parties (
    name TEXT PRIMARY KEY, role TEXT NOT NULL, public_key BLOB NOT NULL UNIQUE, certificate BLOB NOT NULL,
    serial TEXT NOT NULL UNIQUE, node_id TEXT, joined TEXT NOT NULL, last_seen TEXT, revoked TEXT);
CREATE TABLE IF NOT EXISTS retired_keys (public_key BLOB PRIMARY KEY, name TEXT NOT NULL, revoked TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS requests (
    name TEXT PRIMARY KEY, role TEXT NOT NULL, csr BLOB NOT NULL, asked TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS studies (
    digest TEXT PRIMARY KEY, canonical BLOB NOT NULL, researcher TEXT NOT NULL REFERENCES parties(name),
    researcher_signature BLOB NOT NULL, coordinator_signature BLOB NOT NULL, submitted TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS named_sites (
    digest TEXT NOT NULL REFERENCES studies(digest), site TEXT NOT NULL, PRIMARY KEY (digest, site));
CREATE TABLE IF NOT EXISTS decisions (
    digest TEXT NOT NULL REFERENCES studies(digest), site TEXT NOT NULL REFERENCES parties(name),
    decision TEXT NOT NULL, time_ms INTEGER NOT NULL, statement BLOB NOT NULL, signature BLOB NOT NULL,
    PRIMARY KEY (digest, site));
CREATE TABLE IF NOT EXISTS nonces (nonce TEXT PRIMARY KEY, name TEXT NOT NULL, until REAL NOT NULL);
CREATE INDEX IF NOT EXISTS nonces_until ON nonces(until);
"""


class Roster:
    """The tables. Safe for several threads and processes: every method is one transaction on its own connection."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            path.touch(mode=0o600)
            disk.flush_folder(path.parent)
        with self._transaction() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            disk.require_known(path, version, VERSION)
            if 0 < version < VERSION:
                disk.keep_copy_of_database(path, version)
            if version == 1:
                db.execute("ALTER TABLE parties ADD COLUMN revoked TEXT")
            for statement in (_TABLES + standings.TABLE).split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and on the disk when it ends. The write lock is taken at once, so nothing read can change."""
        try:
            db = sqlite3.connect(self.path, timeout=SECONDS_BUSY, isolation_level=None)
        except sqlite3.Error as error:
            raise DiskUnusable(f"{self.path} cannot be opened ({error})") from None
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in disk.SQLITE_UNUSABLE:
                raise DiskUnusable(f"{self.path} cannot be written ({error})") from None
            raise IsocenterError(
                f"{self.path} could not be used ({error})",
                remedy="Check disk space; restore it from a backup if damaged.",
            ) from None
        finally:
            db.close()

    # Invitations and parties

    def invite(self, name: str, role: PartyRole, hours: int) -> str:
        """A one-use token for `name`, known only to its receiver; raises InvitationRefused if the name is taken.

        The name of a revoked party can be given to a new key, and a party whose certificate has ended invited again.
        """
        keys.check_name(name)
        token = InvitationLine.new_token()
        with self._transaction() as db:
            if known := _find(db, name):
                if not known.revoked and not keys.ended(known.certificate):
                    raise InvitationRefused(
                        f"{name} is enrolled already",
                        remedy=f"Choose another name; if the key of {name} was lost: fl-server revoke {name}",
                    )
                if known.role != role:
                    raise InvitationRefused(f"{name} was a {known.role} here", remedy="Choose another name.")
            row = (token_hash(token), name, role, time.time() + hours * 3600)
            db.execute("INSERT INTO invitations (token_hash, name, role, expires) VALUES (?, ?, ?, ?)", row)
        return token

    def redeem(
        self, token: str, name: str, role: str, csr: bytes, issue: Callable[[], x509.Certificate] | None
    ) -> tuple[Party | None, bool]:
        """The party that the invitation makes, and whether it is new. Without `issue` the request waits, and there is none yet.

        Raises InvitationRefused, and changes nothing, if the token is unknown, expired, used with another key, or made
        for another name or role, or if the name or key is enrolled already. The same key again gets what it got.
        """
        key = keys.key_of_csr(csr)
        wanted, key_pem = token_hash(token), keys.public_pem(key)
        with self._transaction() as db:
            # By hash: what an attacker can learn from the time of this look-up is about the hash, not about a token.
            row = db.execute("SELECT * FROM invitations WHERE token_hash = ?", (wanted,)).fetchone()
            if row is None or not secrets.compare_digest(row[0], wanted):
                raise InvitationRefused("this invitation is not known here")
            _, invited, invited_role, expires, used_by = row
            if invited != name:
                raise InvitationRefused("this invitation was made for another name")
            if invited_role != role:
                command = "fl-client" if invited_role == "site" else "fl-study"
                raise InvitationRefused(f"this invitation was made for a {invited_role}; use `{command} join`")
            known = _find(db, name)
            if used_by is not None:
                if used_by != key_pem:
                    raise InvitationRefused("this invitation was used before, with another key")
                if known and known.public_key == key:
                    if known.revoked:
                        raise CertificateRevoked(f"{name} was revoked on {known.revoked}")
                    return known, False
                if db.execute("SELECT 1 FROM requests WHERE name = ?", (name,)).fetchone():
                    return None, False
            if time.time() > expires:
                raise InvitationRefused(f"this invitation expired on {_iso(expires)}")
            _require_free(db, name, key)
            db.execute("UPDATE invitations SET used_by_key = ? WHERE token_hash = ?", (key_pem, wanted))
            if issue is None:
                row = (name, role, csr, _iso())
                db.execute("INSERT OR REPLACE INTO requests VALUES (?, ?, ?, ?)", row)
                return None, True
            return _enrolled(db, name, role, issue()), True

    def ask(self, name: str, role: PartyRole, csr: bytes) -> bool:
        """Keep a request for a renewed certificate until it is signed; False if one was waiting already."""
        with self._transaction() as db:
            return (
                db.execute("INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?)", (name, role, csr, _iso())).rowcount
                == 1
            )

    def requests(self) -> list[tuple[str, PartyRole, bytes, str]]:
        """(name, role, signing request, when) of everything that waits for a signature, oldest first."""
        with self._transaction() as db:
            rows = db.execute("SELECT name, role, csr, asked FROM requests ORDER BY asked, name").fetchall()
            return [(name, party_role(role), bytes(csr), asked) for name, role, csr, asked in rows]

    def signed(self, name: str, certificate: x509.Certificate) -> Party:
        """Answer the waiting request of `name` with a checked certificate; raises InvitationRefused if that became void."""
        with self._transaction() as db:
            row = db.execute("SELECT role FROM requests WHERE name = ?", (name,)).fetchone()
            known, key = _find(db, name), keys.public_key_of(certificate)
            if row is None:
                raise InvitationRefused("nothing of this name waits for a signature")
            if not (known and known.public_key == key and not known.revoked):
                _require_free(db, name, key)
            db.execute("DELETE FROM requests WHERE name = ?", (name,))
            return _enrolled(db, name, row[0], certificate)

    def renewed(self, name: str, certificate: x509.Certificate) -> Party:
        """Note the new certificate of an enrolled party, over the same key."""
        with self._transaction() as db:
            return _enrolled(db, name, _party(db, name).role, certificate)

    def role_of(self, name: str) -> PartyRole:
        """The role of a party, or of whoever joined under this name and waits for a signature; raises NotEnrolled."""
        with self._transaction() as db:
            row = db.execute("SELECT role FROM requests WHERE name = ?", (name,)).fetchone()
            return party_role(row[0]) if row else _party(db, name).role

    def revoke(self, name: str) -> None:
        """Believe nothing of `name` from now on, and its keys never again: the enrolled one, and one that waits for a signature.

        Raises NotEnrolled, or TrustError if it was revoked before.
        """
        with self._transaction() as db:
            party, now = _find(db, name), _iso()
            waiting = [
                keys.key_of_csr(csr) for (csr,) in db.execute("SELECT csr FROM requests WHERE name = ?", (name,))
            ]
            if party and party.revoked and not waiting:
                raise TrustError(f"{name} was revoked on {party.revoked}", remedy="Nothing to do.")
            if party is None and not waiting:
                raise NotEnrolled("the consortium has no party of this name")
            db.execute("UPDATE parties SET revoked = ? WHERE name = ? AND revoked IS NULL", (now, name))
            for key in [*waiting, *([party.public_key] if party else [])]:
                db.execute("INSERT OR IGNORE INTO retired_keys VALUES (?, ?, ?)", (keys.public_pem(key), name, now))
            db.execute("DELETE FROM requests WHERE name = ?", (name,))
            db.execute("DELETE FROM invitations WHERE name = ? AND used_by_key IS NULL", (name,))

    def admitted_sites(self) -> dict[str, str]:
        """Each site that is enrolled and not revoked, with its key as studies name it."""
        return {site.name: keys.point_hex(site.public_key) for site in self.sites() if not site.revoked}

    def known_keys(self) -> dict[str, list[keys.PublicKey]]:
        """Every key that ever spoke for a name, the present one and those that were revoked."""
        found: dict[str, list[keys.PublicKey]] = {}
        with self._transaction() as db:
            rows = db.execute("SELECT name, public_key FROM parties UNION SELECT name, public_key FROM retired_keys")
            for name, pem in rows:
                found.setdefault(name, []).append(keys.load_public(pem))
        return found

    def revoked(self) -> set[str]:
        """Names of the parties that are revoked."""
        with self._transaction() as db:
            return {name for (name,) in db.execute("SELECT name FROM parties WHERE revoked IS NOT NULL")}

    def revoked_nodes(self) -> dict[str, int]:
        """Revoked sites whose Flower node is still registered."""
        return {site.name: site.node_id for site in self.sites() if site.revoked and site.node_id is not None}

    def party(self, name: str) -> Party:
        """The enrolled party of that name; raises NotEnrolled."""
        with self._transaction() as db:
            return _party(db, name)

    def sites(self) -> list[Party]:
        """Enrolled sites by name."""
        return self._parties("site")

    def researchers(self) -> list[Party]:
        """Enrolled researchers by name."""
        return self._parties("researcher")

    def _parties(self, role: PartyRole) -> list[Party]:
        with self._transaction() as db:
            return _parties(db, role)

    def site_keys(self, sites: Sequence[str]) -> dict[str, str]:
        """Each of these sites with its enrolled key as studies name it; raises NotEnrolled naming every one missing."""
        with self._transaction() as db:
            _require_sites(db, sites)
            return {site: keys.point_hex(_party(db, site).public_key) for site in sites}

    def invitations(self) -> list[OpenInvitation]:
        """Invitations that can still be used, without their tokens, which nobody here knows."""
        with self._transaction() as db:
            found = db.execute(
                "SELECT name, role, expires FROM invitations WHERE used_by_key IS NULL AND expires > ? "
                "ORDER BY name, expires",
                (time.time(),),
            )
            return [OpenInvitation(name, role, _iso(expires)) for name, role, expires in found]

    def tell(self, name: str, versions: Versions | None, readiness: Readiness | None = None) -> None:
        """Note what a party told of itself; None of either leaves what is known of it."""
        with self._transaction() as db:
            standings.note(db, name, versions, readiness, _iso())

    def told(self) -> dict[str, Told]:
        """What each party that ever told anything of itself told last, by name."""
        with self._transaction() as db:
            return standings.read(db)

    def set_node(self, name: str, node_id: int) -> None:
        """Note the Flower node of a site."""
        with self._transaction() as db:
            db.execute("UPDATE parties SET node_id = ? WHERE name = ?", (str(node_id), name))

    def forget_node(self, name: str, node_id: int) -> None:
        """Note that this node was unregistered. A node that the site got meanwhile, under a new key, stays."""
        with self._transaction() as db:
            db.execute("UPDATE parties SET node_id = NULL WHERE name = ? AND node_id = ?", (name, str(node_id)))

    def admit_call(self, name: str, nonce: str, until: float) -> None:
        """Raise SignatureInvalid if the nonce was used before; else remember it till `until`, and the party as seen."""
        with self._transaction() as db:
            db.execute("DELETE FROM nonces WHERE until < ?", (time.time(),))
            if db.execute("SELECT count(*) FROM nonces WHERE name = ?", (name,)).fetchone()[0] >= NONCES_PER_PARTY:
                raise TrustError(f"{name} makes too many calls", remedy="Wait five minutes.")
            try:
                db.execute("INSERT INTO nonces (nonce, name, until) VALUES (?, ?, ?)", (f"{name}:{nonce}", name, until))
            except sqlite3.IntegrityError:
                raise SignatureInvalid("this call was received before; a call can be made once") from None
            db.execute("UPDATE parties SET last_seen = ? WHERE name = ?", (_iso(), name))

            # Studies and decisions

    def add_study(self, study: Study, researcher: str, signature: bytes, coordinator_signature: bytes) -> bool:
        """Offer a study to the sites it names. False if it was offered already; another researcher's is refused.

        Raises NotEnrolled naming every site that the study names and the consortium does not have.
        """
        with self._transaction() as db:
            _require_sites(db, study.all_sites)
            owner = db.execute("SELECT researcher FROM studies WHERE digest = ?", (study.digest,)).fetchone()
            if owner is not None:
                if owner[0] != researcher:
                    raise TrustError("this study was submitted by another researcher")
                return False
            row = (study.digest, study.canonical(), researcher, signature, coordinator_signature, _iso())
            db.execute("INSERT INTO studies VALUES (?, ?, ?, ?, ?, ?)", row)
            sites = [(study.digest, site) for site in study.all_sites]
            db.executemany("INSERT INTO named_sites VALUES (?, ?)", sites)
            return True

    def study(self, digest: str) -> Offered:
        """The submitted study; raises RunUnknown."""
        with self._transaction() as db:
            row = db.execute("SELECT * FROM studies WHERE digest = ?", (digest,)).fetchone()
        if row is None:
            raise RunUnknown("there is no study with this digest here")
        return Offered(*row)

    def studies_of(self, researcher: str) -> list[Offered]:
        """Studies that this researcher submitted, newest first."""
        with self._transaction() as db:
            order = "SELECT * FROM studies WHERE researcher = ? ORDER BY submitted DESC, digest"
            return [Offered(*row) for row in db.execute(order, (researcher,))]

    def offered_to(self, site: str) -> list[tuple[Offered, Decision | None]]:
        """Studies that name `site`, newest first, each with the site's decision if it has sent one."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT s.*, d.decision FROM studies s JOIN named_sites n ON n.digest = s.digest AND n.site = ? "
                "LEFT JOIN decisions d ON d.digest = s.digest AND d.site = n.site ORDER BY s.submitted DESC, s.digest",
                (site,),
            )
            return [(Offered(*row[:-1]), row[-1]) for row in rows]

    def decide(self, statement: Statement, signature: bytes) -> bool:
        """Record a verified decision; True if that changed anything. TrustError for a site the study does not name.

        A later statement replaces an earlier one, an earlier one never a later one, whatever order they arrive in.
        """
        with self._transaction() as db:
            place = (statement.digest, statement.site)
            if not db.execute("SELECT 1 FROM named_sites WHERE digest = ? AND site = ?", place).fetchone():
                raise TrustError("no study with this digest is offered to this site")
            old = db.execute("SELECT time_ms, statement FROM decisions WHERE digest = ? AND site = ?", place).fetchone()
            if old is not None and old[0] >= statement.time_ms:
                if old[1] == statement.body():
                    return False
                raise SignatureInvalid("a later decision of this site about this study is recorded already")
            row = (*place, statement.decision, statement.time_ms, statement.body(), signature)
            db.execute("INSERT OR REPLACE INTO decisions VALUES (?, ?, ?, ?, ?, ?)", row)
            return True

    def decisions(self, digest: str) -> dict[str, Decision]:
        """What each site that answered said."""
        with self._transaction() as db:
            return _decisions(db, digest)

    def standing(self, digest: str) -> tuple[list[Party], dict[str, Decision]]:
        """Enrolled sites by name, and what each that answered said about the study: both of one moment."""
        with self._transaction() as db:
            return _parties(db, "site"), _decisions(db, digest)

    def approvals(self, digest: str) -> list[str]:
        """Sites, by name, whose present decision about the study is to approve; none that was revoked."""
        admitted = self.admitted_sites()
        return [
            site for site, decision in self.decisions(digest).items() if decision == "approved" and site in admitted
        ]

    def statements(self, digest: str) -> dict[str, tuple[bytes, bytes]]:
        """Each site's signed statement about the study: (body, signature)."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT site, statement, signature FROM decisions WHERE digest = ? ORDER BY site", (digest,)
            )
            return {site: (statement, signature) for site, statement, signature in rows}


def party_role(text: str) -> PartyRole:
    """The role behind a word from outside; raises MessageMalformed."""
    if text == "site":
        return "site"
    if text == "researcher":
        return "researcher"
    raise MessageMalformed("a party is a site or a researcher")


def _require_sites(db: sqlite3.Connection, sites: Sequence[str]) -> None:
    known = {name for (name,) in db.execute("SELECT name FROM parties WHERE role = 'site' AND revoked IS NULL")}
    if missing := [site for site in sites if site not in known]:
        raise NotEnrolled(
            f"not enrolled here: {', '.join(missing)}",
            remedy="Correct the names in the study's participation, or have the sites invited first.",
        )


def _require_free(db: sqlite3.Connection, name: str, key: keys.PublicKey) -> None:
    """Raise InvitationRefused unless `name` may be given to `key`: both new, the name revoked, or its certificate ended."""
    pem, known = keys.public_pem(key), _find(db, name)
    retired = db.execute("SELECT 1 FROM retired_keys WHERE public_key = ?", (pem,)).fetchone()
    other = db.execute("SELECT 1 FROM parties WHERE public_key = ? AND name != ?", (pem, name)).fetchone()
    if retired:
        raise InvitationRefused(
            "this key was revoked", remedy="Join with a new, empty keys folder: a new key is made there."
        )
    if other or (known and not known.revoked and not (keys.ended(known.certificate) and known.public_key == key)):
        raise InvitationRefused(f"{name} or this key is enrolled already")


def _enrolled(db: sqlite3.Connection, name: str, role: str, certificate: x509.Certificate) -> Party:
    """Write a party down with its certificate. Under a new key it starts anew: no node, and nothing decided."""
    key_pem = keys.public_pem(keys.public_key_of(certificate))
    shown = (key_pem, keys.certificate_pem(certificate), f"{certificate.serial_number:x}")
    known = _find(db, name)
    if known is None:
        row = (name, role, *shown, _iso())
        db.execute(
            "INSERT INTO parties (name, role, public_key, certificate, serial, joined) VALUES (?, ?, ?, ?, ?, ?)", row
        )
    elif keys.public_pem(known.public_key) == key_pem:
        db.execute("UPDATE parties SET public_key = ?, certificate = ?, serial = ? WHERE name = ?", (*shown, name))
    else:
        renewed = (
            "public_key = ?, certificate = ?, serial = ?, joined = ?, node_id = NULL, last_seen = NULL, revoked = NULL"
        )
        db.execute(f"UPDATE parties SET {renewed} WHERE name = ?", (*shown, _iso(), name))  # noqa: S608  fixed columns
        db.execute("DELETE FROM decisions WHERE site = ?", (name,))
        standings.forget(db, name)
    return _party(db, name)


def _parties(db: sqlite3.Connection, role: PartyRole) -> list[Party]:
    rows = db.execute(f"SELECT {_PARTY} FROM parties WHERE role = ? ORDER BY name", (role,))  # noqa: S608  fixed columns
    return [_read(row) for row in rows]


def _decisions(db: sqlite3.Connection, digest: str) -> dict[str, Decision]:
    return dict(db.execute("SELECT site, decision FROM decisions WHERE digest = ? ORDER BY site", (digest,)))


def _party(db: sqlite3.Connection, name: str) -> Party:
    found = _find(db, name)
    if found is None:
        raise NotEnrolled("the consortium has no party of this name")
    return found


def _find(db: sqlite3.Connection, name: str) -> Party | None:
    row = db.execute(f"SELECT {_PARTY} FROM parties WHERE name = ?", (name,)).fetchone()  # noqa: S608  fixed columns
    return None if row is None else _read(row)


def _read(row: tuple[Any, ...]) -> Party:
    node_id = None if row[3] is None else int(row[3])  # an unsigned 64-bit number, which SQLite's INTEGER cannot hold
    return Party(row[0], row[1], _certificate(row[2]), node_id, *row[4:])


_certificate = lru_cache(maxsize=1024)(keys.load_certificate)  # all sites' are read before each sum


def _iso(moment: float | None = None) -> str:
    when = dt.datetime.now(dt.UTC) if moment is None else dt.datetime.fromtimestamp(moment, dt.UTC)
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")
