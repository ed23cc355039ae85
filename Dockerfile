# Image with the CUDA of the locked torch, sshd and pdsh. The WORKDIR is the checkout, with recipes/, launchers/ and eval/.
#   docker build -t sfd-scale .                                   (--build-arg FLASH_ATTN=1 adds flash-attention 2, in an hour)
#   docker run --gpus all --ipc=host -v /data:/opt/sfd-scale/data -v /runs:/opt/sfd-scale/runs sfd-scale sfd show train/sfd_xxl
#   docker run --gpus all --ipc=host --network=host -v ~/.ssh:/home/sfd/.ssh sfd-scale launchers/sshd.sh    (a node)
# For the same image at every rebuild, give the base by digest; `docker buildx imagetools inspect TAG` prints it:
#   docker build --build-arg CUDA_IMAGE=nvidia/cuda@sha256:... .
ARG CUDA_IMAGE=nvidia/cuda:13.2.1-cudnn-devel-ubuntu24.04

FROM ${CUDA_IMAGE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive UV_NO_CACHE=1 UV_LINK_MODE=copy VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends \
        python3 python3-venv python3-dev git ninja-build build-essential \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv \
    && pip install --no-cache-dir "uv==0.13.*"
WORKDIR /opt/sfd-scale
# The locked packages come first: this layer changes seldom. pyproject.toml must not lie beside them yet: uv 0.9 and older
# refuse hashes together with its override of a version.
COPY requirements.lock ./
RUN uv pip install --no-deps --require-hashes -r requirements.lock
# flash-attention 2 for A100, H100, H200 and B200, on request: cuDNN's kernel serves the last three.
ARG FLASH_ATTN=0
ARG FLASH_ATTN_CUDA_ARCHS="80;90;100"
ARG MAX_JOBS=8
COPY launchers/flash_attention.sh launchers/
RUN if [ "$FLASH_ATTN" = 1 ]; then FLASH_ATTN_CUDA_ARCHS="$FLASH_ATTN_CUDA_ARCHS" launchers/flash_attention.sh; fi
COPY pyproject.toml README.md ./
COPY sfd_scale sfd_scale
RUN uv pip install --no-deps -e .

# The last stage uses the devel image too: DeepSpeed compiles its ops on first use.
FROM ${CUDA_IMAGE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 TORCH_EXTENSIONS_DIR=/home/sfd/torch_extensions
# hadolint ignore=DL3008
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        python3 python3-dev build-essential ninja-build openssh-server openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 --shell /bin/bash sfd
COPY --from=build /opt/venv /opt/venv
WORKDIR /opt/sfd-scale
COPY --chown=sfd:sfd . .
RUN mkdir -p runs && chown sfd:sfd . runs
USER 10001
HEALTHCHECK --interval=5m --timeout=2m --start-period=1m --retries=2 CMD ["python", "-c", "import sfd_scale.launch.agent"]
CMD ["sfd", "--help"]
