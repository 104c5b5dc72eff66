"""The web process: validates requests, queues jobs, and turns the events of workers into responses.

It never imports torch or workers.
"""

from collections.abc import Iterator

from click import Command
from flask import Blueprint, Flask

from app.chat.resumable import blueprint as resumable_blueprint
from app.chat.routes import ChatInputs
from app.chat.routes import blueprint as chat_blueprint
from app.chat.text_routes import blueprint as completions_blueprint
from app.chat.tokens_routes import blueprint as tokens_blueprint
from app.commands.doctor import doctor_command
from app.commands.receipts import receipt_commands
from app.commands.requests import request_commands
from app.commands.workers import worker_commands
from app.console.routes import blueprint as console_blueprint
from app.embeddings.routes import blueprint as embeddings_blueprint
from app.http.access_log import Access, log_accesses
from app.http.cors import Cors
from app.http.errors import register_error_handlers
from app.http.wsgi import PlainPaths, add_request_ids
from app.images.routes import blueprint as images_blueprint
from app.operations.activity import blueprint as activity_blueprint
from app.operations.activity import note_ended
from app.operations.drains import blueprint as drains_blueprint
from app.operations.health import blueprint as health_blueprint
from app.operations.models import blueprint as models_blueprint
from app.operations.openapi import describe
from app.operations.routes import blueprint as operations_blueprint
from app.services import Services, build_services
from catalogue import Catalogue
from config import Settings
from node.cli import node_commands

EXTENSION = "modelservice"


def create_app(settings: Settings, catalogue: Catalogue | None = None) -> Flask:
    """Make the Flask app. Nothing connects or starts before `app.extensions["modelservice"].start()`.

    Raises ConfigurationError.
    """
    catalogue = catalogue or Catalogue.from_file(settings.models_file)
    services = build_services(settings, catalogue)
    app = Flask("modelservice", static_folder=None)
    app.extensions[EXTENSION] = services.process
    _add_hooks(app, settings, services)
    blueprints = (
        *_model_blueprints(settings, catalogue, services),
        *_operations(settings, catalogue, services),
    )
    for blueprint in blueprints:
        app.register_blueprint(blueprint)
    for command in _commands(settings, catalogue, services):
        app.cli.add_command(command)
    return app


def _add_hooks(app: Flask, settings: Settings, services: Services) -> None:
    """Add what is done with every request and every response."""
    # metrics first, so that refused requests are counted too
    services.metrics.init_app(app)
    app.before_request(services.origins.check)
    Cors(settings.cors_origins, services.gate.through_node_listener).init_app(app)
    services.gate.init_app(app)
    services.traces.init_app(app)
    add_request_ids(app)
    register_error_handlers(app)

    def on_end(access: Access) -> None:
        note_ended(services.shared.activity, access)
        services.traces.end(access)

    app.wsgi_app = log_accesses(PlainPaths(app.wsgi_app), on_end)  # type: ignore[method-assign, assignment]


def _model_blueprints(settings: Settings, catalogue: Catalogue, services: Services) -> Iterator[Blueprint]:
    """Make the endpoints of models, which need a worker."""
    dispatcher, bodies, fetcher = services.dispatcher, services.bodies, services.fetcher
    inputs = ChatInputs(catalogue, dispatcher, services.shared.worker_view, fetcher.fetch)
    yield chat_blueprint(inputs, services.resumption, bodies)
    yield resumable_blueprint(services.resumption)
    for blueprint in (completions_blueprint, tokens_blueprint, embeddings_blueprint):
        yield blueprint(catalogue=catalogue, dispatcher=dispatcher, bodies=bodies)
    yield images_blueprint(
        catalogue=catalogue,
        dispatcher=dispatcher,
        bodies=bodies,
        fetcher=fetcher,
        image_store=services.shared.image_store,
        image_ttl_s=settings.image_ttl_s,
        public_url=settings.public_url,
    )


def _operations(settings: Settings, catalogue: Catalogue, services: Services) -> Iterator[Blueprint]:
    """Make the endpoints that the web process answers by itself."""
    shared, process, operators = services.shared, services.process, services.operators
    yield models_blueprint(
        catalogue=catalogue, public_url=settings.public_url, worker_view=shared.worker_view
    )
    yield health_blueprint(
        catalogue.models,
        shared.worker_view,
        namespace=services.deployment.namespace,
        redis_state=process.redis_state,
        draining_for_s=process.draining_for_s,
        has_key=services.gate.has_key,
        warnings=services.warnings,
    )
    yield operations_blueprint(
        shared.worker_view,
        render_metrics=services.deployment_metrics.render,
        description=describe(settings.public_url, _first_models(catalogue), keyed=bool(settings.api_keys)),
    )
    yield activity_blueprint(
        shared.activity,
        shared.drains,
        shared.worker_view,
        check_may_look=operators.check_may_look,
        may_act=operators.may_act,
    )
    yield drains_blueprint(
        shared.leases, shared.drains, services.bodies, check_may_act=operators.check_may_act
    )
    yield console_blueprint()


def _commands(settings: Settings, catalogue: Catalogue, services: Services) -> Iterator[Command]:
    """Make the commands of `flask --app wsgi`."""
    shared, deployment = services.shared, services.deployment
    yield node_commands(deployment, leases=shared.leases, lock=services.node_lock)
    yield worker_commands(shared.leases, shared.drains)
    yield receipt_commands(settings.receipts)
    yield request_commands([entry.name for entry in catalogue.models], shared.requests, shared.leases)
    yield doctor_command(settings, catalogue, deployment, services.redis, shared.leases)


def _first_models(catalogue: Catalogue) -> dict[str, str]:
    """Return the name of the first model of each task."""
    return {task: entry.name for entry in reversed(catalogue.models) for task in entry.tasks}
