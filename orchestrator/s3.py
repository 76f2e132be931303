"""The S3 side of `storage`: boto3, one retry policy, and conditional writes."""

import base64
import contextlib
import hashlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import boto3
import botocore.session
from boto3.exceptions import S3UploadFailedError
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004 -- botocore's own
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    MetadataRetrievalError,
    NoCredentialsError,
    SSOError,
    TokenRetrievalError,
)

from blip_engine.errors import one_line

from .errors import (
    AccessDenied,
    NoCredentials,
    ObjectChanged,
    ObjectNotFound,
    StorageError,
    StoreUnavailable,
    UsageError,
)
from .settings import Settings
from .stopping import as_here, go_on, going_on
from .storage import ObjectInfo, Store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")
log = logging.getLogger(__name__)

#: Answers that are worth asking again for: conflicts of conditional writes, throttling, and the store's own failures.
_RETRY_STATUS: Final = frozenset({408, 409, 429, 500, 502, 503, 504})
_RETRY_CODES: Final = frozenset({"RequestTimeout", "SlowDown", "Throttling", "RequestTimeTooSkewed"})
_PASSING: Final = (
    HTTPClientError,
    ConnectionError,
    IncompleteReadError,
)  # ends of connections, time-outs, short bodies
#: Where credentials come from does not answer, or has none at present.
_NO_CREDENTIALS: Final = (
    NoCredentialsError,
    CredentialRetrievalError,
    MetadataRetrievalError,
    SSOError,
    TokenRetrievalError,
)
#: How patient a look for a machine's own credentials is. botocore's one try of a second fails on a machine that starts.
_PATIENCE: Final = {"metadata_service_num_attempts": 5, "metadata_service_timeout": 2}
_LOOK_SECONDS: Final = 2.0  # that a thread waits for another one's look; then it says that there are none
_PIECE: Final = 8 * 2**20  # bytes of a large file that are sent at once; S3 takes 5 MiB at least
_MOST_PIECES: Final = 10_000  # S3's own bound
_SENDERS: Final = 4  # pieces on their way at once
_DENIED: Final = "access denied; check the credentials and the bucket's policy"
_MEANING: Final[Mapping[int, tuple[type[StorageError], str]]] = {
    401: (AccessDenied, _DENIED),
    403: (AccessDenied, _DENIED),
    404: (ObjectNotFound, "no such object or bucket"),
    412: (ObjectChanged, "another version than the one asked for"),
    416: (ObjectChanged, "shorter than the version asked for"),
}


class _Clients:
    """One client a process and time-out (they are thread-safe), with retries left to `S3Store`.

    Everything else is the standard AWS configuration: credentials, region, AWS_ENDPOINT_URL_S3. To be called within
    `retrying`: a client without credentials is not made, so that each try looks for them anew. Raises UsageError for a
    configuration that cannot be right.
    """

    def __init__(self) -> None:
        self._making = threading.Lock()  # making a client is not thread-safe
        self._made: dict[float, S3Client] = {}

    def __call__(self, timeout: float) -> "S3Client":
        if (made := self._made.get(timeout)) is not None:
            return made
        if not self._making.acquire(timeout=_LOOK_SECONDS):
            raise NoCredentialsError
        try:
            if timeout not in self._made:
                self._made[timeout] = _checked_client(timeout)
            return self._made[timeout]
        finally:
            self._making.release()

    def cache_clear(self) -> None:
        """For tests: clients remember the settings that they were made for."""
        self._made.clear()


s3_client: Final = _Clients()


def _checked_client(timeout: float) -> "S3Client":
    try:
        return _new_client(timeout)
    except (*_PASSING, *_NO_CREDENTIALS):
        raise
    except (BotoCoreError, ValueError, AttributeError, OSError) as error:  # whatever botocore makes of a mistake
        raise UsageError(_mistake(error)) from error


def _mistake(error: Exception) -> str:
    """What is wrong with the configuration, and the variables that it comes from."""
    says = one_line(error).rstrip(".")
    if isinstance(error, AttributeError):  # a section that is no section
        says = f"{os.environ.get('AWS_CONFIG_FILE', '~/.aws/config')} is not as it should be ({says})"
    settings = {name: value for name, value in os.environ.items() if name.startswith("AWS_") and "_KEY" not in name}
    found = " and ".join(sorted(name for name, value in settings.items() if value and value in says))
    hint = ", which begins with http:// or https://" if says.startswith("Invalid endpoint") else ""
    return f"S3 cannot be used: {says}; correct {found or 'the AWS_ variables, or ~/.aws/config'}{hint}"


def _new_client(timeout: float) -> "S3Client":
    config = Config(
        connect_timeout=min(5.0, timeout),
        read_timeout=timeout,
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=64,
        # Optional checksums are sent as trailers, which several S3 servers do not read; we send Content-MD5.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    session = _session()
    credentials = session.get_credentials()
    if credentials is None:
        raise NoCredentialsError
    credentials.get_frozen_credentials()  # those of a role are asked for now, and not by the first requests
    # boto3 knows AWS_DEFAULT_REGION and profiles; AWS_REGION is what other SDKs read, and EKS sets in its pods.
    # Stores other than AWS do not care for the region, and AWS redirects.
    region = session.region_name or os.environ.get("AWS_REGION") or "us-east-1"
    return session.client("s3", config=config, region_name=region)


def _session() -> boto3.session.Session:
    core = botocore.session.get_session()  # a new one: the default session remembers old credentials
    for name, value in _PATIENCE.items():
        if f"AWS_{name.upper()}" not in os.environ and name not in core.get_scoped_config():
            core.set_config_variable(name, value)
    return boto3.session.Session(botocore_session=core)


class S3Store(Store):
    """A prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str, settings: Settings) -> None:
        self.bucket = bucket
        self.prefix = prefix + "/" if prefix else ""
        self.root = f"s3://{bucket}/{prefix}".rstrip("/")
        self._settings = settings

    @cached_property
    def _client(self) -> "S3Client":
        return s3_client(max(0.5, self._settings.storage_retry_seconds / 3))  # so that three tries fit

    def _where(self, key: str) -> dict[str, Any]:
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    def get(self, key: str, start: int = 0, end: int | None = None, *, etag: str | None = None) -> bytes:
        if end is not None and end <= start:
            return b""
        wanted = self._where(key)
        if start or end is not None:
            wanted["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        if etag is not None:
            wanted["IfMatch"] = f'"{etag}"'

        def read() -> bytes:
            answer = self._client.get_object(**wanted)
            if etag is not None and answer["ETag"].strip('"') != etag:
                raise ObjectChanged(f"{self.uri(key)} was changed")
            data = answer["Body"].read()
            if len(data) != (answer["ContentLength"] if end is None else end - start):
                raise IncompleteReadError(actual_bytes=len(data), expected_bytes=answer["ContentLength"])
            return data

        return self._ask(key, read)

    def head(self, key: str) -> ObjectInfo | None:
        try:
            answer = self._ask(key, lambda: self._client.head_object(**self._where(key)))
        except ObjectNotFound:
            return None
        return ObjectInfo(key, answer["ContentLength"], answer["ETag"].strip('"'), answer["Metadata"])

    def put(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> None:
        self._ask(key, lambda: self._client.put_object(**self._body(key, data, metadata)))

    def put_new(self, key: str, data: bytes, *, metadata: Mapping[str, str] | None = None) -> bool:
        if self._settings.allow_unconditional_put and self.head(key) is not None:
            return False
        body = self._body(key, data, metadata)
        return self._unless_taken(key, lambda: self._client.put_object(**body, IfNoneMatch="*"))

    def _unless_taken(self, key: str, write: Callable[[], object]) -> bool:
        """Whether a conditional write wrote: False where the key is taken."""

        def put() -> bool:
            try:
                write()
            except ClientError as error:
                if _status(error) == 412:
                    return False
                raise
            return True

        return self._ask(key, put)

    def _body(self, key: str, data: bytes, metadata: Mapping[str, str] | None) -> dict[str, Any]:
        wanted = {**self._where(key), "Body": data, "ContentMD5": _content_md5(data)}
        return {**wanted, "Metadata": dict(metadata or {})}

    def put_file(self, key: str, path: Path) -> None:
        sent = going_on()  # called for each block, in boto3's threads
        self._ask(key, lambda: self._client.upload_file(str(path), self.bucket, self.prefix + key, Callback=sent))

    def put_file_new(self, key: str, path: Path) -> bool:
        if self.head(key) is not None:  # spares sending it
            return False
        size = path.stat().st_size
        return self.put_new(key, path.read_bytes()) if size <= _PIECE else self._put_pieces(key, path, size)

    def _put_pieces(self, key: str, path: Path, size: int) -> bool:
        """A multipart upload whose end is conditional, which boto3's own transfers cannot be."""
        made = self._ask(key, lambda: self._client.create_multipart_upload(**self._where(key)))
        upload = {**self._where(key), "UploadId": made["UploadId"]}
        written = False
        try:
            pieces: Any = {"Parts": self._send_pieces(key, path, size, upload)}
            written = self._unless_taken(key, lambda: self._client.complete_multipart_upload(
                **upload, MultipartUpload=pieces, IfNoneMatch="*"))  # fmt: skip
        except ObjectNotFound:  # the upload has ended: by a try whose answer was lost, or as the store's own doing
            if self.head(key) is None:
                raise StoreUnavailable(f"{self.uri(key)}: the store lost an upload before its end") from None
        finally:
            if not written:
                with contextlib.suppress(ClientError, BotoCoreError):  # what is left is the bucket's to clear away
                    self._client.abort_multipart_upload(**upload)
        return written

    def _send_pieces(self, key: str, path: Path, size: int, upload: Mapping[str, Any]) -> Sequence[Any]:
        step = max(_PIECE, -(-size // _MOST_PIECES))

        def send(number: int) -> dict[str, Any]:
            go_on()
            with path.open("rb") as file:
                file.seek((number - 1) * step)
                data = file.read(step)
            sent = {**upload, "PartNumber": number, "Body": data, "ContentMD5": _content_md5(data)}
            answer = self._ask(key, lambda: self._client.upload_part(**sent))
            return {"PartNumber": number, "ETag": answer["ETag"]}

        with ThreadPoolExecutor(_SENDERS, "upload", initializer=as_here()) as pool:
            return list(pool.map(send, range(1, -(-size // step) + 1)))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        token: dict[str, Any] = {}
        while True:
            page = self._ask(prefix, lambda: self._client.list_objects_v2(  # asked at once: `token` is this round's
                Bucket=self.bucket, Prefix=self.prefix + prefix, **token))  # noqa: B023  # fmt: skip
            for item in page.get("Contents", ()):
                yield ObjectInfo(item["Key"].removeprefix(self.prefix), item["Size"], item["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _ask(self, key: str, call: Callable[[], T]) -> T:
        return retrying(self.uri(key), call, self._settings.storage_retry_seconds)


def retrying(uri: str, call: Callable[[], T], seconds: float) -> T:
    """`call()`, again after a jittered pause while the failure may pass and `seconds` are not over.

    Raises StorageError: ObjectNotFound, AccessDenied, NoCredentials, ObjectChanged, StoreUnavailable, or itself for
    the rest. What `s3_client` says of the configuration is passed on.
    """
    deadline = time.monotonic() + seconds
    pause = 0.1
    while True:
        try:
            return call()
        except (ClientError, BotoCoreError, S3UploadFailedError) as error:
            go_on()  # no further tries then; and an upload that was stopped fails by it
            failure = _as_storage_error(uri, error)
            pause = min(pause * 2, 5.0)
            wait = pause * random.uniform(0.5, 1.0)
            if not failure.retryable or _are_nowhere(error) or time.monotonic() + wait > deadline:
                raise failure from error
            if isinstance(failure, NoCredentials):
                _say_that_it_waits(seconds)
            time.sleep(wait)


def _are_nowhere(error: Exception) -> bool:
    """Credentials that no variable and no file has, where this machine is not to be asked: another look finds none."""
    asked = os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true"
    return isinstance(error, NoCredentialsError) and not asked


@cache
def _say_that_it_waits(seconds: float) -> None:
    """Once a process: someone who forgot them sits before a terminal, and it may take this long."""
    log.warning("no S3 credentials yet; looking for them for up to %g seconds …", seconds)


def _as_storage_error(uri: str, error: BaseException | None) -> StorageError:
    if isinstance(error, S3UploadFailedError) and error.__context__ is not None:
        error = error.__context__
    if isinstance(error, ClientError):
        if error.operation_name.startswith("AssumeRole"):  # of the service that gives credentials
            return _no_credentials(uri, error)
        status, code = _status(error), str(error.response.get("Error", {}).get("Code", ""))
        if status in _RETRY_STATUS or code in _RETRY_CODES:
            return StoreUnavailable(f"{uri}: the store answered {status} {code}")
        kind, says = _MEANING.get(status, (StorageError, "the store refused"))
        return kind(f"{uri}: {says} ({status} {code})")
    if isinstance(error, _NO_CREDENTIALS):
        return _no_credentials(uri, error)
    kind = StoreUnavailable if isinstance(error, _PASSING) else StorageError
    return kind(f"{uri}: {one_line(error)}")


def _no_credentials(uri: str, error: BaseException) -> NoCredentials:
    return NoCredentials(
        f"{uri}: no S3 credentials ({one_line(error)}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "or AWS_PROFILE, or give this machine a role"
    )


def _content_md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
