"""`reco`: the command line's grammar. Each command is one function of a module of this package, imported once the line is known right."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

EPILOG = """examples:
  reco serve                                              the bundled starter on 127.0.0.1:8000
  reco memory build catalog photos/ --activate            a folder with captions.csv, .jsonl or .parquet
  reco memory build catalog shards/*.tar --caption "a photo of {class}"
  reco memory import catalog embeddings/ --model ViT-B-32 --pretrained laion2b_s34b_b79k
  reco eval classify test.tar --memory catalog            does it help on my data?
Every flag of `serve` is also RECO_<FLAG> in the environment and a key of a TOML file (--config)."""
CLASSIFY = """examples:
  reco eval classify test.tar --memory catalog --label class
  reco eval classify test.tar --memory catalog --enhance both --k 1 5 10 20 --json k.json
  reco eval classify test.tar --memory catalog --fusion mean:2 --per-class
  reco eval classify test.tar --memory catalog --search uni cross --fuse cross uni"""
RETRIEVE = """examples:
  reco eval retrieve test.tar --memory pictures --enhance image text both
  reco eval retrieve test.tar --memory pictures --fusion mean:0.5 --dehub 0.75"""
ABLATE = """examples:
  reco eval ablate grocery/test-*.tar --memory grocery --learn-from things --out var/ablation
  reco eval ablate test.tar --memory catalog --learn-from pictures@v2 --seeds 3 --limit 500
  reco eval ablate test.tar --memory catalog --learn-from things --tune-on things.tar --tune-caption 'a photo of {class}'"""
ENTITIES = """examples:
  reco eval entities test.tar --memory everything --seen trained-on.txt
  reco eval entities test.tar --memory everything --seen-share 0.5 --seed 1"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 done, 1 failed, 2 wrong usage; an error is one line on stderr, with the stack only under --verbose."""
    args = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("reco").setLevel(logging.INFO)
    try:
        module, _, run = args.run.rpartition(".")
        getattr(import_module(f"service.cli.{module or 'commands'}"), run)(args)
    except KeyboardInterrupt as stop:
        print(f"reco: {stop}" if stop.args else "reco: stopped; nothing half-made is left", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 0  # the reader, such as `head`, has seen enough
    except Exception as error:  # noqa: BLE001  the last line of defence: told, and an exit code
        return _told(error, verbose=args.verbose)
    return 0


def _told(error: Exception, *, verbose: bool) -> int:
    """One line for an error of ours; anything else is a bug and shows its stack."""
    from index_store.errors import StoreError
    from models.errors import ModelError
    from service.errors import ServiceError
    from service.settings import UsageError

    if verbose or not isinstance(error, ServiceError | StoreError | ModelError | UsageError):
        logging.getLogger("reco").error("%s", error, exc_info=error)
    print(f"reco: {' '.join(str(error).split())}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1


def _parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "reco", description="Retrieval-enhanced CLIP embeddings.", epilog=EPILOG, formatter_class=shape
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _serve_parser(commands)
    memory = commands.add_parser("memory", help="build, list, check and choose memories").add_subparsers(
        metavar="COMMAND", required=True
    )
    _memory_parsers(memory)
    train = _command(commands, "train", "train", "train a fusion from a TOML file")
    train.add_argument("recipe", type=Path, metavar="CONFIG.toml")
    train.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint that a stopped run left beside the output"
    )
    evaluate = commands.add_parser("eval", help="does it help on my data?").add_subparsers(
        metavar="COMMAND", required=True
    )
    _eval_parsers(evaluate)
    _with_settings(
        _command(commands, "info", "info", "print versions, the model and the store as JSON"), "store", "model"
    )
    return parser


def _command(commands: Any, name: str, run: str, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run)
    parser.add_argument("--verbose", action="store_true", help="log more, and show the stack of an error")
    parser.add_argument(
        "--config", type=Path, metavar="TOML", help="a file of settings; flags and RECO_* variables go before it"
    )
    return parser


def _with_settings(parser: argparse.ArgumentParser, *groups: str) -> argparse.ArgumentParser:
    """Flags that Settings reads; unset ones stay None, so that the environment and the file can speak."""
    if "store" in groups:
        parser.add_argument("--store", metavar="DIR", help="where memories live (default var/store)")
    if "memory" in groups:
        parser.add_argument("--memory", metavar="NAME", help="the default memory")
    if "model" in groups:
        parser.add_argument("--model", help="'starter', an open_clip name, or an open_clip config file")
        parser.add_argument(
            "--pretrained", metavar="TAG|FILE", help="a hub tag, a local weights file, or 'random' for speed tests"
        )
        parser.add_argument(
            "--fusion",
            metavar="none|mean|core|FILE",
            help="what `reco train` wrote, or a rule (with its alpha: mean:2); default: the starter's, else the training-free rule",
        )
        parser.add_argument("--device", choices=["auto", "cpu", "cuda"])
        parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"])
    return parser


def _serve_parser(commands: Any) -> None:
    parser = _with_settings(_command(commands, "serve", "serve", "answer over HTTP"), "store", "memory", "model")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    for flag, unit in (
        ("max-batch", "N"),
        ("max-queue", "N"),
        ("max-items", "N"),
        ("max-pixels", "N"),
        ("drain-s", "S"),
        ("timeout-s", "S"),
    ):
        parser.add_argument(f"--{flag}", metavar=unit)


def _memory_parsers(commands: Any) -> None:
    _build_parser(commands)
    _import_parser(commands)
    _with_settings(_command(commands, "list", "memory.list_memories", "all memories and versions"), "store")
    show = _with_settings(_command(commands, "show", "memory.show", "what one version holds, takes and finds"), "store")
    show.add_argument("--json", action="store_true", help="print its manifest instead")
    show.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw recall against latency as measured at the build"
    )
    summary = "read every byte of a version and answer its probe queries"
    verify = _with_settings(_command(commands, "verify", "memory.verify", summary), "store")
    for parser in (show, verify):
        parser.add_argument("ref", metavar="NAME[@VERSION]")
    compact = _with_settings(
        _command(commands, "compact", "compact", "fold the online edits of a memory into a new version"), "store"
    )
    compact.add_argument("name")
    compact.add_argument("--url", help="do it in the running service that edits it, e.g. http://127.0.0.1:8000")
    delete = _with_settings(
        _command(commands, "delete", "delete", "remove a version that is not the current one"), "store"
    )
    delete.add_argument("ref", metavar="NAME@VERSION")
    activate = _with_settings(_command(commands, "activate", "activate", "choose the version to serve"), "store")
    activate.add_argument("ref", metavar="NAME@VERSION")
    activate.add_argument(
        "--url", help="swap it in a running service as well, e.g. http://127.0.0.1:8000 (RECO_ADMIN_KEY is sent if set)"
    )


def _build_parser(commands: Any) -> None:
    build = _with_settings(
        _command(commands, "build", "memory_build.build", "encode image-text pairs into a new version"),
        "store",
        "model",
    )
    build.add_argument("name")
    sources = (
        "webdataset .tar files or folders of them, folders with captions.csv, .jsonl or .parquet, or finished versions"
    )
    build.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help=sources)
    build.add_argument(
        "--caption", metavar="TEMPLATE", help="over the item's JSON fields or columns, such as 'a photo of {class}'"
    )
    build.add_argument(
        "--image-key",
        choices=["vector", "trunk"],
        default="vector",
        help="what the image search compares (default vector)",
    )
    _with_making(build)


def _import_parser(commands: Any) -> None:
    summary = "make a new version of embeddings in clip-retrieval's layout, or of another version"
    parser = _with_settings(_command(commands, "import", "memory_build.import_embeddings", summary), "store", "model")
    parser.add_argument("name")
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="holds img_emb/*.npy, text_emb/*.npy and metadata/*.parquet"
    )
    parser.add_argument(
        "--id",
        metavar="COLUMN",
        help="of the metadata, that names a pair (default key, image_path, url, else its number)",
    )
    _with_making(parser)


def _with_making(parser: argparse.ArgumentParser) -> None:
    """What every way of making a version can be told."""
    parser.add_argument("--version", help="default: today and a letter")
    parser.add_argument("--index", default="auto", metavar="auto|FACTORY", help="'auto', or a faiss factory string")
    parser.add_argument("--shard-pairs", type=int, default=1_000_000, metavar="N")
    parser.add_argument(
        "--recall-floor",
        type=float,
        default=0.99,
        metavar="R",
        help="recall@10 that the index must reach (default 0.99)",
    )
    parser.add_argument(
        "--dedup",
        type=float,
        metavar="COSINE",
        help="drop pairs whose image and text both come this near to an earlier one",
    )
    parser.add_argument("--dry-run", action="store_true", help="count and estimate only, write nothing")
    parser.add_argument(
        "--fresh", action="store_true", help="begin anew where an interrupted run could be gone on from"
    )
    parser.add_argument("--activate", action="store_true", help="make it the version that the next `reco serve` serves")
    parser.add_argument(
        "--keep",
        type=int,
        metavar="N",
        help="delete older versions but the newest N; the current and the previous one stay",
    )


def _eval_parsers(commands: Any) -> None:
    """The data are encoded once; every combination of what is listed is measured against plain CLIP with the same prompts."""
    classify = _eval_command(commands, "classify", "zero-shot accuracy, plain against enhanced", CLASSIFY)
    retrieve = _eval_command(commands, "retrieve", "text to image and image to text over all captions", RETRIEVE)
    retrieve.add_argument(
        "--caption", metavar="TEMPLATE", help="over the item's fields; default every caption that the tars hold"
    )
    entities = _eval_command(commands, "entities", "entities seen and never seen in training, apart", ENTITIES)
    entities.add_argument("--seen", type=Path, metavar="FILE", help="the entities that training saw, one a line")
    entities.add_argument(
        "--seen-share",
        type=float,
        default=0.5,
        metavar="S",
        help="without a list: a seeded share of them (default 0.5)",
    )
    entities.add_argument("--seed", type=int, default=0)
    ablate = _eval_command(commands, "ablate", "every claim of the method as a row of one table", ABLATE)
    ablate.add_argument(
        "--learn-from", required=True, metavar="NAME[@V]", help="the memory whose pairs the learned rows learn from"
    )
    ablate.add_argument(
        "--out", type=Path, default=Path("var/ablation"), metavar="DIR", help="rows and table; a second run goes on"
    )
    ablate.add_argument("--seeds", type=int, default=3, metavar="N")
    ablate.add_argument("--steps", type=int, default=200, metavar="N", help="of each learned row")
    ablate.add_argument("--alpha", type=float, default=2.0, help="strength of every rule")
    ablate.add_argument(
        "--tune-on", type=Path, nargs="+", metavar="SOURCE", help="pairs for the rows that compare full fine-tuning"
    )
    ablate.add_argument(
        "--tune-caption", metavar="TEMPLATE", help="over their fields; default every caption that they hold"
    )
    ablate.add_argument("--tune-steps", type=int, default=100, metavar="N")
    ablate.add_argument(
        "--tune-pairs", type=int, default=2048, metavar="N", help="so many of them, drawn with a fixed seed"
    )
    for parser in (classify, entities, ablate):
        parser.add_argument(
            "--label", default="class", metavar="FIELD", help="the JSON field of the class (default class)"
        )
        parser.add_argument(
            "--labels", type=Path, metavar="FILE", help="the labels, one a line; default all that the data name"
        )
        parser.add_argument("--templates", nargs="+", default=["a photo of a {}."], help="prompts, each with one {}")
    classify.add_argument("--per-class", action="store_true", help="class by class, and the worst confusions")


def _eval_command(commands: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    parser = _with_settings(_command(commands, name, f"evaluate.{name}", summary), "store", "memory", "model")
    parser.epilog, parser.formatter_class = examples, argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "sources", nargs="+", type=Path, metavar="SOURCE", help="webdataset tars, or folders with a captions.csv"
    )
    parser.add_argument(
        "--enhance", nargs="+", default=["image", "text", "both"], choices=["none", "image", "text", "both"]
    )
    parser.add_argument(
        "--search",
        nargs="+",
        default=["uni"],
        choices=["uni", "cross"],
        help="compare with the same side, or the other",
    )
    parser.add_argument(
        "--fuse", nargs="+", default=["cross"], choices=["cross", "uni", "both"], help="whose vectors come back"
    )
    parser.add_argument("--k", type=int, nargs="+", help="neighbours (default the fusion's)")
    parser.add_argument(
        "--max-similarity", type=float, default=0.98, metavar="COS", help="nearer images are duplicates (default 0.98)"
    )
    parser.add_argument(
        "--max-text-similarity", type=float, metavar="COS", help="nearer texts are duplicates (default none)"
    )
    parser.add_argument(
        "--dehub", type=float, default=0.0, metavar="W", help="take W times each candidate's hubness off (NNN)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N items only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="write a page with plots and examples, and a Markdown table"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
