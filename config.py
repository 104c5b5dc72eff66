"""The settings of every process, read from the environment. The only module that reads it.

Imports neither Flask, Celery, Redis nor torch, and of this project only the checks in addresses.py, so that
every process can import it first.
Each setting has its help beside its default; docs/settings.md and `scripts/run --help` are made from both.
"""

import difflib
import hashlib
import os
import re
import socket
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from addresses import callable_address, check_http_url, check_origin, check_redis_url, split_address

VERSION = "0.2.0"
"""Version of the service: pyproject.toml and CHANGELOG.md name the same."""

EXIT_CONFIGURATION = 78
"""Exit status for a wrong configuration (EX_CONFIG of sysexits.h). A supervisor must not retry it."""

EXIT_TEMPORARY = 75
"""Exit status of a worker that could not start for a reason that may pass (EX_TEMPFAIL). A supervisor retries
it."""


class ConfigurationError(Exception):
    """The operator's configuration can't work. The message says what and where in one line."""


class Settings(BaseSettings):
    """The environment. Each field is a variable, which has the same name in upper case."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=False)

    bind: str = Field(
        default="127.0.0.1:1088",
        description="host:port that the web process listens on; 0.0.0.0 or [::] as host for every address",
    )
    web_concurrency: int = Field(
        default=1, ge=1, description="number of web processes (gunicorn's own variable)"
    )
    api_keys: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="comma-separated keys, one of which each request carries; without any, none is needed",
    )
    operator_keys: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="comma-separated, those of API_KEYS that may see the requests of all clients, and drain and "
        "resume workers, as the console at / does. Default: all of them",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="comma-separated origins (https://app.example.org) whose web pages may call the service "
        "from a browser, or * for all. Default: none",
    )
    rate_limit: str = Field(
        default="",
        description='requests that each key may send, such as "60/minute" or "100/5 minutes"; more get 429. '
        "One with several prompts or inputs counts once. Default: no limit",
    )
    public_url: str = Field(
        default="",
        description="base of image links, as users reach it. Default: SERVICE_URL, with API_KEYS http:// and BIND",
    )
    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0",
        description="Redis (6.2 or later) for the queue, events, leases and images. "
        "Unset or empty under scripts/run: an embedded one",
    )
    namespace: str = Field(
        default="",
        description="prefix of all names in Redis, so that deployments can share one. "
        "Default: the catalogue's project",
    )
    models_file: Path = Field(default=Path("models.toml"), description="the catalogue of models")
    worker_model: str = Field(
        default="", description="the model that a worker process serves; scripts/run sets it"
    )
    worker_gpu_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="the part of its GPU's memory that a worker process may use; scripts/run divides a GPU among the workers that share it",
    )
    worker_cid: str = Field(
        default="",
        description="what the node knows a worker by, the same after each restart. "
        "Default: made from SERVICE_ID, NAMESPACE, host, GPUs, the worker's name (-n) and model",
    )
    service_id: str = Field(
        default="",
        description="marks this deployment's registrations at the node: the same for all processes beside "
        "one node, another on each machine. Default: the host name and digits made from /etc/machine-id",
    )
    node_url: str = Field(
        default="http://127.0.0.1:6000",
        description="the network node, for AIL2-ComputeNet http://127.0.0.1:7002; empty: models are not registered",
    )
    service_url: str = Field(
        default="",
        description="base of the URLs that the node calls; its host must be an address of the node's machine. "
        "Default: http:// and BIND, with API_KEYS http:// and NODE_BIND; the loopback for 0.0.0.0 and [::]",
    )
    node_bind: str = Field(
        default="127.0.0.1:1089",
        description="with API_KEYS: host:port of a second listener, for the node, which can't send a key",
    )
    chat_deadline_s: float = Field(
        default=170,
        gt=0,
        description="seconds for a chat completion, time in the queue included; the node's limit is 180",
    )
    generation_deadline_s: float = Field(
        default=290, gt=0, description="the same for an image generation; the node's limit is 300"
    )
    edit_deadline_s: float = Field(
        default=170,
        gt=0,
        description="the same for an image edit; the node's limit is 180, AIL2-ComputeNet's 300 (set 290)",
    )
    embedding_deadline_s: float = Field(
        default=170, gt=0, description="the same for a request of embeddings; the node does not know these"
    )
    stream_grace_s: int = Field(
        default=15,
        ge=0,
        le=3600,
        description="seconds for which a chat goes on, and its events are kept, after its client has disconnected, "
        "if the client had asked for a stream that it can resume (docs/api.md); 0: such streams are not offered",
    )
    max_waiting: int = Field(
        default=256, ge=1, description="requests that may wait in the queue of each model; more get 503"
    )
    image_ttl_s: int = Field(default=3600, ge=1, description="seconds for which an image link works")
    image_store_mb: int = Field(
        default=1024, ge=1, description="MiB of images kept in Redis; the oldest are removed first"
    )
    allowed_image_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="comma-separated hosts (name or name:port) from which images are fetched "
        "although their addresses are not public",
    )
    drain_s: float = Field(
        default=60, ge=0, description="seconds that a stopping worker has to finish its requests"
    )
    hang_s: float = Field(
        default=30, gt=0, description="seconds without progress after which a worker's engine counts as hung"
    )
    flower_basic_auth: str = Field(
        default="", description="user:password for Flower, which does not start without"
    )
    log_format: Literal["text", "json"] = Field(
        default="text",
        description="what the lines of the logs are: text, or json, an object on each line (docs/monitoring.md)",
    )
    otel_exporter_otlp_endpoint: str = Field(
        default="",
        description="base URL of an OpenTelemetry collector, such as http://127.0.0.1:4318, to which traces are sent "
        "(OTLP over HTTP; OpenTelemetry's own variable, as are others of it). Default: no traces",
    )
    receipts: Path | None = Field(
        default=None,
        description="folder to which workers write a signed line for each job (docs/monitoring.md), and the key, "
        "which is made at the first start. Default: no receipts",
    )
    cuda_visible_devices: str | None = Field(
        default=None,
        description="GPUs that the service may use (CUDA's own variable); GPU indices in the catalogue count "
        "in this list. Default: all",
    )

    @field_validator("api_keys", "operator_keys", "cors_origins", "allowed_image_hosts", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("api_keys", "operator_keys", "cors_origins", mode="before")
    @classmethod
    def _not_empty_by_mistake(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, str) and value and not value.replace(",", "").strip():
            reason = {
                "api_keys": "key; unset it to serve without keys",
                "operator_keys": "key; unset it if all of API_KEYS are operators'",
                "cors_origins": "origin; unset it to serve without CORS",
            }
            raise ValueError(f"contains no {reason[info.field_name or '']}")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _valid_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "*" in value and len(value) > 1:
            raise ValueError("* stands for every origin, so it must be alone")
        for origin in value:
            if origin != "*":
                check_origin(origin)
        return value

    @model_validator(mode="before")
    @classmethod
    def _unset_if_empty(cls, values: dict[str, object]) -> dict[str, object]:
        """An empty RECEIPTS would be the current folder."""
        return {
            name: value for name, value in values.items() if value or name not in ("redis_url", "receipts")
        }

    @field_validator("bind", "node_bind")
    @classmethod
    def _valid_address(cls, value: str) -> str:
        split_address(value)
        return value

    @field_validator("service_url", "public_url", "node_url", "otel_exporter_otlp_endpoint")
    @classmethod
    def _valid_url(cls, value: str) -> str:
        if value:
            check_http_url(value)
        return value

    @field_validator("redis_url")
    @classmethod
    def _valid_redis_url(cls, value: str) -> str:
        check_redis_url(value)
        return value

    @field_validator("flower_basic_auth")
    @classmethod
    def _valid_login(cls, value: str) -> str:
        user, separator, password = value.partition(":")
        if value and not (user and separator and password):
            raise ValueError("is not user:password")
        return value

    @field_validator("rate_limit")
    @classmethod
    def _valid_rate(cls, value: str) -> str:
        value = value.strip()
        if value and not _RATE.fullmatch(value):
            raise ValueError('must be like "60/minute" or "100/5 minutes" (second, minute, hour, day)')
        return value

    @field_validator("operator_keys")
    @classmethod
    def _are_api_keys(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not set(value) <= set(info.data.get("api_keys", ())):
            raise ValueError("has a key that API_KEYS does not have")
        return value

    @model_validator(mode="after")
    def _derive_urls(self) -> Self:
        listener = self.node_bind if self.api_keys else self.bind
        service_url = (self.service_url or f"http://{callable_address(listener)}").rstrip("/")
        # The node's own listener serves no image links, so with keys they need the public one.
        public_url = self.public_url or (
            f"http://{callable_address(self.bind)}" if self.api_keys else service_url
        )
        # The model is frozen; these are written once, before anything else sees the object.
        object.__setattr__(self, "service_url", service_url)
        object.__setattr__(self, "public_url", public_url.rstrip("/"))
        object.__setattr__(self, "service_id", self.service_id or default_service_id())
        object.__setattr__(self, "node_url", self.node_url.rstrip("/"))
        return self

    def _node_needs_key(self) -> bool:
        """Whether the node would call the listener for clients.

        Only ports are compared: hosts have several names.
        """
        parts = urlsplit(self.service_url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        _, public = split_address(self.bind)
        _, for_node = split_address(self.node_bind)
        return bool(self.api_keys) and port == public and port != for_node

    @classmethod
    def from_env(cls) -> "Settings":
        """Read the environment. Raises ConfigurationError with one line that names the variable."""
        try:
            return cls()
        except ValidationError as error:
            place, message = first_complaint(error)
            raise ConfigurationError(f"environment: {'.'.join(place).upper()}: {message}") from error

    @property
    def json_logs(self) -> bool:
        """Whether each line of the logs is a JSON object."""
        return self.log_format == JSON_LOGS

    def warnings(self) -> list[str]:
        """Return what works but may surprise the operator; logged at the start and shown by `/readyz`."""
        found = []
        if self.node_url and _host(self.public_url) in _LOOPBACK:
            found.append(
                f"PUBLIC_URL is {self.public_url}: image links don't work for users of other machines; "
                "set it to an address that they reach"
            )
        if self.node_url and self._node_needs_key():
            found.append(
                f"SERVICE_URL is {self.service_url}, where BIND listens and API_KEYS are needed: the node sends none, "
                "so its users get 401; unset SERVICE_URL, or set it to the address of NODE_BIND"
            )
        if not self.api_keys and _host(f"http://{self.bind}") not in _LOOPBACK:
            found.append(
                f"BIND is {self.bind} and API_KEYS is empty: everyone who reaches it can use the GPUs"
            )
        if "*" in self.cors_origins and not self.api_keys:
            found.append(
                "CORS_ORIGINS is * and API_KEYS is empty: every web page that a user opens can use the GPUs"
            )
        if self.rate_limit and not self.api_keys:
            found.append("RATE_LIMIT applies to each API key and API_KEYS is empty: nothing is limited")
        return found + _similar_variables()


JSON_LOGS = "json"


def json_logs_wanted() -> bool:
    """Whether LOG_FORMAT asks for JSON, for a process that ends because it could not read its other
    settings."""
    return os.environ.get("LOG_FORMAT") == JSON_LOGS  # noqa: TID251


MACHINE_ID_FILE = Path("/etc/machine-id")
"""Unique to an installation of Linux (machine-id(5)). Containers often have none."""


def default_service_id(machine_id_file: Path = MACHINE_ID_FILE) -> str:
    """The host name, and digits that differ between two machines of one host name.

    The digits are a hash, because the id itself must not be shown to others. They are left out where there is
    no id.
    """
    try:
        machine_id = machine_id_file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        machine_id = ""
    host = socket.gethostname()
    digits = hashlib.sha256(f"modelservice {machine_id}".encode()).hexdigest()[:8]
    return f"{host}-{digits}" if machine_id else host


def hub_folder() -> Path:
    """The folder to which the hub's library downloads weights, found as the library finds it."""
    given = {name: os.environ.get(name) for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")}  # noqa: TID251
    cache = Path(given["XDG_CACHE_HOME"] or "~/.cache")
    home = Path(given["HF_HOME"] or cache / "huggingface")
    return Path(given["HF_HUB_CACHE"] or home / "hub").expanduser()


_RATE = re.compile(r"[1-9][0-9]{0,8}/([1-9][0-9]{0,4} )?(second|minute|hour|day)s?")
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def _similar_variables() -> list[str]:
    """Return a warning for each variable of the environment whose name is almost that of a setting."""
    known = [name.upper() for name in Settings.model_fields] + ["HF_TOKEN", "HF_HOME"]
    found = []
    for name in sorted(set(os.environ)):  # noqa: TID251
        if name.upper() not in known and (close := difflib.get_close_matches(name.upper(), known, 1, 0.85)):
            found.append(f"{name} is set, but is no setting; {close[0]} is one")
    return found


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""


def first_complaint(error: ValidationError) -> tuple[tuple[str, ...], str]:
    """Return the place of the first of pydantic's findings, key by key, and its message."""
    first = error.errors()[0]
    return tuple(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
