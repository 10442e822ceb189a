"""The page: what is drawn there is what generate draws, and a browser gets it."""

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw

from common.errors import ConfigError
from infer.config import GenerateConfig, ServeConfig
from infer.drawing import metadata
from infer.drawing.generate import generate
from sd3.images import fit
from sd3.pretrained import DATA_KEY
from tests.conftest import PROMPTS, RESOLUTION_PX, Outcome, flags, free_port

pytestmark = pytest.mark.extras
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def config(base: Path, controlnet: Path, tmp_path: Path) -> ServeConfig:
    return ServeConfig(
        pretrained_model_name_or_path=str(base),
        controlnet=(str(controlnet),),
        output_dir=tmp_path / "served",
        num_inference_steps=2,
        device="cpu",
        port=free_port(),
        most_steps=5,
        most_upload_mb=1,
    )


@pytest.fixture
def page(config: ServeConfig) -> Iterator[str]:
    """Address of the page."""
    from infer.serve import serve

    blocks = serve(config, block_thread=False)
    yield f"http://{config.host}:{config.port}"
    blocks.close()


@pytest.fixture
def page_of_canny(config: ServeConfig) -> Iterator[str]:
    """Address of the page of a ControlNet whose controls Canny draws."""
    from infer.serve import serve

    blocks = serve(
        replace(config, conditioning_from="canny", conditioning_args=("low_threshold=30",)),
        block_thread=False,
    )
    yield f"http://{config.host}:{config.port}"
    blocks.close()


def ring() -> Image.Image:
    image = Image.new("RGB", (200, 200))
    ImageDraw.Draw(image).ellipse((40, 50, 140, 150), outline="white", width=4)
    return image


def ask(page: str, image: Path | None, **changes: object) -> list[dict[str, object]]:
    """Ask the page's own interface for a picture."""
    from gradio_client import Client, handle_file

    client = Client(page, verbose=False)
    arguments = {
        "prompt": PROMPTS[0],
        "negative_prompt": "",
        "title": None,
        "seed": 3,
        "steps": 2,
        "guidance": 4.0,
        "scale": 0.5,
        "from_photo": False,
        "shown": None,
    } | changes
    if arguments["title"] is None:
        info = client.view_api(return_format="dict")["named_endpoints"]["/draw"]["parameters"]
        (title,) = (one["parameter_default"] for one in info if one["label"] == "ControlNet")
        arguments["title"] = title
    file = None if image is None else handle_file(str(image))
    editor = {"background": file, "layers": [], "composite": file}
    return list(client.predict(editor, *arguments.values(), api_name="/draw"))


def test_the_page_draws_what_generate_does(page: str, config: ServeConfig, tmp_path: Path) -> None:
    ring().save(tmp_path / "ring.png")
    (shown,) = ask(page, tmp_path / "ring.png")
    assert shown["caption"].startswith(PROMPTS[0])
    assert shown["caption"].endswith("seed 3, 2 steps, guidance 4, strength 0.5")
    picture = config.output_dir / "00001.png"
    given = np.array(Image.open(config.output_dir / "00001-conditioning.png"))
    assert np.array_equal(given, np.array(ring()))
    settings = {
        "prompt": PROMPTS[:1],
        "image": (tmp_path / "ring.png",),
        "seed": (3,),
        "guidance_scale": 4.0,
        "controlnet_conditioning_scale": (0.5,),
        "output_dir": tmp_path / "own",
    }
    generate(
        GenerateConfig(
            pretrained_model_name_or_path=config.pretrained_model_name_or_path,
            controlnet=config.controlnet,
            num_inference_steps=2,
            device="cpu",
            **settings,
        )
    )
    expected = np.array(Image.open(tmp_path / "own" / "000.png"))
    assert np.array_equal(np.array(Image.open(picture)), expected)
    assert metadata.read(picture)["settings"]["seed"] == [3]
    with Image.open(str(shown["image"])) as sent:
        assert np.array_equal(np.array(sent.convert("RGB")), expected)


@pytest.mark.parametrize(
    ("image", "changes", "message"),
    [
        (True, {"prompt": "  "}, "Say in the prompt what to draw"),
        (True, {"steps": 6}, "6 is greater than maximum|6 steps: 1 to 5"),
        (False, {}, "Draw or upload a conditioning image"),
        (
            True,
            {"title": "none"},
            r"Value: none is not in the list of choices: \['controlnet\d*'\]",
        ),
    ],
)
def test_what_cannot_be_drawn_is_a_message(
    page: str, image: bool, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    ring().save(tmp_path / "ring.png")
    with pytest.raises(Exception, match=message):
        ask(page, tmp_path / "ring.png" if image else None, **changes)


def test_large_uploads_are_turned_away(page: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    assert (tmp_path / "noise.png").stat().st_size > 1_100_000
    with pytest.raises(Exception, match=r"413|too large|exceed"):
        ask(page, tmp_path / "noise.png")


def test_images_of_many_pixels_are_turned_away(config: ServeConfig) -> None:
    from infer.draw_service import DrawService

    service = DrawService(config)
    arguments = {
        "seed": 0,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "controlnet_conditioning_scale": 1.0,
    }
    (title,) = service.controlnets
    with pytest.raises(ConfigError, match="The image has 5000 x 10 pixels; 4096 at most"):
        service.draw(Image.new("RGB", (5000, 10)), "a", "", title, **arguments)
    with pytest.raises(ConfigError, match="no ControlNet 'other'"):
        service.draw(Image.new("RGB", (64, 64)), "a", "", "other", **arguments)
    # Numbers go on from what is there.
    service.draw(Image.new("RGB", (64, 64)), "a", "", title, **arguments)
    again, _ = DrawService(config).draw(Image.new("RGB", (64, 64)), "b", "", title, **arguments)
    assert again.name == "00002.png"


def test_a_photograph_is_drawn_from_and_the_control_shown(
    page_of_canny: str, config: ServeConfig, circles: Path
) -> None:
    photograph = circles / "target" / "3.png"
    picture, control = ask(page_of_canny, photograph, from_photo=True)
    assert picture["caption"].startswith(PROMPTS[0])
    assert control["caption"].startswith("drawn from the photograph, for controlnet")
    fitted = fit(Image.open(photograph).convert("RGB"), RESOLUTION_PX)
    expected = cv2.Canny(np.asarray(fitted), 30, 200)
    kept = Image.open(config.output_dir / "00001-conditioning.png")
    assert (np.asarray(kept) == expected[..., None]).all()
    with Image.open(str(control["image"])) as sent:
        assert (np.asarray(sent.convert("RGB")) == expected[..., None]).all()
    (as_it_is,) = ask(page_of_canny, photograph)
    assert not str(as_it_is["caption"]).startswith("drawn")


def test_without_an_annotator_a_photograph_is_refused(page: str, circles: Path) -> None:
    with pytest.raises(Exception, match="What draws controls from photographs is not known"):
        ask(page, circles / "target" / "3.png", from_photo=True)


def test_a_port_that_is_taken_ends_in_one_line(
    page: str, config: ServeConfig, command: Callable[..., Outcome]
) -> None:
    outcome = command("infer", "serve", *flags(config))
    assert outcome.exit_code == 2
    assert f"--port {config.port}: cannot listen there" in outcome.output


def test_more_steps_than_may_be_asked_for(config: ServeConfig) -> None:
    with pytest.raises(ConfigError, match="--num-inference-steps 6: --most-steps is 5"):
        replace(config, num_inference_steps=6)


def test_nothing_but_the_picture_is_sent(page: str, config: ServeConfig, tmp_path: Path) -> None:
    ring().save(tmp_path / "ring.png")
    (shown,) = ask(page, tmp_path / "ring.png")
    with Image.open(str(shown["image"])) as sent:
        assert metadata.KEY not in sent.info
    for name in ("00001.png", "run.json"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{page}/gradio_api/file={config.output_dir / name}")
    # Past the queue nobody comes.
    body = json.dumps({"data": []}).encode()
    asked = urllib.request.Request(
        f"{page}/gradio_api/run/draw", body, {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(asked)
    assert not (config.output_dir / "00002.png").exists()


@pytest.mark.parametrize("name", ["port", "most_waiting", "most_upload_mb", "most_steps"])
def test_limits_are_positive(config: ServeConfig, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--{name.replace('_', '-')} 0: at least 1"):
        replace(config, **{name: 0})


@pytest.mark.slow
def test_a_circle_drawn_in_a_browser_becomes_a_picture(
    page: str, config: ServeConfig, tmp_path: Path
) -> None:
    from playwright import sync_api

    if CHROMIUM is None:
        pytest.skip("neither Chromium nor Google Chrome is installed")
    with sync_api.sync_playwright() as found:
        browser = found.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--use-gl=swiftshader", "--enable-unsafe-swiftshader"],
        )
        tab = browser.new_page(viewport={"width": 1280, "height": 1000})
        tab.goto(page)
        tab.locator("#prompt textarea").fill(PROMPTS[0])
        canvas = tab.locator("#conditioning canvas").first
        canvas.wait_for()
        tab.wait_for_timeout(3000)  # until it has come to its place
        tab.locator("#conditioning button[aria-label='Clear canvas']").click()
        tab.wait_for_timeout(3000)
        tab.locator("#conditioning button[aria-label='Brush']").click()
        box = canvas.bounding_box()
        assert box is not None
        across, down = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        radius = min(box["width"], box["height"]) / 5
        angles = np.linspace(0, 2 * np.pi, 40)
        tab.mouse.move(across + radius, down)
        tab.mouse.down()
        for angle in angles:
            tab.mouse.move(across + radius * np.cos(angle), down + radius * np.sin(angle))
        tab.mouse.up()
        tab.wait_for_timeout(500)
        tab.locator("#draw").click()
        tab.locator("#pictures img").first.wait_for(timeout=60_000)
        tab.screenshot(path=str(tmp_path / "page.png"))
        browser.close()
    drawing = np.array(Image.open(config.output_dir / "00001-conditioning.png").convert("L"))
    light = drawing > 128
    # A ring: light pixels, few of them, none in the middle.
    assert 0.001 < light.mean() < 0.5
    rows, columns = np.nonzero(light)
    assert not light[int(rows.mean()), int(columns.mean())]
    with Image.open(config.output_dir / "00001.png") as picture:
        assert picture.size == (RESOLUTION_PX, RESOLUTION_PX)
    about = json.loads(Image.open(config.output_dir / "00001.png").info[metadata.KEY])
    assert about["settings"]["prompt"] == [PROMPTS[0]]


def test_transparent_parts_have_the_controlnets_background(
    config: ServeConfig, controlnet: Path, tmp_path: Path
) -> None:
    from infer.draw_service import DrawService
    from infer.page import _DrawAction

    black = tmp_path / "black"
    shutil.copytree(controlnet, black)
    values = json.loads((black / "config.json").read_text())
    values[DATA_KEY]["background"] = [0, 0, 0]
    (black / "config.json").write_text(json.dumps(values))
    service = DrawService(replace(config, controlnet=(str(black), str(controlnet))))
    clear = {"composite": Image.new("RGBA", (64, 64), (255, 0, 0, 0))}
    for title, colour in (("black", 0), (controlnet.name, 255)):
        _DrawAction(service).on_click(clear, "a prompt", "", title, 0, 1, 1.0, 1.0, False, None)
        newest = sorted(config.output_dir.glob("*-conditioning.png"))[-1]
        assert set(np.asarray(Image.open(newest)).flat) == {colour}
