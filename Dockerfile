# Every node of a cluster, and the driver, from one image: docker build -t modmill .
# Python's minor version must be the same wherever Ray connects; see docs/cluster.md.
FROM python:3.11-slim

# KubeRay asks for a node's health with wget.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/*

# gcs, view: add them here. Fits of tokenizers need `train`.
ARG EXTRAS=ray,label,train,s3

WORKDIR /opt/modmill
COPY pyproject.toml constraints.txt README.md LICENSE modmill.py ./
COPY manifests ./manifests
COPY labelers ./labelers
COPY tokenize_jobs ./tokenize_jobs
COPY train ./train
COPY engine ./engine
RUN pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"

# Weights and indexes lie below the home folder: mount a disk there to keep them.
RUN useradd --create-home --uid 1000 modmill
USER modmill
WORKDIR /home/modmill
ENV PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token

# No ENTRYPOINT: Ray's launchers start a shell in the container.
CMD ["modmill", "--help"]
