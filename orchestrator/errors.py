"""Everything the orchestrator raises on purpose.

BlipBatchError               base; its text is one line that a user can act on
├── UsageError               a command, option or setting that cannot be right
│   ├── UnknownJob           no job has this id
│   └── JobConflict          what the job's status forbids, or an output that holds other work
│       └── SpecUnreadable   a job that another version of blip-batch wrote, or that was damaged
├── ManifestError            a manifest that cannot be read as a whole (a bad *row* is a record, not an exception)
├── JobError                 a job that cannot go on; `code` is the job's error code
├── FetchError               one image that cannot be fetched; `code` is the record's error code
├── RedisUnavailable         no Redis, or one that refuses writes                             (retryable)
├── Unauthorized             the HTTP API wants another token
├── ApiUnavailable           the HTTP API does not answer, or cannot now                      (retryable)
└── StorageError             an object or a file that cannot be read or written
    ├── ObjectNotFound       no such object or bucket
    ├── AccessDenied         the credentials or the file's mode do not allow it
    │   └── NoCredentials    none were found within the retries, or they could not be renewed     (retryable)
    ├── ObjectChanged        not the version that was asked for
    └── StoreUnavailable     time-outs, 5xx, resets and short bodies that outlasted the retries  (retryable)
"""

from typing import ClassVar

from blip_engine.errors import one_line


class BlipBatchError(Exception):
    """Base of the orchestrator's exceptions. `str(error)` is one line: the thing, the place, the way out."""

    retryable: ClassVar[bool] = False


class UsageError(BlipBatchError):
    """A command, an option or a setting that cannot be right."""


class UnknownJob(UsageError):  # noqa: N818
    """No job has this id."""


class JobConflict(UsageError):  # noqa: N818
    """The job's status does not allow it, or the output belongs to other work."""


class SpecUnreadable(JobConflict):
    """What a user asked for is in Redis, but in words that this version does not know."""

    code: ClassVar[str] = "spec_unreadable"


class ManifestError(BlipBatchError):
    """A manifest that is missing, empty, unreadable or of an unknown format."""


class JobError(BlipBatchError):
    """A job that cannot go on. `code` goes into the job's `error`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class FetchError(BlipBatchError):
    """One image that cannot be had. `code` is one of the contract's record error codes."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type["FetchError"], tuple[str, str]]:  # it crosses process boundaries
        return type(self), (self.code, str(self))


class RedisUnavailable(BlipBatchError):  # noqa: N818
    """Redis does not answer, or refuses writes. A change may have happened all the same."""

    retryable = True

    @classmethod
    def of(cls, what: str, error: Exception) -> "RedisUnavailable":
        """What a client of Redis says, and the way out; `what` it was used for."""
        return cls(f"{what}: {one_line(error).rstrip('.')}; check BLIP_REDIS_URL")


class Unauthorized(BlipBatchError):  # noqa: N818
    """The HTTP API wants a token, or another one."""


class ApiUnavailable(BlipBatchError):  # noqa: N818
    """The HTTP API does not answer, or says that it cannot at present. A change may have happened all the same."""

    retryable = True


class StorageError(BlipBatchError):
    """An object or a file that cannot be read or written."""


class ObjectNotFound(StorageError):  # noqa: N818
    """No such object, file or bucket."""


class AccessDenied(StorageError):  # noqa: N818
    """The credentials, the bucket's policy or the file's mode do not allow it."""


class NoCredentials(AccessDenied):
    """No credentials were found for the object store. It is not about this object, and may pass."""

    retryable = True


class ObjectChanged(StorageError):  # noqa: N818
    """The object is no longer the version that was asked for."""


class StoreUnavailable(StorageError):  # noqa: N818
    """The store did not give a whole answer within the retries."""

    retryable = True
