"""Classify photos with your own labels: `python classify_photos.py banana,lemon a.jpg b.jpg`."""

import os
import sys
from pathlib import Path

from service.client import RecoClient

labels, photos = sys.argv[1].split(","), [Path(name) for name in sys.argv[2:]]
with RecoClient(os.environ.get("RECO_URL", "http://127.0.0.1:8000")) as reco:
    plain = reco.classify(photos, labels=labels, enhance="none", top_k=1)
    enhanced = reco.classify(photos, labels=labels, enhance="both", top_k=1)
for photo, (before,), (after,) in zip(photos, plain, enhanced, strict=True):
    print(
        f"{photo.name}: plain {before['label']} {before['score']:.2f}, enhanced {after['label']} {after['score']:.2f}"
    )
