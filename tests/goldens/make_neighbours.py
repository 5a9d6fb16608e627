"""Writes tests/goldens/neighbours: small random encoders of other code bases and their outputs.

Needs what the project does not: pip install torch torchvision timm transformers open_clip_torch
"""

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTForImageClassification,
)

FOLDER = Path(__file__).parent / "neighbours"
SIZE, PATCH, WIDTH, DEPTH, HEADS, MLP = 16, 8, 24, 2, 3, 48
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "image_size": SIZE,
    "patch_size": PATCH,
}


def randomized(model):
    """Every parameter drawn anew: initial values hide mistakes behind zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise + (parameter == 1))
    return model.eval()


def write_json(folder: Path, name: str, content: dict) -> None:
    (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def timm_model(name: str, suffix: str, card: dict, **options) -> VisionTransformer:
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH}
    sizes |= {"num_heads": HEADS, "mlp_ratio": MLP / WIDTH, "num_classes": 3}
    model = VisionTransformer(**(sizes | options))
    randomized(model)
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    if suffix == "safetensors":
        save_file(model.state_dict(), folder / "model.safetensors")
    else:
        state = {f"module.{key}": value for key, value in model.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state}, folder / "pytorch_model.bin")
    write_json(folder, "config.json", {"model_args": {"num_heads": HEADS}, **card})
    return model


def flax_names(prefix: str, attention: int, norm2: int, mlp: int) -> dict[str, np.ndarray]:
    """A ViT as big_vision (0, 1, 0) or AugReg (1, 2, 3) store it."""
    rng = np.random.default_rng(1)

    def draw(*shape, center=0.0):
        return (center + 0.2 * rng.normal(size=shape)).astype(np.float32)

    def norm(name):
        return {f"{name}/scale": draw(WIDTH, center=1.0), f"{name}/bias": draw(WIDTH)}

    def dense(name, rows, columns):
        return {f"{name}/kernel": draw(rows, columns), f"{name}/bias": draw(columns)}

    arrays = {
        "cls": draw(1, 1, WIDTH),
        "embedding/kernel": draw(PATCH, PATCH, 3, WIDTH),
        "embedding/bias": draw(WIDTH),
        **norm("Transformer/encoder_norm"),
        **dense("head", WIDTH, 5),
    }
    inside = "Transformer/posembed_input/" if attention else ""
    arrays[f"{inside}pos_embedding"] = draw(1, 1 + (SIZE // PATCH) ** 2, WIDTH)
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        heads = f"{block}/MultiHeadDotProductAttention_{attention}"
        arrays |= norm(f"{block}/LayerNorm_0") | norm(f"{block}/LayerNorm_{norm2}")
        for part in ("query", "key", "value"):
            arrays[f"{heads}/{part}/kernel"] = draw(WIDTH, HEADS, WIDTH // HEADS)
            arrays[f"{heads}/{part}/bias"] = draw(HEADS, WIDTH // HEADS)
        arrays[f"{heads}/out/kernel"] = draw(HEADS, WIDTH // HEADS, WIDTH)
        arrays[f"{heads}/out/bias"] = draw(WIDTH)
        arrays |= dense(f"{block}/MlpBlock_{mlp}/Dense_0", WIDTH, MLP)
        arrays |= dense(f"{block}/MlpBlock_{mlp}/Dense_1", MLP, WIDTH)
    return {prefix + name: array for name, array in arrays.items()}


def flax_model(name: str, *layout) -> VisionTransformer:
    """timm's reading of such a file is the reference."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "model.npz", **flax_names(*layout))
    model = VisionTransformer(
        img_size=SIZE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=MLP / WIDTH,
        num_classes=5,
    )
    model.load_pretrained(str(folder / "model.npz"))
    return model.eval()


@torch.no_grad()
def main() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
    ids = rng.integers(1, 60, (2, 7)).astype(np.int32)
    mask = np.arange(7) < np.array([[7], [4]])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    outputs = {"images": images, "ids": ids, "mask": mask}

    inception = {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    plain = timm_model("timm", "safetensors", {"architecture": "vit_tiny", **inception})
    outputs["timm"] = plain.forward_features(pixels)
    options = {"init_values": 1e-3, "qkv_bias": False, "num_classes": 0}
    scaled = timm_model("timm_layerscale", "bin", {"architecture": "vit_dino"}, **options)
    outputs["timm_layerscale"] = scaled.forward_features(pixels)
    quick = {
        "pre_norm": True,
        "norm_layer": lambda width, **_: torch.nn.LayerNorm(width, eps=1e-5),
        "act_layer": open_clip.transformer.QuickGELU,
    }
    clip = timm_model("timm_clip", "safetensors", {"architecture": "vit_clip_quickgelu"}, **quick)
    outputs["timm_clip"] = clip.forward_features(pixels)

    vit = randomized(ViTForImageClassification(ViTConfig(**SIZES, layer_norm_eps=1e-6)))
    vit.save_pretrained(FOLDER / "hf_vit")
    outputs["hf_vit"] = vit.vit(pixels).last_hidden_state

    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    text |= {"num_attention_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
    both = randomized(CLIPModel(CLIPConfig(vision_config=SIZES, text_config=text)))
    both.save_pretrained(FOLDER / "hf_clip")
    means = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    write_json(FOLDER / "hf_clip", "preprocessor_config.json", means)
    vision = both.vision_model
    # transformers normalises the CLS token only; the method uses all tokens.
    outputs["hf_clip"] = vision.post_layernorm(vision(pixels).last_hidden_state)

    tower = {"layers": DEPTH, "width": WIDTH, "patch_size": PATCH, "image_size": SIZE}
    tower |= {"head_width": WIDTH // HEADS, "mlp_ratio": MLP / WIDTH}
    words = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1}
    laion = randomized(open_clip.CLIP(embed_dim=8, vision_cfg=tower, text_cfg=words))
    (FOLDER / "open_clip").mkdir(exist_ok=True)
    save_file(laion.state_dict(), FOLDER / "open_clip" / "open_clip_model.safetensors")
    model_cfg = {"embed_dim": 8, "vision_cfg": tower, "text_cfg": words}
    write_json(FOLDER / "open_clip", "open_clip_config.json", {"model_cfg": model_cfg})
    visual = laion.visual
    x = visual._embeds(pixels)
    outputs["open_clip"] = visual.ln_post(visual.transformer(x))

    outputs["augreg"] = flax_model("augreg", "", 1, 2, 3).forward_features(pixels)
    outputs["big_vision"] = flax_model("big_vision", "params/", 0, 1, 0).forward_features(pixels)

    sizes = {key: SIZES[key] for key in list(SIZES)[:4]} | {"vocab_size": 60}
    options = {"hidden_act": "gelu_new", "layer_norm_eps": 1e-6, "max_position_embeddings": 16}
    bert = randomized(BertForMaskedLM(BertConfig(**sizes, **options)))
    bert.save_pretrained(FOLDER / "hf_bert")
    encoded = bert.bert(torch.from_numpy(ids).long(), torch.from_numpy(mask).long())
    outputs["hf_bert"] = encoded.last_hidden_state

    np.savez(FOLDER / "outputs.npz", **{key: np.asarray(x) for key, x in outputs.items()})


if __name__ == "__main__":
    main()
