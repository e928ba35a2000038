"""Embed a long list of texts under one version: `python pin_version.py texts.txt out.npy`.

Vectors of two versions of a memory do not compare. The first request tells which version answers;
the others pin it. Where that version is swapped away meanwhile the service answers 410, and the
program begins again.
"""

import sys
from pathlib import Path

import httpx
import numpy as np

from service.client import RecoClient, RecoError

PART = 64
texts, out = Path(sys.argv[1]).read_text().splitlines(), Path(sys.argv[2])
url = (sys.argv[3:] or ["http://127.0.0.1:8000"])[0]


def embed_all(reco: RecoClient) -> tuple[np.ndarray, str]:
    """(N, D) float32 and the version that made every row."""
    first = httpx.post(f"{url}/embed/text", json={"texts": texts[:1]}, timeout=60).raise_for_status().json()
    version = first["memory"]
    parts = [reco.embed_texts(texts[i : i + PART], memory=version) for i in range(0, len(texts), PART)]
    return np.concatenate(parts), version


with RecoClient(url) as reco:
    while True:
        try:
            vectors, version = embed_all(reco)
            break
        except RecoError as error:
            if error.status != 410:
                raise
np.save(out, vectors)
print(f"{len(vectors)} vectors, all made by {version}")
