"""Where a generator's files are: folders, runs, adapters and hub ids."""

import json
import re
from pathlib import Path

from speedrl.system.errors import one_line
from speedrl.system.hub import from_hub

HUB_ID = re.compile(r"(\w[\w-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?")  # owner/name or owner/name@revision

INSTEAD = "give a folder, a hub id owner/name, or embedded"

SAMPLER = "sampler.safetensors"

WEIGHTS = {"transformer": "diffusion_pytorch_model", "vqvae": "diffusion_pytorch_model", "text_encoder": "model"}


def find(source: str | Path) -> Path:
    """The folder of a model or an adapter named as in `load_generator`; a hub id is downloaded.

    Of a run's folder it is model/, or adapter/ where no model is.
    """
    folder = Path(__file__).parent / "embedded" if str(source) == "embedded" else Path(source)
    if folder.is_file():
        raise ValueError(f"{source} is a file, but a model is a folder with transformer/, vqvae/ and text_encoder/")
    if not folder.is_dir():
        if not (named := HUB_ID.fullmatch(str(source))):
            raise FileNotFoundError(f"there is no model at {source}: {INSTEAD}")
        files = ["model_index.json", "*/config.json", "scheduler*", "tokenizer/*", "adapter_config.json",
                 "adapter_model.safetensors", SAMPLER, *(f"{p}/{name}*.safetensors" for p, name in WEIGHTS.items())]
        folder = fetch(named, files, f"{source} is no folder here, and as a hub id it", instead=INSTEAD)
    for place in (folder / "model", folder, folder / "adapter"):
        if is_adapter(place) or (place / "transformer/config.json").exists():
            return place
    if str(source) == "embedded":
        raise FileNotFoundError("the embedded model is not in this installation: rebuild it, see experiments/")
    advice = ": finish the run with `resume`, or make a model of a checkpoint with export"
    advice = advice if (folder / "checkpoints").is_dir() else ""
    raise FileNotFoundError(f"{source} has no transformer/config.json: it is not a model or a finished run{advice}")


def fetch(named: re.Match, files: list[str], what: str, *, instead: str) -> Path:
    """The folder of a hub repository's files in the cache; fp16 ones too where a folder has no others."""
    from huggingface_hub import snapshot_download

    def get(ignored: str | None) -> Path:
        return from_hub(
            lambda: snapshot_download(named[1], revision=named[2], allow_patterns=files, ignore_patterns=ignored),
            what, instead=instead,
        )

    folder = get("*.fp16*")
    lacking = [path for path in folder.rglob("config.json") if not any(path.parent.glob("*.safetensors"))]
    return get(None) if lacking else folder


def find_text_encoder(source: str | Path) -> Path:
    """The folder of a CLIP; a hub id is downloaded."""
    if Path(source).is_dir():
        return Path(source)
    what = f"the text encoder {source}"
    if not (named := HUB_ID.fullmatch(str(source))):
        raise FileNotFoundError(f"{what} is not there: give `text_encoder` a folder or a hub id of a CLIP")
    files = ["config.json", "model.safetensors", "model-*.safetensors", "model.fp16*.safetensors"]
    return fetch(named, files, what, instead="give `text_encoder` a folder or a hub id")


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def base_of(adapter: Path, base: str | Path | None = None) -> Path:
    """The folder of an adapter's base: `base`, or the one that it records. FileNotFoundError where that is gone."""
    recorded = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    try:
        folder = find(str(recorded) if base is None else base)
    except FileNotFoundError as error:
        if base is not None:
            raise
        gone = f"the adapter {adapter} was trained on {recorded}, which cannot be loaded ({one_line(error)})"
        raise FileNotFoundError(f"{gone}: give its base by `base`") from error
    if is_adapter(folder):
        raise ValueError(
            f"the base of the adapter {adapter} is an adapter itself, {folder}: give a whole model by `base`"
        )
    return folder


def parts_of(source: str | Path, base: str | Path | None = None) -> list[Path]:
    """The folders whose files make a generator what it is."""
    found = find(source)
    folder = base_of(found, base) if is_adapter(found) else found
    parts = ("transformer", "vqvae", "text_encoder", "tokenizer", "scheduler")
    return [*(folder / part for part in parts), *([found] if is_adapter(found) else [])]


def resolve_source(source: str | Path) -> str:
    """A source as a record keeps it, so that it is the same from every working directory and later: a folder's absolute
    path, a hub id with the commit that it has now (owner/name@commit), or "embedded". FileNotFoundError for none."""
    if str(source) == "embedded":
        return "embedded"
    return resolved(source, find(source))


def resolve_text_encoder(source: str | Path) -> str:
    """As `resolve_source`, of a text encoder."""
    return resolved(source, find_text_encoder(source))


def resolved(source: str | Path, folder: Path) -> str:
    if Path(source).exists():
        return str(Path(source).resolve())
    return f"{str(source).partition('@')[0]}@{folder.name}"  # the hub's cache names a snapshot by its commit


def recorded_source(recorded: str, *, where: str, option: str = "model") -> str:
    """A source as `resolve_source` gave it, for `load_generator`. FileNotFoundError where its folder is gone, naming
    it, the record `where` and the option that gives another."""
    if recorded == "embedded" or Path(recorded).is_dir() or HUB_ID.fullmatch(recorded):
        return recorded
    lost = f"{where} was trained from {recorded}, and there is no such folder here"
    raise FileNotFoundError(f"{lost}: say by `{option}` where it is now")


def read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: it is not a whole model")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad json and bad UTF-8 both
        raise ValueError(f"{path} is not json: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a json object")
    return values
