"""Low-rank adapters (arXiv 2106.09685) through peft: few weights to train, and the reference policy comes for free."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speedrl.system.errors import one_line
from speedrl.system.files import write_atomically, write_json

NAME = "adapter_model.safetensors"


def add_lora(
    transformer: nn.Module, *, rank: int, alpha: float | None = None, targets: str | None = None, seed: int = 0
) -> None:
    """Freezes a transformer and puts an adapter of this rank beside each of its linear layers, in place.

    What it adds is scaled by alpha / rank, by default 1. `targets` are the last parts of the names of the layers that
    get one, like "to_q,to_k,to_v", by default all. It starts as nothing: the outputs are unchanged until it trains.
    ValueError without peft, for a rank under 1, an alpha that is not positive, and a target that no layer has.
    """
    if rank < 1:
        raise ValueError(f"`lora` must be a rank of at least 1, got {rank}")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"`lora_alpha` must be positive, got {alpha}")
    layers = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    if targets is not None:
        wanted = [target.strip() for target in targets.split(",")]
        of = {target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in wanted}
        if lacking := [target for target in wanted if not target or not of[target]]:
            kinds = sorted({name.rpartition(".")[2] for name in layers} - {"0", "2"})
            raise ValueError(f"no linear layer is named {lacking[0]!r}: `lora_targets` are out of {', '.join(kinds)}")
        layers = sorted({name for names in of.values() for name in names})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        package = peft()
        config = package.LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=layers)
        package.inject_adapter_in_model(config, transformer)


def peft() -> Any:
    """The package peft. ValueError without it."""
    from speedrl.system.platform import import_torchvision

    import_torchvision()  # peft imports transformers
    try:
        import peft
    except ImportError as error:
        raise ValueError('`lora` and adapters need the package peft: pip install -e ".[lora]" in a clone') from error
    return peft


def adapters(transformer: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every layer with an adapter, one of peft's, by name."""
    for name, module in transformer.named_modules():
        if hasattr(module, "lora_A"):
            yield name, module


@contextmanager
def without_lora(transformer: nn.Module) -> Iterator[None]:
    """Within, the transformer computes as if it had no adapter."""
    layers = [module for _, module in adapters(transformer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class WithoutLora:
    """The transformer under an adapter, where features and logits of the base are wanted: no copy of it is kept."""

    def __init__(self, transformer: Any):
        self.transformer = transformer

    def features(self, *inputs: Tensor) -> Tensor:
        with without_lora(self.transformer):
            return self.transformer.features(*inputs)

    def head(self, features: Tensor) -> Tensor:
        with without_lora(self.transformer):
            return self.transformer.head(features)

    def compile_blocks(self, *, backend: str = "inductor") -> None:
        """The blocks are the transformer's own, compiled there."""


def save_lora(transformer: nn.Module, out: Path, *, base: str, scheduler: dict) -> None:
    """Writes peft's layout to the folder `out`, and how the model is sampled beside it."""
    from safetensors.torch import save_file

    layers = dict(adapters(transformer))
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": first.r["default"],
        "lora_alpha": first.lora_alpha["default"], "bias": "none", "target_modules": sorted(layers),
    }
    weights = {
        f"base_model.model.{name}.{part}.weight": getattr(layer, part)["default"].weight.detach().cpu().contiguous()
        for name, layer in layers.items()
        for part in ("lora_A", "lora_B")
    }
    write_json(out / "adapter_config.json", config)
    write_json(out / "scheduler_config.json", scheduler)
    write_atomically(out / NAME, lambda partial: save_file(weights, partial, metadata={"format": "pt"}))


def load_lora(transformer: nn.Module, folder: Path) -> None:
    """Puts the adapter in `folder` beside a transformer's layers, by peft's own reading of its adapter_config.json:
    ranks and scales may differ from layer to layer. ValueError where it is no LoRA, and where keys or shapes differ."""
    from safetensors.torch import load_file

    package = peft()
    try:
        with warnings.catch_warnings(action="ignore"):
            config = package.LoraConfig.from_pretrained(folder)
            if not isinstance(config, package.LoraConfig):
                raise TypeError(f"its kind is {type(config).__name__}, and only LoRA is read")
            package.inject_adapter_in_model(config, transformer)
        state = load_file(folder / NAME)
        for name, layer in adapters(transformer):
            for part in ("lora_A", "lora_B"):
                weight = state.pop(f"base_model.model.{name}.{part}.weight")
                getattr(layer, part)["default"].load_state_dict({"weight": weight})
    except Exception as error:  # peft, safetensors and torch have many
        raise ValueError(f"{folder / NAME} is damaged or another model's adapter ({one_line(error)})") from error
    if state:
        raise ValueError(f"{folder / NAME} has {len(state)} weights that are not read ({min(state)})")


def merge_lora(transformer: nn.Module) -> None:
    """Adds the adapters to the weights they stand beside and takes them away, in place; all weights may train again."""
    for name, layer in list(adapters(transformer)):
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(transformer.get_submodule(parent), last, layer.get_base_layer())
    transformer.requires_grad_(True)
