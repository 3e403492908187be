# docker build -t inference-sidecar:0.2.0 .
#   --build-arg EXTRAS=diagnose      without torch: no image preparation, a much smaller image; EXTRAS= also omits py-spy
#   --build-arg PILLOW=pillow-simd   see docs/images.md, "Pillow-SIMD"
#   --build-arg PYTHON=3.13
#   --build-arg COMPILE=1            the path of each request compiled: a third less CPU per request (docs/decisions/0040)
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG EXTRAS=images,diagnose,orca,postgres,tokenizer
ARG PILLOW=pillow
ARG COMPILE=
# The compiler builds the kernel and, if selected, Pillow-SIMD; it stays in this stage.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libc6-dev libjpeg62-turbo-dev zlib1g-dev libwebp-dev libtiff-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt pyproject.toml setup.py README.md ./
RUN python -m venv /opt/sidecar && /opt/sidecar/bin/pip install --no-cache-dir -c constraints.txt uv
ENV VIRTUAL_ENV=/opt/sidecar UV_LINK_MODE=copy UV_NO_CACHE=1 PATH=/opt/sidecar/bin:$PATH
COPY kernels kernels
COPY sidecar sidecar
# COMPILE: the path of each request as machine code (docs/decisions/0040-compiled-hot-path.md)
RUN COMPILE=$COMPILE uv pip install --compile-bytecode -c constraints.txt ".${EXTRAS:+[$EXTRAS]}"
# Pillow-SIMD is a drop-in for Pillow under another name, so it replaces Pillow once everything else is installed.
RUN if [ "$PILLOW" != pillow ]; then \
      uv pip uninstall pillow && CC="gcc -mavx2" uv pip install --compile-bytecode --no-binary "$PILLOW" "$PILLOW"; \
    fi
RUN uv pip uninstall uv pip && sidecar --version

FROM python:${PYTHON}-slim-bookworm
ARG PILLOW=pillow
# hadolint ignore=DL3008
RUN if [ "$PILLOW" != pillow ]; then \
      apt-get update \
      && apt-get install -y --no-install-recommends libjpeg62-turbo libwebp7 libwebpmux3 libwebpdemux2 libtiff6 \
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
