# Image of every node: head, CPU and GPU workers, and the MLflow server.
#
# Why python:slim and not rayproject/ray:*-gpu: the wheels of requirements.lock bring their own CUDA libraries (13), so a CUDA base would
# be gigabytes that nothing loads, and its conda environment holds other versions of what the lock pins. What the launcher and KubeRay
# need beside Python are the five packages below. Hosts need an NVIDIA driver of at least 580 (CUDA 13) and the NVIDIA container toolkit.
#
#   docker build --tag coda-ray:0.1.0 .
#
# The lock holds the extras too: harmonypy is GPL-3.0-or-later, which matters to whoever hands this image on.
FROM python:3.11.14-slim-bookworm

# Launcher: rsync, ssh (head to workers), ps. KubeRay's probes: wget. Wheels of numba and torch: libgomp.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 openssh-client procps rsync wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 --shell /bin/bash ray \
    && install --directory --owner ray --group ray --mode 0755 /scratch

# Into the system's Python, not a virtual environment: the launcher opens login shells, whose PATH is Debian's own.
WORKDIR /opt/coda_ray
COPY requirements.lock ./
RUN pip install --no-cache-dir --no-deps --only-binary :all: --require-hashes --requirement requirements.lock

COPY pyproject.toml README.md LICENSE ./
COPY coda_ray ./coda_ray
COPY configs ./configs
COPY jobs ./jobs
RUN pip install --no-cache-dir --no-deps --no-index --no-build-isolation .

# A node without a token does not start. task_oom_retries: a stage killed for want of memory is tried three times more, not for ever.
# JOB_STOP: a sweep that is stopped writes its table, which takes longer than Ray's 3 s.
# NVIDIA_*: what the container toolkit shows to a container that asks for a GPU.
ENV RAY_AUTH_MODE=token \
    RAY_task_oom_retries=3 \
    RAY_JOB_STOP_WAIT_TIME_S=60 \
    RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
CMD ["bash"]
