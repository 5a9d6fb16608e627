"""Writes tests/goldens/photographs.npz: two photographs through the paper's evaluation, and LARS.

A second implementation in PyTorch, OpenCV and pydensecrf that shares no code with the package. It
must first repeat what the authors' code gave for two other photographs, at every pixel.

Needs what the project does not: pip install torch opencv-python-headless pydensecrf2 scikit-image
"""

import math
import zlib
from pathlib import Path

import cv2
import numpy as np
import pydensecrf.densecrf as dcrf
import skimage.data
import torch
from PIL import Image
from torch.nn import functional

FOLDER = Path(__file__).parent
PATCH, HEADS, DEPTH = 16, 3, 3
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
# 640 x 427 (SpaceX, public domain) and 600 x 400 (Rachel Michetti, CC0), width x height.
PHOTOS = ("rocket", "coffee")

state = torch.load(FOLDER / "model.pth", weights_only=True)["state_dict"]
reference = dict(np.load(FOLDER / "reference.npz"))
classes = torch.from_numpy(reference["seg_class_embedding"])


def vit(pixels: torch.Tensor) -> torch.Tensor:
    """Normalised images [B, 3, S, S] -> tokens [B, 1 + N, width] after the final norm."""
    weights = {
        name.removeprefix("image_encoder.model.model."): array for name, array in state.items()
    }

    def linear(name, x):
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, x):
        shape = x.shape[-1:]
        return functional.layer_norm(
            x, shape, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6
        )

    kernel, bias = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    x = functional.conv2d(pixels, kernel, bias, stride=PATCH)
    grid = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2)
    positions = weights["pos_embed"]
    side = math.isqrt(positions.shape[1] - 1)
    square = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    square = functional.interpolate(square, size=tuple(grid), mode="bicubic", align_corners=False)
    positions = torch.cat([positions[:, :1], square.flatten(2).transpose(1, 2)], dim=1)
    x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x], dim=1) + positions
    for i in range(DEPTH):
        block = f"blocks.{i}"
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x))
        q, k, v = qkv.reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + linear(f"{block}.attn.proj", out)
        hidden = functional.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))
        x = x + linear(f"{block}.mlp.fc2", hidden)
    return norm("norm", x)


def normalized(image: np.ndarray) -> torch.Tensor:
    """uint8 [S, S, 3] -> float32 [1, 3, S, S]."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    return (pixels - MEAN) / STD


def embed(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(pooled embedding [D] of unit length, projected patches [N, D]) of one image."""
    patches = functional.linear(vit(pixels)[0, 1:], state["image_projection.linear.weight"])
    pooled = patches.topk(5, dim=0).values.mean(dim=0)
    return pooled / (pooled.norm() + 1e-8), patches


def refined(image: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The CRF's mask, bool [S, S], of probabilities p."""
    field = dcrf.DenseCRF2D(p.shape[1], p.shape[0], 2)
    energy = -np.log(np.stack([1 - p, p]) + 1e-8)
    field.setUnaryEnergy(np.ascontiguousarray(energy.reshape(2, -1), np.float32))
    field.addPairwiseGaussian(sxy=3, compat=3)
    field.addPairwiseBilateral(sxy=40, srgb=13, rgbim=np.ascontiguousarray(image), compat=10)
    return np.array(field.inference(3)).argmax(axis=0).reshape(p.shape) > 0


def segment(photo: np.ndarray) -> dict[str, np.ndarray]:
    """The paper protocol on uint8 [H, W, 3] with the 21 classes of the reference."""
    small = np.asarray(Image.fromarray(photo).resize((288, 288), Image.Resampling.BILINEAR))
    pixels = normalized(small)
    embedding, patches = embed(pixels)
    scores = classes @ embedding
    top = scores.topk(10).values
    threshold = top.mean() + top.std()
    levels = ((pixels * STD + MEAN) * 255).type(torch.uint8)[0].permute(1, 2, 0).numpy()
    candidates = scores.topk(5).indices
    height, width = photo.shape[:2]
    weighted = np.zeros((len(classes), height, width))
    masks = np.zeros((5, 288, 288), bool)
    for place, label in enumerate(candidates.tolist()):
        if label == 0:
            continue
        if scores[label] < threshold:
            break
        grid = (functional.normalize(patches, dim=-1) @ classes[label]).reshape(1, 1, 18, 18)
        values = functional.interpolate(grid, scale_factor=PATCH, mode="nearest")[0, 0].numpy()
        p = (values - values.min()) / (values.max() - values.min())
        square = np.ones((7, 7), np.uint8)
        mask = cv2.erode(cv2.dilate(refined(levels, p).astype(np.uint8), square), square)
        masks[place] = mask
        large = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
        weighted[label] = large * float(scores[label])
    return {
        "input": small,
        "levels": levels,
        "scores": scores.numpy(),
        "threshold": threshold.numpy(),
        "candidates": candidates.numpy(),
        "masks": masks,
        "prediction": weighted.argmax(axis=0).astype(np.uint8),
    }


def prove(photo: str) -> None:
    """Stops unless `segment` repeats what the authors' code gave for a photograph."""
    found = segment(getattr(skimage.data, photo)())
    known = {key: reference[f"seg/{photo}/{key}"] for key in ("scores", "threshold", "candidates")}
    np.testing.assert_allclose(found["scores"], known["scores"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["threshold"], known["threshold"], rtol=1e-5)
    drawn = (known["candidates"] > 0) & (known["scores"][known["candidates"]] >= found["threshold"])
    shape = reference[f"seg/{photo}/mask_shape"]
    bits = np.unpackbits(reference[f"seg/{photo}/crf_and_closed"])[: np.prod(shape)]
    closed = bits.reshape(shape)[:, 1] > 0
    for key, expected in (
        ("input", reference[f"seg/{photo}/input_uint8"]),
        ("levels", reference[f"seg/{photo}/denormalised_uint8"]),
        ("candidates", known["candidates"]),
        ("masks", closed & drawn[:, None, None]),
        ("prediction", reference[f"seg/{photo}/prediction"]),
    ):
        np.testing.assert_array_equal(found[key], expected, err_msg=f"{photo}: {key}")


def retrieve(photo: np.ndarray, size: int = 324, side: int = 288) -> dict[str, np.ndarray]:
    """What retrieval sees of uint8 [H, W, 3], squashed or not, and its embedding."""
    found = {}
    height, width = photo.shape[:2]
    short = min(height, width)
    # torchvision's Resize((size, size)) and Resize(size).
    keep = tuple(size if x == short else int(size * x / short) for x in (width, height))
    for name, (columns, rows) in (("squash", (size, size)), ("keep", keep)):
        image = Image.fromarray(photo).resize((columns, rows), Image.Resampling.BILINEAR)
        # Its CenterCrop.
        left, top = round((columns - side) / 2.0), round((rows - side) / 2.0)
        crop = np.asarray(image)[top : top + side, left : left + side]
        found |= {f"{name}/crop": crop, f"{name}/embedding": embed(normalized(crop))[0].numpy()}
    return found


def lars(rates: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(losses, final kernel [C, D], final bias [C]) of a classifier under learning rates."""
    x, y = (torch.from_numpy(reference[f"lars/{name}"]) for name in ("x", "y"))
    kernel = torch.from_numpy(reference["lars/w0"].copy()).requires_grad_()
    bias = torch.zeros(len(kernel), requires_grad=True)
    momenta = [torch.zeros_like(kernel), torch.zeros_like(bias)]
    losses = []
    for rate in rates:
        loss = functional.cross_entropy(functional.linear(x, kernel, bias), y)
        gradients = torch.autograd.grad(loss, (kernel, bias))
        with torch.no_grad():
            for parameter, gradient, momentum in zip(
                (kernel, bias), gradients, momenta, strict=True
            ):
                length, slope = parameter.norm(), gradient.norm()
                ratio = 0.001 * length / (slope + 1e-8) if length > 0 and slope > 0 else 1.0
                momentum.mul_(0.9).add_(rate * ratio * gradient)
                parameter.sub_(momentum)
        losses.append(loss.item())
    return np.array(losses), kernel.detach().numpy(), bias.detach().numpy()


def warmup_and_cosine(peak: float, steps: int, warmup: int) -> list[float]:
    """Learning rates from 0 up to `peak` and down to 0."""
    down = [0.5 * (1 + math.cos(math.pi * i / (steps - warmup))) for i in range(steps - warmup)]
    return [peak * factor for factor in [*(i / warmup for i in range(warmup)), *down]]


@torch.no_grad()
def photographs() -> dict[str, np.ndarray]:
    stored = {}
    for photo in PHOTOS:
        path = FOLDER / f"{photo}.jpg"
        Image.fromarray(getattr(skimage.data, photo)()).save(path, quality=85)
        pixels = np.asarray(Image.open(path))
        found = segment(pixels)
        found |= {f"retrieval/{key}": value for key, value in retrieve(pixels).items()}
        found["pixels"] = pixels
        for key, value in found.items():
            if value.dtype == bool:
                stored[f"{photo}/{key}"] = np.packbits(value)
            elif value.ndim == 3:
                # Of an image every sixteenth pixel, and a checksum over all of them.
                stored[f"{photo}/{key}"] = value[::16, ::16]
                stored[f"{photo}/{key}/checksum"] = np.uint32(zlib.crc32(value.tobytes()))
            else:
                stored[f"{photo}/{key}"] = value
    return stored


def main() -> None:
    for photo in ("astronaut", "chelsea"):
        with torch.no_grad():
            prove(photo)
    losses, kernel, bias = lars([0.1] * 6)
    for found, key in ((losses, "losses"), (kernel, "w6"), (bias, "b6")):
        np.testing.assert_allclose(found, reference[f"lars/{key}"], rtol=1e-5, atol=1e-7)
    losses, kernel, bias = lars(warmup_and_cosine(peak=20.0, steps=40, warmup=8))
    scheduled = {"losses": losses, "kernel": kernel, "bias": bias}
    stored = photographs() | {f"lars/{key}": value for key, value in scheduled.items()}
    np.savez_compressed(FOLDER / "photographs.npz", **stored)


if __name__ == "__main__":
    main()
