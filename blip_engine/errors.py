"""Everything the engine raises on purpose (standard library only).

BlipError                    base; its text is one line that a user can act on
├── CheckpointError          a model that is absent, incomplete, of the wrong shape, or not what the task needs
├── OptionError              an option the task does not have, or a value out of range
├── InputError               images or texts a model cannot take
│   └── ImageError           an image that cannot be decoded; carries the record's error code
└── EngineClosedError        a request to an engine that was shut down
"""


class BlipError(Exception):
    """Base of the engine's exceptions. `str(error)` is one line: the thing, the place, the way out."""


class CheckpointError(BlipError):
    """A checkpoint that cannot be loaded whole. Nothing of it is kept."""


class OptionError(BlipError, ValueError):
    """An option that the task does not know, or a value it cannot have."""


class InputError(BlipError, ValueError):
    """Images or texts that the model cannot take (wrong size, too long, wrong count)."""


class ImageError(InputError):
    """An image that cannot be decoded.

    `code` is one of the record's error codes: `image_too_large`, `image_unreadable`, `image_truncated`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:  # it crosses process boundaries
        return type(self), (self.code, str(self))


class EngineClosedError(BlipError):
    """The engine was closed before it could answer."""


def one_line(error: object) -> str:
    """All that another library's error says, in one line; empty where it says nothing."""
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """What another library's error says, without the lines that follow; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
