"""The convert command on the authors' miniature checkpoint: there, back, and into programs."""

import json
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import GOLDENS
from PIL import Image
from support import assert_close, assert_trees_equal, hub_environment, message, run

from simseg_jax import convert
from simseg_jax.masks.postprocess import resize_nearest
from simseg_jax.runtime.errors import UserError
from simseg_jax.weights.load import load_model
from simseg_jax.weights.torch_file import load_tensors
from simseg_jax.zeroshot.classifier import Prompts, class_embedder
from simseg_jax.zeroshot.paper import PaperProtocol

MODEL = GOLDENS / "model.pth"
PHOTOS = ("astronaut", "chelsea")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """As many tokens as the miniature has rows."""
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(115))]
    path.write_text("\n".join(tokens) + "\n")
    return path


@pytest.fixture(scope="module")
def orbax(tmp_path_factory, vocabulary):
    """The miniature as a model folder."""
    folder = tmp_path_factory.mktemp("converted") / "orbax"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert", *golden_arguments(vocabulary, folder)])
        convert.main()
    return folder


def golden_arguments(vocabulary, *destination):
    heads = ("--image_heads=3", "--text_heads=2")
    return [str(MODEL), *map(str, destination), f"--vocab={vocabulary}", *heads]


@pytest.fixture(scope="module")
def class_embeddings(orbax, golden):
    model = load_model(orbax)
    ids, mask = (golden[f"seg_class_{name}"] for name in ("ids", "mask"))
    classes = np.repeat(np.arange(len(ids)), ids.shape[1])
    prompts = Prompts(ids.reshape(-1, 25).astype(np.int32), mask.reshape(-1, 25), classes)
    return class_embedder(model)(model.params, prompts, 1)


def test_predictions_of_the_converted_checkpoint_are_the_references(
    orbax, golden, golden_model, class_embeddings
):
    model = load_model(orbax)
    assert_trees_equal(model.params, golden_model[2])
    assert_close(class_embeddings, golden["seg_class_embedding"])
    # The folder alone decides the protocol.
    (settings,) = model.config.evals.seg.values()
    protocol = PaperProtocol(model, [settings])
    images = np.stack([golden[f"seg/{photo}/input_uint8"] for photo in PHOTOS] * 4)
    with jax.set_mesh(model.mesh):
        started = protocol.start(model.params, {1: class_embeddings}, {"image": images})
        (masks,), (response,) = protocol.finish(started)
    for i, photo in enumerate(PHOTOS):
        assert_close(response.scores[i], golden[f"seg/{photo}/scores"])
        expected = golden[f"seg/{photo}/prediction"]
        np.testing.assert_array_equal(resize_nearest(masks[i], *expected.shape), expected)


@pytest.mark.parametrize("between", ["orbax", "safetensors"])
def test_back_to_pth_is_equal_bit_for_bit(
    orbax, vocabulary, tmp_path, monkeypatch, capsys, between
):
    source = orbax
    if between == "safetensors":
        source = tmp_path / "safetensors"
        run(monkeypatch, capsys, convert, orbax, source, "--to=safetensors")
        assert_trees_equal(load_model(source).params, load_model(orbax).params)
    target = tmp_path / "back.pth"
    out = run(monkeypatch, capsys, convert, source, target, "--to=pth")
    assert str(target) in out.splitlines()[-1]
    before, after = (load_tensors(path)["state_dict"] for path in (MODEL, target))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        np.testing.assert_array_equal(after[name], tensor)
    # What is written beside the tensors spares the options of heads.
    out = run(monkeypatch, capsys, convert, target)
    assert "width=48, depth=3, heads=3" in out
    torch = pytest.importorskip("torch", reason="PyTorch reads the file: pip install torch")
    loaded = torch.load(target, weights_only=True)["state_dict"]
    assert {name: tuple(x.shape) for name, x in loaded.items()} == {
        name: x.shape for name, x in before.items()
    }


@pytest.mark.slow
def test_half_precision_halves_the_folder(orbax, tmp_path, monkeypatch, capsys):
    for kind in ("orbax", "safetensors"):
        folder = tmp_path / kind
        run(monkeypatch, capsys, convert, orbax, folder, f"--to={kind}", "--dtype=bfloat16")
        model, whole = load_model(folder), load_model(orbax)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"float32"}
        # Eight bits of mantissa; the temperature is kept whole.
        jax.tree.map(lambda a, b: assert_close(a, b, 2**-8), model.params, whole.params)
        assert model.params["temperature"] == whole.params["temperature"]
    size = (folder / "model.safetensors").stat().st_size
    assert 0.5 < size / (2 * sum(x.size for x in jax.tree.leaves(model.params))) < 1.2


def test_a_converted_model_says_where_it_came_from(orbax):
    manifest = json.loads((orbax / "manifest.json").read_text())
    assert manifest["origin"]["format"] == "authors' checkpoint"
    assert manifest["origin"]["meta"] == {"epoch": 1, "step": 2, "inner_step": 0}
    (checksum,) = manifest["origin"]["files"].values()
    assert checksum in (orbax / "README.md").read_text()
    assert "heads" in (orbax / "README.md").read_text()


PROGRAM_RUN = """
import sys
sys.modules["simseg_jax"] = None  # An import would fail.
{card}
given = np.load(sys.argv[1])
masks, scores, thresholds = segment(given["images"], given["embeddings"])
np.savez(sys.argv[2], masks=masks, scores=scores, thresholds=thresholds)
for name, arguments in (("image_encoder", ["images"]), ("text_encoder", ["ids", "mask"])):
    with open(name + ".stablehlo", "rb") as file:
        program = export.deserialize(file.read())
    assert program.platforms == ("cpu", "cuda", "tpu")
    out = program.call(*(given[argument] for argument in arguments))
    np.save(name + ".npy", out[0] if isinstance(out, tuple) else out)
assert not any(name.startswith(("simseg_jax.", "flax")) for name in sys.modules)
"""


@pytest.mark.slow
def test_exported_programs_in_a_process_with_only_jax(
    orbax, golden, class_embeddings, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "programs"
    words = ",".join(f"word{i}" for i in range(12))
    run(monkeypatch, capsys, convert, orbax, folder, "--to=stablehlo", f"--words={words}")
    # What the card says is what runs.
    card = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]
    images = np.stack([golden[f"seg/{photo}/input_uint8"] for photo in PHOTOS])
    Image.fromarray(images[0]).save(folder / "photo.jpg")
    ids, mask = golden["input_ids"].astype(np.int32), golden["attention_mask"] > 0
    inputs, outputs = tmp_path / "inputs.npz", tmp_path / "outputs.npz"
    np.savez(inputs, images=images, embeddings=class_embeddings, ids=ids, mask=mask)
    script = PROGRAM_RUN.format(card=card)
    command = [sys.executable, "-c", script, str(inputs), str(outputs)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = np.load(outputs)
    for i, photo in enumerate(PHOTOS):
        assert_close(found["scores"][i], golden[f"seg/{photo}/scores"])
        expected = golden[f"seg/{photo}/prediction"]
        # With the dense CRF, another number of images than the program was written for.
        predicted = resize_nearest(found["masks"][i], *expected.shape)
        np.testing.assert_array_equal(predicted, expected)
    assert_close(np.load(folder / "text_encoder.npy"), golden["eval_text_embedding_m1"])
    assert np.load(folder / "image_encoder.npy").shape == (2, 24)
    with pytest.raises(UserError, match="exported programs, not parameters"):
        load_model(folder)


def test_descriptions(monkeypatch, capsys, orbax):
    for source, facts in (
        (orbax, ("width=48, depth=3, heads=3", "authors' checkpoint")),
        (GOLDENS / "neighbours" / "timm", ("timm ViT", "mlp_width=48", "--config.init.image=")),
        (GOLDENS / "neighbours" / "hf_bert", ("vocab_size=60", "--config.init.text=")),
    ):
        out = run(monkeypatch, capsys, convert, source)
        assert all(fact in out for fact in facts), out
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, convert, "--help")
    assert "examples:" in capsys.readouterr().out


def test_mistakes_get_one_sentence_and_write_nothing(
    monkeypatch, capsys, orbax, vocabulary, tmp_path
):
    def error(*arguments):
        return message(monkeypatch, capsys, convert, *arguments)

    bad = tmp_path / "bad.pth"
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("bad/data.pkl", pickle.dumps({"state_dict": exec}))
    destination = tmp_path / "out"
    assert "asks to run 'builtins.exec', which is refused" in error(bad, destination)
    assert "No weights at" in error(tmp_path / "nothing", destination)
    timm = GOLDENS / "neighbours" / "timm"
    assert "but timm ViT: start a run from an encoder" in error(timm, destination)
    several = error(MODEL, destination, f"--vocab={vocabulary}", "--to=stablehlo", "--words=a,a")
    assert "The same word is given twice" in several
    known = f"--words={','.join(f'word{i}' for i in range(12))}"
    programs = error(orbax, destination, "--to=stablehlo", known, "--refine=pydensecrf")
    assert "refine=crf" in programs or "paper protocol in JAX" in programs
    other = error(orbax, destination, "--to=stablehlo", known, "--platforms=cpu,abacus")
    assert "Platforms are cpu, cuda, tpu, not abacus" in other
    assert "leave --step out" in error(orbax, destination, "--step=3")
    assert not destination.exists()
    assert not list(tmp_path.glob("*.partial"))
    assert f"{orbax} exists" in error(MODEL, orbax)
    file = tmp_path / "file.pth"
    file.write_text("precious")
    assert f"{file} exists" in error(orbax, file, "--to=pth")
    assert file.read_text() == "precious"


def test_damage_is_noticed_before_use(monkeypatch, capsys, orbax, tmp_path):
    folder = tmp_path / "copy"
    run(monkeypatch, capsys, convert, orbax, folder, "--to=safetensors")
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"1 of \d+ files .* damaged \(model\.safetensors\)"):
        load_model(folder)
    file.unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        load_model(folder)
    (folder / "manifest.json").write_text('{"format": "simseg_jax 9"}')
    with pytest.raises(UserError, match="install the version that wrote it"):
        load_model(folder)


def test_safetensors_alone_know_their_architecture(monkeypatch, capsys, orbax, tmp_path):
    folder = tmp_path / "folder"
    run(monkeypatch, capsys, convert, orbax, folder, "--to=safetensors")
    alone = shutil.copy(folder / "model.safetensors", tmp_path / "alone.safetensors")
    out = run(monkeypatch, capsys, convert, alone)
    # Three heads of 16 channels and two: by their width alone it would be one of 64 each.
    assert "width=48, depth=3, heads=3" in out
    assert "width=32, depth=2, heads=2" in out
    assert "Taken: 82 tensors; ignored: none." in out


def test_a_manifest_lists_what_is_read(orbax, tmp_path):
    folder = shutil.copytree(orbax, tmp_path / "copy")
    whole = json.loads((folder / "manifest.json").read_text())
    params = next(name for name in whole["sha256"] if name.startswith("params/"))
    fewer = {k: v for k, v in whole["sha256"].items() if k != params}
    for change, expected in (
        ({"sha256": {}}, "lists no files"),
        ({"sha256": None}, "lists no files"),
        ({"origin": None}, "lists no files or no origin"),
        ({"sha256": fewer}, f"holds files that manifest.json does not list .{params}"),
        (
            {"sha256": whole["sha256"] | {"/proc/kcore": "0"}},
            "leads out of its folder: /proc/kcore",
        ),
        ({"sha256": whole["sha256"] | {"a/../../b": "0"}}, r"leads out .*: a/\.\./\.\./b"),
        ({"weights": 3}, "exported programs, not parameters"),
        ({"origin": {"step": "abc"}}, "says step='abc'"),
    ):
        (folder / "manifest.json").write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match=expected):
            load_model(folder)


@pytest.mark.parametrize("to", ["safetensors", "pth"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(monkeypatch, capsys, orbax, tmp_path, to):
    signal_before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        error = message(monkeypatch, capsys, convert, orbax, tmp_path / "out", f"--to={to}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, signal_before)
    assert f"Cannot write {tmp_path / 'out'}: " in error
    assert "File too large" in error
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_seen_before_orbax_writes(monkeypatch, capsys, orbax, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    error = message(monkeypatch, capsys, convert, orbax, tmp_path / "out")
    assert "bytes are needed, 1,000 are free" in error
    assert not list(tmp_path.iterdir())


def test_metrics_that_cannot_be_read(monkeypatch, capsys, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "metrics.jsonl").write_bytes(b"[1]\n\xff")
    error = message(monkeypatch, capsys, convert, run, tmp_path / "model")
    assert re.search(r"Cannot read .*metrics\.jsonl", error)


def test_a_run_that_lost_something_is_told_in_one_sentence(workdir):
    for change, expected in (
        (
            lambda: (workdir / "config.json").write_text("[]"),
            r"Cannot read .*config\.json.*Run its command again",
        ),
        (lambda: (workdir / "config.json").unlink(), "no checkpoint of step 77, only of 2, 4"),
        (lambda: shutil.rmtree(workdir / "tokenizer"), "has no tokenizer/"),
        (lambda: shutil.rmtree(workdir / "checkpoints"), "No finished checkpoint"),
    ):
        change()
        with pytest.raises(UserError, match=expected):
            load_model(workdir, 77 if "77" in expected else None)


HUB = """
import pathlib, sys
from hub_server import serve

serve(pathlib.Path(sys.argv[1]))

from simseg_jax import Segmenter, convert

run, repository = sys.argv[2:4]
sys.argv = ["convert", run, repository, "--to=hub", "--dtype=bfloat16", "--private"]
convert.main()
segmenter = Segmenter.from_pretrained(repository, refine="none")
print(segmenter("photo.png", ["star"]).labels)
convert.main()
"""


def test_a_run_is_uploaded_and_used(trained, tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "photo.png")

    def upload(**more):
        command = [sys.executable, "-c", HUB, str(tmp_path / "hub"), str(trained), "me/shapes"]
        options = {"capture_output": True, "text": True, "timeout": 120, "cwd": tmp_path}
        return subprocess.run(command, env=hub_environment(tmp_path, **more), **options)

    (tmp_path / "hub").mkdir()
    done = upload()
    assert done.returncode == 2
    assert 'that you are logged in ("hf auth login")' in done.stderr
    assert "Traceback" not in done.stderr
    done = upload(HF_TOKEN="hf_secret")
    uploaded, labels = done.stdout.splitlines()
    assert uploaded.startswith(f"Uploaded {trained} in")
    assert uploaded.endswith("/me/shapes")
    assert labels == "('background', 'star')"
    # The second upload is refused.
    assert done.returncode == 2
    assert "me/shapes holds files" in done.stderr
    folder = tmp_path / "hub" / "me" / "shapes"
    assert "private" in json.loads((folder / ".private").read_text()).values()
    names = {file.name for file in folder.rglob("*")}
    assert names > {"model.safetensors", "README.md", "manifest.json", "config.json"}
    assert 'Segmenter.from_pretrained("me/shapes")' in (folder / "README.md").read_text()


def test_a_repository_has_an_owner(monkeypatch, capsys, trained):
    error = message(monkeypatch, capsys, convert, str(trained), "shapes", "--to=hub")
    assert error == "error: shapes is no repository: --to=hub takes owner/name."
