#!/usr/bin/env bash
# The check on a GPU, from the root of a checkout: loadtests/gpu.sh [options of loadtests.gpu.check]
# Needs: Linux, and a Python (PYTHON) in which reco-serve is installed, or Python 3.12 with torch,
# torchvision, timm, numpy and httpx: there it takes the rest from .whl/ (loadtests/gpu_wheels.sh).
# Results: $OUT (default var/gpu).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export OUT=${OUT:-$PWD/var/gpu} PYTHONUNBUFFERED=1
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if ! "$PYTHON" -c 'from importlib.metadata import version; version("reco-serve")' 2>/dev/null; then
  if compgen -G '.whl/*.whl' >/dev/null; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl
  fi
  version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) # a tree that is not installed states none
  mkdir "$site/reco_serve-$version.dist-info"
  printf 'Metadata-Version: 2.1\nName: reco-serve\nVersion: %s\n' "$version" >"$site/reco_serve-$version.dist-info/METADATA"
fi
export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH}
"$PYTHON" -m loadtests.gpu.check "$@"
