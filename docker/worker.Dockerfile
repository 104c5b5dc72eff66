# A worker: Celery and the engines. torch's wheels bring CUDA along; the host needs the NVIDIA driver and container toolkit.
FROM python:3.12-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HOME=/var/lib/weights
WORKDIR /srv
# torch's compiler builds small C helpers at run time
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY requirements-web.txt requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt

COPY config.py ./
COPY catalogue/ catalogue/
COPY node/ node/
COPY protocol/ protocol/
COPY workers/ workers/
COPY demo/ demo/

# the folder exists before the volume is mounted, so that the volume takes over its owner
RUN useradd --system --uid 10001 --home-dir /srv service && install -d -o service /var/lib/weights
USER service
CMD ["celery", "-A", "workers", "worker"]
