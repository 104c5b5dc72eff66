"""The web process: validates, admits, queues, and turns workers' events into answers. Never imports torch or workers."""

import logging

from flask import Flask

from app.chat.routes import blueprint as chat_blueprint
from app.http.errors import register_error_handlers
from app.images.routes import blueprint as images_blueprint
from app.operations.models import blueprint as models_blueprint
from app.operations.routes import blueprint as operations_blueprint
from app.services import Services, build_services
from catalogue import Catalogue
from config import Settings
from node.cli import node_commands

log = logging.getLogger(__name__)

EXTENSION = "modelservice"


def create_app(settings: Settings, catalogue: Catalogue | None = None) -> Flask:
    """The Flask app. Nothing connects or starts before `app.extensions["modelservice"].start()`.

    Raises ConfigurationError.
    """
    catalogue = catalogue or Catalogue.from_file(settings.models_file)
    services = build_services(settings, catalogue)
    app = Flask("modelservice", static_folder=None)
    app.extensions[EXTENSION] = services

    # the clock starts before the gate, so that refusals are counted too
    services.metrics.init_app(app)
    services.gate.init_app(app)
    register_error_handlers(app)

    app.register_blueprint(chat_blueprint(services))
    app.register_blueprint(images_blueprint(services))
    app.register_blueprint(models_blueprint(services))
    app.register_blueprint(operations_blueprint(services))
    app.cli.add_command(node_commands(lambda: services))

    for warning in settings.warnings():
        log.warning("%s", warning)
    return app


__all__ = ["EXTENSION", "Services", "create_app"]
