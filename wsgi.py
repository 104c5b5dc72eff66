"""The WSGI application that gunicorn serves: `gunicorn wsgi:app`."""

import logging

from app import create_app
from config import Settings

logging.basicConfig(level=logging.INFO, format="[%(asctime)s] [%(levelname)s] %(name)s: %(message)s")

app = create_app(Settings.from_env())
