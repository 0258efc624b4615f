# clear-dist with torch for CUDA; without a GPU it draws with the embedded model. Nobody has built it yet: see
# docs/platforms.md, which says how to run it.
FROM python:3.12-slim

# g++: kernels of Triton and of torch.compile are built where they run.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE MANIFEST.in ./
COPY clear_dist clear_dist
RUN pip install --no-cache-dir -c constraints.txt '.[gpu,lora]'

ENV HF_HOME=/cache
WORKDIR /work
ENTRYPOINT ["clear-dist"]
