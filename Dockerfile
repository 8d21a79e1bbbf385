# For Docker and Podman; docs/containers.md has Apptainer and Kubernetes.
#   docker build -t of-cnn .
#   docker run --rm -v "$PWD/output:/app/output" of-cnn sh train.sh
#   docker run --rm --gpus=all --shm-size=8g -v /data:/data:ro -v "$PWD/output:/app/output" -e DATA_ROOT=/data/imagenet/ofrecord \
#       -e GPU_NUM_PER_NODE=8 of-cnn sh train.sh --resume=auto --model_save_dir=output/run1
# OneFlow's wheel and the packages that it needs bring CUDA, cuDNN and NCCL; the driver is the host's.
FROM python:3.10-slim-bookworm

# What the NVIDIA container runtime mounts: devices, libcuda, and nvidia-smi.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /app

# The set-up of the wrappers, in a layer of its own: it is made again when requirements.txt changes only.
COPY requirements.txt env.sh ./
RUN PIP_NO_CACHE_DIR=1 sh -c '. ./env.sh'

COPY . .

# Any user may run it, as clusters demand: what is written goes to mounted directories.
RUN mkdir -p output log onnx && chmod 1777 output log onnx

CMD ["sh", "inference.sh", "--model=efficientnet_lite0"]
