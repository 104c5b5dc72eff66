"""Flower's settings. `celery -A workers flower` reads this file from the working directory.

User and password come from FLOWER_BASIC_AUTH. Without them Flower would serve everyone, so it does not start.
"""

import sys

from config import EXIT_CONFIGURATION, ConfigurationError, Settings

try:
    _password = Settings.from_env().flower_basic_auth
    if ":" not in _password:
        raise ConfigurationError("FLOWER_BASIC_AUTH must be set to user:password")
except ConfigurationError as _error:
    print(f"flower: {_error}", file=sys.stderr)
    sys.exit(EXIT_CONFIGURATION)

basic_auth = [_password]
address = "127.0.0.1"
