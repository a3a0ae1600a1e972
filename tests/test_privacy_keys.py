"""Keys, certificates, statements, and the generated stubs of the consortium protocol."""

import contextlib
import datetime as dt
import hashlib
import hmac
import os
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from privacy import keys
from privacy.errors import KeyFileUnsafe, MessageMalformed, NotEnrolled, SealBroken, SignatureInvalid, TrustError

ROOT = Path(__file__).resolve().parent.parent
KEY = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())
P256_P = 2**256 - 2**224 + 2**192 + 2**96 - 1  # SEC 2, 2.4.2
P256_B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B


@pytest.fixture
def authority(tmp_path: Path) -> keys.Authority:
    return keys.make_ca(keys.make_key(tmp_path / "ca.key"), "demo")


def test_a_new_key_file_is_private_and_loads_again(tmp_path: Path) -> None:
    old = os.umask(0)  # the mode must not depend on the umask
    try:
        key = keys.make_key(tmp_path / "deep" / "site.key")
    finally:
        os.umask(old)
    path = tmp_path / "deep" / "site.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.load_key(path).private_numbers() == key.private_numbers()
    assert [entry.name for entry in path.parent.iterdir()] == ["site.key"]


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    keys.make_key(path)
    before = path.read_bytes()
    with pytest.raises(KeyFileUnsafe, match="never overwritten"):
        keys.make_key(path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(KeyFileUnsafe):
        keys.make_key(tmp_path / "dangling")
    assert path.read_bytes() == before
    assert not (tmp_path / "nowhere").exists()


def test_one_of_many_threads_makes_the_key(tmp_path: Path) -> None:
    made: list[bytes] = []

    def make() -> None:
        with contextlib.suppress(KeyFileUnsafe):
            made.append(keys.public_pem(keys.make_key(tmp_path / "site.key")))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [keys.public_pem(keys.load_key(tmp_path / "site.key"))]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o777])
def test_a_key_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    keys.make_key(tmp_path / "site.key")
    (tmp_path / "site.key").chmod(mode)
    with pytest.raises(KeyFileUnsafe) as caught:
        keys.load_key(tmp_path / "site.key")
    assert "chmod 600" in caught.value.remedy


def test_a_linked_key_is_refused(tmp_path: Path) -> None:
    keys.make_key(tmp_path / "site.key")
    (tmp_path / "link").symlink_to(tmp_path / "site.key")
    with pytest.raises(KeyFileUnsafe):
        keys.load_key(tmp_path / "link")


def test_what_is_no_p256_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotEnrolled):
        keys.load_key(tmp_path / "absent")
    wrong = [ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()]
    pems = [
        key.private_bytes(  # type: ignore[attr-defined]
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        for key in wrong
    ]
    for content in [*pems, b"", b"\0" * 100, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]:
        keys.write_private(tmp_path / "bad.key", content)
        with pytest.raises(TrustError):
            keys.load_key(tmp_path / "bad.key")


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    keys.write_private(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        keys.write_private(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_site_certificate_says_who_and_what_for(authority: keys.Authority) -> None:
    certificate = keys.issue(authority, keys.make_csr(KEY, "north"), "north", "site", 30)
    certificate.verify_directly_issued_by(authority.certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert certificate.subject.rfc4514_string() == "CN=north"
    assert names.get_values_for_type(x509.DNSName) == ["north.site.isocenter"]
    assert list(uses) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    days = certificate.not_valid_after_utc - dt.datetime.now(dt.UTC)
    assert dt.timedelta(days=29, hours=23) < days <= dt.timedelta(days=30)
    assert keys.public_key_of(certificate) == KEY.public_key()
    keys.check_issued(authority.certificate, certificate, "north", "site")


def test_the_authority_takes_nothing_from_the_request_but_its_key(authority: keys.Authority) -> None:
    greedy = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coordinator")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=3), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("victim.site.isocenter")]), critical=False)
        .sign(KEY, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    certificate = keys.issue(authority, greedy, "north", "site", 30)
    assert certificate.subject.rfc4514_string() == "CN=north"
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["north.site.isocenter"]


@pytest.mark.parametrize("host", ["127.0.0.1", "fed.example.org"])
def test_a_server_certificate_satisfies_openssl_for_its_host(authority: keys.Authority, host: str) -> None:
    """Oracle: Python's ssl, that is OpenSSL, does the handshake and the host check."""
    certificate = keys.issue(authority, keys.make_csr(KEY, "demo"), "demo", "server", 30, host)
    assert _handshake(authority.certificate, certificate, KEY, host) == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        _handshake(authority.certificate, certificate, KEY, "other.example.org")


def _handshake(ca: x509.Certificate, certificate: x509.Certificate, key: keys.PrivateKey, host: str) -> str | None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        pem = Path(folder) / "both.pem"
        pem.write_bytes(
            keys.certificate_pem(certificate)
            + key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        server.load_cert_chain(pem)
    client = ssl.create_default_context(cadata=keys.certificate_pem(ca).decode())
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(6):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return ends[0].version()


def test_check_issued_refuses_what_the_authority_did_not_say(authority: keys.Authority, tmp_path: Path) -> None:
    csr = keys.make_csr(KEY, "north")
    good = keys.issue(authority, csr, "north", "site", 30)
    foreign = keys.issue(keys.make_ca(OTHER, "demo"), csr, "north", "site", 30)
    for certificate, name, role in [
        (foreign, "north", "site"),
        (good, "south", "site"),
        (good, "north", "researcher"),
        (authority.certificate, "north", "site"),
    ]:
        with pytest.raises(TrustError):
            keys.check_issued(authority.certificate, certificate, name, role)  # type: ignore[arg-type]


def test_an_ended_certificate_is_refused(authority: keys.Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(dt.datetime):
        pass

    monkeypatch.setattr(dt, "datetime", Clock)
    now = dt.datetime.now(dt.UTC)
    certificate = keys.issue(authority, keys.make_csr(KEY, "north"), "north", "site", 1)
    for moment in (now + dt.timedelta(days=2), now - dt.timedelta(hours=1)):
        monkeypatch.setattr(Clock, "now", staticmethod(lambda _tz, moment=moment: moment))
        with pytest.raises(TrustError, match="ended"):
            keys.check_issued(authority.certificate, certificate, "north", "site")


def test_hostile_signing_requests_are_refused(authority: keys.Authority) -> None:
    good = keys.make_csr(KEY, "north")
    request = x509.load_pem_x509_csr(good)
    der = bytearray(request.public_bytes(serialization.Encoding.DER))
    der[-3] ^= 1  # inside the signature
    try:
        broken = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    except ValueError:
        broken = b"unreadable"
    rsa_key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "north")])
    rsa_csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(rsa_key, hashes.SHA256())
    p384 = ec.generate_private_key(ec.SECP384R1())
    p384_csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(p384, hashes.SHA256())
    pem = serialization.Encoding.PEM
    for csr in [
        b"",
        good[:100],
        broken,
        rsa_csr.public_bytes(pem),
        p384_csr.public_bytes(pem),
        b"A" * (keys.PEM_BYTES_MAX + 1),
        good + b"A" * keys.PEM_BYTES_MAX,
    ]:
        with pytest.raises((MessageMalformed, SignatureInvalid)):
            keys.issue(authority, csr, "north", "site", 30)


@pytest.mark.parametrize("name", ["", "North", "a b", "../x", "a.b", "ä", "a" * 33, "1a", "a\n"])
def test_only_names_become_certificates(authority: keys.Authority, name: str) -> None:
    with pytest.raises(MessageMalformed):
        keys.issue(authority, keys.make_csr(KEY, "north"), name, "site", 30)
    with pytest.raises(MessageMalformed):
        keys.make_csr(KEY, name)


@pytest.mark.parametrize("host", ["", "*.example.org", "UPPER.org", "a b", "a/b", "-x.org", None])
def test_only_hosts_become_server_certificates(authority: keys.Authority, host: str | None) -> None:
    with pytest.raises(MessageMalformed):
        keys.issue(authority, keys.make_csr(KEY, "demo"), "demo", "server", 30, host)


def test_fingerprint_is_the_sha256_of_the_der(authority: keys.Authority) -> None:
    der = authority.certificate.public_bytes(serialization.Encoding.DER)
    value = keys.fingerprint(authority.certificate)
    assert value == hashlib.sha256(der).hexdigest()
    assert keys.grouped(value).replace(" ", "") == value
    assert {len(group) for group in keys.grouped(value).split(" ")} == {4}


def test_public_parts_refuse_other_content() -> None:
    for pem in [
        b"",
        b"x" * 200_000,
        keys.public_pem(KEY)[:60],
        b"-----BEGIN PUBLIC KEY-----\n\n-----END PUBLIC KEY-----",
    ]:
        with pytest.raises(MessageMalformed):
            keys.load_public(pem)
        with pytest.raises(MessageMalformed):
            keys.load_certificate(pem)
    certificate = keys.certificate_pem(keys.make_ca(KEY, "demo").certificate)
    with pytest.raises(MessageMalformed):
        keys.load_certificate(certificate * 2)
    assert keys.load_public(keys.public_pem(KEY)) == KEY.public_key()


def test_a_statement_holds_for_its_key_label_and_body_only() -> None:
    signature = keys.sign(KEY, keys.STUDY_OFFER, b"body")
    keys.verify(KEY.public_key(), keys.STUDY_OFFER, b"body", signature)
    changed = bytearray(signature)
    changed[len(changed) // 2] ^= 1
    for key, label, body, made in [
        (OTHER, keys.STUDY_OFFER, b"body", signature),
        (KEY, keys.STUDY_SUBMIT, b"body", signature),
        (KEY, keys.STUDY_OFFER, b"body ", signature),
        (KEY, keys.STUDY_OFFER, b"body", bytes(changed)),
        (KEY, keys.STUDY_OFFER, b"body", signature[:-1]),
        (KEY, keys.STUDY_OFFER, b"body", b""),
    ]:
        with pytest.raises(SignatureInvalid):
            keys.verify(key.public_key(), label, body, made)


def test_a_statement_is_plain_ecdsa_over_label_line_feed_body() -> None:
    """Oracle: the library's own verification of the documented bytes."""
    signature = keys.sign(KEY, keys.CALL, b"x")
    KEY.public_key().verify(signature, b"isocenter/v1/call\nx", ec.ECDSA(hashes.SHA256()))


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_label_and_body_cannot_shift_into_each_other(body: bytes, tail: bytes) -> None:
    label = keys.STUDY_SUBMIT
    with pytest.raises(ValueError, match="no label"):
        keys.sign(KEY, label + b"\n" + tail, body)


# Keys in a study's roster


def test_a_point_is_written_as_sec_1_says_and_comes_back() -> None:
    """Oracle: SEC 1, 2.3.3: 02 or 03 for an even or odd y, then x in 32 bytes."""
    for _ in range(20):  # both signs of y, and now and then an x with leading zeros
        public = ec.generate_private_key(ec.SECP256R1()).public_key()
        numbers = public.public_numbers()
        assert keys.point_hex(public) == f"{2 + numbers.y % 2:02x}{numbers.x:064x}"
        assert keys.load_point(keys.point_hex(public)) == public
    assert keys.point_hex(KEY.public_key()) != keys.point_hex(OTHER.public_key())
    small = ec.derive_private_key(1, ec.SECP256R1()).public_key()  # the generator of NIST P-256 (SEC 2, 2.4.2)
    assert keys.point_hex(small) == "036b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296"


def test_what_is_no_point_is_refused() -> None:
    good = keys.point_hex(KEY.public_key())
    p384 = ec.generate_private_key(ec.SECP384R1()).public_key()
    longer = p384.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint).hex()
    off_curve = next(
        text
        for text in (f"02{x:064x}" for x in range(1, 50))
        if pow(int(text[2:], 16) ** 3 - 3 * int(text[2:], 16) + P256_B, (P256_P - 1) // 2, P256_P) == P256_P - 1
    )
    for text in ["", "00", "zz" * 33, good[:-1], good[:-2], good + "00", "05" + good[2:], longer, off_curve]:
        with pytest.raises(MessageMalformed):
            keys.load_point(text)
    with pytest.raises(MessageMalformed):
        keys.load_point(f"02{P256_P:064x}")  # x is not below the prime
    with pytest.raises(MessageMalformed):
        keys.load_point(None)  # type: ignore[arg-type]


# Sealing


def test_a_sealing_key_file_is_private_raw_and_never_overwritten(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        key = keys.make_sealing_key(tmp_path / "deep" / "aggregator.key")
    finally:
        os.umask(old)
    path = tmp_path / "deep" / "aggregator.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == key.private_bytes_raw() and path.stat().st_size == 32
    assert keys.load_sealing_key(path).public_key() == key.public_key()
    with pytest.raises(FileExistsError):
        keys.make_sealing_key(path)
    assert path.read_bytes() == key.private_bytes_raw()
    assert [entry.name for entry in path.parent.iterdir()] == ["aggregator.key"]


def test_a_sealing_key_is_not_loaded_from_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(NotEnrolled):
        keys.load_sealing_key(tmp_path / "absent.key")
    path = tmp_path / "aggregator.key"
    for content in (b"", b"x" * 31, b"x" * 33, b"x" * (keys.PEM_BYTES_MAX + 10)):
        keys.write_private(path, content)
        with pytest.raises(TrustError, match="no X25519 key"):
            keys.load_sealing_key(path)
    keys.make_key(tmp_path / "site.key")  # another kind of key
    with pytest.raises(TrustError, match="no X25519 key"):
        keys.load_sealing_key(tmp_path / "site.key")
    keys.write_private(path, b"x" * 32)
    for mode in (0o640, 0o604, 0o660, 0o777):
        path.chmod(mode)
        with pytest.raises(KeyFileUnsafe, match=f"{mode:04o}"):
            keys.load_sealing_key(path)
    path.chmod(0o600)
    (tmp_path / "link.key").symlink_to(path)
    with pytest.raises(KeyFileUnsafe):
        keys.load_sealing_key(tmp_path / "link.key")


def public_of(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


@given(st.binary(max_size=300), st.binary(max_size=100))
def test_what_is_sealed_opens_for_its_key_and_purpose_only(content: bytes, about: bytes) -> None:
    key, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    sealed = keys.seal(public_of(key), content, about)
    assert keys.unseal(key, sealed, about) == content
    assert len(sealed) == 32 + len(content) + 16  # ephemeral key, content, tag
    for wrong_key, wrong_about in [
        (other, about),
        (key, about + b"\0"),
        (key, b"x" + about),
        (key, about[:-1] + b"?!"),
    ]:
        with pytest.raises(SealBroken):
            keys.unseal(wrong_key, sealed, wrong_about)


def test_a_sealed_message_that_was_cut_or_altered_anywhere_does_not_open() -> None:
    key = X25519PrivateKey.generate()
    sealed = keys.seal(public_of(key), b"an update", b"study run round site")
    for place in range(len(sealed)):
        for changed in (sealed[:place], sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :]):
            with pytest.raises(SealBroken):
                keys.unseal(key, changed, b"study run round site")
    for changed in (sealed + b"\0", b"\0" * len(sealed), b"\0" * 32 + sealed[32:]):
        with pytest.raises(SealBroken):
            keys.unseal(key, changed, b"study run round site")
    with pytest.raises(SealBroken):
        keys.unseal(key, sealed, b"")


def test_sealing_the_same_twice_looks_different() -> None:
    key = X25519PrivateKey.generate()
    one, two = (keys.seal(public_of(key), b"\0" * 64, b"a") for _ in range(2))
    assert one[:32] != two[:32] and one[32:] != two[32:]


def test_only_a_usable_x25519_key_is_sealed_to() -> None:
    # Small-order points (RFC 7748, section 6.1): the shared secret would be zero whatever the sender's key is.
    for public in (b"", b"x" * 31, b"x" * 33, b"\0" * 32, b"\1" + b"\0" * 31):
        with pytest.raises(MessageMalformed):
            keys.seal(public, b"an update", b"about")


def test_sealing_is_rfc_9180_base_mode() -> None:
    """Oracle: HPKE's key schedule written out here (RFC 9180, sections 4 and 5) with one AES-256-GCM message."""
    key, about, content = X25519PrivateKey.generate(), b"study run round site", b"an update"
    sealed = keys.seal(public_of(key), content, about)
    enc, ciphertext = sealed[:32], sealed[32:]
    kem_suite, suite = b"KEM" + (32).to_bytes(2, "big"), b"HPKE" + bytes([0, 32, 0, 1, 0, 2])

    def extract(salt: bytes, label: bytes, ikm: bytes, suite_id: bytes) -> bytes:
        return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite_id + label + ikm, "sha256")

    def expand(prk: bytes, label: bytes, info: bytes, length: int, suite_id: bytes) -> bytes:
        labelled = length.to_bytes(2, "big") + b"HPKE-v1" + suite_id + label + info
        return hmac.digest(prk, labelled + b"\x01", "sha256")[:length]  # one block: length is at most 32

    shared = key.exchange(X25519PublicKey.from_public_bytes(enc))
    secret = expand(extract(b"", b"eae_prk", shared, kem_suite), b"shared_secret", enc + public_of(key), 32, kem_suite)
    context = b"\0" + extract(b"", b"psk_id_hash", b"", suite) + extract(b"", b"info_hash", about, suite)
    schedule = extract(secret, b"secret", b"", suite)
    aead, nonce = expand(schedule, b"key", context, 32, suite), expand(schedule, b"base_nonce", context, 12, suite)
    assert AESGCM(aead).decrypt(nonce, ciphertext, b"") == content


def test_labels_all_differ() -> None:
    labels = [keys.STUDY_SUBMIT, keys.STUDY_OFFER, keys.STUDY_DECISION, keys.CALL, keys.SUM_KEYS]
    assert len(set(labels)) == len(labels)


def test_the_stubs_are_what_the_protocol_generates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT)]
    command += [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([*command, "privacy/consortium.proto"], check=True, cwd=ROOT)
    made = {path.name: path.read_text() for path in (tmp_path / "privacy").iterdir()}
    assert set(made) == {"consortium_pb2.py", "consortium_pb2.pyi", "consortium_pb2_grpc.py"}
    for name, text in made.items():
        assert (ROOT / "privacy" / name).read_text() == text, f"regenerate privacy/{name}"
    assert "from privacy import consortium_pb2" in made["consortium_pb2_grpc.py"]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 24, 25])
def test_what_is_locked_opens_with_its_key_for_its_purpose_only(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "LOCK_PIECE", 8)
    key, content = bytes(range(32)), bytes(range(size))
    locked = keys.lock(key, content, b"this")
    assert keys.unlock(key, locked, b"this") == content
    assert keys.lock(key, content, b"this") != locked  # another nonce each time
    pieces = [locked[:12], *(locked[n : n + 24] for n in range(12, len(locked), 24))]
    wrong = [locked[:n] for n in range(0, len(locked), 5)] + [locked + b"x", locked + locked[12:]]
    wrong += [locked[:n] + bytes([locked[n] ^ 1]) + locked[n + 1 :] for n in range(len(locked))]
    wrong += [pieces[0] + pieces[2] + pieces[1] + b"".join(pieces[3:])] if len(pieces) > 2 else []
    wrong += [locked[:8] + (1).to_bytes(4, "big") + pieces[1]] if len(pieces) > 2 else []  # only its first piece
    for other in wrong:
        if other != locked:
            with pytest.raises(SealBroken):
                keys.unlock(key, other, b"this")
    for other_key, about in ((bytes(32), b"this"), (key, b"that")):
        with pytest.raises(SealBroken):
            keys.unlock(other_key, locked, about)


def test_a_locking_key_is_made_once_and_read_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "a" / "cache.key"
    with pytest.raises(NotEnrolled):
        keys.locking_key(path)
    keys.make_locking_key(path)
    first = keys.locking_key(path)
    keys.make_locking_key(path)
    assert len(first) == 32 and keys.locking_key(path) == first and path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(KeyFileUnsafe):
        keys.locking_key(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(TrustError):
        keys.locking_key(path)
