# A worker: Celery and the engines. torch's wheels contain CUDA; the host needs the NVIDIA driver and its
# container toolkit.
FROM python:3.12-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HOME=/var/lib/weights
WORKDIR /srv
# torch.compile and Triton compile C code at run time
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY requirements-web.txt requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt

COPY addresses.py config.py logs.py ./
COPY catalogue/ catalogue/
COPY node/ node/
COPY protocol/ protocol/
COPY workers/ workers/
COPY demo/ demo/

# The user's home holds the caches of compiled kernels. A volume takes the owner of the folder that it is mounted on.
# The files' modes come from the checkout, whose umask may have kept others from reading.
RUN useradd --uid 10001 --create-home service && install -d -o service /var/lib/weights /var/lib/receipts && chmod -R a+rX .
USER service
CMD ["celery", "-A", "workers", "worker"]
