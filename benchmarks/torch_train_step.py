"""The peer of benchmarks/train_step.py: the same training step in PyTorch, tuned as is usual.

scaled_dot_product_attention, fused AdamW, TF32 for what is not half precision; on GPUs bfloat16
autocast. timm's ViT where timm imports, else the same layers; Hugging Face's BERT.
"""

import time
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportMissingImports]
from transformers import BertConfig, BertModel

try:
    from timm.models.vision_transformer import (  # pyright: ignore[reportMissingImports]
        VisionTransformer,
    )
except ImportError:
    VisionTransformer = None


class Peer:
    """The step of a model of these sizes on one batch; `remat` as ours, without gradient cache.

    batch: NumPy arrays image uint8 [B, H, W, 3], ids [B, T], mask [B, T].
    """

    def __init__(self, sizes: dict, vocabulary: int, batch: dict, remat: str, compiled: bool):
        self.cuda = torch.cuda.is_available()
        device = torch.device("cuda" if self.cuda else "cpu")
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        model = TwoTowers(sizes, vocabulary, remat).to(device)
        model.train()
        parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(
            parameters, 1e-4, (0.9, 0.98), 1e-6, weight_decay=0.2, fused=True
        )
        data = {k: torch.from_numpy(v).to(device) for k, v in batch.items()}
        self.data = data | {"ids": data["ids"].long()}
        target = torch.arange(len(batch["ids"]), device=device)
        mean = torch.tensor([0.485, 0.456, 0.406], device=device)
        deviation = torch.tensor([0.229, 0.224, 0.225], device=device)

        def loss(image, ids, mask):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.cuda):
                pixels = ((image.float() / 255 - mean) / deviation).permute(0, 3, 1, 2)
                images, texts = model(pixels, ids, mask)
            first, second = (
                functional.normalize(x.float().topk(5, dim=1)[0].mean(1), dim=1)
                for x in (images, texts)
            )
            logits = first @ second.T / model.temperature.clamp(0.001, 0.5)
            return (
                functional.cross_entropy(logits, target)
                + functional.cross_entropy(logits.T, target)
            ) / 2

        self.loss: Any = torch.compile(loss) if compiled else loss
        began = time.perf_counter()
        self.step()
        self.wait()
        self.compile_seconds = time.perf_counter() - began

    def step(self) -> None:
        """Starts one update."""
        self.optimizer.zero_grad(set_to_none=True)
        self.value = self.loss(**self.data)
        self.value.backward()
        self.optimizer.step()

    def wait(self) -> float:
        """The loss of the newest step, when it is done."""
        return float(self.value.detach())

    def facts(self) -> dict:
        """Memory (None: not known on a CPU) and time of the first step."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else None
        return {"peak_bytes": peak, "compile_seconds": self.compile_seconds}


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        out = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        x = x + self.proj(out.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class PlainViT(nn.Module):
    """ViT/16 at 224 pixels with the methods of timm's that are used here."""

    def __init__(self, width: int, depth: int, heads: int):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 197, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-6)
        self.remat = False

    def set_grad_checkpointing(self):
        self.remat = True

    def forward_features(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.remat else block(x)
        return self.norm(x)


class TwoTowers(nn.Module):
    """Both encoders with their projections: projected tokens of images and texts."""

    def __init__(self, sizes: dict, vocabulary: int, remat: str):
        super().__init__()
        width, depth, heads = sizes["width"], sizes["depth"], sizes["heads"]
        if VisionTransformer is None:
            self.image = PlainViT(width, depth, heads)
        else:
            self.image = VisionTransformer(
                embed_dim=width, depth=depth, num_heads=heads, num_classes=0
            )
        config: Any = BertConfig(
            vocab_size=vocabulary,
            hidden_size=sizes["text_width"],
            num_hidden_layers=sizes["text_depth"],
            num_attention_heads=sizes["text_width"] // 64,
            intermediate_size=4 * sizes["text_width"],
        )
        config._attn_implementation = "sdpa"
        self.text = BertModel(config, add_pooling_layer=False)
        if remat != "none":
            self.image.set_grad_checkpointing()
            self.text.gradient_checkpointing_enable({"use_reentrant": False})
        self.image_projection = nn.Linear(width, 512, bias=False)
        self.text_projection = nn.Linear(sizes["text_width"], 512, bias=False)
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def forward(self, pixels, ids, mask):
        tokens = self.image.forward_features(pixels)
        words = self.text(ids, mask).last_hidden_state
        return self.image_projection(tokens[:, 1:]), self.text_projection(words)
