"""Generators on disk: one loading path for Meissonic's and aMUSEd's folders, hub ids, our runs and the embedded model.

A folder holds transformer/, vqvae/, text_encoder/, tokenizer/ and scheduler/, each json and safetensors, whole or in
shards. Which kind of transformer it is says its config.json; the embedded model and the released Meissonic differ in
their numbers only. What training adds to the sampler is in scheduler/: numbers in its json, tensors in
sampler.safetensors.
"""

import inspect
import json
import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from speedrl.method.sampler import Sampler
from speedrl.models.generator import Generator
from speedrl.models.lora import load_lora, merge_lora
from speedrl.models.meissonic import MeissonicTransformer
from speedrl.models.sources import SAMPLER, WEIGHTS, base_of, find, find_text_encoder, is_adapter
from speedrl.system.errors import one_line
from speedrl.system.files import write_atomically, write_json
from speedrl.system.platform import check_device, frugal_allocator, import_vq_model

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection

    from speedrl.models.amused import AmusedTransformer

Network = TypeVar("Network", bound=nn.Module)

# what the released Meissonic scripts lead away from
NEGATIVE = (
    "worst quality, low quality, low res, blurry, distortion, watermark, logo, signature, text, jpeg artifacts, "
    "signature, sketch, duplicate, ugly, identifying mark"
)


def load_generator(
    source: str | Path | Generator = "embedded",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    text_encoder: str | Path | None = None,
    size: str | tuple[int, int] | None = None,
    negative: str | None = None,
    micro_conds: str | Sequence[float] | None = None,
    base: str | Path | None = None,
) -> Generator:
    """Loads a generator in eval mode from "embedded", a folder, a run's folder or a hub id `owner/name[@revision]`.

    `dtype` is that of the transformer and the text encoder, whatever the files hold; the VQ decoder is always float32,
    as half precision gives NaN. All but the transformer is frozen. Every key and shape must match.
    `text_encoder` is a CLIP's folder or hub id in place of the generator's own, `size` height and width in pixels, like
    "512x768", `negative` the negative prompt, `micro_conds` as Generator's; None takes what the files say, else what
    the released scripts take: for Meissonic NEGATIVE, and the size with a crop of 0, 0 and an aesthetic score of 6.
    An adapter is merged into its base, which is `base` in place of the one that it records. FileNotFoundError where
    something is missing, ValueError where something is wrong, each in one line.
    """
    if isinstance(source, Generator):
        if any(option is not None for option in (text_encoder, size, negative, micro_conds, base)):
            raise ValueError("a Generator is taken as it is: give its options where it is loaded")
        return source
    found, size, micro_conds = find(source), parse_size(size), parse_micro_conds(micro_conds)
    adapted = is_adapter(found)
    if base is not None and not adapted:
        raise ValueError(f"`base` is for an adapter, but {source} is a whole model")
    beside = found if adapted else found / "scheduler"
    scheduler = read_json(beside / "scheduler_config.json")
    if adapted and text_encoder is None:
        text_encoder = scheduler.pop("text_encoder", None)  # a merged model holds it itself
    folder = base_of(found, base) if adapted else found
    check_device(device)
    for place in {folder, beside}:
        if (place / "pace").is_dir():
            earlier = "was trained with --steps auto by an earlier version, which this one does not read"
            raise ValueError(f"{place} {earlier}: train it anew with --steps 1-16")
    config = read_json(folder / "transformer/config.json")
    index = folder / "model_index.json"

    VQModel = import_vq_model()
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    amused = config.get("_class_name") == "UVit2DModel"
    transformer = load_module(
        lambda: new_transformer(config, amused=amused), folder / "transformer", dtype=dtype, device=device
    )
    vq_config = read_json(folder / "vqvae/config.json")
    vqvae = load_module(lambda: VQModel.from_config(vq_config), folder / "vqvae", dtype=torch.float32, device=device)
    if text_encoder is None:
        text_config = read_json(folder / "text_encoder/config.json")
        text_model = load_module(
            lambda: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(text_config)),
            folder / "text_encoder",
            dtype=dtype,
            device=device,
        )
    else:
        text_model = load_text_encoder(text_encoder, dtype=dtype, device=device)
    tokenizer = load_tokenizer(folder / "tokenizer")

    vqvae.to(memory_format=torch.channels_last).requires_grad_(False)
    for module in vqvae.modules():
        if isinstance(module, nn.SiLU):
            module.inplace = True  # it follows a norm of its own: one copy less of a large image's largest tensor
    text_model.requires_grad_(False)
    given = text_model.config.hidden_size
    wanted = config.get("encoder_hidden_size" if amused else "joint_attention_dim", given)
    if wanted != given:
        raise ValueError(f"the text encoder has hidden size {given}, but the transformer takes {wanted}")
    scale = 2 ** (len(vqvae.config.block_out_channels) - 1)  # pixels to a token
    rows, columns = grid_of(config, size or scheduler.get("size"), scale=scale)
    height, width = rows * scale, columns * scale
    if isinstance(config.get("sample_size"), list):  # of an earlier version: no pipeline reads it
        size, config["sample_size"] = (height, width), max(config["sample_size"])
    scheduler = scheduler | ({"size": [height, width]} if size else {})
    learned = load_sampler(beside, device=device)
    if height * width > 512 * 512:
        frugal_allocator()
    if adapted:
        load_lora(transformer, found)
        merge_lora(transformer)
    vocabulary = transformer.embed.embeddings.num_embeddings
    return Generator(
        transformer=transformer,
        vqvae=vqvae,
        text_encoder=text_model,
        tokenizer=tokenizer,
        config=config,
        scheduler=scheduler,
        grid=(rows, columns),
        size=(height, width),
        mask_id=scheduler.get("mask_token_id", vocabulary - 1),
        codes=transformer.mlm_layer.conv2.out_channels,
        # where the files do not say: what the pipelines of the two take
        steps=scheduler.get("num_inference_steps", 12 if amused else 64 if rows >= 64 else 48),
        sampler=Sampler(
            # below 1 the pipelines of both draw without guidance
            guidance=max(1.0, scheduler.get("guidance_scale", 10.0 if amused else 9.0)),
            schedule=scheduler.get("masking_schedule", "cosine"),
            order=scheduler.get("reveal_order", "confidence"),
            temperature=scheduler.get("temperature", 2.0),
            remask=scheduler.get("remask_share", 0.0),
            scalars=learned.pop("search", None),
        ),
        negative=scheduler.get("negative_prompt", "" if amused else NEGATIVE) if negative is None else negative,
        micro_conds=tuple(micro_conds or scheduler.get("micro_conds", (width, height, 0.0, 0.0, 6.0))),
        model_index=read_json(index) if index.exists() else None,
        step_policy={name.removeprefix("steps."): value for name, value in learned.items()},
    )


def save_generator(generator: Generator, out: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Saves a generator to the folder `out` in the layout that it was loaded from, weights rounded to `dtype`.

    Written to `out.partial` and renamed, so that `out` is never half a checkpoint; one that stands there is replaced.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()) and not (out / "transformer").exists():
        raise ValueError(f"{out} is not a model's folder, and nothing in it will be overwritten: give another --out")
    partial, old = out.with_name(out.name + ".partial"), out.with_name(out.name + ".old")
    shutil.rmtree(partial, ignore_errors=True)
    text_config = generator.text_encoder.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    save_module(generator.transformer, generator.config, partial / "transformer", dtype=dtype)
    private = ("_use_default_values", "_name_or_path")
    vq_config = {"_class_name": "VQModel"} | {k: v for k, v in generator.vqvae.config.items() if k not in private}
    save_module(generator.vqvae, vq_config, partial / "vqvae", dtype=dtype)
    save_module(generator.text_encoder, text_config, partial / "text_encoder", dtype=dtype)
    write_json(partial / "scheduler/scheduler_config.json", scheduler_of(generator))
    if generator.model_index is not None:
        write_json(partial / "model_index.json", generator.model_index)
    save_sampler(generator, partial / "scheduler")
    generator.tokenizer.save_pretrained(partial / "tokenizer")
    generator.tokenizer.backend_tokenizer.model.save(str(partial / "tokenizer"))  # vocab.json, merges.txt, as released
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def parse_size(size: str | tuple[int, int] | None) -> tuple[int, int] | None:
    """Height and width of "512x768". ValueError for another text."""
    if not isinstance(size, str):
        return size
    try:
        height, width = (int(side) for side in size.lower().split("x"))
    except ValueError:
        raise ValueError(f"`size` takes height and width, like 512x768, not {size!r}") from None
    return height, width


def parse_micro_conds(given: str | Sequence[float] | None) -> Sequence[float] | None:
    """The five numbers of "1024,1024,0,0,6". ValueError for another text or number of them."""
    try:
        found = [float(part) for part in given.split(",")] if isinstance(given, str) else given
    except ValueError:
        found = []
    if found is not None and not (len(found) == 5 and all(map(math.isfinite, found))):
        raise ValueError(f"`micro_conds` takes five numbers, like 1024,1024,0,0,6, not {given!r}")
    return found


def new_transformer(config: dict, *, amused: bool) -> "MeissonicTransformer | AmusedTransformer":
    """The transformer that a config.json describes; keys that are not of its class are left out."""
    if amused:
        from speedrl.models.amused import AmusedTransformer

        return AmusedTransformer(**{key: value for key, value in config.items() if not key.startswith("_")})
    known = inspect.signature(MeissonicTransformer).parameters
    return MeissonicTransformer(**{key: value for key, value in config.items() if key in known})


def grid_of(config: dict, size: tuple[int, int] | None, *, scale: int) -> tuple[int, int]:
    """Rows and columns of tokens for a size in pixels, or of the configuration. ValueError for what does not fit."""
    if size is None:
        side = config.get("sample_size", 64)  # in tokens; released configurations leave it out
        return tuple(side) if isinstance(side, list) else (side, side)
    unit = 2 * scale  # two tokens to a cell inside
    if any(side < unit or side % unit for side in size):
        raise ValueError(f"`size`: height and width must be multiples of {unit} pixels, got {size[0]} and {size[1]}")
    return size[0] // scale, size[1] // scale


def load_tokenizer(folder: Path) -> Any:
    """transformers' CLIPTokenizer of a folder."""
    from transformers import CLIPTokenizer

    if not (folder / "vocab.json").exists() and not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(f"{folder} has no vocab.json: it is not a whole model")
    try:
        return CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{folder} cannot be read: {one_line(error)}") from error


def load_text_encoder(
    source: str | Path, *, dtype: torch.dtype, device: torch.device | str
) -> "CLIPTextModelWithProjection":
    """The text half of a CLIP, a folder or a hub id. ValueError where weights are missing, naming the first."""
    from transformers import CLIPTextModelWithProjection

    what, instead = f"the text encoder {source}", "give --text-encoder a folder or a hub id of a CLIP"
    folder = find_text_encoder(source)
    try:
        # transformers' own way, as a whole CLIP's file names its text half otherwise
        loaded: Any = CLIPTextModelWithProjection.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, variant=variant_in(folder, "model")
        )
    except Exception as error:  # transformers has many
        raise ValueError(f"{what} cannot be read: {one_line(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{what} lacks {len(missing)} weights ({', '.join(missing[:3])}): {instead}")
    return model.to(device).eval()


def variant_in(folder: Path, name: str) -> str | None:
    """The variant of the weights `name` that a folder has: None for the plain ones, which are preferred, or "fp16"."""
    plain = any((folder / f"{name}.safetensors{index}").exists() for index in ("", ".index.json"))
    half = any((folder / f"{name}{file}").exists() for file in (".fp16.safetensors", ".safetensors.index.fp16.json"))
    return "fp16" if half and not plain else None


def scheduler_of(generator: Generator) -> dict[str, Any]:
    """How a generator is sampled, as scheduler_config.json says it."""
    sampler = generator.sampler
    return generator.scheduler | {
        "num_inference_steps": generator.steps, "guidance_scale": sampler.guidance,
        "temperature": sampler.temperature, "masking_schedule": sampler.schedule, "reveal_order": sampler.order,
        "remask_share": sampler.remask, "negative_prompt": generator.negative, "micro_conds": generator.micro_conds,
    }


def load_sampler(folder: Path, *, device: torch.device | str) -> dict[str, Tensor]:
    """The sampler's tensors by name, on a device: "search", and the step policy's as "steps.NAME"."""
    if not (folder / SAMPLER).exists():
        return {}
    return {name: value.to(device, copy=True) for name, value in read_weights(folder / SAMPLER).items()}


def save_sampler(generator: Generator, folder: Path) -> None:
    """Writes what `load_sampler` reads, and takes away what stands there where there is none."""
    from safetensors.torch import save_file

    found = {f"steps.{name}": value for name, value in generator.step_policy.items()}
    if generator.sampler.scalars is not None:
        found["search"] = generator.sampler.scalars
    if not found:
        (folder / SAMPLER).unlink(missing_ok=True)
        return
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in found.items()}
    write_atomically(folder / SAMPLER, lambda partial: save_file(tensors, partial, metadata={"format": "pt"}))


class NoInitialisation(TorchFunctionMode):
    """Makes torch.nn.init's functions do nothing: on the meta device they would import torch.compile, for seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load_module(
    build: Callable[[], Network], folder: Path, *, dtype: torch.dtype, device: torch.device | str
) -> Network:
    """A module with the weights in a folder of WEIGHTS, whole, in shards or fp16, as `dtype`, in eval mode.

    Shapes and keys must match. The weights are copies: the file may be replaced later.
    """
    path, files = weight_files(folder, WEIGHTS[folder.name])
    try:
        # the parameters come from the file: no time and memory for random ones
        with torch.device("meta"), NoInitialisation(), warnings.catch_warnings(action="ignore"):
            module = build()
    except Exception as error:  # each library has its own for numbers that make no model
        raise ValueError(f"{folder / 'config.json'} describes no such model: {one_line(error)}") from error
    own, state = module.state_dict(), {key: value for file in files for key, value in read_weights(file).items()}
    state = {key: value for key, value in state.items() if key in own or not key.endswith("position_ids")}
    wrong = {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape}
    for what, keys in (
        ("lacks", own.keys() - state.keys()),
        ("has unknown", state.keys() - own.keys()),
        ("has another shape for", wrong),
    ):
        if keys:
            first = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            raise ValueError(f"{path} {what} {len(keys)} of {len(own)} weights ({first}): it is another model's")
    module.load_state_dict({key: value.to(dtype, copy=True) for key, value in state.items()}, assign=True)
    count_positions(module)
    return module.to(device).eval()


def save_module(module: nn.Module, config: dict, folder: Path, *, dtype: torch.dtype) -> None:
    """Writes config.json and the weights to a folder of WEIGHTS."""
    from safetensors.torch import save_file

    write_json(folder / "config.json", config)
    state = {key: value.detach().to("cpu", dtype).contiguous() for key, value in module.state_dict().items()}
    save_file(state, folder / f"{WEIGHTS[folder.name]}.safetensors", metadata={"format": "pt"})


def weight_files(folder: Path, name: str) -> tuple[Path, list[Path]]:
    """The file that says what weights a part has, the plain one or the index of its shards, and the files with them."""
    plain = [folder / f"{name}.safetensors", folder / f"{name}.fp16.safetensors"]
    indices = [folder / f"{name}.safetensors.index.json", folder / f"{name}.safetensors.index.fp16.json"]
    candidates = (plain[0], indices[0], plain[1], indices[1])
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        pickled = next((p.name for p in sorted(folder.glob("*")) if p.suffix in (".bin", ".pt", ".ckpt")), None)
        why = f"and {pickled}, a pickle, is not read: convert it" if pickled else "it is not a whole model"
        raise FileNotFoundError(f"{folder} has no {name}.safetensors: {why}")
    if path in plain:
        return path, [path]
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise ValueError(f"{path} is not an index of files in its own folder")
    files = [folder / file for file in sorted(set(names.values()))]
    if lacking := [file.name for file in files if not file.exists()]:
        raise FileNotFoundError(f"{folder} lacks {len(lacking)} of {len(files)} shards of its weights ({lacking[0]})")
    return path, files


def read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or half written: {one_line(error)}") from error


def count_positions(module: nn.Module) -> None:
    """Gives buffers on the meta device their values: the position_ids of transformers' text models, in no file."""
    for parent in module.modules():
        for key, buffer in parent.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(parent, key, torch.arange(buffer.shape[-1]).expand(buffer.shape))


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
