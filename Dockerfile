# syntax=docker/dockerfile:1
# The command `dmtjepa` with the versions of constraints.txt. docs/container.md says how to run it.
#
#   docker build --tag dmtjepa .                                for CUDA
#   docker build --tag dmtjepa:cpu --build-arg DEVICE=cpu .     for a CPU
#
# PyTorch's packages hold the libraries of CUDA. The host provides the driver and the NVIDIA Container Toolkit.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

# Triton and torch.compile compile during a run. Debian keeps only the newest version of a package.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/dmtjepa PATH=/opt/dmtjepa/bin:$PATH
RUN python -m venv "$VIRTUAL_ENV"
WORKDIR /src

# All packages but this project, in a layer that changes only with their versions.
ARG CONSTRAINTS=constraints.txt
ARG EXTRAS=dali,export
ARG DEVICE=cuda
COPY setup.py pyproject.toml ${CONSTRAINTS} ./
RUN --mount=type=cache,target=/root/.cache/pip \
    case "$DEVICE" in \
        cuda) set -- ;; \
        cpu) set -- --extra-index-url https://download.pytorch.org/whl/cpu ;; \
        *) echo "DEVICE=$DEVICE: choose cuda or cpu" >&2; exit 1 ;; \
    esac \
    && mkdir dmtjepa && echo '__version__ = "0"' >dmtjepa/__init__.py && touch README.md \
    && pip install --constraint "$CONSTRAINTS" "$@" ".[$EXTRAS]" \
    && rm -r dmtjepa README.md build ./*.egg-info

COPY . .
RUN pip install --no-cache-dir --no-deps . && rm -r build ./*.egg-info

# The folder of compiled programs is found by the names of the user and of the home folder, also with `docker run --user`.
RUN useradd --uid 1000 --create-home dmtjepa && chmod 1777 /home/dmtjepa && mkdir --mode 1777 /workspace
ENV USER=dmtjepa HOME=/home/dmtjepa NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /workspace
ENTRYPOINT ["dmtjepa"]
CMD ["--help"]
