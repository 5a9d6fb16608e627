"""The whole zero-shot evaluation, JPEG to mean IoU: this package against a loop in PyTorch.

    pip install -e ".[bench]"
    python benchmarks/segmentation.py [--refine crf|none] [--root VOCdevkit/VOC2012] [--images 100]

The peer is the protocol as one writes it in PyTorch, one image at a time: PIL, a plain ViT, topk,
pydensecrf per drawn class, OpenCV; float32, default threads. Both sides take turns on chunks of the
same images, after an untimed first one, with the same weights and class embeddings (computed before
the clock starts). The run fails if their scores differ by 1e-3. The last line is one JSON object.

Without --root it generates images, without --checkpoint (a WORKDIR) it takes a random ViT-S/16 and
random class embeddings. Mean IoU means nothing then, but the number of drawn classes (printed; it
sets the cost of a CRF) stays realistic, because the threshold is relative to an image's scores.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from peers import require
from PIL import Image

from simseg_jax.config import RunConfig, model_config
from simseg_jax.data import shapes
from simseg_jax.data.text import TextEncoder, load_tokenizer
from simseg_jax.evaluators.metrics import class_iou, confusion_matrix, mean_iou
from simseg_jax.evaluators.segmentation import SegmentationEvaluator
from simseg_jax.models.bert import BertConfig
from simseg_jax.models.simseg import SimSegConfig, init_params, l2_normalize, make_model
from simseg_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD
from simseg_jax.runtime.command_line import accepted
from simseg_jax.runtime.errors import report_user_errors
from simseg_jax.runtime.ranges import whole
from simseg_jax.runtime.sharding import make_mesh
from simseg_jax.weights.load import load_model
from simseg_jax.zeroshot.model import Model
from simseg_jax.zeroshot.settings import SegmentationConfig

with contextlib.suppress(ImportError):  # Said by `require`, once the options are read.
    import torch  # pyright: ignore[reportMissingImports]
    import torch.nn.functional as F  # noqa: N812  # pyright: ignore[reportMissingImports]


def ours(evaluator, params, indices, confusion) -> list[np.ndarray]:
    """Scores [C] of the images, evaluated by this package; adds to `confusion`."""
    records = {record.name: record for record in evaluator.records(params, indices)}
    confusion += evaluator.confusion(list(records.values()))
    return [records[evaluator.images[index][0]].scores[0] for index in indices]


class Peer:
    """The protocol in PyTorch, image by image; `seconds` sums up the time of every stage."""

    def __init__(self, params, config: SimSegConfig, class_embeddings, settings):
        import cv2  # pyright: ignore[reportMissingImports]

        self.cv2, self.settings, self.heads = cv2, settings, config.image.heads
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        patch, side = config.image.patch_size, config.image.image_size // config.image.patch_size
        self.grid = (settings.resolution // patch,) * 2
        self.vit = self.tensors(params["image_encoder"])
        self.projection = self.tensors(params["image_projection"])
        self.class_embeddings = self.tensors(class_embeddings)  # [D, C]
        self.mean, self.std = (
            self.tensors(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD)
        )
        embed, positions = self.vit["patch_embed"]["proj"], self.vit["pos_embed"]
        kernel = embed["weight"].view(-1, patch, patch, 3).permute(0, 3, 1, 2)
        embed.update(weight=kernel.contiguous(), stride=patch)
        grid = positions[:, 1:].view(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, self.grid, mode="bicubic", align_corners=False).flatten(2)
        self.positions = torch.cat([positions[:, :1], grid.mT], dim=1)
        self.seconds, self.drawn = {}, 0

    def tensors(self, tree) -> Any:
        """Our parameters as PyTorch's: kernels and scales are called weight, matrices [out, in]."""
        if isinstance(tree, dict):
            name = {"kernel": "weight", "scale": "weight"}
            return {name.get(key, key): self.tensors(value) for key, value in tree.items()}
        x = torch.from_numpy(np.array(tree, np.float32)).to(self.device)
        return x.T.contiguous() if x.ndim == 2 else x

    def lap(self, stage: str) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        began, self.began = self.began, time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0) + self.began - began

    def patches(self, image: torch.Tensor) -> torch.Tensor:
        """Normalised image [1, 3, S, S] -> projected patch tokens [1, N, D]."""
        norm = functools.partial(F.layer_norm, normalized_shape=self.positions.shape[2:], eps=1e-6)
        x = F.conv2d(image, **self.vit["patch_embed"]["proj"]).flatten(2).mT
        x = torch.cat([self.vit["cls_token"], x], dim=1) + self.positions
        for i in range(len(self.vit["blocks"])):
            block = self.vit["blocks"][str(i)]
            qkv = F.linear(norm(x, **block["norm1"]), **block["attn"]["qkv"])
            q, k, v = qkv.view(1, x.shape[1], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
            x = x + F.linear(attended, **block["attn"]["proj"])
            hidden = F.gelu(F.linear(norm(x, **block["norm2"]), **block["mlp"]["fc1"]))
            x = x + F.linear(hidden, **block["mlp"]["fc2"])
        return F.linear(norm(x, **self.vit["norm"])[:, 1:], **self.projection)

    def segment(self, name: str, confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(Prediction at the size of the truth, scores) of one image; adds to `confusion`."""
        self.began, settings, size = time.perf_counter(), self.settings, self.settings.resolution
        photo = Image.open(f"{settings.root}/JPEGImages/{name}.jpg").convert("RGB")
        pixels = np.array(photo.resize((size, size), Image.Resampling.BILINEAR))
        truth = np.array(Image.open(f"{settings.root}/SegmentationClass/{name}.png"))
        self.lap("decode and resize")
        image = torch.from_numpy(pixels).to(self.device).permute(2, 0, 1)[None].float() / 255
        image = (image - self.mean) / self.std
        patches = self.patches(image)
        self.lap("forward")
        embedding = F.normalize(patches.topk(settings.m_image, dim=1).values.mean(dim=1))
        scores = (embedding @ self.class_embeddings)[0].cpu()
        top = scores.topk(min(settings.class_scores, len(scores))).values
        threshold = top.mean() + settings.sigma_weight * top.std()
        best = scores.topk(min(settings.candidates, len(scores))).indices.tolist()
        drawn = [label for label in best if label != 0 and scores[label] >= threshold]
        maps, patches = [], F.normalize(patches, dim=-1)
        for label in drawn:
            cosine = (patches @ self.class_embeddings[:, label]).view(1, 1, *self.grid)
            p = F.interpolate(cosine, (size, size), mode="nearest")[0, 0]
            maps.append(((p - p.min()) / (p.max() - p.min()).clamp_min(1e-30)).cpu().numpy())
        self.lap("scores and threshold")
        if settings.refine == "none":
            masks = [p > 0.5 for p in maps]
        else:
            levels = (image * self.std + self.mean)[0].permute(1, 2, 0).cpu().numpy() * 255
            masks = [dense_crf(levels.astype(np.uint8, order="C"), p) for p in maps]
        self.lap("refinement")
        square = np.ones((settings.closing, settings.closing), np.uint8)
        weighted = [np.zeros(truth.shape, np.float32)]
        for label, mask in zip(drawn, masks, strict=True):
            mask = self.cv2.erode(self.cv2.dilate(mask.astype(np.uint8), square), square)
            mask = self.cv2.resize(mask, truth.shape[::-1], interpolation=self.cv2.INTER_NEAREST)
            weighted.append(mask * scores[label].item())
        prediction = np.array([0, *drawn])[np.argmax(weighted, axis=0)]
        self.lap("closing and resize")
        confusion += confusion_matrix(prediction, truth, len(confusion))  # One np.bincount.
        self.lap("confusion")
        self.drawn += len(drawn)
        return prediction, scores.numpy()


def dense_crf(photo: np.ndarray, p: np.ndarray) -> np.ndarray:
    """pydensecrf's two-label mask [S, S] of probabilities p on a uint8 photograph [S, S, 3]."""
    import pydensecrf.densecrf  # pyright: ignore[reportMissingImports]

    unary = -np.log(np.stack([1 - p, p]) + np.float32(1e-8)).reshape(2, -1)
    crf = pydensecrf.densecrf.DenseCRF2D(p.shape[1], p.shape[0], 2)
    crf.setUnaryEnergy(np.ascontiguousarray(unary, np.float32))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=40, srgb=13, rgbim=photo, compat=10)
    return np.argmax(crf.inference(3), axis=0).reshape(p.shape)


def generate(root: Path, count: int) -> str:
    """Writes generated scenes as a VOC folder of noisy 500x375 JPEGs and masks; returns it."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        scene, mask, _ = shapes.scene(i, "test")
        photo = np.asarray(Image.fromarray(scene).resize((500, 375), Image.Resampling.BICUBIC))
        photo = photo + np.random.default_rng(i).normal(0, 8, photo.shape)
        Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(root / f"JPEGImages/{i}.jpg")
        mask = Image.fromarray(mask).resize((500, 375), Image.Resampling.NEAREST)
        mask.save(root / f"SegmentationClass/{i}.png")
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(map(str, range(count))))
    return str(root)


def compare(args) -> dict:
    """Times both sides in turn; the figures of the run."""
    if args.checkpoint:
        model = load_model(args.checkpoint)
        params, encoder, config = model.params, model.encoder, model.config
    else:
        encoder = TextEncoder(load_tokenizer("shapes"), 25)
        config = RunConfig(
            model=SimSegConfig(text=BertConfig(width=64, depth=1, heads=1, mlp_width=64))
        )
        params = init_params(model_config(config, encoder.vocab_size), jax.random.key(0))
    architecture = model_config(config, encoder.vocab_size)
    settings = SegmentationConfig(root=args.root, refine=args.refine, batch_size=args.batch)
    model = Model(architecture, make_model(architecture), encoder, make_mesh())
    evaluator = SegmentationEvaluator(model, settings)
    count, classes = min(args.images, evaluator.count), len(evaluator.class_names)
    names = [evaluator.source[i]["name"] for i in range(count)]  # Reads every file once.
    vectors = jax.random.normal(jax.random.key(1), (classes, architecture.embed_dim))
    embeddings = {settings.m_text: np.asarray(l2_normalize(vectors))}
    if args.checkpoint:
        embeddings = evaluator.engine.embed(params, evaluator.prompts)
    evaluator.engine.embed = lambda params, prompts: embeddings
    peer = Peer(params, architecture, embeddings[settings.m_text], settings)
    segment = torch.inference_mode()(peer.segment)
    sides = {
        "pytorch": lambda chunk, sums: [segment(names[i], sums) for i in chunk],
        "ours": lambda chunk, sums: ours(evaluator, params, chunk, sums),
    }
    confusion = {side: np.zeros((classes, classes), np.int64) for side in sides}
    for side, run in sides.items():
        run(range(min(args.chunk, count)), confusion[side].copy())
    peer.seconds, peer.drawn = {}, 0
    seconds, equal, pixels, difference = {side: [] for side in sides}, 0, 0, 0.0
    for start in range(0, count, args.chunk):
        chunk, results = range(start, min(start + args.chunk, count)), {}
        for side, run in sides.items():
            began = time.perf_counter()
            results[side] = run(chunk, confusion[side])
            seconds[side].append(time.perf_counter() - began)
        labels = [item[1][0] for item in evaluator.predictions(params, chunk)]  # Not in records.
        for (mask, scores), others, other in zip(*results.values(), labels, strict=True):
            difference = max(difference, float(np.abs(scores - others).max()))
            equal, pixels = equal + int((mask == other).sum()), pixels + mask.size
        if difference > 1e-3:
            raise SystemExit(f"Not the same computation: scores differ by {difference:.1e}.")
    total = {side: sum(seconds[side]) for side in sides}
    return {
        "benchmark": "segmentation",
        "refine": args.refine,
        "images": count,
        "images_per_second": {side: count / total[side] for side in sides},
        "ratio": total["pytorch"] / total["ours"],
        "ratio_of_chunks": [a / b for a, b in zip(*seconds.values(), strict=True)],
        "pytorch_stages": {name: s / total["pytorch"] for name, s in peer.seconds.items()},
        "drawn_classes_per_image": peer.drawn / count,
        "miou": {side: mean_iou(class_iou(confusion[side])) for side in sides},
        "equal_pixels": equal / pixels,
        "score_difference": difference,
        "hardware": [jax.devices()[0].device_kind, f"{torch.get_num_threads()} CPU threads"],
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
    }


@report_user_errors
def main() -> None:
    """Prints the figures, the last line as JSON."""
    parser = argparse.ArgumentParser(description="Segmentation evaluation: ours against PyTorch.")
    parser.add_argument("--root", help="the folder VOC2012; default: generated images")
    parser.add_argument("--checkpoint", help="WORKDIR of a run; default: random weights")
    parser.add_argument("--refine", choices=("crf", "none"), default="crf")
    parser.add_argument(
        "--images", type=accepted(whole(1)), default=80, help="the first so many images"
    )
    parser.add_argument("--chunk", type=accepted(whole(1)), default=40, help="images per turn")
    parser.add_argument("--batch", type=accepted(whole(1)), default=8, help="our batch size")
    args = parser.parse_args()
    require("torch", "cv2", *(["pydensecrf"] if args.refine == "crf" else []))
    jax.config.update("jax_default_matmul_precision", "highest")  # Float32 on a GPU too.
    with tempfile.TemporaryDirectory() as folder:
        args.root = args.root or generate(Path(folder), args.images)
        figures = compare(args)
    for key, value in figures.items():
        print(f"{key:26s}{value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
