from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Versions(_message.Message):
    __slots__ = ("wire", "major", "minor", "patch")
    WIRE_FIELD_NUMBER: _ClassVar[int]
    MAJOR_FIELD_NUMBER: _ClassVar[int]
    MINOR_FIELD_NUMBER: _ClassVar[int]
    PATCH_FIELD_NUMBER: _ClassVar[int]
    wire: int
    major: int
    minor: int
    patch: int
    def __init__(self, wire: _Optional[int] = ..., major: _Optional[int] = ..., minor: _Optional[int] = ..., patch: _Optional[int] = ...) -> None: ...

class EnrolRequest(_message.Message):
    __slots__ = ("name", "role", "token", "csr", "versions")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CSR_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: str
    token: str
    csr: bytes
    versions: Versions
    def __init__(self, name: _Optional[str] = ..., role: _Optional[str] = ..., token: _Optional[str] = ..., csr: _Optional[bytes] = ..., versions: _Optional[_Union[Versions, _Mapping]] = ...) -> None: ...

class EnrolReply(_message.Message):
    __slots__ = ("certificate", "coordinator_key", "gateway_port", "versions")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_KEY_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_PORT_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    coordinator_key: bytes
    gateway_port: int
    versions: Versions
    def __init__(self, certificate: _Optional[bytes] = ..., coordinator_key: _Optional[bytes] = ..., gateway_port: _Optional[int] = ..., versions: _Optional[_Union[Versions, _Mapping]] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("csr", "versions")
    CSR_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    csr: bytes
    versions: Versions
    def __init__(self, csr: _Optional[bytes] = ..., versions: _Optional[_Union[Versions, _Mapping]] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("certificate", "versions")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    versions: Versions
    def __init__(self, certificate: _Optional[bytes] = ..., versions: _Optional[_Union[Versions, _Mapping]] = ...) -> None: ...

class Readiness(_message.Message):
    __slots__ = ("ready", "reasons")
    READY_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    ready: bool
    reasons: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ready: _Optional[bool] = ..., reasons: _Optional[_Iterable[str]] = ...) -> None: ...

class GreetRequest(_message.Message):
    __slots__ = ("versions", "readiness")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    READINESS_FIELD_NUMBER: _ClassVar[int]
    versions: Versions
    readiness: Readiness
    def __init__(self, versions: _Optional[_Union[Versions, _Mapping]] = ..., readiness: _Optional[_Union[Readiness, _Mapping]] = ...) -> None: ...

class GreetReply(_message.Message):
    __slots__ = ("versions", "time_s")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    versions: Versions
    time_s: int
    def __init__(self, versions: _Optional[_Union[Versions, _Mapping]] = ..., time_s: _Optional[int] = ...) -> None: ...

class WitnessRequest(_message.Message):
    __slots__ = ("head",)
    HEAD_FIELD_NUMBER: _ClassVar[int]
    head: bytes
    def __init__(self, head: _Optional[bytes] = ...) -> None: ...

class WitnessReply(_message.Message):
    __slots__ = ("head",)
    HEAD_FIELD_NUMBER: _ClassVar[int]
    head: bytes
    def __init__(self, head: _Optional[bytes] = ...) -> None: ...

class OffersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Offer(_message.Message):
    __slots__ = ("study", "researcher", "researcher_certificate", "researcher_signature", "coordinator_signature", "submitted", "decision")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    RESEARCHER_FIELD_NUMBER: _ClassVar[int]
    RESEARCHER_CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    RESEARCHER_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    study: bytes
    researcher: str
    researcher_certificate: bytes
    researcher_signature: bytes
    coordinator_signature: bytes
    submitted: str
    decision: str
    def __init__(self, study: _Optional[bytes] = ..., researcher: _Optional[str] = ..., researcher_certificate: _Optional[bytes] = ..., researcher_signature: _Optional[bytes] = ..., coordinator_signature: _Optional[bytes] = ..., submitted: _Optional[str] = ..., decision: _Optional[str] = ...) -> None: ...

class OffersReply(_message.Message):
    __slots__ = ("offers",)
    OFFERS_FIELD_NUMBER: _ClassVar[int]
    offers: _containers.RepeatedCompositeFieldContainer[Offer]
    def __init__(self, offers: _Optional[_Iterable[_Union[Offer, _Mapping]]] = ...) -> None: ...

class DecideRequest(_message.Message):
    __slots__ = ("statement", "signature")
    STATEMENT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    statement: bytes
    signature: bytes
    def __init__(self, statement: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class DecideReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RosterRequest(_message.Message):
    __slots__ = ("sites",)
    SITES_FIELD_NUMBER: _ClassVar[int]
    sites: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sites: _Optional[_Iterable[str]] = ...) -> None: ...

class RosterReply(_message.Message):
    __slots__ = ("keys", "aggregator")
    class KeysEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    KEYS_FIELD_NUMBER: _ClassVar[int]
    AGGREGATOR_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.ScalarMap[str, str]
    aggregator: str
    def __init__(self, keys: _Optional[_Mapping[str, str]] = ..., aggregator: _Optional[str] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("study", "signature")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    study: bytes
    signature: bytes
    def __init__(self, study: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class StudiesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RunState(_message.Message):
    __slots__ = ("run_id", "state", "label")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    state: str
    label: str
    def __init__(self, run_id: _Optional[str] = ..., state: _Optional[str] = ..., label: _Optional[str] = ...) -> None: ...

class StudyState(_message.Message):
    __slots__ = ("digest", "name", "submitted", "quorum", "approved", "declined", "unanswered", "runs", "draft")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_FIELD_NUMBER: _ClassVar[int]
    QUORUM_FIELD_NUMBER: _ClassVar[int]
    APPROVED_FIELD_NUMBER: _ClassVar[int]
    DECLINED_FIELD_NUMBER: _ClassVar[int]
    UNANSWERED_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    digest: str
    name: str
    submitted: str
    quorum: int
    approved: _containers.RepeatedScalarFieldContainer[str]
    declined: _containers.RepeatedScalarFieldContainer[str]
    unanswered: _containers.RepeatedScalarFieldContainer[str]
    runs: _containers.RepeatedCompositeFieldContainer[RunState]
    draft: str
    def __init__(self, digest: _Optional[str] = ..., name: _Optional[str] = ..., submitted: _Optional[str] = ..., quorum: _Optional[int] = ..., approved: _Optional[_Iterable[str]] = ..., declined: _Optional[_Iterable[str]] = ..., unanswered: _Optional[_Iterable[str]] = ..., runs: _Optional[_Iterable[_Union[RunState, _Mapping]]] = ..., draft: _Optional[str] = ...) -> None: ...

class StudiesReply(_message.Message):
    __slots__ = ("studies",)
    STUDIES_FIELD_NUMBER: _ClassVar[int]
    studies: _containers.RepeatedCompositeFieldContainer[StudyState]
    def __init__(self, studies: _Optional[_Iterable[_Union[StudyState, _Mapping]]] = ...) -> None: ...

class LaunchRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class LaunchReply(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("run_id", "first")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    first: int
    def __init__(self, run_id: _Optional[str] = ..., first: _Optional[int] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("number", "text")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    number: int
    text: str
    def __init__(self, number: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class ResultsRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("name", "data", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    data: bytes
    sha256: str
    def __init__(self, name: _Optional[str] = ..., data: _Optional[bytes] = ..., sha256: _Optional[str] = ...) -> None: ...

class HeadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HeadReply(_message.Message):
    __slots__ = ("head",)
    HEAD_FIELD_NUMBER: _ClassVar[int]
    head: bytes
    def __init__(self, head: _Optional[bytes] = ...) -> None: ...

class ModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Published(_message.Message):
    __slots__ = ("notice", "signature")
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    notice: bytes
    signature: bytes
    def __init__(self, notice: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class ModelsReply(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Published]
    def __init__(self, models: _Optional[_Iterable[_Union[Published, _Mapping]]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("sha256", "first")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    first: int
    def __init__(self, sha256: _Optional[str] = ..., first: _Optional[int] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...
