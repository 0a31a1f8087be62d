"""The packages image-reward and hpsv2 as references, with what they need to run beside newer libraries.

For the parity test and its measurement alone. They come with `pip install ".[reference]"`, in an environment of their
own: see pyproject.toml.
"""

import importlib.util
import shutil
import sys
import types
from pathlib import Path

import torch

from speedrl.platform import import_torchvision

WORDS = 30522  # of BERT's vocabulary


def write_vocabulary(path: Path) -> None:
    """A vocabulary of BERT's size: its marks, letters, and words that nothing says."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    path.write_text("\n".join([*known, *(f"[unused{i}]" for i in range(WORDS - len(known)))]) + "\n")


def image_reward(vocabulary: Path):
    """The package ImageReward, importable under transformers 5, with BERT's words from a file."""
    import_torchvision()
    import transformers
    from transformers import modeling_utils, pytorch_utils

    sys.modules.setdefault("clip", types.ModuleType("clip"))  # undeclared; used by another of its scores
    sys.modules.setdefault("ImageReward.ReFL", types.ModuleType("ImageReward.ReFL"))  # its training
    for name in ("apply_chunking_to_forward", "prune_linear_layer"):  # where they were in transformers 4
        setattr(modeling_utils, name, getattr(pytorch_utils, name))
    modeling_utils.find_pruneable_heads_and_indices = None  # nothing is pruned
    package = importlib.import_module("ImageReward")
    pretrain = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
    pretrain.init_tokenizer = lambda: transformers.BertTokenizer(vocab=str(vocabulary), do_lower_case=True)
    bert = importlib.import_module("ImageReward.models.BLIP.med").BertModel
    bert.all_tied_weights_keys = {}
    bert.get_head_mask = lambda self, mask, layers, *_: [None] * layers
    bert.invert_attention_mask = lambda self, mask: (
        (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float).min
    )
    return package


def hpsv2():
    """The module hpsv2.img_score, whose wheel lacks a file that open_clip has and wants a window toolkit."""
    import_torchvision()
    import open_clip

    sys.modules.setdefault("turtle", types.ModuleType("turtle"))
    sys.modules["turtle"].forward = None
    folder = Path(importlib.util.find_spec("hpsv2").origin).parent / "src/open_clip"
    words = "bpe_simple_vocab_16e6.txt.gz"
    if not (folder / words).exists():
        shutil.copy(Path(open_clip.__file__).parent / words, folder / words)
    return importlib.import_module("hpsv2.img_score")
