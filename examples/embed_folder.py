"""Embed the photos of a folder: `python embed_folder.py photos/ photos.npy`.

Writes the vectors, and beside them the file names, one a line.
"""

import sys
from pathlib import Path

import numpy as np

from service.client import RecoClient

folder, out, url = Path(sys.argv[1]), Path(sys.argv[2]), (sys.argv[3:] or ["http://127.0.0.1:8000"])[0]
photos = sorted(path for path in folder.iterdir() if path.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"})
with RecoClient(url) as reco:
    vectors = reco.embed_images(photos)  # (N, D) float32, unit rows; long lists go in parts
np.save(out, vectors)
out.with_suffix(".txt").write_text("".join(f"{path.name}\n" for path in photos))
print(f"{len(photos)} photos, vectors of {vectors.shape[1]} numbers in {out}")
