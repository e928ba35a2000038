#!/usr/bin/env bash
# Everything that docs/concepts/results.md tells, with the bundled starter: docs/concepts/results.sh DATA [WORK]. About an hour on two cores; goes on where it stopped.
set -euo pipefail
DATA=${1:?the folder that holds flickr8k/, grocery/, caltech101/ and imagen/} WORK=${2:-var/results}
export RECO_STORE=$WORK/store
mkdir -p "$WORK"
built() { [ -e "$RECO_STORE/$1/CURRENT" ]; }

# What the learned rows learn from, and sentences.
named='a photo of {class}'
built things || reco memory build things "$DATA/caltech101/caltech101.tar" "$DATA/imagen/imagen.tar" --caption "$named" --image-key trunk --version v1 --activate
built sentences || reco memory build sentences "$DATA"/flickr8k/train-*.tar --image-key trunk --version v1 --activate

# Does it help on groceries, and which settings? Side, k, confusions, memory curve, examples.
reco eval classify "$DATA"/grocery/test-*.tar --memory grocery --enhance image text both --k 1 5 10 20 --report "$WORK/grocery"

# Every claim of the method as a row.
reco eval ablate "$DATA"/grocery/test-*.tar --memory grocery --learn-from things --seeds 3 --out "$WORK/ablation" \
  --tune-on "$DATA/caltech101/caltech101.tar" "$DATA/imagen/imagen.tar" --tune-caption "$named"

# Sentences: text to image and image to text, with the learned fusion and with a gentle rule.
for fusion in "" mean:0.5 mean:0.25; do
  reco eval retrieve "$DATA"/flickr8k/test-*.tar --memory sentences --enhance image text both ${fusion:+--fusion "$fusion"} --report "$WORK/flickr-${fusion:-learned}"
done

# Entities seen and never seen in training, 101 + 81 in one label set over one memory.
python3 - "$DATA/caltech101/caltech101.tar" >"$WORK/seen.txt" <<'PY'
import json, sys, tarfile
with tarfile.open(sys.argv[1]) as tar:
    print("\n".join(sorted({json.load(tar.extractfile(member))["class"] for member in tar if member.name.endswith(".json")})))
PY
built world || reco memory build world "$DATA/caltech101/caltech101.tar" "$RECO_STORE/grocery/all" --caption "$named" --image-key trunk --version v1 --activate
reco eval entities "$DATA/caltech101/caltech101.tar" "$DATA"/grocery/test-*.tar --memory world --seen "$WORK/seen.txt" --enhance image text both --report "$WORK/entities"
