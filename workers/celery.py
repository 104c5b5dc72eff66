"""The Celery app of the worker processes, which `celery -A workers` finds here. Flower uses it too.

Without WORKER_MODEL the app can be inspected, but no worker starts. A wrong configuration ends the process
with EXIT_CONFIGURATION, after which the supervisor does not restart it.
"""

import logging
from functools import partial

from celery import Celery
from celery.signals import worker_init

from catalogue import Catalogue, ModelEntry
from config import EXIT_CONFIGURATION, ConfigurationError, Settings, json_logs_wanted
from logs import print_failure
from protocol.celery_app import consume, create_celery
from protocol.connections import namespace_of
from protocol.names import Keys
from workers.celery_signals import connect_signals
from workers.json_logs import write_json
from workers.services import build_worker


def create_worker_app(settings: Settings) -> Celery:
    """Create the Celery app for the model that WORKER_MODEL names. Raises ConfigurationError."""
    catalogue = Catalogue.from_file(settings.models_file)
    keys = Keys.of(namespace_of(settings, catalogue))
    celery = create_celery(settings, keys)
    if not settings.worker_model:
        worker_init.connect(_refuse, weak=False)
        return celery
    entry = _find_entry(settings, catalogue)
    consume(celery, keys, entry.name, entry.engine.max_batch_size)
    # Celery's default level is WARNING. At INFO, Celery would log each task, so the level is set for our
    # modules only.
    for package in ("workers", "node"):
        logging.getLogger(package).setLevel(logging.INFO)
    if settings.json_logs:
        write_json()
    build = partial(build_worker, settings, catalogue, entry, celery)
    connect_signals(celery, build, json_logs=settings.json_logs)
    return celery


def _find_entry(settings: Settings, catalogue: Catalogue) -> ModelEntry:
    """Return the catalogue entry that WORKER_MODEL names. Raises ConfigurationError."""
    entry = catalogue.get(settings.worker_model)
    if entry is None:
        names = ", ".join(model.name for model in catalogue.models)
        raise ConfigurationError(
            f"WORKER_MODEL: {settings.worker_model!r} is not in the catalogue; it has: {names}"
        )
    return entry


def _refuse(**_: object) -> None:
    _exit_with("WORKER_MODEL is not set; it names the catalogue entry that this worker serves")


def _exit_with(reason: str) -> None:
    print_failure("workers", reason, as_json=json_logs_wanted())
    raise SystemExit(EXIT_CONFIGURATION)


try:
    app = create_worker_app(Settings.from_env())
except ConfigurationError as error:
    _exit_with(str(error))
