"""`pipeline`: what goes in, what comes out, and that it is what the models say."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from small_models import save_checkpoint, small_config

from blip_engine import AutoModelForVisualQuestionAnswering, AutoProcessor, BlipForQuestionAnswering, pipeline
from blip_engine.errors import CheckpointError, ImageError, InputError, OptionError
from blip_engine.requests import TASKS

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")

COLORS = ("red", "blue", "green")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each task, and three images."""
    root = tmp_path_factory.mktemp("pipelines")
    config = small_config({"hidden_size": 32})  # transformers can do VQA only where both widths are equal
    found = {task: save_checkpoint(root / task, task, **config) for task in TASKS}
    for number, color in enumerate(COLORS):
        image = Image.new("RGB", (40, 30), color)
        image.paste("white", (5 * number, 3, 20 + 5 * number, 20))
        image.save(root / f"{color}.png")
    return found | {"images": root}


def images(places: dict[str, Path]) -> list[str]:
    return [str(places["images"] / f"{color}.png") for color in COLORS]


def theirs(places: dict[str, Path], task: str, image: str, text: str | None, **options: Any) -> str:
    """What transformers' own classes say."""
    kind = {"vqa": "BlipForQuestionAnswering", "caption": "BlipForConditionalGeneration"}[task]
    model = getattr(transformers, kind).from_pretrained(places[task]).eval()
    processor = transformers.BlipProcessor.from_pretrained(places[task], backend="pil")
    inputs = processor(images=Image.open(image), text=text, return_tensors="pt")
    return str(processor.decode(model.generate(**inputs, **options)[0], skip_special_tokens=True)).strip()


class TestQuestions:
    def test_one_and_several(self, places: dict[str, Path]) -> None:
        answer = pipeline("visual-question-answering", model=places["vqa"], device=-1)
        red, blue, _ = images(places)
        what, how = "what is this ?", "how many dogs ?"
        single = answer(question=what, image=red)
        assert single == [{"answer": theirs(places, "vqa", red, what)}]
        assert answer({"image": red, "question": what}) == single
        assert answer(red, what) == answer(Path(red), what) == answer(Path(red).read_bytes(), what) == single
        assert answer(Image.open(red), what) == single
        pairs = [(red, what), (blue, what), (red, how), (blue, how)]
        alone = [answer(image, question) for image, question in pairs]
        assert answer([red, blue], [what, how]) == alone
        assert answer([{"image": image, "question": question} for image, question in pairs]) == alone
        assert answer([red, blue], what) == alone[:2]
        assert answer(red, [what, how]) == alone[::2]
        assert len({str(each) for each in alone}) > 1

    def test_generation_arguments(self, places: dict[str, Path]) -> None:
        answer = pipeline("visual-question-answering", model=str(places["vqa"]))
        red = images(places)[0]
        several = answer(red, "what is this ?", num_beams=3, num_return_sequences=2)
        assert [list(each) for each in several] == [["answer"], ["answer"]]
        assert several[0]["answer"] == theirs(places, "vqa", red, "what is this ?", num_beams=3)


def test_captions(places: dict[str, Path]) -> None:
    caption = pipeline("image-to-text", model=places["caption"])
    red, blue, _ = images(places)
    plain = [{"generated_text": theirs(places, "caption", red, None)}]
    assert caption(red) == plain
    assert caption([red, blue]) == [plain, caption(blue)]
    prompted = caption(red, prompt="a picture of", max_new_tokens=5)
    assert prompted == [{"generated_text": theirs(places, "caption", red, "a picture of", max_new_tokens=5)}]
    assert caption(red, prompt="a picture of", generate_kwargs={"max_new_tokens": 5}) == prompted


def test_matches(places: dict[str, Path]) -> None:
    match = pipeline("image-text-matching", model=places["itm"])
    model = transformers.BlipForImageTextRetrieval.from_pretrained(places["itm"]).eval()
    processor = transformers.BlipProcessor.from_pretrained(places["itm"], backend="pil")
    red, blue, _ = images(places)
    texts = ["a red dog", "two cats"]
    expected = []
    for text in texts:
        for image in (red, blue):
            inputs = processor(images=Image.open(image), text=text, return_tensors="pt")
            with torch.no_grad():
                itm, itc = (model(**inputs, use_itm_head=head)[0] for head in (True, False))
            expected.append({"match": itm.softmax(-1)[0, 1].item(), "similarity": itc[0, 0].item()})
    found = match([red, blue], texts)
    assert [list(each) for each in found] == [["match", "similarity"]] * 4
    for mine, truth in zip(found, expected, strict=True):
        assert mine == pytest.approx(truth, abs=1e-5)
    assert match(image=red, text=texts[0]) == found[0]


class TestLoading:
    def test_types_and_devices(self, places: dict[str, Path]) -> None:
        half = pipeline("visual-question-answering", model=places["vqa"], torch_dtype="bfloat16", device_map="cpu")
        assert half.model.dtype is torch.bfloat16
        assert len(half(images(places)[0], "what is this ?")) == 1
        old = AutoModelForVisualQuestionAnswering.from_pretrained(places["vqa"], torch_dtype=torch.float16)
        assert isinstance(old, BlipForQuestionAnswering)
        assert old.dtype is torch.float16
        assert AutoProcessor.from_pretrained(places["vqa"]).image_processor.size == {"height": 32, "width": 32}

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
    def test_a_gpu_that_is_not_there(self, places: dict[str, Path]) -> None:
        with pytest.warns(UserWarning, match="there is no GPU 0 here: running on the CPU") as caught:
            answer = pipeline("visual-question-answering", model=places["vqa"], device=0)
        assert caught[0].filename == __file__
        assert answer.model.device.type == "cpu"


WHOLE = ("vision_model", "text_encoder", "text_decoder.bert", "text_decoder.cls")


@pytest.mark.parametrize(
    "device",
    [{"": "cpu"}, dict.fromkeys(WHOLE, "cpu"), {"": torch.device("cpu"), "text_decoder": "cpu"}, "auto", "balanced",
     "sequential", torch.device("cpu")],
    ids=str,
)  # fmt: skip
def test_device_maps_of_one_device(places: dict[str, Path], device: Any) -> None:
    model = BlipForQuestionAnswering.from_pretrained(places["vqa"], device_map=device)
    if not isinstance(device, str):
        assert model.device == torch.device("cpu")
    theirs = transformers.BlipForQuestionAnswering.from_pretrained(places["vqa"])
    assert all(value.equal(theirs.state_dict()[name]) for name, value in model.cpu().state_dict().items())


class TestFaults:
    @pytest.mark.parametrize(
        ("device", "fault"),
        [
            ("gpu", "device 'gpu' is unknown; use auto, cpu, cuda"),
            (99, "device 'cuda:99' is not here: torch sees"),
            (["cpu"], "device_map must be a device, a dictionary or 'auto', not .'cpu'."),
            ({"": 0}, "device 'cuda:0' is not here"),
            ({"": "disk"}, "device 'disk' is unknown"),
            ({"text_decoder": "cpu"}, "device_map has no device for vision_model.embeddings.class_embedding; {'': dev"),
            ({"": "cpu", "text_model": "cpu"}, "device_map names 'text_model', which is no part of the model"),
            (
                {"vision_model": "cpu", "text_decoder": "meta"},
                "on one device, not vision_model: cpu, text_decoder: met",
            ),
            ({}, "on one device, not on none"),
        ],
    )
    def test_devices(self, places: dict[str, Path], device: Any, fault: str) -> None:
        with pytest.raises(OptionError, match=fault):
            BlipForQuestionAnswering.from_pretrained(places["vqa"], device_map=device)

    def test_tasks_and_checkpoints(self, places: dict[str, Path]) -> None:
        with pytest.raises(
            OptionError, match="no task 'translation'; it has: visual-question-answering, image-to-text"
        ):
            pipeline("translation", model=places["vqa"])
        with pytest.raises(CheckpointError, match="missing: text_encoder"):
            pipeline("visual-question-answering", model=places["caption"])

    def test_images(self, places: dict[str, Path], tmp_path: Path) -> None:
        caption = pipeline("image-to-text", model=places["caption"])
        (tmp_path / "no.png").write_bytes(b"text")
        with pytest.raises(ImageError, match=r"no\.png: not an image in one of the formats"):
            caption(tmp_path / "no.png")
        with pytest.raises(InputError, match=r"absent\.png cannot be read: No such file"):
            caption(tmp_path / "absent.png")
        with pytest.raises(InputError, match=r"http://127\.0\.0\.1:1/x\.png cannot be fetched: .*refused"):
            caption("http://127.0.0.1:1/x.png")
        with pytest.raises(InputError, match="must be a path, a URL, bytes or a Pillow image, not int"):
            caption(7)

    def test_a_question_is_needed(self, places: dict[str, Path]) -> None:
        answer = pipeline("visual-question-answering", model=places["vqa"])
        with pytest.raises(InputError, match="pass a question with the image"):
            answer(images(places)[0])
