"""Options that several commands have."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from speedrl.models.generator import Generator
from speedrl.system.options import MODEL, Opt

QUALITY = (
    "Names and weights, like hpsv2=1,clip=0.5: embedded, hpsv2, imagereward, clip, a folder, MODULE:FUNCTION, "
    "FILE.py:FUNCTION; or none"
)
PROMPTS = (
    "A file: text with one prompt a line, JSON, JSONL, CSV or TSV; or a set by name: hpsv2, hpsv2-photo, -anime, "
    "-concept-art or -paintings, partiprompts, geneval. [default: the embedded model's]"
)
REWARD_WEIGHTS = "NAME=FILE: weights of a quality in place of the published ones."

Model = Annotated[str | Path | Generator, Opt("embedded, a folder, a run's folder or a hub id.", cli=str)]
Device = Annotated[str, Opt("auto, cpu, cuda, mps; auto takes the first of cuda, mps and cpu that works.")]
TextEncoder = Annotated[str | Path | None, Opt("A CLIP's folder or hub id. [default: the model's own]", MODEL,
                                               cli=str | None)]
Size = Annotated[str | tuple[int, int] | None, Opt(
    "Height and width in pixels, like 512x768. [default: the model's]", MODEL, cli=str | None)]
NegativePrompt = Annotated[str | None, Opt("What guidance leads away from. [default: the model's]", MODEL)]
MicroConds = Annotated[str | Sequence[float] | None, Opt(
    "Width, height, crop top, crop left, aesthetic score. [default: the size,0,0,6]", MODEL, cli=str | None)]
Base = Annotated[str | Path | None, Opt("The base of an adapter, if it is no longer where it was.", MODEL,
                                        cli=str | None)]
Precision = Annotated[str, Opt("Of transformer and text encoder.", MODEL, choices=("fp32", "bf16", "fp16"))]
