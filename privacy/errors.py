"""Every error of Isocenter: a message that stays where it happened, a public code that may leave, and a remedy.

    IsocenterError
    ├── DocumentError             a YAML file that is malformed, has an unknown key or a value out of range
    │   ├── StudyConflict         settings of a study that contradict each other
    │   └── NewerVersion          a state file that a later version of Isocenter wrote
    ├── TrustError                who is speaking, and may they?
    │   ├── InvitationRefused     unknown, expired, used before, or for somebody else
    │   ├── WrongAuthority        the coordinator's certificate authority is not the invited one
    │   ├── NotEnrolled           no certificate here, or one that the consortium does not know
    │   ├── CertificateExpired    a certificate that has ended, and was not renewed in time
    │   ├── CertificateRevoked    the coordinator revoked this party
    │   ├── AwaitingSignature     the authority is offline, and signs by hand
    │   ├── SignatureInvalid      a signature, or what it covers, is not what it should be
    │   ├── ClockSkewed           caller and coordinator disagree about the time
    │   ├── HeadContradicted      a signed head of a journal that does not follow the one before it
    │   └── KeyFileUnsafe         a private key that others can read
    ├── OrderRefused              the gate of a site said no
    │   ├── StudyNotApproved      nobody at this site approved the digest
    │   ├── OrderForged           the order is not signed by the coordinator
    │   ├── OrderReplayed         this round and attempt was answered before
    │   ├── PolicyForbids         site.yaml does not permit it
    │   ├── OutsideHours          site.yaml permits work at other hours
    │   └── SitePaused            somebody at the site paused it
    ├── DataError
    │   ├── ImageLeftOut          one file, with one of the named reasons of `fl_client.ingest`
    │   ├── LabelTableError       a label table that cannot be read as mapped
    │   ├── CohortTooSmall        fewer patients than the site's or the study's minimum
    │   ├── PatientInTwoSplits    the same image, under two patients, on both sides of a split
    │   └── CacheLost             the index names an image that is not in the cache, or there is no index
    ├── RunError
    │   ├── TooFewApprovals       fewer sites approved than the study's quorum
    │   ├── QuorumLost            a round ended with fewer reports than the quorum
    │   ├── RunStopped            the coordinator stopped the run; what was committed stays
    │   └── RunUnknown            no such run or study here
    ├── ProtectionError           how updates are protected on their way into the sum
    │   ├── StepRefused           a step of secure aggregation out of turn, twice, or against its rules
    │   ├── PeerUntrusted         keys of another site that its enrolled key did not sign, or other keys than expected
    │   ├── ShareInvalid          shares of a secret that do not give the secret back
    │   ├── TooFewSurvivors       fewer sites than the threshold: no sum may be opened
    │   ├── MaskKeysLost          the process that held the keys of this sum is gone, and the keys with it
    │   ├── SealBroken            a sealed update that does not open, or was sealed for something else
    │   └── SignatureRefused      the training process asked for a signature that its order does not need
    ├── PrivacyError              differential privacy: a promise that cannot be made, or not be kept
    │   ├── UnitsCoupled          a layer or a loss in which one patient influences another's gradient
    │   ├── SamplingRefused       batches that no accounting here covers: shuffled, of fixed size, by class
    │   ├── DeltaTooLarge         δ at or above 1 / patients: a promise that allows publishing a patient
    │   ├── BudgetExceeded        a study or an order that would spend more ε than site.yaml permits
    │   ├── LedgerDamaged         the record of spent budgets is changed, cut off or missing
    │   ├── LedgerBusy            another process holds the record of spent budgets
    │   ├── ClockSetBack          the clock stands before the last entry of the record
    │   ├── AuditFailed           noise, clipping, sampling, masks or isolation are not what they should be
    │   └── ReleaseRefused        an attack on the model found more than the study claims
    ├── LearningError
    │   ├── TrainingDiverged      a loss or a weight is no longer a finite number
    │   └── TrainingStopped       the site was told to stop in the middle of a round
    ├── Unreachable               nothing answered at the address
    │   └── ProxyRefused          the proxy on the way out did not let through, or is none
    ├── PackageRefused            a released model that is altered, incomplete, unsigned, or another than it says
    ├── JournalDamaged            a line of a journal was changed, removed, reordered or cut off
    ├── DiskUnusable              a disk that is full, read-only or failing
    ├── MessageMalformed          a message or record that does not follow its schema
    │   └── VersionSkew           a message of a version that this Isocenter does not speak
    ├── NodeRunning               a second node for one site's home
    ├── WorkerDied                the process that trains ended without an answer
    └── LimitExceeded             the process that trains took more memory or time than site.yaml gives it

Only `code` crosses a site's boundary (inside `privacy.wire.Refusal`); messages may name files and values and never do.
"""


class IsocenterError(Exception):
    """An expected failure. `code` is public and enumerated; `str(error)` stays local; `remedy` says what to do next."""

    code = "internal"
    remedy = "See the log of this command; if it happens again, report it with the command and its version."

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        if remedy is not None:
            self.remedy = remedy


class DocumentError(IsocenterError):
    code = "bad-document"
    remedy = "Correct the line named above and run the command again."


class StudyConflict(DocumentError):
    code = "study-conflict"
    remedy = "Change one of the settings named above; `fl-study check FILE` repeats this check."


class NewerVersion(DocumentError):
    code = "newer-version"
    remedy = (
        "Upgrade Isocenter on this machine to the version that wrote the file, or a later one; nothing was changed."
    )


class TrustError(IsocenterError):
    code = "trust"
    remedy = "Ask the coordinator of your consortium."


class InvitationRefused(TrustError):
    code = "invitation-refused"
    remedy = "Ask the coordinator for a new invitation (`fl-server invite NAME`)."


class WrongAuthority(TrustError):
    code = "wrong-authority"
    remedy = (
        "Do not continue: the server at this address is not the one that invited you, or TLS is inspected on the way. "
        "Ask the coordinator to read the fingerprint of `fl-server sites` to you over the telephone."
    )


class NotEnrolled(TrustError):
    code = "not-enrolled"
    remedy = "Join first, with the line that the coordinator's `fl-server invite` printed."


class CertificateExpired(TrustError):
    code = "certificate-expired"
    remedy = "Ask the coordinator for a new invitation (`fl-server invite NAME`), and join with it in the same folder."


class CertificateRevoked(TrustError):
    code = "certificate-revoked"
    remedy = "Telephone the coordinator. If the key was lost, join with a new invitation and a new, empty keys folder."


class AwaitingSignature(TrustError):
    code = "awaiting-signature"
    remedy = "Wait until the coordinator says that it was signed, then run the same command again."


class SignatureInvalid(TrustError):
    code = "signature-invalid"
    remedy = (
        "Check the clocks of both machines; if they are right, treat the message as forged and tell the coordinator."
    )


class ClockSkewed(TrustError):
    code = "clock-skewed"
    remedy = "Set the clock of this machine (time synchronisation), then run the command again."


class HeadContradicted(TrustError):
    code = "head-contradicted"
    remedy = (
        "Somebody rewrote a journal, cut it off, or put back an old copy. Keep both journals as they are, and compare them: "
        "`fl-client journal verify --witness OTHER` names the line."
    )


class KeyFileUnsafe(TrustError):
    code = "key-file-unsafe"
    remedy = "Run `chmod 600` on the file named above."


class OrderRefused(IsocenterError):
    code = "order-refused"
    remedy = "Nothing to do at the site: the order was not carried out."


class StudyNotApproved(OrderRefused):
    code = "study-not-approved"
    remedy = "Read the study with `fl-client studies`, then approve it with `fl-client approve DIGEST`."


class OrderForged(OrderRefused):
    code = "order-forged"


class OrderReplayed(OrderRefused):
    code = "order-replayed"


class PolicyForbids(OrderRefused):
    code = "policy-forbids"
    remedy = "Ask the researcher for another study, or change the policy in site.yaml."


class OutsideHours(OrderRefused):
    code = "outside-hours"
    remedy = "Nothing to do: the site works again within its hours. They stand below `policy.hours` in site.yaml."


class SitePaused(OrderRefused):
    code = "site-paused"
    remedy = "Run `fl-client resume` when the site may work again."


class DataError(IsocenterError):
    code = "data"
    remedy = "Run `fl-client check` at the site; it lists what is missing."


class ImageLeftOut(DataError):
    """One file that is not taken. `reason` is one of the enumerated reasons; the message may quote the file."""

    code = "image-left-out"

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason


class LabelTableError(DataError):
    code = "label-table"
    remedy = "Correct `data.labels` in site.yaml; `fl-client check` shows the columns that were found."


class CohortTooSmall(DataError):
    code = "cohort-too-small"
    remedy = "Ingest more studies, or label more of them, or decline the study."


class PatientInTwoSplits(DataError):
    code = "patient-in-two-splits"
    remedy = "Give both images the same patient in the label table, or remove the copy, then ingest again."


class CacheLost(DataError):
    code = "cache-lost"
    remedy = "Run `fl-client ingest` again; it only reads what is missing. If an image is damaged, run it with --again."


class RunError(IsocenterError):
    code = "run"
    remedy = "See `fl-server runs` for the state of the run."


class TooFewApprovals(RunError):
    code = "too-few-approvals"
    remedy = "Ask the sites that have not answered to run `fl-client studies`."


class QuorumLost(RunError):
    code = "quorum-lost"
    remedy = "Find out why the sites named above did not report, then launch the run again; it goes on at this round."


class RunStopped(RunError):
    code = "run-stopped"
    remedy = "Ask the coordinator why; `fl-server resume RUN` carries it on where it stopped."


class RunUnknown(RunError):
    code = "run-unknown"
    remedy = "List what there is with `fl-server runs` or `fl-study studies`."


class ProtectionError(IsocenterError):
    code = "protection"
    remedy = "Nothing was revealed. If it happens again, tell the sites of the study before another run is launched."


class StepRefused(ProtectionError):
    code = "step-refused"


class PeerUntrusted(ProtectionError):
    code = "peer-untrusted"
    remedy = (
        "Do not continue: somebody put keys into the round that do not belong to the study's sites. Compare the "
        "fingerprints of the study's roster with the other sites over the telephone."
    )


class ShareInvalid(ProtectionError):
    code = "share-invalid"


class TooFewSurvivors(ProtectionError):
    code = "too-few-survivors"
    remedy = "Nothing was learned from this attempt. Find out why sites drop out; the round is tried again without masks reused."


class MaskKeysLost(ProtectionError):
    code = "mask-keys-lost"
    remedy = "Nothing to do: the site takes part again with fresh keys from the next round on."


class SealBroken(ProtectionError):
    code = "seal-broken"


class SignatureRefused(ProtectionError):
    code = "signature-refused"
    remedy = (
        "Nothing was signed, and the training process was replaced. No version of Isocenter asks for this: have the machine and "
        "its installation examined before the node is started again."
    )


class PrivacyError(IsocenterError):
    code = "privacy"
    remedy = "Correct the value named above; docs/privacy.md says what each of them means."


class UnitsCoupled(PrivacyError):
    code = "units-coupled"
    remedy = "Use a network with GroupNorm or InstanceNorm only, and a loss that is computed patient by patient."


class SamplingRefused(PrivacyError):
    code = "sampling-refused"
    remedy = "Draw patients by Poisson sampling; for other batches the accounting would claim too small an ε."


class DeltaTooLarge(PrivacyError):
    code = "delta-too-large"
    remedy = "Ask the researcher for a smaller `privacy.delta`; a fifth of 1 / patients is usual."


class BudgetExceeded(PrivacyError):
    code = "budget-exceeded"
    remedy = "See `fl-client budget`. Nothing was trained; a spent budget does not come back."


class LedgerDamaged(PrivacyError):
    code = "ledger-damaged"
    remedy = (
        "Nothing is trained until it is whole again: put back the newest backup of ledger.sqlite, leave journal.jsonl as it is, "
        "and run `fl-client budget --rebuild`, which charges what the backup does not know to every patient of this site."
    )


class LedgerBusy(PrivacyError):
    code = "ledger-busy"
    remedy = "Stop the other process that uses this site's folder; one node serves all studies of a site."


class ClockSetBack(PrivacyError):
    code = "clock-set-back"
    remedy = "Set the clock of this machine (time synchronisation), then start the node again."


class AuditFailed(PrivacyError):
    code = "audit-failed"
    remedy = (
        "The node does not start on this machine: report the finding with the versions of Isocenter, torch and numpy."
    )


class ReleaseRefused(PrivacyError):
    code = "release-refused"
    remedy = "Do not publish this model: find the cause with `fl-study attack`, mend it, and train again."


class LearningError(IsocenterError):
    code = "learning"
    remedy = "See the log of the site; the round goes on without it."


class TrainingDiverged(LearningError):
    code = "training-diverged"
    remedy = "Ask the researcher for a lower `learning_rate`; the update was not sent."


class TrainingStopped(LearningError):
    code = "training-stopped"
    remedy = "Start the node again; it takes part from the next round on."


class Unreachable(IsocenterError):
    code = "unreachable"
    remedy = (
        "Check that the coordinator runs (`fl-server start`), the address, and that no firewall blocks its two ports."
    )


class ProxyRefused(Unreachable):
    code = "proxy-refused"
    remedy = "Ask those who run the proxy to permit CONNECT to both ports of the coordinator, without opening the TLS inside."


class MessageMalformed(IsocenterError):
    code = "message-malformed"
    remedy = (
        "Both sides must run the same version of Isocenter; compare `fl-client --version` and `fl-server --version`."
    )


class VersionSkew(MessageMalformed):
    code = "version-skew"
    remedy = (
        "One side has to upgrade: `fl-client check` at the site, or `fl-server sites` at the coordinator, says which."
    )


class PackageRefused(IsocenterError):
    code = "package-refused"
    remedy = "Use nothing of it. Fetch the package again from whoever released it, and compare its SHA-256 with theirs."


class JournalDamaged(IsocenterError):
    code = "journal-damaged"
    remedy = "Keep the file as it is, find out who changed it, and restore the journal from a backup beside it."


class DiskUnusable(IsocenterError, OSError):
    """Is an OSError as well, so that whoever can go on without the file still does."""

    code = "disk-unusable"
    remedy = (
        "Make room on the disk, or mount it for writing. Nothing was half written: a running node or coordinator goes on by "
        "itself then, everything else where it stood when it is started again."
    )

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.errno, self.strerror = number, message

    def __str__(self) -> str:
        return str(self.args[0])


class NodeRunning(IsocenterError):
    code = "node-running"
    remedy = "Stop the other one first, or use it: `fl-client start` serves all studies of the site."


class WorkerDied(IsocenterError):
    code = "worker-died"
    remedy = "Most often the machine ran out of memory: lower `batch_size` in the study or free memory at the site."


class LimitExceeded(IsocenterError):
    """`limit` is memory or time."""

    code = "limit-exceeded"
    remedy = (
        "Raise `resources.memory_gb` or `resources.minutes_per_round` in site.yaml (it holds from the next order on), or decline "
        "the study."
    )

    def __init__(self, message: str, limit: str = "time") -> None:
        super().__init__(message)
        self.limit = limit


def public_codes() -> frozenset[str]:
    """Every code that a Refusal may carry; anything else is malformed."""
    return frozenset(_kinds())


def named(code: str) -> type[IsocenterError]:
    """The error with this code, for what another process of ours tells; IsocenterError if there is none."""
    return _kinds().get(code, IsocenterError)


def _kinds() -> dict[str, type[IsocenterError]]:
    found, todo = dict[str, type[IsocenterError]](), [IsocenterError]
    while todo:
        kind = todo.pop()
        found.setdefault(kind.code, kind)
        todo += kind.__subclasses__()
    return found
