"""Flower's settings. `celery -A workers flower` reads this file from the working directory.

User and password come from FLOWER_BASIC_AUTH. Without them Flower would serve everyone, so it does not start.
"""

import sys

from flower.views import BaseHandler

from config import EXIT_CONFIGURATION, ConfigurationError, Settings, json_logs_wanted
from logs import print_failure

try:
    _password = Settings.from_env().flower_basic_auth
    if not _password:
        raise ConfigurationError("FLOWER_BASIC_AUTH must be set to user:password")
except ConfigurationError as _error:
    print_failure("flower", str(_error), as_json=json_logs_wanted())
    sys.exit(EXIT_CONFIGURATION)


def _require_password(handler: BaseHandler) -> None:
    """Refuse a request without the password: reading `current_user` raises the 401."""
    _ = handler.current_user


# Flower itself asks for it page by page, and neither at /metrics, which names tasks and workers, nor at
# /healthcheck.
BaseHandler.prepare = _require_password

basic_auth = [_password]
address = "127.0.0.1"
