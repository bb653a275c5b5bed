# The repository with everything installed: docker build -t ept . && docker run --rm ept make reproduce
FROM python:3.13-slim
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /ept
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu, as a build argument, leaves the CUDA libraries out
ARG PIP_EXTRA_INDEX_URL
# What is installed changes less often than the rest, and is kept between builds
COPY Makefile pyproject.toml setup.py requirements-dev.txt README.md LICENSE params.yaml ./
COPY ept ept
RUN make install
COPY . .
CMD ["make", "help"]
