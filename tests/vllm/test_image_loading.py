"""Each row of engines/image_loading.py against the engine's own loading code: bytes in, `pixel_values` out.

A prepared image must give, through the engine's loader and the Hugging Face processor behind it, what the original
gives. Where a row says "pass", it must be seen that some would not.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sidecar.engines.image_loading import ImageModel, row_of
from sidecar.images.protocol import RAW, ImageDone, ImageJob, ImageLimits
from sidecar.images.worker import tensors
from sidecar.kernels import families
from sidecar.tools.synthetic_photos import photo, pixels

from ..images import corpus, public_files, test_families
from ..images.published import settings as published
from ..images.test_public_files import Pixels, decoded
from ..missing import missing
from . import engine_sources

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

LOADING = Path(__file__).with_name("loading.py")
LIMITS = ImageLimits(20 << 20, 20_000_000)
QWEN: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 3136, "longest_edge": 224 * 224},
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SIGLIP = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
PIXTRAL = {name: value for name, value in published("PixtralImageProcessor").items() if value is not None}


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


PICTURE = Image.fromarray(pixels(640, 480, 7))
RED = (255, 0, 0)  # a colour key that is not what is put behind it
KEYED = PICTURE.copy()
KEYED.paste(RED, (100, 100, 300, 300))
MADE: dict[str, bytes] = {
    **{f"EXIF {turn}": photo(900, 600, turn, exif_orientation=turn) for turn in range(1, 9)},
    "1080p": photo(1920, 1080, 20),
    "progressive": saved(PICTURE, "JPEG", progressive=True),
    "grey": saved(PICTURE.convert("L"), "JPEG"),
    "cmyk": saved(PICTURE.convert("CMYK"), "JPEG"),
    "png": saved(PICTURE, "PNG"),
    "webp": saved(PICTURE, "WEBP", quality=80),
    "gif": saved(PICTURE.quantize(64), "GIF"),
    "colour key": saved(KEYED, "PNG", transparency=RED),
    "grey key": saved(PICTURE.convert("L"), "PNG", transparency=128),
    "opaque alpha": saved(PICTURE.convert("RGBA"), "PNG"),
}


def photo_with_alpha() -> Image.Image:
    """PICTURE, from clear on the left to opaque on the right."""
    made = PICTURE.convert("RGBA")
    made.putalpha(Image.linear_gradient("L").rotate(90).resize(made.size))
    return made


PREPARED = {*(f"EXIF {turn}" for turn in range(1, 9)), "1080p", "progressive", "grey", "cmyk", "png", "opaque alpha"}


def write_pairs(config: dict[str, Any], folder: Path, files: dict[str, bytes]) -> list[str]:
    """Write each image that is prepared, and what it is prepared to; returns their names."""
    from sidecar.images.worker.pipeline import prepare_image

    spec = families.from_config(config)
    assert spec is not None
    names: list[str] = []
    for name, data in files.items():
        done, rows = prepare_image(ImageJob(RAW, spec.to_json(), False, LIMITS, 60.0), data)
        if isinstance(done, ImageDone) and done.outcome == "ok":
            file = re.sub(r"\W+", "_", name) + f".{len(names)}"
            (folder / f"{file}.original").write_bytes(data)
            (folder / f"{file}.prepared").write_bytes(b"P6\n%d %d\n255\n" % (done.width, done.height) + bytes(rows))
            names.append(name)
    return names


def write_pixels(folder: Path, files: dict[str, bytes], pixels: Mapping[str, Pixels | str]) -> list[str]:
    """Write each image that has pixels, and these; returns their names."""
    names: list[str] = []
    for name, data in files.items():
        if not isinstance(shown := pixels[name], str):
            (folder / f"{len(names):05}.{len(names)}.original").write_bytes(data)
            (folder / f"{len(names):05}.{len(names)}.prepared").write_bytes(tensors.ppm(shown))
            names.append(name)
    return names


Pairs = dict[str, tuple[dict[str, Any], list[str]]]  # by folder: the processor, and the images whose pairs lie there


def different(
    python: Path, sources: tuple[str, ...], engine: str, config: dict[str, Any], folder: Path, names: list[str]
) -> tuple[str, set[str]]:
    """The engine's version, and the images that it would see in another way if they were prepared."""
    version, found = all_different(python, sources, engine, {str(folder): (config, names)})
    assert found[str(folder)] is not None
    return version, found[str(folder)] or set()


def all_different(
    python: Path, sources: tuple[str, ...], engine: str, pairs: Pairs
) -> tuple[str, dict[str, set[str] | None]]:
    """The same for several processors, by folder; None for one that the engine's transformers does not have."""
    if absent := [name for name in sources if not engine_sources.complete(name)]:
        missing(f"not installed: {', '.join(absent)} (python tests/vllm/engine_sources.py)")
    arguments: list[str] = []
    for folder, (config, _) in pairs.items():
        file = Path(f"{folder}.json")
        file.write_text(json.dumps(config))
        arguments += [str(file), folder]
    done = engine_sources.run(python, sources, str(LOADING), engine, *arguments)
    if "ModuleNotFoundError" in done.stderr or "ImportError" in done.stderr:
        pytest.skip(f"its code does not load here: {done.stderr.strip().splitlines()[-1][:200]}")
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    found: dict[str, set[str] | None] = {}
    for folder, (_, names) in pairs.items():
        made = said["made"][folder]
        found[folder] = None if made is None else _pairs_that_differ(made, names)
    return said["engine"], found


def _pairs_that_differ(made: dict[str, str], names: list[str]) -> set[str]:
    assert len(made) == 2 * len(names)
    ends = {file.rpartition(".")[2] + file.split(".")[-2]: value for file, value in made.items()}
    return {name for at, name in enumerate(names) if ends[f"original{at}"] != ends[f"prepared{at}"]}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    (tmp_path / "pairs").mkdir()
    return tmp_path / "pairs"


IMITATED = {
    "0.24, the oldest": ("vllm-0.24.0",),
    "0.32": (),
    "0.32 with transformers 5.23": ("transformers-5.23.0",),
    "0.33, the newest": ("vllm-0.33.0",),
    "0.33 with transformers 5.24": ("vllm-0.33.0", "transformers-5.24.0"),
}
ODD = {str(config["image_processor_type"]): config for config in (QWEN, SIGLIP, PIXTRAL)}
# Every family of which a resized image may replace the original, by a row of its tests.
INLINE = {row.name: published(row.name, **row.config) for row in test_families.ROWS.values() if row.spec().inline}
# Transparent parts, of which /v1/preprocess makes what the engine's loader and transformers make together.
CLEAR = {
    "colour key": MADE["colour key"],
    "grey key": MADE["grey key"],
    "palette key": saved(PICTURE.quantize(64), "PNG", transparency=3),
    "alpha": saved(photo_with_alpha(), "PNG"),
    "grey alpha": saved(photo_with_alpha().convert("LA"), "PNG"),
}
# The others leave the pixels of a colour key's colour as they are: vLLM before 0.33, over transformers before 5.21.
KEYS_ON_WHITE = {"0.32 with transformers 5.23", "0.33, the newest", "0.33 with transformers 5.24"}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """All images and what they are prepared to, made once: for each processor, and as pixels alone."""
    home, made = tmp_path_factory.mktemp("prepared"), Pairs()
    odd = MADE | corpus.all_files()
    for kind, config in ODD.items():
        (folder := home / f"odd.{kind}").mkdir()
        made[str(folder)] = config, write_pairs(config, folder, odd)
    for kind, config in INLINE.items():
        (folder := home / f"family.{kind}").mkdir()
        plain = {key: value for key, value in config.items() if value is not None}
        made[str(folder)] = plain, write_pairs(plain, folder, MADE)
    (folder := home / "public").mkdir()
    opaque = {name: decoded(data, flatten=False) for name, data in public_files.all_files().items()}
    made[str(folder)] = {"image_processor_type": "pixels"}, write_pixels(folder, public_files.all_files(), opaque)
    (folder := home / "clear").mkdir()
    flat = {name: decoded(data) for name, data in CLEAR.items()}
    made[str(folder)] = QWEN, write_pixels(folder, CLEAR, flat)
    return made


@dataclass(frozen=True)
class Seen:
    """What one vLLM with its transformers made of all of them."""

    name: str
    version: str
    sent: dict[str, list[str]]  # by folder: the images that were prepared
    different: dict[str, set[str] | None]  # and those that differ; None where transformers has no such processor


@pytest.fixture(scope="module", params=IMITATED)
def seen(request: pytest.FixtureRequest, vllm_python: Path, prepared: Pairs) -> Seen:
    """One process for each engine: most of its time goes into loading it."""
    version, found = all_different(vllm_python, IMITATED[request.param], "vllm", prepared)
    sent = {Path(folder).name: names for folder, (_, names) in prepared.items()}
    return Seen(request.param, version, sent, {Path(folder).name: names for folder, names in found.items()})


@pytest.mark.parametrize("kind", ODD)
def test_a_prepared_image_is_what_vllm_sees(seen: Seen, kind: str) -> None:
    """For the oldest and the newest vLLM of the row, and each transformers: not one image differs, of some hundred."""
    names = seen.sent[f"odd.{kind}"]
    assert set(names) >= PREPARED and len(names) > 300 and not {"colour key", "grey key"} & set(names)
    assert seen.different[f"odd.{kind}"] == set()
    assert row_of("vllm", seen.version, ImageModel("hf", "", kind)).reason == ""


def test_every_family_sees_a_prepared_image_as_the_original(seen: Seen) -> None:
    """Photographs in all orientations and formats, through each vLLM's loader and each transformers' own processor."""
    found = {kind: seen.different[f"family.{kind}"] for kind in INLINE}
    assert {kind: names for kind, names in found.items() if names} == {}
    assert len(found) > 10 and list(found.values()).count(None) <= 1


def test_public_files_are_decoded_as_by_vllm(seen: Seen) -> None:
    """Each file that would be prepared (tests/images/public_files.py): its pixels are those of vLLM's own loader."""
    if len(seen.sent["public"]) < 100:
        missing("the public files are not fetched (make test-fixtures)")
    print(seen.name, len(seen.sent["public"]), "files")
    assert seen.different["public"] == set() and len(seen.sent["public"]) > 400


def test_transparent_parts_are_on_white_but_for_an_older_vllms_colour_key(seen: Seen) -> None:
    """What /v1/preprocess makes of them, next to each vLLM: equal but for the one form that docs/images.md names."""
    assert seen.sent["clear"] == list(CLEAR)
    assert seen.different["clear"] == (set() if seen.name in KEYS_ON_WHITE else {"colour key"})


def test_an_older_vllm_turns_no_photograph(vllm_python: Path, pairs: Path) -> None:
    """Before 0.24 EXIF orientations are ignored: the row lets images pass."""
    names = write_pairs(QWEN, pairs, MADE)
    version, found = different(vllm_python, ("vllm-0.23.0",), "vllm", QWEN, pairs, names)
    assert found >= {f"EXIF {turn}" for turn in range(2, 9)}
    assert row_of("vllm", version, ImageModel("hf")).reason == "engine_version"


def test_sglang_turns_no_photograph(vllm_python: Path, pairs: Path) -> None:
    """SGLang, by its own loader on the CPU: photographs that are turned differ, so images pass."""
    names = write_pairs(QWEN, pairs, MADE)
    version, found = different(vllm_python, ("sglang-0.5.23",), "sglang", QWEN, pairs, names)
    assert found >= {f"EXIF {turn}" for turn in range(2, 9)}
    assert row_of("sglang", version, ImageModel("hf")).reason == "engine_loading"


def test_mistrals_tokenizer_resizes_in_another_way(vllm_python: Path, pairs: Path) -> None:
    """vLLM with Mistral's tokenizer has mistral_common resize: nearly every image differs, so images pass."""
    names = write_pairs(PIXTRAL, pairs, MADE)
    config = {"patch_size": 16, "size": {"longest_edge": 1024}}
    version, found = different(vllm_python, (), "mistral", config, pairs, names)
    assert "1080p" in found
    assert row_of("vllm", version, ImageModel("mistral")).reason == "mistral_tokenizer"


def test_a_row_without_a_test_lets_images_pass() -> None:
    """Only vLLM is imitated, in the versions above; llama.cpp's loader needs a build of its own and was not run."""
    for kind in ("llamacpp", "ollama", "tgi", "tei", "openai", "sglang"):
        assert row_of(kind, "1.0.0", ImageModel("hf")).reason != ""
    for version in ("0.34.0", "1.0.0", "0.23.9", "", "main"):
        assert row_of("vllm", version, ImageModel("hf")).reason != ""


def test_the_files_of_a_model_choose_the_tokenizer(vllm_python: Path, tmp_path: Path) -> None:
    """vLLM's own choice for a model with Mistral's files is the one that the sidecar assumes."""
    from sidecar.engines.image_loading import tokenizer_mode

    code = "import sys; from vllm.tokenizers.registry import resolve_tokenizer_args as r; print(r(sys.argv[1])[0])"
    for names in (("tokenizer.json",), ("consolidated.safetensors", "tekken.json"), ("consolidated.safetensors",)):
        folder = tmp_path / str(len(names)) / names[-1]
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text("{}")
        done = engine_sources.run(vllm_python, (), "-c", code, str(folder))
        assert done.returncode == 0, done.stderr[-1000:]
        assert done.stdout.split()[-1] == tokenizer_mode(names)
