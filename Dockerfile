# docker build -t inference-sidecar:0.2.0 .
#   --build-arg EXTRAS=              no image preparation, stack dumps, gRPC load reports or tokenizer
#   --build-arg PILLOW=pillow-simd   see docs/images.md, "Pillow-SIMD"
#   --build-arg PYTHON=3.12 --build-arg DEBIAN=bookworm
#   --build-arg COMPILE=1            the path of each request compiled: a third less CPU per request, some ten minutes more to build (docs/decisions/0040)
#   --build-arg REVISION=$(git rev-parse HEAD) --build-arg CREATED=$(date -u +%FT%TZ) --build-arg SOURCE=URL   for labels
ARG PYTHON=3.13
ARG DEBIAN=trixie

FROM python:${PYTHON}-slim-${DEBIAN} AS build
ARG EXTRAS=images,diagnose,orca,postgres,tokenizer,render
ARG PILLOW=pillow
ARG COMPILE=
# The compiler builds the kernel and, if selected, Pillow-SIMD, which needs the codecs; both stay in this stage.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libc6-dev \
    && if [ "$PILLOW" != pillow ]; then \
      apt-get install -y --no-install-recommends libjpeg62-turbo-dev zlib1g-dev libwebp-dev libtiff-dev; \
    fi \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt pyproject.toml setup.py README.md ./
RUN python -m venv /opt/sidecar && /opt/sidecar/bin/pip install --no-cache-dir -c constraints.txt uv
ENV VIRTUAL_ENV=/opt/sidecar UV_LINK_MODE=copy UV_NO_CACHE=1 PATH=/opt/sidecar/bin:$PATH
# Dependencies first: a change of the sidecar's own code then costs seconds.
RUN IFS=,; set --; for extra in $EXTRAS; do set -- "$@" --extra "$extra"; done; \
    uv pip install --compile-bytecode -c constraints.txt -r pyproject.toml "$@"
COPY kernels kernels
COPY sidecar sidecar
# COMPILE: the path of each request as machine code (docs/decisions/0040-compiled-hot-path.md)
RUN COMPILE=$COMPILE uv pip install --compile-bytecode --no-deps -c constraints.txt .
# Pillow-SIMD is a drop-in for Pillow under another name, so it replaces Pillow once everything else is installed.
RUN if [ "$PILLOW" != pillow ]; then \
      uv pip uninstall pillow && CC="gcc -mavx2" uv pip install --compile-bytecode --no-binary "$PILLOW" "$PILLOW"; \
    fi
# An image without the kernel would work, and prepare no image: the build fails instead.
RUN uv pip uninstall uv pip && sidecar --version && python -c "import sidecar.kernels._fused"

FROM python:${PYTHON}-slim-${DEBIAN}
ARG PYTHON
ARG DEBIAN
ARG EXTRAS=images,diagnose,orca,postgres,tokenizer,render
ARG PILLOW=pillow
ARG REVISION=
ARG CREATED=
ARG SOURCE=
LABEL org.opencontainers.image.title="inference-sidecar" \
      org.opencontainers.image.description="A sidecar for one LLM inference engine" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="docker.io/library/python:${PYTHON}-slim-${DEBIAN}"
# What Pillow-SIMD was built against.
# hadolint ignore=DL3008,SC2086
RUN packages=; \
    if [ "$PILLOW" != pillow ]; then packages="libjpeg62-turbo libwebp7 libwebpmux3 libwebpdemux2 libtiff6"; fi; \
    if [ -n "$packages" ]; then \
      apt-get update \
      && apt-get install -y --no-install-recommends $packages \
      && rm -rf /var/lib/apt/lists/*; \
    fi \
    && useradd --uid 65532 --no-create-home --shell /usr/sbin/nologin sidecar \
    && install -d -o sidecar /run/sidecar
COPY --from=build /opt/sidecar /opt/sidecar
ENV PATH=/opt/sidecar/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
EXPOSE 8080 9400
# No HEALTHCHECK: Kubernetes ignores it; the manifests have probes.
ENTRYPOINT ["sidecar"]
CMD ["run"]
