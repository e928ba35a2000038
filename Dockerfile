# docker build -t reco-serve . ; docker run -p 127.0.0.1:8000:8000 -v reco:/var/lib/reco reco-serve
# VARIANT=gpu, the default: torch and faiss bring their CUDA libraries along: about 8 GB, and it runs with or without a GPU.
# VARIANT=cpu (--build-arg VARIANT=cpu): the same versions without CUDA.
# PYTHON_IMAGE=python@sha256:... pins the base to the byte.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG VARIANT=gpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/reco
WORKDIR /src
# the pinned set first: this layer, the large one, changes only with the lock file
COPY requirements.lock ./
# cpu: torch and torchvision come from PyTorch's own index, in the lock's versions but not under its hashes; all else as locked
RUN awk '/^[a-z]/ { keep = $0 !~ /^(cuda-|nvidia-|triton=|torch=|torchvision=|faiss-gpu=)/ } /^faiss-cpu=/ { $0 = $1 " \\" } keep' \
        requirements.lock > cpu.lock \
    && awk '/^torch(vision)?==/ { print $1 "+cpu" }' requirements.lock > torch-cpu.txt \
    && case "$VARIANT" in \
        gpu) /opt/reco/bin/pip install --require-hashes -r requirements.lock ;; \
        cpu) /opt/reco/bin/pip install --require-hashes --no-deps -r cpu.lock \
            && /opt/reco/bin/pip install --no-deps --index-url https://download.pytorch.org/whl/cpu -r torch-cpu.txt ;; \
        *) echo "VARIANT=$VARIANT: choose gpu or cpu" >&2; exit 1 ;; \
    esac
COPY pyproject.toml README.md LICENSE ./
COPY index_store index_store
COPY models models
COPY service service
# hatchling is in the lock, so that the build takes nothing unpinned
RUN /opt/reco/bin/pip install --no-deps --no-build-isolation . && /opt/reco/bin/reco --help > /dev/null

FROM ${PYTHON_IMAGE}
RUN useradd --system --uid 10001 --home-dir /var/lib/reco --create-home reco
COPY --from=build /opt/reco /opt/reco
ENV PATH=/opt/reco/bin:$PATH PYTHONUNBUFFERED=1 RECO_STORE=/var/lib/reco/store HF_HOME=/var/lib/reco/hub
USER 10001
WORKDIR /var/lib/reco
VOLUME /var/lib/reco
EXPOSE 8000
# the first start builds the starter's memory; a large memory of one's own is verified byte by byte
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["reco"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
