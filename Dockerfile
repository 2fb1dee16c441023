# A text-generation server for GPU machines: docs/serving.md.
#
#   docker build -t early-exit .
#   docker run --gpus all --shm-size 8g -p 5000:5000 -v /data/checkpoints:/checkpoints:ro early-exit --load /checkpoints
#
# --shm-size is for NCCL between the ranks of one machine. Give --api-key-file, or let only a gateway reach the port.
FROM pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime

ENV PIP_BREAK_SYSTEM_PACKAGES=1
RUN useradd --create-home server
WORKDIR /app
COPY pyproject.toml setup.py README.md LICENSE ./
COPY megatron megatron
COPY tools tools
# torch is that of the image: pip must not replace it with one for another CUDA.
RUN python -c "import torch; print(f'torch=={torch.__version__}')" > /tmp/torch.txt \
    && pip install --no-cache-dir --constraint /tmp/torch.txt .
USER server

# SIGTERM lets running answers finish: give it as long (docker stop --time 40, terminationGracePeriodSeconds: 40).
ENTRYPOINT ["python", "tools/run_text_generation_server.py", "--host", "0.0.0.0"]
EXPOSE 5000
# Loading may take minutes, and a server that loads lives; whether it can serve is what /health tells a gateway.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:5000/health/live', timeout=4)"]
