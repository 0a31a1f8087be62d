"""Generators on disk: one loading path for Meissonic's and aMUSEd's folders, hub ids, our runs and the embedded model.

A folder holds transformer/, vqvae/, text_encoder/, tokenizer/ and scheduler/, each json and safetensors, whole or in
shards. Which kind of transformer it is says its config.json; the embedded model and the released Meissonic differ in
their numbers only. What training adds to the sampler is in scheduler/: numbers in its json, tensors in
sampler.safetensors.
"""

import importlib
import inspect
import math
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from speedrl.method.sampler import Sampler
from speedrl.models.generator import Generator, Transformer
from speedrl.models.lora import load_lora, merge_lora
from speedrl.models.sources import SAMPLER, WEIGHTS, base_of, find, find_text_encoder, is_adapter, read_json
from speedrl.system.errors import one_line
from speedrl.system.files import replace_folder, write_atomically, write_json
from speedrl.system.platform import check_device, frugal_allocator, import_torchvision

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection

Network = TypeVar("Network", bound=nn.Module)

ARCHITECTURES = {  # `_class_name` of a transformer's config.json, and the module and class that it is
    "Transformer2DModel": ("speedrl.models.meissonic", "MeissonicTransformer"),
    "UVit2DModel": ("speedrl.models.amused", "AmusedTransformer"),
}


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
    transformer: type[Transformer] | None = None,
) -> Generator:
    """Loads a generator in eval mode from "embedded", a folder, a run's folder or a hub id `owner/name[@revision]`.

    `dtype` is that of the transformer and the text encoder, whatever the files hold; the VQ decoder is always float32,
    as half precision gives NaN. All but the transformer is frozen. Every key and shape must match.
    `text_encoder` is a CLIP's folder or hub id in place of the generator's own, `size` height and width in pixels,
    like "512x768", `negative` the negative prompt, `micro_conds` as Generator's; None takes what the files say, else
    the transformer's `defaults`, and the size with a crop of 0, 0 and an aesthetic score of 6. `transformer` is the
    class of one of your own. An adapter is merged into its base, which is `base` in place of the one that it records.
    FileNotFoundError where something is missing, ValueError where something is wrong, each in one line.
    """
    if isinstance(source, Generator):
        if any(option is not None for option in (text_encoder, size, negative, micro_conds, base)):
            raise ValueError("a Generator is taken as it is: give its options where it is loaded")
        return source
    found, size, micro_conds = find(source), parse_size(size), parse_micro_conds(micro_conds)
    adapted = is_adapter(found)
    if base is not None and not adapted:
        raise ValueError(f"`base` is for an adapter, but {source} is a whole model")
    folder = base_of(found, base) if adapted else found
    # an adapter of another program has no scheduler: its base's is taken
    beside = found if adapted and (found / "scheduler_config.json").exists() else folder / "scheduler"
    scheduler = read_json(beside / "scheduler_config.json")
    encoder = scheduler.pop("text_encoder", None) if adapted else None  # a merged model holds it itself
    encoder = encoder if text_encoder is None else text_encoder
    check_device(device)
    config = read_json(folder / "transformer/config.json")
    index = folder / "model_index.json"
    kind = transformer or transformer_class(config, folder)
    vq_config = read_json(folder / "vqvae/config.json")
    import_torchvision()
    from diffusers import VQModel

    network = load_module(lambda: kind.of_config(config), folder / "transformer", dtype=dtype, device=device,
                          meta=transformer is None)
    vqvae = load_module(lambda: VQModel.from_config(vq_config), folder / "vqvae", dtype=torch.float32, device=device)
    text_folder = folder / "text_encoder" if encoder is None else find_text_encoder(encoder)
    text_model = load_text_encoder(text_folder, dtype=dtype, device=device)
    vqvae.to(memory_format=torch.channels_last).requires_grad_(False)
    for module in vqvae.modules():
        if isinstance(module, nn.SiLU):
            module.inplace = True  # it follows a norm of its own: one copy less of a large image's largest tensor
    text_model.requires_grad_(False)

    scheduler = kind.defaults(config) | scheduler | ({"size": list(size)} if size else {})
    side = config.get("sample_size", scheduler.pop("sample_size", None))
    scale = 2 ** (len(vqvae.config.block_out_channels) - 1)  # pixels to a token
    rows, columns = grid_of(side, scheduler.get("size"), scale=scale)
    height, width = rows * scale, columns * scale
    learned = load_sampler(beside, device=device)
    mask_id = scheduler.get("mask_token_id", network.vocabulary - 1)
    check_parts(network, vqvae, text_model, config, mask_id=mask_id)
    if height * width > 512 * 512:
        frugal_allocator()
    if adapted:
        load_lora(network, found)
        merge_lora(network)
    return Generator(
        transformer=network,
        vqvae=vqvae,
        text_encoder=text_model,
        tokenizer=load_tokenizer(folder / "tokenizer"),
        config=config,
        scheduler=scheduler,
        grid=(rows, columns),
        size=(height, width),
        mask_id=mask_id,
        codes=network.codes,
        steps=scheduler.get("num_inference_steps", 16),
        sampler=Sampler(
            # below 1 the pipelines of both draw without guidance
            guidance=max(1.0, scheduler.get("guidance_scale", 1.0)),
            schedule=scheduler.get("masking_schedule", "cosine"),
            order=scheduler.get("reveal_order", "confidence"),
            temperature=scheduler.get("temperature", 2.0),
            remask=scheduler.get("remask_share", 0.0),
            shared_noise=scheduler.get("shared_noise", False),
            scalars=learned.pop("search", None),
        ),
        negative=scheduler.get("negative_prompt", "") if negative is None else negative,
        micro_conds=tuple(micro_conds or scheduler.get("micro_conds", (width, height, 0.0, 0.0, 6.0))),
        model_index=read_json(index) if index.exists() else None,
        step_policy={name.removeprefix("steps."): value for name, value in learned.items()},
    )


def save_generator(generator: Generator, out: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Saves a generator to the folder `out` in the layout that it was loaded from, weights rounded to `dtype`.

    Written to `out.partial` and renamed, so that `out` is never half a checkpoint; one that stands there is replaced.
    ValueError for another folder, and for a transformer of your own that `Generator.config` does not describe.
    """
    out, config, scheduler = Path(out), generator.config, scheduler_of(generator)
    if out.exists() and any(out.iterdir()) and not (out / "transformer").exists():
        raise ValueError(f"{out} is not a model's folder, and nothing in it will be overwritten: give another `out`")
    kind = type(generator.transformer)
    if (kind.__module__, kind.__name__) not in ARCHITECTURES.values():
        config = own_config(kind, config)
    if "sample_size" not in config:
        scheduler["size"] = list(generator.size)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    text_config = generator.text_encoder.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    save_module(generator.transformer, config, partial / "transformer", dtype=dtype)
    private = ("_use_default_values", "_name_or_path")
    vq_config = {"_class_name": "VQModel"} | {k: v for k, v in generator.vqvae.config.items() if k not in private}
    save_module(generator.vqvae, vq_config, partial / "vqvae", dtype=dtype)
    save_module(generator.text_encoder, text_config, partial / "text_encoder", dtype=dtype)
    write_json(partial / "scheduler/scheduler_config.json", scheduler)
    if generator.model_index is not None:
        write_json(partial / "model_index.json", generator.model_index)
    save_sampler(generator, partial / "scheduler")
    generator.tokenizer.save_pretrained(partial / "tokenizer")
    generator.tokenizer.backend_tokenizer.model.save(str(partial / "tokenizer"))  # vocab.json, merges.txt, as released
    replace_folder(partial, out)


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


def transformer_class(config: dict, folder: Path) -> type[Transformer]:
    """The class of the transformer in a model's folder. ValueError where it is none of ARCHITECTURES."""
    name = config.get("_class_name", "Transformer2DModel")
    if name not in ARCHITECTURES:
        raise ValueError(f"{folder} has a transformer of the class {name}: load_generator(..., transformer={name})")
    module, name = ARCHITECTURES[name]
    return getattr(importlib.import_module(module), name)


def own_config(kind: type[Transformer], config: dict) -> dict:
    """The config.json of a transformer of the reader's own class. ValueError where it cannot be built by it."""
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        inspect.signature(kind).bind(**config)
    except TypeError as error:
        how = f"give generator._replace(config={{...}}) with the keyword arguments of {kind.__name__}"
        raise ValueError(f"the generator's config does not describe its transformer ({error}): {how}") from error
    return {"_class_name": kind.__name__} | config


def check_parts(
    transformer: Transformer, vqvae: Any, text_model: "CLIPTextModelWithProjection", config: dict, *, mask_id: int
) -> None:
    """ValueError where the parts of a generator do not fit together."""
    given = text_model.config.hidden_size
    wanted = config.get("joint_attention_dim", config.get("encoder_hidden_size", given))
    if wanted != given:
        raise ValueError(f"the text encoder has hidden size {given}, but the transformer takes {wanted}")
    if vqvae.config.num_vq_embeddings < transformer.codes:
        many = f"{vqvae.config.num_vq_embeddings} codes, but the transformer draws from {transformer.codes}"
        raise ValueError(f"the VQ model has {many}: it is another model's")
    if not transformer.codes <= mask_id < transformer.vocabulary:
        span = f"{transformer.codes} to {transformer.vocabulary - 1}"
        raise ValueError(f"mask_token_id must be a token beside the codes, {span}, got {mask_id}")


def grid_of(side: Any, size: tuple[int, int] | None, *, scale: int) -> tuple[int, int]:
    """Rows and columns of tokens for a size in pixels, or of `side` tokens. ValueError for what does not fit."""
    if size is None:
        if not isinstance(side, int):
            raise ValueError("the model's files do not say its size: give `size`")
        return side, side
    unit = 2 * scale  # two tokens to a cell inside
    if any(length < unit or length % unit for length in size):
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


def load_text_encoder(folder: Path, **options: Any) -> "CLIPTextModelWithProjection":
    """The text half of a CLIP in a folder, which may hold the whole. `options` as of `load_module`."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    about = read_json(folder / "config.json")

    def build() -> CLIPTextModelWithProjection:
        own = about.get("text_config", about) | {"projection_dim": about.get("projection_dim", 512)}
        return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(own))

    return load_module(build, folder, name="model", others="text_config" in about, **options)


def scheduler_of(generator: Generator) -> dict[str, Any]:
    """How a generator is sampled, as scheduler_config.json says it."""
    sampler = generator.sampler
    return generator.scheduler | {
        "mask_token_id": generator.mask_id, "num_inference_steps": generator.steps, "guidance_scale": sampler.guidance,
        "temperature": sampler.temperature, "masking_schedule": sampler.schedule, "reveal_order": sampler.order,
        "remask_share": sampler.remask, "shared_noise": sampler.shared_noise,
        "negative_prompt": generator.negative, "micro_conds": generator.micro_conds,
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
    build: Callable[[], Network],
    folder: Path,
    *,
    name: str = "diffusion_pytorch_model",
    dtype: torch.dtype,
    device: torch.device | str,
    meta: bool = True,
    others: bool = False,
) -> Network:
    """A module with a folder's weights `name`, whole or in shards, fp16 files where there are no others, as `dtype`, in
    eval mode.

    Shapes and keys must match; with `others` the files may hold more. The weights are copies: a file may be replaced
    later. Built on the `meta` device, it costs no time and memory for random parameters, but loses its own buffers.
    """
    try:
        with torch.device("meta") if meta else nullcontext(), NoInitialisation() if meta else nullcontext():
            module = build()
    except Exception as error:  # each library has its own for numbers that make no model
        raise ValueError(f"{folder / 'config.json'} describes no such model: {one_line(error)}") from error
    state = {key: value for file in weight_files(folder, name) for key, value in read_weights(file).items()}
    own = module.state_dict()
    state = {key: value for key, value in state.items() if key in own or not (others or key.endswith("position_ids"))}
    fill(module, state, folder, dtype=dtype)
    if meta:
        count_positions(module)
    return module.to(device)


def fill(module: Network, state: dict[str, Tensor], where: Path, *, dtype: torch.dtype = torch.float32) -> Network:
    """Puts copies of a state dict's tensors, as `dtype`, into a module. ValueError where a key or a shape differs."""
    try:
        module.load_state_dict({key: value.to(dtype, copy=True) for key, value in state.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{where} is another model's, or not whole: {one_line(error)}") from error
    return module.eval()


def save_module(module: nn.Module, config: dict, folder: Path, *, dtype: torch.dtype) -> None:
    """Writes config.json and the weights to a folder of WEIGHTS."""
    from safetensors.torch import save_file

    write_json(folder / "config.json", config)
    state = {key: value.detach().to("cpu", dtype).contiguous() for key, value in module.state_dict().items()}
    save_file(state, folder / f"{WEIGHTS[folder.name]}.safetensors", metadata={"format": "pt"})


def weight_files(folder: Path, name: str) -> list[Path]:
    """The files with a part's weights, plain ones if there are any, else fp16. FileNotFoundError for none."""
    named = re.compile(rf"{name}(\.fp16)?(-\d+-of-\d+)?(\.fp16)?\.safetensors")
    files = [path for path in sorted(folder.glob("*")) if named.fullmatch(path.name)]
    if not files:
        raise FileNotFoundError(f"{folder} has no {name}.safetensors, and pickles (.bin, .pt, .ckpt) are not read")
    return [path for path in files if ".fp16" not in path.name] or files


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
