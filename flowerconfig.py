"""Flower's settings: `celery -A workers flower` reads this file from the working directory.

Flower itself takes the password from FLOWER_BASIC_AUTH (user:password); without one it would serve anybody.
"""

import sys

from config import ConfigurationError, Settings

try:
    _password = Settings.from_env().flower_basic_auth
except ConfigurationError as _error:
    sys.exit(f"flower: {_error}")

if ":" not in _password:
    print("flower: FLOWER_BASIC_AUTH is not set to user:password; Flower doesn't run open", file=sys.stderr)
    sys.exit(78)

basic_auth = [_password]
address = "127.0.0.1"
