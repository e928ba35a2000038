"""Add photos with captions to a memory while it serves: `python add_pairs.py shop new.csv`.

The table has the columns id, file, caption; files are relative to the table. RECO_ADMIN_KEY is sent
where it is set, else the admin token of the store in RECO_STORE. Once the last line is printed, the
pairs are on the disk and the next request finds them.
"""

import base64
import csv
import os
import sys
from pathlib import Path

import httpx

memory, table = sys.argv[1], Path(sys.argv[2])
url = os.environ.get("RECO_URL", "http://127.0.0.1:8000")
token = Path(os.environ.get("RECO_STORE", "var/store")) / ".admin-token"
key = os.environ.get("RECO_ADMIN_KEY") or (token.read_text().strip() if token.is_file() else None)
with table.open(newline="") as rows:
    pairs = [
        {
            "id": row["id"],
            "caption": row["caption"],
            "image": base64.b64encode((table.parent / row["file"]).read_bytes()).decode(),
        }
        for row in csv.DictReader(rows)
    ]
reply = httpx.post(
    f"{url}/memories/{memory}/pairs",
    json={"pairs": pairs},
    headers={"Authorization": f"Bearer {key}"} if key else {},
    timeout=60,
)
if reply.is_error:
    sys.exit(reply.json()["error"]["message"])
print(f"{reply.json()['added']} added, {reply.json()['replaced']} replaced: {reply.json()['memory']}")
