"""The web process: validates requests, queues jobs, and turns the events of workers into responses.

It never imports torch or workers.
"""

from flask import Flask

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
from app.operations.models import blueprint as models_blueprint
from app.operations.openapi import describe
from app.operations.routes import blueprint as operations_blueprint
from app.services import build_services
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

    # metrics first, so that refused requests are counted too
    services.metrics.init_app(app)
    app.before_request(services.origins.check)
    Cors(settings.cors_origins, services.gate.through_node_listener).init_app(app)
    services.gate.init_app(app)
    services.traces.init_app(app)
    add_request_ids(app)
    register_error_handlers(app)

    def on_end(access: Access) -> None:
        note_ended(services.activity, access)
        services.traces.end(access)

    app.wsgi_app = log_accesses(PlainPaths(app.wsgi_app), on_end)  # type: ignore[method-assign, assignment]

    app.register_blueprint(
        chat_blueprint(
            ChatInputs(catalogue, services.dispatcher, services.worker_view, services.fetcher.fetch),
            services.resumption,
            services.bodies,
        )
    )
    app.register_blueprint(resumable_blueprint(services.resumption))
    for blueprint in (completions_blueprint, tokens_blueprint):
        app.register_blueprint(
            blueprint(catalogue=catalogue, dispatcher=services.dispatcher, bodies=services.bodies)
        )
    app.register_blueprint(
        embeddings_blueprint(catalogue=catalogue, dispatcher=services.dispatcher, bodies=services.bodies)
    )
    app.register_blueprint(
        images_blueprint(
            catalogue=catalogue,
            dispatcher=services.dispatcher,
            bodies=services.bodies,
            fetcher=services.fetcher,
            image_store=services.image_store,
            image_ttl_s=settings.image_ttl_s,
            public_url=settings.public_url,
        )
    )
    app.register_blueprint(
        models_blueprint(
            catalogue=catalogue, public_url=settings.public_url, worker_view=services.worker_view
        )
    )
    app.register_blueprint(
        operations_blueprint(
            models=catalogue.models,
            namespace=services.deployment.namespace,
            worker_view=services.worker_view,
            metrics=services.metrics,
            redis_state=services.process.redis_state,
            draining_for_s=services.process.draining_for_s,
            has_key=services.gate.has_key,
            warnings=services.warnings,
            description=describe(
                settings.public_url, _first_models(catalogue), keyed=bool(settings.api_keys)
            ),
        )
    )
    app.register_blueprint(
        activity_blueprint(
            services.activity,
            services.drains,
            services.worker_view,
            check_may_look=services.operators.check_may_look,
            may_act=services.operators.may_act,
        )
    )
    app.register_blueprint(
        drains_blueprint(
            services.leases, services.drains, services.bodies, check_may_act=services.operators.check_may_act
        )
    )
    app.register_blueprint(console_blueprint())
    app.cli.add_command(node_commands(services.deployment, leases=services.leases, lock=services.node_lock))
    app.cli.add_command(worker_commands(services.leases, services.drains))
    app.cli.add_command(receipt_commands(settings.receipts))
    names = [entry.name for entry in catalogue.models]
    app.cli.add_command(request_commands(names, services.requests, services.leases))
    app.cli.add_command(
        doctor_command(settings, catalogue, services.deployment, services.redis, services.leases)
    )
    return app


def _first_models(catalogue: Catalogue) -> dict[str, str]:
    """Return the name of the first model of each task."""
    return {task: entry.name for entry in reversed(catalogue.models) for task in entry.tasks}
