"""The WSGI application that gunicorn serves: `gunicorn wsgi:app`."""

import logging

from app import create_app
from app.commands.errors import CommandFailed
from config import EXIT_CONFIGURATION, ConfigurationError, Settings
from logs import use_json

logging.basicConfig(level=logging.INFO, format="[%(asctime)s] [%(levelname)s] %(name)s: %(message)s")

try:
    settings = Settings.from_env()
    if settings.json_logs:
        use_json("web")
    app = create_app(settings)
except ConfigurationError as error:
    # one line and this status on flask's command line; gunicorn.conf.py does the same for gunicorn
    raise CommandFailed(str(error), EXIT_CONFIGURATION) from error
