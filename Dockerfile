# syntax=docker/dockerfile:1
# Two images of one source: `docker build --target orchestrator .` and `docker build --target worker .`
# A worker without a GPU: --build-arg WORKER_BASE=python:3.12-slim-bookworm
ARG ORCHESTRATOR_BASE=python:3.12-slim-bookworm
# The driver is the node's; torch brings its own CUDA libraries. Ubuntu 24.04 has Python 3.12.
ARG WORKER_BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04

FROM ${ORCHESTRATOR_BASE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY blip_engine blip_engine
COPY orchestrator orchestrator
COPY workers workers
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps --wheel-dir /wheels .


FROM ${ORCHESTRATOR_BASE} AS orchestrator-packages
# Where wheels come from besides the usual place: a mirror.
ARG PIP_EXTRA_INDEX_URL=
COPY constraints.txt /build/
COPY --from=wheel /wheels /wheels
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install -c /build/constraints.txt /wheels/*.whl


FROM ${WORKER_BASE} AS worker-base
# The distribution's patches matter more than the same build of its Python. torch.compile on a GPU, Triton, builds what
# launches its kernels with the C compiler and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev tini \
    && { command -v python3 || apt-get install -y --no-install-recommends python3 python3-dev python3-venv; } \
    && rm -rf /var/lib/apt/lists/*


FROM worker-base AS worker-packages
# The place of torch's builds for another CUDA version, or for none.
ARG PIP_EXTRA_INDEX_URL=
COPY constraints.txt /build/
COPY --from=wheel /wheels /wheels
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install -c /build/constraints.txt "$(echo /wheels/*.whl)[worker]"


FROM ${ORCHESTRATOR_BASE} AS orchestrator
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin blip
COPY --from=orchestrator-packages /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    BLIP_API_HOST=0.0.0.0 BLIP_API_PORT=8080
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ['BLIP_API_PORT']}/healthz\", timeout=4)"]
# tini passes SIGTERM on from the first moment, before Python listens to it, and buries orphans.
ENTRYPOINT ["tini", "--", "blip-batch"]
CMD ["orchestrator"]


FROM worker-base AS worker
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin blip \
    && install -d -o 10001 -g 10001 /models
COPY --from=worker-packages /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HOME=/models \
    TORCHINDUCTOR_CACHE_DIR=/tmp/compiled \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    BLIP_METRICS_HOST=0.0.0.0 BLIP_METRICS_PORT=9090
USER 10001:10001
EXPOSE 9090
HEALTHCHECK --interval=15s --timeout=10s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ['BLIP_METRICS_PORT']}/healthz\", timeout=9)"]
ENTRYPOINT ["tini", "--", "blip-batch"]
CMD ["worker"]
