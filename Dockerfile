# CUDA image with flash-attn built in. The checkout is the WORKDIR, so that recipes/ and eval/ are at hand.
#   docker build -t sfd-scale .
#   docker run --gpus all --ipc=host -v /data:/data sfd-scale sfd show train/sfd_xxl
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
ARG CUDA_RUNTIME_IMAGE=nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

FROM ${CUDA_IMAGE} AS build
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1
RUN apt-get update && apt-get install -y --no-install-recommends \
        python3 python3-venv python3-dev git ninja-build build-essential \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/sfd-scale
COPY pyproject.toml README.md ./
COPY sfd_scale/__init__.py sfd_scale/
RUN pip install uv && uv pip install -e .
# flash-attn compiles for the accelerators named here: A100, H100/H200, B200.
ARG FLASH_ATTN_CUDA_ARCHS="80;90;100"
ARG MAX_JOBS=8
RUN FLASH_ATTN_CUDA_ARCHS="${FLASH_ATTN_CUDA_ARCHS}" MAX_JOBS="${MAX_JOBS}" \
    pip install --no-build-isolation "flash-attn>=2.8"

# DeepSpeed compiles its ops on first use, so the last stage keeps the compiler of the devel image.
FROM ${CUDA_RUNTIME_IMAGE}
ENV DEBIAN_FRONTEND=noninteractive PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
RUN apt-get update && apt-get install -y --no-install-recommends \
        python3 python3-dev build-essential ninja-build openssh-server openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/* && mkdir -p /run/sshd
COPY --from=build /opt/venv /opt/venv
WORKDIR /opt/sfd-scale
COPY . .
RUN useradd --create-home sfd && chown -R sfd /opt/sfd-scale
USER sfd
CMD ["sfd", "--help"]
