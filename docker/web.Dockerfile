# The web process and Flower, without torch. The build context is the repository's root.
FROM python:3.12-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /srv
COPY requirements-web.txt .
RUN pip install --no-cache-dir -r requirements-web.txt

COPY addresses.py config.py logs.py wsgi.py gunicorn.conf.py gunicorn_worker.py flowerconfig.py ./
COPY app/ app/
COPY catalogue/ catalogue/
COPY node/ node/
COPY protocol/ protocol/
# Flower uses the workers' Celery app, whose import does not load torch
COPY workers/ workers/

# The files' modes come from the checkout, whose umask may have kept others from reading.
RUN useradd --uid 10001 --create-home service && chmod -R a+rX .
USER service
CMD ["gunicorn", "wsgi:app"]
