"""The web page that segments images with words: `python -m simseg_jax.demo --checkpoint=...`."""

import atexit
import functools
import html
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from simseg_jax.data import shapes
from simseg_jax.data.images import IMAGE_SUFFIXES
from simseg_jax.data.pipeline import DataConfig
from simseg_jax.data.words import split_words
from simseg_jax.reports.page import CSS, colour, heat_maps, layers, reasons, score_chart
from simseg_jax.reports.segmentation import Segmentation
from simseg_jax.reports.visualize import labels_in
from simseg_jax.runtime.command_line import accepted, add_setting, cache_programs, make_parser
from simseg_jax.runtime.errors import UserError, report_user_errors
from simseg_jax.runtime.files import write_json
from simseg_jax.runtime.processes import keeping
from simseg_jax.runtime.ranges import whole
from simseg_jax.runtime.settings import plain
from simseg_jax.segmenter import Segmenter, words_of
from simseg_jax.weights.load import load_model

EPILOG = """examples:
  python -m simseg_jax.demo --checkpoint=runs/shapes
  python -m simseg_jax.demo --checkpoint=runs/f8k --examples=photos --port=8000
  python -m simseg_jax.demo --checkpoint=runs/loda --checkpoint=runs/mean

Needs the extra demo. Several checkpoints answer side by side. Only this machine reaches the page,
unless --host=0.0.0.0 or --share opens it. Files of visitors are deleted after an hour, by the next
request, and at the end.
"""
UPLOAD = 20 * 2**20  # Bytes of an upload.
PIXELS = 25_000_000  # More than most telephones take.
MOST_WORDS = 100
QUEUE = 16  # Requests that wait; further ones are refused.
SEGMENTERS = 8  # Combinations of settings, per checkpoint, whose compiled programs are kept.
HOUR = 3600  # Seconds that files are kept.
MUTED = (("body", "_subdued"), ("block_info", ""), ("block_label", ""))
OWN, NONE, THESE = "the checkpoint's classes", "none", "these words"


def import_gradio() -> Any:
    """The module gradio, which then sends no usage data; a `UserError` says how to get it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "The demo needs gradio: pip install -e '.[demo]', or pip install gradio."
        ) from error
    return gradio


class Column:
    """One checkpoint on the page. folder: where the files of visitors go; all of it is theirs."""

    def __init__(self, source: str, name: str, max_pixels: int, folder: Path):
        self.name, self.folder, self.kept = name, folder, set()
        self.model = load_model(source)
        # Compiled programs differ between these settings; they are the same for all thresholds.
        self.segmenter = functools.lru_cache(SEGMENTERS)(
            lambda **settings: Segmenter(self.model, max_pixels, **settings)
        )
        self.settings = self.segmenter().settings

    def segment(
        self,
        image: str | None,
        words: list[str] | None,
        contrast: str = OWN,
        contrast_words: list[str] | None = None,
        sigma_weight: float | None = None,
        resolution: int = 0,
        refine: str = "",
        m_image: int = 0,
    ) -> tuple[Segmentation, dict[str, Any]]:
        """(result, what JSON says of it); 0, "" and None are the checkpoint's own settings."""
        self._forget()
        if not image:
            raise UserError("Give an image first: upload or paste one, or choose an example.")
        looked_for, others = (
            [word for text in texts or () for word in split_words(text) if word]
            for texts in (words, contrast_words)
        )
        if not looked_for:
            raise UserError("Give at least one word to look for.")
        if len(looked_for) + len(others) > MOST_WORDS:
            raise UserError(f"Give at most {MOST_WORDS} words here.")
        given = {"resolution": resolution, "refine": refine, "m_image": m_image}
        segmenter = self.segmenter(**{name: value for name, value in given.items() if value})
        if sigma_weight is not None:
            segmenter = segmenter.with_sigma_weight(sigma_weight)
        classes = segmenter.classes(looked_for, {OWN: None, NONE: []}.get(contrast, others))
        try:
            _, answer = next(segmenter.answers([Path(image)], classes))
        except UserError as error:  # The folder is nothing that visitors need to know.
            raise UserError(str(error).replace(image, Path(image).name)) from error
        record = {
            "checkpoint": {"name": self.name, "step": self.model.step},
            "image": Path(image).name,
            "words": classes.words,
            "contrast": classes.contrast,
            **answer.record(),
            "reasons": reasons(answer, segmenter.settings),
            "settings": plain(segmenter.settings),
        }
        return answer, record

    def write(self, answer: Segmentation, record: dict[str, Any]) -> list[str]:
        """Writes NAME_mask.png, NAME_overlay.png and NAME.json; returns their paths."""
        stem = Path(tempfile.mkdtemp(dir=self.folder)) / Path(record["image"]).stem
        paths = answer.save(stem)
        write_json(stem.with_name(f"{stem.name}.json"), record)
        return [*map(str, paths), f"{stem}.json"]

    def _forget(self) -> None:
        """Deletes what visitors left an hour ago; Gradio forgets some files of its own."""
        for path in set(self.folder.iterdir()) - self.kept:
            if time.time() - path.stat().st_mtime > HOUR:
                shutil.rmtree(path, ignore_errors=True)


def examples_in(folder: str | None, classes: Sequence[str], out: Path) -> list[list]:
    """[image file, words] of the images in a folder; without one, of generated scenes."""
    if folder is not None:
        found = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise UserError(f"The folder --examples={folder} holds no images.")
        return [[str(path), list(classes[:3])] for path in found[:24]]
    if not set(shapes.CATEGORIES) <= set(classes):
        return []
    rows = []
    for index in range(24):
        mask = shapes.scene(index, "test")[1]
        seen = [shapes.CATEGORIES[label - 1] for label in labels_in(mask) if label]
        if len(seen) > 1:
            others = shapes.CATEGORIES[index % 10 :] + shapes.CATEGORIES
            absent = next(name for name in others if name not in seen)
            rows.append([_save_scene(index, out), [*seen, absent]])
    return rows[:8]


def _save_scene(index: int, folder: Path) -> str:
    path = folder / f"scene{index}.png"
    Image.fromarray(shapes.scene(index, "test")[0]).save(path)
    return str(path)


def build(checkpoints: Sequence[str], examples: str | None = None, max_pixels: int = PIXELS) -> Any:
    """The page as gradio.Blocks, which `serve` starts; every checkpoint has answered once.

    checkpoints: as for `load_model`. examples: a folder with images; by default generated scenes
    for checkpoints that know their classes. max_pixels: larger images are refused.
    """
    gr = import_gradio()
    if examples is not None and not Path(examples).is_dir():
        raise UserError(f"There is no folder --examples={examples}.")
    folder = Path(tempfile.mkdtemp(prefix="simseg_jax_demo_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)

    async def no_download(url: str, cache_dir: str) -> str:
        raise gr.Error("The demo downloads nothing: upload the image itself.")

    # Requests may name addresses, which Gradio would download, whatever their size.
    gr.processing_utils.async_ssrf_protected_download = no_download
    names = [Path(source.rstrip("/")).name for source in checkpoints]
    names = names if len(set(names)) == len(names) else list(checkpoints)
    columns = [
        Column(source, name, max_pixels, folder)
        for source, name in zip(checkpoints, names, strict=True)
    ]
    first = columns[0].settings
    classes = words_of(first)
    rows = examples_in(examples, classes, Path(tempfile.mkdtemp(dir=folder)))
    image, words = rows[0] if rows else (None, classes[:3])

    def without_result(text: str) -> list:
        hidden = gr.update(value=None, visible=False)
        told = f'<p class="told" role="alert">{html.escape(text)}</p>'
        return [*[hidden] * 3, gr.update(value=told, visible=True), *[hidden] * 3]

    def outputs(column: Column, tell: Callable[[str], Any], *asked) -> list:
        """New properties of the components of a column."""
        try:
            answer, record = column.segment(*asked)
        except UserError as error:
            tell(html.escape(str(error)))
            return without_result(str(error))
        colours = {word: colour(label) for label, word in enumerate(answer.labels)}
        return [
            gr.update(value=layers(answer), color_map=colours, visible=True),
            gr.update(value=score_chart(answer, record["reasons"]), visible=True),
            gr.update(value=heat_maps(answer), visible=True),
            gr.update(value="", visible=False),
            *(gr.update(value=path, visible=True) for path in column.write(answer, record)),
        ]

    # Every program is compiled before the first visitor comes.
    warm = image or _save_scene(0, folder)
    firsts = [outputs(column, print, warm, words) for column in columns]
    if image is None:
        firsts = [without_result("Give an image and words, then press Segment.")] * len(columns)
    own = "checkpoint's" if len(columns) == 1 else "each checkpoint's"
    with gr.Blocks(title="simseg_jax: words to masks", analytics_enabled=False) as page:
        gr.HTML(
            '<header class="intro"><h1>Words to masks</h1><p>Name what to look for in an image. '
            "The model learned from images with captions; it has never seen a mask.</p></header>"
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                picture = gr.Image(
                    image,
                    label="Image",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=240,
                    buttons=[],
                    elem_classes="given",
                )
                # Images are decoded by `Segmenter`: upright, with its limits, in its formats.
                picture.preprocess = lambda payload: payload and payload.path
                example = gr.Gallery(
                    [row[0] for row in rows],
                    label="Examples",
                    columns=4,
                    height="auto",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_classes="examples",
                    visible=bool(rows),
                )
                chips = {"choices": classes, "multiselect": True, "allow_custom_value": True}
                searched = gr.Dropdown(
                    value=words,
                    label="Words",
                    info="Type a word and press Enter; several between commas.",
                    **chips,
                )
                button = gr.Button("Segment", variant="primary")
                with gr.Accordion("Settings", open=False):
                    contrast = gr.Radio(
                        [OWN, NONE, THESE],
                        value=OWN,
                        label="Contrast words",
                        info="They count towards the threshold and claim pixels; none is drawn.",
                    )
                    others = gr.Dropdown(value=[], label="These words", visible=False, **chips)
                    sigma = gr.Slider(
                        -2,
                        4,
                        first.sigma_weight,
                        step=0.05,
                        label="Threshold (sigma_weight)",
                        info="Mean of the best scores plus this many standard deviations.",
                        buttons=[],
                    )
                    asked = [picture, searched, contrast, others, sigma]
                    for label, name, options in _choices(columns):
                        value = f" ({getattr(first, name)})" if len(columns) == 1 else ""
                        nothing = type(getattr(first, name))()
                        asked.append(
                            gr.Dropdown([(f"{own}{value}", nothing), *options], label=label)
                        )
            shown = []
            with gr.Column(scale=5, min_width=280), gr.Row(equal_height=False):
                for column, answer in zip(columns, firsts, strict=True):
                    with gr.Column(min_width=280, elem_classes="results"):
                        about = f"{column.name}, step {column.model.step:,}, pooling "
                        about += column.model.architecture.pool
                        gr.HTML(f"<h2>{html.escape(about)}</h2>")
                        shown.append(_results(gr, answer))
        limits = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal"}
        quick = {"show_progress": "hidden", "api_visibility": "private", "queue": False}

        def example_of(event: gr.SelectData):  # pyright: ignore[reportInvalidTypeForm]
            return rows[event.index]

        choose = example.select(example_of, None, [picture, searched], **quick)
        starts = [button.click, sigma.release, choose.then]
        for column, components in zip(columns, shown, strict=True):
            for start in starts:
                answer_to = functools.partial(outputs, column, gr.Warning)
                start(answer_to, asked, components, api_visibility="private", **limits)
        contrast.change(lambda kind: gr.update(visible=kind == THESE), contrast, others, **quick)
        with gr.Row(visible=False):  # What programs call.
            chosen = gr.Dropdown(names, label="Checkpoint")
            results = [gr.JSON(label="Result"), gr.File(label="Mask"), gr.File(label="Overlay")]
            call = gr.Button()

        def segment(
            image,
            words,
            contrast,
            contrast_words,
            sigma_weight,
            resolution,
            refine,
            m_image,
            checkpoint,
        ):
            """Segments an image with words; the mask's pixel values are positions in words."""
            column = columns[names.index(checkpoint or names[0])]
            given = image, words, contrast, contrast_words, sigma_weight
            try:
                answer, record = column.segment(*given, resolution, refine, m_image)
            except UserError as error:
                raise gr.Error(html.escape(str(error)), print_exception=False) from error
            return record, *column.write(answer, record)[:2]

        call.click(segment, [*asked, chosen], results, api_name="segment", **limits)
    for column in columns:
        column.kept = set(folder.iterdir())  # First answers and examples.
    page.queue(max_size=QUEUE)
    return page


def _choices(columns: Sequence[Column]):
    """(label, setting, choices) of the settings that compile other programs."""
    sides = set()
    for column in columns:
        patch, own = column.model.patch_size, column.settings.resolution
        sides |= {max(round(own * factor / patch), 1) * patch for factor in (0.5, 0.75, 1, 1.5, 2)}
    yield "Resolution in pixels", "resolution", sorted(sides)
    refine = ["none", "pamr"] + ["crf"] * any(c.settings.protocol == "paper" for c in columns)
    yield "Mask refinement", "refine", refine
    yield "M^I: patches that a score counts per channel", "m_image", [1, 2, 3, 5, 10, 20]


def _results(gr, first: list[dict]) -> list:
    """The components of one checkpoint's results, with its first answer."""
    now = [{key: v for key, v in update.items() if key != "__type__"} for update in first]
    message = gr.HTML(**now[3])
    with gr.Row(equal_height=False):
        with gr.Column(min_width=280):
            annotated = gr.AnnotatedImage(
                label="Result: point at a word to see it alone",
                format="png",
                buttons=["fullscreen"],
                elem_classes="annotated",
                **now[0],
            )
            with gr.Row():
                files = [
                    gr.DownloadButton(label, size="sm", min_width=80, **update)
                    for label, update in zip(("Mask", "Overlay", "JSON"), now[4:], strict=True)
                ]
        with gr.Column(min_width=280):
            chart = gr.HTML(**now[1])
    maps = gr.HTML(**now[2])
    return [annotated, chart, maps, message, *files]


class _Bounded:
    """Refuses requests whose body is larger than an upload may be: Gradio limits files only."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        from starlette.exceptions import HTTPException  # pyright: ignore[reportMissingImports]

        size = 0

        async def counted():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > UPLOAD + 2**16:  # With the form around the file.
                raise HTTPException(413)
            return message

        await self.app(scope, counted, send)


def serve(
    page: Any, host: str = "127.0.0.1", port: int = 7860, share: bool = False, wait: bool = True
) -> str:
    """Starts what `build` returned and says where it is; returns the address.

    share: through a public address of Gradio's, which forwards to this machine. wait: until the
    process is stopped.
    """
    gr = import_gradio()
    import httpx  # pyright: ignore[reportMissingImports]
    from starlette.middleware import Middleware  # pyright: ignore[reportMissingImports]

    # No fonts of other servers, and explanations in a colour that is read on both backgrounds.
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(**fonts, primary_hue="blue", neutral_hue="slate").set(
        **{f"{name}_text_color{kind}_dark": "*neutral_300" for name, kind in MUTED},
        **{f"{name}_text_color{kind}": "*neutral_600" for name, kind in MUTED},
    )
    try:
        _, address, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=UPLOAD,
            allowed_paths=[],
            state_session_capacity=100,
            enable_monitoring=False,
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            footer_links=["api"],
            theme=theme,
            css=CSS,
            app_kwargs={"middleware": [Middleware(_Bounded)]},
        )
    except OSError as error:
        raise UserError(f"Port {port} of {host} is in use: choose another with --port.") from error
    # Gradio's first event takes a second longer than others: an empty one, which is refused.
    call, data = f"{address}gradio_api/call/segment", [None, [], NONE, [], 0, 0, "", 0, None]
    event = httpx.post(call, json={"data": data}, trust_env=False).json()["event_id"]
    httpx.get(f"{call}/{event}", trust_env=False)
    print(f"Ready: {public or address}  (Ctrl-C ends it)", flush=True)
    if wait:
        with keeping(lambda: "The files of visitors are deleted."):
            threading.Event().wait()
    return address


@report_user_errors
def main() -> None:
    """Serves the page for the checkpoints of the command line."""
    parser = make_parser("demo", "Serves a web page that segments images with words.", EPILOG)
    parser.add_argument(
        "--checkpoint",
        required=True,
        action="append",
        help="a run's --workdir or converted folder: path, URL or hub id; repeat it to compare",
    )
    parser.add_argument("--examples", help="folder of images to choose from")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: other machines reach it")
    parser.add_argument("--port", type=accepted(whole(1, 65535)), default=7860)
    parser.add_argument("--share", action="store_true", help="a public address through Gradio")
    text = "larger images are refused (default: %(default)s)"
    add_setting(parser, DataConfig, "max_pixels", text, PIXELS)
    args = parser.parse_args()
    import_gradio()
    cache_programs()
    print("Loading and compiling ...", flush=True)
    page = build(args.checkpoint, args.examples, args.max_pixels)
    serve(page, args.host, args.port, args.share)


if __name__ == "__main__":
    main()
