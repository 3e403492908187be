"""Videos for `POST /v1/preprocess`: a video in, the output of the model's video processor out.

In: JSON `{"videos": ["data:video/mp4;base64,...", ...]}`, also lists of JPEGs (`data:video/jpeg;base64,A,B,...`) and,
if --image-urls allows them, links; or one raw body of type `video/*`. Which frames are taken: those of vLLM's loader
for the model, also at `?fps=`; with `?sampling=processor` or `?num_frames=` those of the processor by itself. Out: as
for images, with `pixel_values_videos` and `video_grid_thw`; the layout and the metadata have what is no tensor there:
the frames that were taken, the times of Qwen3-VL's steps, the seconds that one of Qwen2.5-VL's stands for.
"""

from __future__ import annotations

import json
from typing import Any, Final

from sidecar.errors import BadImage, RequestError
from sidecar.images.protocol import VideoDone
from sidecar.images.service import FrameChoice, SentVideo
from sidecar.kernels.families.videos import MAX_FRAMES, VideoSpec
from sidecar.load import body_scan

MAX_VIDEOS: Final = 4
MAX_HEAD_BYTES: Final = 256  # of a data URL, up to its base64 text
MAX_FPS: Final = 240.0
BASE64_MARK: Final = ";base64,"
JPEG_LIST: Final = "video/jpeg"


class BadVideos(RequestError, code="bad_request"):
    """The request's videos, or what it asks of them, are not in the form that is read here."""


def listed_videos(body: bytes) -> list[SentVideo | str] | None:
    """The videos of the JSON form, and the links among them; None if it has none. Raises BadVideos or BadImage."""
    found = body_scan.find(body)
    if found is None or "videos" not in found.members:
        return None
    start, end = found.members["videos"]
    try:
        videos = json.loads(body[start:end])
    except (ValueError, RecursionError):
        videos = None
    if not isinstance(videos, list) or not videos or not all(isinstance(video, str) for video in videos):
        raise BadVideos('videos must be a list such as {"videos": ["data:video/mp4;base64,..."]}')
    if len(videos) > MAX_VIDEOS:
        raise BadImage(f"{len(videos)} videos in one request; at most {MAX_VIDEOS} are accepted", "image_count")
    return [_video(video, i) for i, video in enumerate(videos)]


def _video(url: str, index: int) -> SentVideo | str:
    if url.lstrip()[:6].lower().startswith(("http:", "https:")):
        return url
    at = url[:MAX_HEAD_BYTES].find(BASE64_MARK)
    if at < 0 or not url.startswith("data:"):
        raise BadImage(f"videos[{index}]: neither a base64 data URL nor a link", "image_url")
    kind = url[len("data:") : at].partition(";")[0].strip().lower()
    try:
        text = url[at + len(BASE64_MARK) :].encode("ascii")
    except UnicodeEncodeError:
        raise BadImage(f"videos[{index}]: its base64 text is damaged", "image_base64") from None
    return SentVideo(text, True, kind == JPEG_LIST)


def frames_of(count: str, fps: str, sampling: str) -> FrameChoice:
    """The frames that a request's query asks for. Raises BadVideos."""
    try:
        number, rate = int(count or 0), float(fps or 0)
    except ValueError:
        number, rate = -1, 0.0
    if not 0 <= number <= MAX_FRAMES or not 0 <= rate <= MAX_FPS or sampling not in ("", "vllm", "processor"):
        raise BadVideos(
            f"num_frames: send 1 to {MAX_FRAMES}; fps: more than 0, up to {MAX_FPS:g}; sampling: vllm or processor"
        )
    if number and (rate or sampling == "vllm"):
        raise BadVideos("num_frames is the processor's alone: leave out fps and sampling, or send fps instead")
    return FrameChoice(number, rate, sampling == "processor" or number > 0)


def layout(videos: list[VideoDone], spec: VideoSpec) -> dict[str, Any]:
    """The JSON form: names, shapes, dtypes, and each video."""
    shapes = spec.shapes([spec.video(len(video.indices), *video.original) for video in videos])
    return {
        "processor": spec.fingerprint,
        "tensors": {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in shapes.items()},
        "videos": [
            {
                "format": video.format,
                "height": video.height,
                "width": video.width,
                "grid_thw": list(video.grid),
                "tokens": video.tokens,
                "content_hash": video.content_hash,
                "frames_indices": list(video.indices),
                "total_num_frames": video.total_frames,
                "fps": video.fps,
                **(
                    {"timestamps": list(video.timestamps)}
                    if spec.whole
                    else {"second_per_grid_ts": video.second_per_grid}
                ),
            }
            for video in videos
        ],
    }
