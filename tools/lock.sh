#!/usr/bin/env bash
# Writes requirements.lock from requirements.in. Reach for it when a pinned version is to change; review the diff.
#   tools/lock.sh [python3.11]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3.11}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch/venv"
pip="$scratch/venv/bin/pip --disable-pip-version-check --quiet"
$pip install torch==2.13.0
$pip install -r requirements.in
# SGLang's own pins (another torch, CUDA kernels) cannot be met beside a CPU torch, and are not needed there.
$pip install --no-deps sglang==0.5.23 compressed-tensors==0.18.0 xgrammar==0.2.7
{
    echo "# Made by tools/lock.sh from requirements.in; install with: make setup"
    # A CPU torch calls itself 2.13.0+cpu: the lock must also hold where the same line brings the CUDA build.
    $pip freeze --all | grep -v '^pip==' | sed 's/+cpu$//'
} > requirements.lock
echo "wrote requirements.lock: $(grep -c == requirements.lock) packages"
