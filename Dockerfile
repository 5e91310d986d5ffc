# megabus and the versions that its tests ran with.
#   docker build -t megabus .                                    # for GPUs: torch's default build
#   docker build -t megabus --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .   # for CPUs, much smaller
#   docker run --gpus all --ipc host -v "$PWD":/work megabus train --nproc-per-node 8 --config run.yaml
FROM python:3.11-slim

# DeepSpeed's Adam and torch.compile build C++ when they are asked for.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# torch in a layer of its own: it is most of the image, and changes least.
ARG TORCH_INDEX=
COPY requirements.txt /megabus/
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
    "torch==$(sed -n 's/^torch==//p' /megabus/requirements.txt)"

ARG EXTRAS=report,wandb,tensorboard,hf
COPY pyproject.toml README.md LICENSE /megabus/
COPY megabus /megabus/megabus
RUN pip install --no-cache-dir -c /megabus/requirements.txt "/megabus[$EXTRAS]"

# Ranks exchange what they have through shared memory: give the container enough with --ipc host or --shm-size.
WORKDIR /work
ENTRYPOINT ["megabus"]
CMD ["--help"]
