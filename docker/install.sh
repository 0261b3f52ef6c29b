#!/bin/sh
# install.sh cpu|gpu VENV: an environment with what ./pyproject.toml pins, and the drivers of the
# MLflow server, as of its exclude-newer date. Byte-compiled; requirements.txt in it lists all.
set -eu
target=$1
venv=$2
case $target in
cpu)
    # Builds without CUDA are on PyTorch's own index, which gives no dates; versions are pinned.
    set -- --torch-backend cpu
    for package in torch torchaudio torchvision; do
        set -- "$@" --exclude-newer-package "$package=false"
    done
    ;;
gpu) set -- ;;
*)
    echo "install.sh: target '$target' is not one of: cpu, gpu" >&2
    exit 2
    ;;
esac
uv venv "$venv"
uv pip install --python "$venv" --compile-bytecode "$@" \
    --requirements pyproject.toml --group server
uv pip freeze --python "$venv" >"$venv/requirements.txt"
