"""Settings: environment variables `BLIP_*`, each documented here. Command-line flags win over them."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from .errors import UsageError


class Settings(BaseSettings):
    """One class for all processes; build it with `load_settings`, which words mistakes for people."""

    model_config = SettingsConfigDict(env_prefix="BLIP_", frozen=True, extra="ignore")

    redis_url: str = "redis://127.0.0.1:6379/0"  # the coordination Redis (redis://, rediss://, unix://, sentinel://)

    # Leases and the control loop (seconds).
    lease_seconds: float = Field(default=60, gt=0)  # a silent worker's chunk is given away after this long
    renew_seconds: float = Field(default=15, gt=0)  # how often a worker renews; also how early it gives up by itself
    reconcile_seconds: float = Field(default=15, gt=0)  # how often lost chunks are looked for
    poll_seconds: float = Field(default=0.5, gt=0)  # longest pause between two steps of the control loop
    lead_seconds: float = Field(default=10, gt=0)  # a silent control loop is replaced after this long
    # What Redis knows of a job that ended is dropped after this long; `recover` brings it back from its output.
    job_retention_seconds: float = Field(default=30 * 86_400, gt=0, le=1e10)
    max_attempts: int = Field(
        default=6, ge=1
    )  # starts of a chunk; then one death fails a row, and after as many more all

    # The HTTP API of an orchestrator, and where commands and clients find it.
    api_host: str = "127.0.0.1"  # the address to listen on; 0.0.0.0 is every one
    api_port: int = Field(default=8080, ge=0, le=65_535)  # 0: any free one, which the log tells
    # The bearer token that requests must carry; "none": no token, wherever it listens. Empty: none, on loopback only.
    api_token: str = Field(default="", repr=False)
    api_url: str = ""  # http(s)://host:port of the API for commands and clients; empty: commands talk to Redis

    # The autoscaler's number (`GET /v1/backlog`).
    backlog_seconds: float = Field(default=600, gt=0)  # within which the desired workers should finish what is left
    max_workers: int = Field(default=100, ge=1)  # never more are asked for

    price_per_worker_hour: float | None = Field(default=None, ge=0)  # for the estimated cost of a job; unset: none

    # What is told of the processes.
    log_format: Literal["auto", "json", "text"] = "auto"  # auto: text on a terminal, JSON otherwise
    metrics_host: str = "127.0.0.1"  # the address on which a worker answers /metrics, /healthz and /readyz
    metrics_port: int = Field(default=0, ge=0, le=65_535)  # 0: it does not

    # What a manifest may point to.
    # Buckets ("photos") or prefixes ("photos/2024/") that rows may name as s3:// images, comma-separated; "*" is any.
    # Empty: the manifest's own bucket, and no bucket for a manifest on local disk.
    allowed_buckets: Annotated[tuple[str, ...], NoDecode] = ()
    # Folders, comma-separated, that rows of a manifest on disk may name files in, besides the manifest's own; and that
    # manifests, outputs and checkpoints of jobs submitted over HTTP may be in.
    allowed_folders: Annotated[tuple[str, ...], NoDecode] = ()
    fetch_timeout_seconds: float = Field(default=30, gt=0)  # for one image, retries included
    max_image_bytes: int = Field(default=64 * 2**20, ge=1)  # an image of more bytes is not read
    max_image_pixels: int = Field(default=178_956_970, ge=1)  # an image of more pixels is not decoded

    # Object storage.
    storage_retry_seconds: float = Field(default=30, gt=0)  # how long time-outs, 409 and 5xx are retried, with jitter
    # For stores that ignore `If-None-Match: *`: look, then write. Two workers that finish the same chunk within the
    # same instant may then overwrite each other's (equal) part.
    allow_unconditional_put: bool = False

    # Workers.
    # Models ("demo", hub names, directories) that this worker serves, comma-separated; it gets no other jobs, and these
    # jobs go to no worker without the setting. Empty: it takes any job, and loads what that names.
    models: Annotated[tuple[str, ...], NoDecode] = ()
    worker_threads: int = Field(default=2, ge=1)  # chunks worked on at once
    loaders: int = Field(default=0, ge=0)  # processes that fetch and decode; 0: one for each two cores, at most 8
    fetches: int = Field(default=8, ge=1, le=64)  # images that each of them fetches at once, while it decodes one
    # Who resizes images: `pillow`, in the loaders; `device`, in the engine, to within one level of 255. For GPUs that
    # wait for their loaders.
    resize: Literal["pillow", "device"] = "pillow"
    # Decode large JPEGs at a half, a quarter or an eighth of their size, no smaller than twice what the model takes:
    # faster, and pixels that differ a little.
    jpeg_draft: bool = False
    # Checkpoints that are loaded at the start, not with their first job: TASK:MODEL (`caption:demo`), comma-separated.
    preload: Annotated[tuple[str, ...], NoDecode] = ()
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    precision: str = "auto"  # auto, fp32, bf16, fp16, int8
    # Whether torch.compile fuses the vision tower when a model is loaded: auto is on a GPU. Needs a C compiler; what it
    # makes is kept in TORCHINDUCTOR_CACHE_DIR.
    compile: Literal["auto", "on", "off"] = "auto"
    drain_seconds: float = Field(default=25, ge=0)  # after SIGTERM: what finishes within this is kept
    slots: int = Field(default=512, ge=1)  # decoded images held at once; they bound the memory of a worker
    loader_timeout_seconds: float = Field(default=60, gt=0)  # an image that keeps a loader longer fails
    engine_timeout_seconds: float = Field(default=300, gt=0)  # an engine silent for longer over work is restarted
    model_timeout_seconds: float = Field(default=1800, gt=0)  # for loading a checkpoint, its download included
    engine: str = "blip_engine.engine:Engine"  # module:factory; another one for fault tests and dry runs

    @field_validator("models", "preload", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("allowed_folders", mode="before")
    @classmethod
    def _split_folders(cls, value: Any) -> Any:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @field_validator("allowed_buckets", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip().removeprefix("s3://") for part in value.split(",") if part.strip())
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        """Raises UsageError for settings that are well each by itself, and with which nothing would ever be done."""
        for first, times, other, why in (
            ("lease_seconds", 2, "renew_seconds", "every lease would count as lost"),
            ("slots", 1, "worker_threads", "a thread without a slot would never end"),
            ("loader_timeout_seconds", 1, "fetch_timeout_seconds", "loaders would be killed over slow fetches"),
        ):
            have, bound = getattr(self, first), getattr(self, other)
            if have < times * bound:
                raise UsageError(
                    f"setting BLIP_{first.upper()}={have:g} is less than {'twice ' * (times - 1)}"
                    f"BLIP_{other.upper()}={bound:g}: {why}; raise the one or lower the other"
                )
        return self


def load_settings(**overrides: Any) -> Settings:
    """The settings from the environment, with `overrides` (None: not given) on top.

    Raises UsageError that names the variable, or the two that do not go together.
    """
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "?"
        raise UsageError(f"setting BLIP_{name.upper()}={first['input']!r}: {first['msg']}") from None
