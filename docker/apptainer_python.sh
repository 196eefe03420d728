#!/bin/bash
# Python of an Apptainer image, as cluster.slurm.python: apptainer_python.sh ARGUMENTS...
# CSC_IMAGE names the image file; the working folder is the checkout, which has the same path on all nodes.
set -eu
if [ -n "${APPTAINER_CONTAINER:-}" ]; then exec python "$@"; fi # inside the image already: torchrun

# The image gets a home of its own on the node: neither packages nor settings of the user's home.
home=/tmp/csc_train-$UID
mkdir -p -m 700 "$home"
if [ ! -O "$home" ]; then
    echo "$home: another user made it: remove it on $(hostname)" >&2
    exit 1
fi

# --cleanenv keeps all variables out. Those that a training reads pass by name, from this node, whose GPUs they number.
# Not by --env: it splits values at commas, and the list of processes would show them.
libraries='^(ACCELERATE|CSC|CUDA|DS|GLOO|HF|MLFLOW|NCCL|NVIDIA|OMP|OPENAI|PYTORCH|SLURM|TORCH|TORCHINDUCTOR|TRITON|UCX|WANDB)_'
proxies='^(https?|HTTPS?|no|NO)_(proxy|PROXY)$'
for name in $(compgen -e); do
    if [[ $name =~ $libraries || $name =~ $proxies ]]; then export "APPTAINERENV_$name=${!name}"; fi
done
# The package of the checkout, not the image's copy
export APPTAINERENV_PYTHONPATH=$PWD APPTAINERENV_PYTHONNOUSERSITE=1
exec apptainer exec --nv --cleanenv --home "$home" --bind "$PWD${HF_HOME:+,$HF_HOME}" --pwd "$PWD" \
    "${CSC_IMAGE:-csc_train.sif}" python "$@"
