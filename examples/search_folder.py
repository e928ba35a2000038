"""Find the photos that fit a sentence: `python search_folder.py photos.npy "a ripe banana"`.

Reads what embed_folder.py wrote. Both sides are enhanced by the same memory, so that they compare.
"""

import sys
from pathlib import Path

import numpy as np

from service.client import RecoClient

file, sentence, url = Path(sys.argv[1]), sys.argv[2], (sys.argv[3:] or ["http://127.0.0.1:8000"])[0]
vectors, names = np.load(file), file.with_suffix(".txt").read_text().splitlines()
with RecoClient(url) as reco:
    query = reco.embed_texts([sentence])[0]  # (D,) float32
scores = vectors @ query  # (N,) cosines
for i in np.argsort(-scores)[:5]:
    print(f"{scores[i]:.3f}  {names[i]}")
