#!/usr/bin/env bash
# Hybrids with int8 weights. torchao lies in a folder of its own: where it is installed, every
# program that imports transformers loads it, and prints what it could not load.
set -euo pipefail
cd "$(dirname "$0")/.."
version=0.18.0
folder=.venv-torchao/$version
test -d "$folder/torchao" || .venv/bin/python -m pip --disable-pip-version-check install -q \
    --no-deps --target "$folder" "torchao==$version"
export PYTHONPATH="$PWD/$folder${PYTHONPATH:+:$PYTHONPATH}"
.venv/bin/python -m pytest -q tests/test_quantized.py
