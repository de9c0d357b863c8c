# align in a container, from the pinned packages:
#
#   docker build --target cpu --build-arg TORCH_INDEX=URL -t align .     # the CPU index URL shown on pytorch.org's Get Started page
#   docker build --target cuda -t align-cuda .
#   docker run --rm align                                                # align doctor
#   docker run --rm --gpus all --shm-size 16g -v "$PWD:/data" --user "$(id -u)" --env HOME=/data align-cuda align run my.yaml

FROM python:3.11-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1 PATH=/align/.venv/bin:$PATH
RUN useradd --uid 1000 --user-group --create-home align && install -d -o align -g align /align /data
WORKDIR /align
COPY --chown=align:align pyproject.toml README.md LICENSE ./
COPY --chown=align:align requirements requirements
COPY --chown=align:align data data
COPY --chown=align:align recipes recipes
COPY --chown=align:align align align

FROM base AS cpu
ARG TORCH_INDEX=
USER 1000:1000
RUN python requirements/install.py cpu
WORKDIR /data
CMD ["align", "doctor"]

FROM base AS cuda
# The driver is the host's and the CUDA libraries come with the packages. Triton compiles the kernels' launchers with a C compiler.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER 1000:1000
RUN python requirements/install.py cuda
WORKDIR /data
CMD ["align", "doctor"]
