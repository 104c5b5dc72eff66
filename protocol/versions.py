"""Several versions of this service beside each other, as in a rolling upgrade.

What one version can't read of another is skipped, item by item, and logged once.
"""

import functools
import logging

PROTOCOL_VERSION = 1
"""In every worker's record. Raised by a change that older processes can't read."""


@functools.lru_cache(maxsize=100)
def _log(logger: logging.Logger, message: str) -> None:
    logger.warning("%s", message)


def log_once(logger: logging.Logger, message: str, *values: object) -> None:
    """Log a warning, the first time that it has this text."""
    _log(logger, message % tuple(str(value)[:200] for value in values))
