#!/usr/bin/env bash
# Gather in .whl/ what loadtests/gpu.sh needs beside torch and its usual companions, in the versions of
# requirements.lock, for Python 3.12 on x86-64 Linux. faiss-cpu, as faiss-gpu brings CUDA 12 libraries.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
MOST_MIB=60
needed="annotated-doc annotated-types click et-xmlfile faiss-cpu fastapi ftfy httptools open-clip-torch openpyxl
  opentelemetry-api orjson pillow pillow-heif prometheus-client pydantic pydantic-core pydantic-settings
  python-dotenv python-multipart regex rich starlette typer typing-extensions typing-inspection uvicorn uvloop wcwidth"
rm -rf .whl
mkdir .whl
pinned=()
for name in $needed; do
  found=$(sed -nE "s/^($name==[^ ;]+).*/\1/p" requirements.lock)
  [ -n "$found" ] || { echo "$name is not in requirements.lock: take it out of $0"; exit 1; }
  pinned+=("$found")
done
platforms=()
for minor in 17 24 26 27 28 31 34 35; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
"$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" --platform manylinux2014_x86_64 --dest .whl "${pinned[@]}"
du -k .whl/*.whl | sort -n
size=$(($(du -sk .whl | cut -f1) / 1024))
echo "$(find .whl -name '*.whl' | wc -l) wheels, $size MiB"
[ "$size" -le "$MOST_MIB" ] || { echo ".whl is over $MOST_MIB MiB: take something out of $0"; exit 1; }
