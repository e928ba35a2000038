"""CARD.md, filled in with what was measured in the run that made the starter."""

from collections.abc import Mapping

Figures = Mapping[str, float]

CARD = """# The starter

A small dual encoder, a fusion and a memory, so that RECO Serve shows what it does without any download.
**It is for trying and testing, not for production**: it knows about as much of the world as 8 000 photos tell.

| part | what it is |
|---|---|
| `clip.json`, `clip.safetensors` | {encoder}: MobileNetV2 1.0 (frozen, ImageNet-trained), a text transformer of 4 layers and width 128, both projected to 256; float16, {megabytes:.1f} MB; an open_clip configuration, loaded by open_clip itself |
| `fusion.safetensors` | fusion `{fusion}`, {kind}; k = 10 |
| `memory.json`, `memory.safetensors` | {pairs} photos of 81 grocery classes as vectors and class names; no image. Versions `all` and `fruit-and-vegetables` are made from it |

Image search keys are the 1280 features of MobileNetV2 before the projection, text keys the CLIP vectors.

## Measured

In per cent, by `python -m models.make_starter DATA` in the run that made these files ({minutes:.0f} minutes on {cores} cores, seed {seed});
the Grocery line is also what `reco eval classify DATA/grocery/test-*.tar` prints. One seed: differences below a point mean nothing.

{retrieval}

Grocery Store, test split: 2485 photos, 81 labels, prompt "a photo of a {{}}.", k = 10, top-1. None of its photos, captions or names was learned from or tuned on.

{classification}

What one would try instead, with the same labelled photos and no text: {baselines}.
A nearest neighbour is hard to beat where every photo of the memory carries the right label; what the fusion gives is one vector space for photos and
for any text, with a memory that need not be labelled and may change while it serves.

## The fusion

{verdict}

## Learned from

| data | used for | licence |
|---|---|---|
| Flickr8k, 6091 photos with 5 captions | encoder; memory of the sentence lessons | photos: their Flickr authors', research and education only |
| Flickr8k, 1000 other photos | sentence lessons of the fusion | the same |
| ImageNet sample, one photo of each class | encoder | none stated, research use only |
| Caltech 101, 15 photos of each class | encoder | CC BY 4.0 as stated by Caltech |
| Caltech 101, the other photos; imagen, 200 ImageNet classes x 5 | lessons of the fusion: class captions, also with invented names | CC BY 4.0; research use only |
| MobileNetV2 weights and the rows of its classifier (google-coral test data) | image tower; the rows as imagined photos of the 1000 classes | Apache-2.0 |
| Grocery Store, training split | the memory alone, never learned from | MIT |

The grocery photos and class names are those of the Grocery Store data set: M. Klasson, C. Zhang, H. Kjellström, *A Hierarchical Grocery Store Image
Dataset with Visual and Semantic Labels*, WACV 2019.
"""


def table(columns: tuple[str, ...], rows: Mapping[str, Figures]) -> str:
    """A Markdown table of per cents, one row per name."""
    head = ["| |" + "|".join(columns) + "|", "|---|" + "--:|" * len(columns)]
    return "\n".join([*head, *(f"|{name}|" + "|".join(f"{found[column]:.1f}" for column in columns) + "|" for name, found in rows.items())])


def listed(figures: Figures) -> str:
    """The figures in one line."""
    return " · ".join(f"{name} {value:.1f}" for name, value in figures.items())
