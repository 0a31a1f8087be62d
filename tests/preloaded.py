"""What the processes of tests/ranks.py share: the slow imports, once."""

from speedrl.system.platform import import_torchvision

import_torchvision()

import pytest  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401
import torch.distributed.checkpoint  # noqa: E402, F401
import torch.distributed.fsdp  # noqa: E402, F401
from diffusers import VQModel  # noqa: E402, F401
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: E402, F401

import speedrl.cli  # noqa: E402, F401
import speedrl.training  # noqa: E402, F401
