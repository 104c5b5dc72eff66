"""The WSGI application that gunicorn serves: `gunicorn wsgi:app`."""

import logging

from app import create_app
from config import Settings
from logs import use_json

logging.basicConfig(level=logging.INFO, format="[%(asctime)s] [%(levelname)s] %(name)s: %(message)s")
settings = Settings.from_env()
if settings.json_logs:
    use_json("web")

app = create_app(settings)
