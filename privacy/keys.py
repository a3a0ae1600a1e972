"""Keys, certificates and signed statements: every check here raises, and a private key is never readable by others.

Trust rules, in the order in which they bite:
1. One kind of identity: EC P-256. It serves TLS, the node's authentication at Flower (which asks for a NIST curve) and
   statements. X25519 keys are for sealing and for masks alone.
2. A private key is made where it is used, in a file of mode 0600, and is never overwritten and never sent.
3. A certificate is issued only for a signing request whose own signature holds; subject and uses come from the
   authority's arguments, never from the request.
4. Every signature covers a label `isocenter/v1/<use>` before its body, so a statement of one use is none of another.
5. What is sealed to a key says what it is about, and opens for nothing else.
6. An authority is known by the SHA-256 of its certificate, which people compare.
"""

import contextlib
import datetime as dt
import hashlib
import ipaddress
import json
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, hmac, hpke, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from privacy.disk import write_file
from privacy.errors import (
    CertificateExpired,
    KeyFileUnsafe,
    MessageMalformed,
    NotEnrolled,
    SealBroken,
    SignatureInvalid,
    TrustError,
)

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
Role = Literal["site", "researcher", "server"]

STUDY_SUBMIT = b"isocenter/v1/study/submit"  # a researcher stands for the canonical study
STUDY_OFFER = b"isocenter/v1/study/offer"  # the coordinator offers the canonical study to the sites it names
STUDY_DECISION = b"isocenter/v1/study/decision"  # a site approves or declines a digest
CALL = b"isocenter/v1/call"  # one gRPC call
JOURNAL_HEAD = b"isocenter/v1/journal/head"  # a party stands for its journal up to a line
SIGNING_LIST = b"isocenter/v1/signing-list"  # the coordinator asks its offline authority for these certificates
SUM_KEYS = b"isocenter/v1/sum-keys"  # a site stands for its ephemeral keys of one sum
SUM_CONTEXT = b"isocenter/v1/sum-context"  # a site says which order and participants its masks are bound to
LOG_TOKEN = b"isocenter/v1/log-token"  # a text that a log does not show
MODEL_PACKAGE = b"isocenter/v1/model-package"  # a researcher stands for a released model
MODEL_NOTICE = b"isocenter/v1/model-notice"  # the coordinator publishes a released model
LOCKED_FILE = b"isocenter/v1/locked-file"

PEM_BYTES_MAX = 64 * 1024  # a chain of three P-256 certificates is under 4 KiB
CA_DAYS = 3650  # the authority outlives every certificate it issues; replacing it means joining again
BACKDATE = dt.timedelta(minutes=5)  # a certificate is valid at once on a machine whose clock is a little behind
SEALING_KEY_BYTES = 32
TOKEN_KEY_BYTES = 32
SCRYPT = {"n": 2**15, "r": 8, "p": 1}  # 32 MiB and about a tenth of a second, as RFC 7914 has it for interactive logins
_HPKE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
_LABEL = re.compile(rb"isocenter/v1/[a-z0-9/-]{1,64}")
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


@dataclass(frozen=True)
class Authority:
    """The certificate authority of one consortium."""

    key: PrivateKey
    certificate: x509.Certificate


# Files ---------------------------------------------------------------------------------------------------------------


def write_private(path: Path, content: bytes) -> None:
    """Replace `path` in one step by a file of mode 0600; after a crash the old or the whole new content is there."""
    write_file(path, content, 0o600)


def write_public(path: Path, content: bytes) -> None:
    """`write_private` for what others may read, such as certificates: mode 0644."""
    write_file(path, content, 0o644)


def make_key(path: Path) -> PrivateKey:
    """A new P-256 key, stored unencrypted with mode 0600. Raises KeyFileUnsafe rather than overwrite anything."""
    key = ec.generate_private_key(ec.SECP256R1())
    copy_key(key, path)
    return key


def copy_key(key: PrivateKey, path: Path) -> None:
    """`key`, stored unencrypted in a new file of mode 0600. Raises KeyFileUnsafe rather than overwrite anything."""
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        write_file(path, pem, 0o600, replace=False)
    except FileExistsError:
        raise KeyFileUnsafe(
            f"{path} exists already; a key is never overwritten",
            remedy="Choose another folder, or move the old key away if it is certain that nobody needs it.",
        ) from None


def load_key(path: Path) -> PrivateKey:
    """The P-256 key in `path`. Raises KeyFileUnsafe if others may use the file, NotEnrolled if it is absent."""
    try:
        key = serialization.load_pem_private_key(read_private(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise TrustError(f"{path} holds no private key", remedy="Restore the file from your backup.") from None
    if not isinstance(key, PrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise TrustError(f"the key in {path} is not of type EC P-256", remedy="Restore the file from your backup.")
    return key


def read_private(path: Path) -> bytes:
    """The content of a file that only this user can use. Raises KeyFileUnsafe or, if it is absent, NotEnrolled."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise NotEnrolled(f"there is no key at {path}") from None
    except OSError as error:
        raise KeyFileUnsafe(f"{path} cannot be opened as a plain file ({error.strerror})") from None
    with os.fdopen(descriptor, "rb") as file:
        # The open file is examined, not its name, so nobody can exchange it between the look and the read.
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise KeyFileUnsafe(
                f"{path} can be read or changed by other users (mode {stat.S_IMODE(status.st_mode):04o})"
            )
        return file.read(PEM_BYTES_MAX)


# Public keys and certificates ----------------------------------------------------------------------------------------


def public_pem(key: PrivateKey | PublicKey) -> bytes:
    """PEM of the public half of `key`."""
    public = key.public_key() if isinstance(key, PrivateKey) else key
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def load_public(pem: bytes) -> PublicKey:
    """The P-256 public key in `pem`; raises MessageMalformed for anything else."""
    try:
        key = serialization.load_pem_public_key(pem[: PEM_BYTES_MAX + 1])
    except (ValueError, UnsupportedAlgorithm):
        raise MessageMalformed("this is no public key in PEM form") from None
    return _p256(key, "public key")


def load_certificate(pem: bytes) -> x509.Certificate:
    """The one certificate in `pem`; raises MessageMalformed for none, several or garbage."""
    try:
        found = x509.load_pem_x509_certificates(pem[: PEM_BYTES_MAX + 1])
    except ValueError:
        raise MessageMalformed("this is no certificate in PEM form") from None
    if len(found) != 1:
        raise MessageMalformed(f"expected one certificate, found {len(found)}")
    return found[0]


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def public_key_of(certificate: x509.Certificate) -> PublicKey:
    """The P-256 key that `certificate` speaks for; raises MessageMalformed for another type of key."""
    try:
        return _p256(certificate.public_key(), "key of the certificate")
    except (ValueError, UnsupportedAlgorithm):
        raise MessageMalformed("the key of the certificate cannot be read") from None


def _p256(key: object, what: str) -> PublicKey:
    if not isinstance(key, PublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise MessageMalformed(f"the {what} is not of type EC P-256")
    return key


def fingerprint(certificate: x509.Certificate) -> str:
    """64 lower-case hex characters: SHA-256 of the certificate's DER bytes."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def grouped(fingerprint_hex: str) -> str:
    """A fingerprint in groups of four, as people read it to each other over the telephone."""
    return " ".join(fingerprint_hex[i : i + 4] for i in range(0, len(fingerprint_hex), 4))


# The authority -------------------------------------------------------------------------------------------------------


def make_ca(key: PrivateKey, name: str) -> Authority:
    """A self-signed authority for the consortium `name` that may issue end certificates and no further authorities."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{check_name(name)} consortium authority")])
    now = dt.datetime.now(dt.UTC)
    public = key.public_key()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + dt.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(key, certificate)


def make_csr(key: PrivateKey, name: str) -> bytes:
    """PEM of a signing request: proof that whoever asks holds `key`. The authority takes nothing else from it."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_name(name))])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def key_of_csr(csr_pem: bytes) -> PublicKey:
    """The P-256 key of a signing request whose signature holds; raises MessageMalformed or SignatureInvalid."""
    if len(csr_pem) > PEM_BYTES_MAX:
        raise MessageMalformed(f"a signing request over {PEM_BYTES_MAX} bytes")
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        key = request.public_key()
        valid = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm):
        raise MessageMalformed("this is no signing request in PEM form") from None
    if not valid:
        raise SignatureInvalid("the signing request is not signed by its own key")
    return _p256(key, "key of the signing request")


def issue(
    authority: Authority, csr_pem: bytes, name: str, role: Role, days: int, host: str | None = None
) -> x509.Certificate:
    """A certificate for `name` in `role`, valid `days` from now, over the key of a checked request.

    Sites and researchers get clientAuth and the DNS name `<name>.<role>.isocenter`; role "server" gets serverAuth and
    `host`, a DNS name or an IP address.
    """
    public = key_of_csr(csr_pem)
    now = dt.datetime.now(dt.UTC)
    if role == "server":
        alternative: x509.GeneralName = _host_name(host or "")
        use = ExtendedKeyUsageOID.SERVER_AUTH
    else:
        alternative = x509.DNSName(f"{check_name(name)}.{role}.isocenter")
        use = ExtendedKeyUsageOID.CLIENT_AUTH
    authority_key = authority.certificate.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_name(name))]))
        .issuer_name(authority.certificate.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(min(now + dt.timedelta(days=days), authority.certificate.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=True)
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(_authority_key_identifier(authority_key), critical=False)
        .sign(authority.key, hashes.SHA256())
    )


def check_issued(ca: x509.Certificate, certificate: x509.Certificate, name: str, role: Role) -> None:
    """Raise TrustError unless `ca` issued `certificate` to `name` in `role`, CertificateExpired unless it is valid now."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        raise TrustError(f"the certificate of {name} was not issued by this consortium's authority") from None
    now = dt.datetime.now(dt.UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise CertificateExpired(
            f"the certificate of {name} ended {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC or is not yet valid"
        )
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        listed = names.get_values_for_type(x509.DNSName)
    except (x509.ExtensionNotFound, ValueError):
        listed = []
    if listed != [f"{name}.{role}.isocenter"]:
        raise TrustError(f"the certificate does not speak for {role} {name}")


def renewal_due(certificate: x509.Certificate) -> bool:
    """Whether two thirds of its life are over: early enough that a week without a connection costs nothing at 30 days."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return dt.datetime.now(dt.UTC) >= begin + (end - begin) * 2 / 3


def ended(certificate: x509.Certificate) -> bool:
    """Whether the time of `certificate` is over."""
    return dt.datetime.now(dt.UTC) > certificate.not_valid_after_utc


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_key_identifier(key: object) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(_p256(key, "authority's key"))


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _HOST.fullmatch(host):
        raise MessageMalformed(f"{host!r} is neither a DNS name in lower case nor an IP address")
    return x509.DNSName(host)


def check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise MessageMalformed(
            f"{name!r} is no name: lower-case letters, digits, - and _, at most 32, beginning with a letter",
            remedy="Choose a short name in lower case, such as north or st-mary.",
        )
    return name


def point_hex(public_key: PublicKey) -> str:
    """The key as 66 hex characters (compressed point), as a study's roster names it."""
    encoding, form = serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
    return public_key.public_bytes(encoding, form).hex()


def load_point(text: str) -> PublicKey:
    """The key behind `point_hex`; raises MessageMalformed for anything else, another spelling of it included."""
    try:
        key = PublicKey.from_encoded_point(ec.SECP256R1(), bytes.fromhex(text))
    except (ValueError, TypeError):
        raise MessageMalformed("this is no P-256 key in compressed form") from None
    if point_hex(key) != text:
        raise MessageMalformed("this is another spelling of a P-256 key than its compressed form")
    return key


# Tokens --------------------------------------------------------------------------------------------------------------


def token_key(path: Path) -> bytes:
    """The secret in `path` (32 bytes, 0600) under which texts are hashed into tokens; made on the first call."""
    if not path.exists():
        with contextlib.suppress(FileExistsError):  # another process of this site made it meanwhile
            write_file(path, secrets.token_bytes(TOKEN_KEY_BYTES), 0o600, replace=False)
    key = read_private(path)
    if len(key) != TOKEN_KEY_BYTES:
        raise TrustError(f"{path} holds no key of tokens", remedy="Remove the file: a new one is made.")
    return key


def token(key: bytes, text: str) -> str:
    """16 hex characters that stand for `text`: HMAC-SHA256, so who has no `key` cannot try names until one fits."""
    digest = hmac.HMAC(key, hashes.SHA256())
    digest.update(LOG_TOKEN + b"\n" + text.encode("utf-8", "backslashreplace"))
    return digest.finalize()[:8].hex()


def password_record(password: str) -> bytes:
    """What may be stored of a password: its scrypt hash (RFC 7914) with a salt of its own."""
    salt = secrets.token_bytes(16)
    hashed = Scrypt(salt=salt, length=32, **SCRYPT).derive(password.encode("utf-8", "surrogatepass"))
    return json.dumps({"version": 1, **SCRYPT, "salt": salt.hex(), "hash": hashed.hex()}).encode()


def is_password(record: bytes, password: str) -> bool:
    """Whether `password` is the one of the record, compared in constant time. Raises TrustError for a damaged record."""
    try:
        found = json.loads(record)
        if found["version"] != 1 or {name: found[name] for name in SCRYPT} != SCRYPT:
            raise ValueError
        salt, hashed = bytes.fromhex(found["salt"]), bytes.fromhex(found["hash"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TrustError("the stored password is damaged", remedy="Set it anew.") from None
    given = Scrypt(salt=salt, length=32, **SCRYPT).derive(password.encode("utf-8", "surrogatepass"))
    return secrets.compare_digest(given, hashed)


# Sealing -------------------------------------------------------------------------------------------------------------


def make_sealing_key(path: Path) -> X25519PrivateKey:
    """The X25519 key that others seal to, 32 raw bytes in a file of mode 0600; never overwrites anything."""
    key = X25519PrivateKey.generate()
    write_file(path, key.private_bytes_raw(), 0o600, replace=False)
    return key


def load_sealing_key(path: Path) -> X25519PrivateKey:
    """The key of `make_sealing_key`. Raises KeyFileUnsafe if others may use the file, NotEnrolled if it is absent."""
    raw = read_private(path)
    if len(raw) != SEALING_KEY_BYTES:
        raise TrustError(f"{path} holds no X25519 key", remedy="Restore the file from your backup.")
    return X25519PrivateKey.from_private_bytes(raw)


def seal(public_key: bytes, content: bytes, about: bytes) -> bytes:
    """Encrypt `content` so that only the owner of the X25519 `public_key` can read it, bound to `about`.

    HPKE in base mode (RFC 9180) with X25519, HKDF-SHA256 and AES-256-GCM: a fresh key for each message, `about` as info.
    Raises MessageMalformed if `public_key` is no X25519 key.
    """
    try:
        return _HPKE.encrypt(content, X25519PublicKey.from_public_bytes(public_key), about)
    except ValueError:
        raise MessageMalformed("this is no X25519 key to seal to") from None


def unseal(key: X25519PrivateKey, sealed: bytes, about: bytes) -> bytes:
    """What was sealed to `key` about the same thing; raises SealBroken for anything else."""
    try:
        return _HPKE.decrypt(sealed, key, about)
    except (ValueError, InvalidTag):
        raise SealBroken("the sealed content does not open with this key for this purpose") from None


# Files of this site ---------------------------------------------------------------------------------------------------

LOCKING_KEY_BYTES = 32
LOCK_PIECE = 64 * 1024 * 1024  # bytes encrypted at once: AES-GCM takes less than 2 GiB, and a volume may be larger


def make_locking_key(path: Path) -> None:
    """See to a key in `path` (32 bytes, 0600) that files of this site are locked with. Raises as `locking_key`."""
    if not path.exists():
        with contextlib.suppress(FileExistsError):  # another process of this site made it meanwhile
            write_file(path, secrets.token_bytes(LOCKING_KEY_BYTES), 0o600, replace=False)
    locking_key(path)


def locking_key(path: Path) -> bytes:
    """The key of `make_locking_key`. Raises KeyFileUnsafe if others may use the file, NotEnrolled if it is absent."""
    key = read_private(path)
    if len(key) != LOCKING_KEY_BYTES:
        raise TrustError(
            f"{path} holds no key of {LOCKING_KEY_BYTES} bytes", remedy="Restore the file from your backup."
        )
    return key


def lock(key: bytes, content: bytes, about: bytes) -> bytes:
    """`content` encrypted and authenticated under `key`, bound to `about` (AES-256-GCM, pieces in their order and number)."""
    begin, cipher = secrets.token_bytes(8), AESGCM(key)
    count = max(1, -(-len(content) // LOCK_PIECE))
    about = _piece(about, count)
    pieces = [
        cipher.encrypt(begin + number.to_bytes(4, "big"), content[at : at + LOCK_PIECE], about)
        for number, at in enumerate(range(0, count * LOCK_PIECE, LOCK_PIECE))
    ]
    return begin + count.to_bytes(4, "big") + b"".join(pieces)


def unlock(key: bytes, locked: bytes, about: bytes) -> bytes:
    """What was locked with `key` about the same thing; raises SealBroken for anything else."""
    begin, count, rest = locked[:8], int.from_bytes(locked[8:12], "big"), locked[12:]
    cipher, size = AESGCM(key), LOCK_PIECE + 16
    if count != max(1, -(-len(rest) // size)):
        raise SealBroken("a locked file is damaged")
    try:
        return b"".join(
            cipher.decrypt(
                begin + number.to_bytes(4, "big"), rest[number * size : (number + 1) * size], _piece(about, count)
            )
            for number in range(count)
        )
    except (InvalidTag, ValueError):
        raise SealBroken("a locked file does not open with this key, or is damaged") from None


def _piece(about: bytes, count: int) -> bytes:
    return LOCKED_FILE + b"\n" + count.to_bytes(4, "big") + about


# Statements ----------------------------------------------------------------------------------------------------------


def sign(key: PrivateKey, label: bytes, body: bytes) -> bytes:
    """ECDSA P-256 with SHA-256 over label and body; `label` is one of the constants above (domain separation)."""
    return key.sign(_labelled(label, body), ec.ECDSA(hashes.SHA256()))


def verify(public_key: PublicKey, label: bytes, body: bytes, signature: bytes) -> None:
    """Raise SignatureInvalid unless `signature` was made by the owner of `public_key` over the same label and body."""
    try:
        public_key.verify(signature, _labelled(label, body), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise SignatureInvalid(f"the signature does not belong to this content and key ({label.decode()})") from None


def signature_hex(signature: bytes) -> str:
    """A signature of `sign` as 128 hex characters (r, then s): always of one length, and a word that a journal may hold."""
    return "".join(f"{number:064x}" for number in decode_dss_signature(signature))


def signature_of(text: str) -> bytes:
    """The signature behind `signature_hex`; raises MessageMalformed for anything else."""
    if not re.fullmatch("[0-9a-f]{128}", text):
        raise MessageMalformed("this is no signature in hexadecimal form")
    return encode_dss_signature(int(text[:64], 16), int(text[64:], 16))


def _labelled(label: bytes, body: bytes) -> bytes:
    # No label holds a line feed, so label and body cannot be shifted into each other.
    if not _LABEL.fullmatch(label):
        raise ValueError(f"{label!r} is no label of the form isocenter/v1/<use>")
    return label + b"\n" + body


def digest(body: bytes) -> str:
    """64 lower-case hex characters: plain SHA-256, for content that is signed elsewhere."""
    return hashlib.sha256(body).hexdigest()
