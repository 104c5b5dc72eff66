"""The settings of every process, read from the environment. The only module that reads it.

Imports nothing of this project, nor Flask, Celery, Redis or torch, so that every process can import it first.
"""

import re
import socket
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

EXIT_CONFIGURATION = 78
"""Exit status of a process whose configuration can't work (EX_CONFIG of sysexits.h). A supervisor must not retry it."""


class ConfigurationError(Exception):
    """The operator's configuration can't work. The message says what and where in one line."""


class Settings(BaseSettings):
    """The environment, one field for each variable (upper case there, lower case here). Times in seconds."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=False)

    bind: str = "127.0.0.1:1088"
    redis_url: str = "redis://127.0.0.1:6379/0"
    namespace: str = ""
    models_file: Path = Path("models.toml")
    worker_model: str = ""
    worker_cid: str = ""
    service_id: str = Field(default_factory=socket.gethostname)
    node_url: str = "http://127.0.0.1:6000"
    service_url: str = ""
    node_bind: str = "127.0.0.1:1089"
    public_url: str = ""
    api_keys: Annotated[tuple[str, ...], NoDecode] = ()
    rate_limit: str = ""
    chat_deadline_s: float = Field(default=170, gt=0)
    generation_deadline_s: float = Field(default=290, gt=0)
    edit_deadline_s: float = Field(default=170, gt=0)
    max_waiting: int = Field(default=256, ge=1)
    image_ttl_s: int = Field(default=3600, ge=1)
    image_store_mb: int = Field(default=1024, ge=1)
    drain_s: float = Field(default=60, ge=0)
    hang_s: float = Field(default=30, gt=0)
    flower_basic_auth: str = ""
    allowed_image_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    cuda_visible_devices: str | None = None

    @field_validator("api_keys", "allowed_image_hosts", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("api_keys", mode="before")
    @classmethod
    def _not_open_by_mistake(cls, value: object) -> object:
        if isinstance(value, str) and value and not value.replace(",", "").strip():
            raise ValueError("holds no key; leave it out to serve without keys")
        return value

    @field_validator("rate_limit")
    @classmethod
    def _rate(cls, value: str) -> str:
        value = value.strip()
        if value and not _RATE.fullmatch(value):
            raise ValueError('must be like "60/minute" or "100/5 minutes" (second, minute, hour, day)')
        return value

    @model_validator(mode="after")
    def _derive_urls(self) -> Self:
        # frozen: the derived defaults are written past the guard, once, before anybody sees the object
        listener = self.node_bind if self.api_keys else self.bind
        service_url = (self.service_url or f"http://{listener}").rstrip("/")
        object.__setattr__(self, "service_url", service_url)
        # the node's own listener serves no picture links: with keys they stand on the public one
        public_url = self.public_url or (f"http://{self.bind}" if self.api_keys else service_url)
        object.__setattr__(self, "public_url", public_url.rstrip("/"))
        object.__setattr__(self, "node_url", self.node_url.rstrip("/"))
        return self

    @classmethod
    def from_env(cls) -> "Settings":
        """Read the environment. Raises ConfigurationError with one line that names the variable."""
        try:
            return cls()
        except ValidationError as error:
            place, message = first_complaint(error)
            raise ConfigurationError(f"environment: {'.'.join(place).upper()}: {message}") from error

    def warnings(self) -> list[str]:
        """What works but will surprise the operator; logged at start and shown by `/readyz`."""
        found = []
        if self.node_url and _host(self.public_url) in _LOOPBACK:
            found.append(
                f"PUBLIC_URL is {self.public_url}: picture links are dead for users beyond this machine"
            )
        if not self.api_keys and _host(f"http://{self.bind}") not in _LOOPBACK:
            found.append(
                f"BIND is {self.bind} and API_KEYS is empty: anybody who reaches it may use the GPUs"
            )
        if self.rate_limit and not self.api_keys:
            found.append("RATE_LIMIT counts for each API key and API_KEYS is empty: nothing is limited")
        return found


_RATE = re.compile(r"[1-9][0-9]{0,8}/([1-9][0-9]{0,4} )?(second|minute|hour|day)s?")
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""


def first_complaint(error: ValidationError) -> tuple[tuple[str, ...], str]:
    """Where the first of pydantic's findings is, key by key, and what is wrong there."""
    first = error.errors()[0]
    return tuple(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
