"""Decode rate per core of our processors against the bare library on the same files; a JSON line.

    python tests/bench/decode.py [--clips 12] [--rounds 9]

Each side turns every file of a kind into the array that a shard stores, alone in this process:

- `jpg`: 480 x 360 pixels to uint8 (3, 224, 224). Bare: PIL open, convert, resize.
- `wav`: 2.5 s at 16 kHz to float16 (1, 1024, 128). Bare: soundfile and torchaudio's Kaldi filter
  banks, padded and normalised.
- `mp4`: H.264, 320 x 240 pixels, 3 s at 25 fps, to three frames, uint8 (3, 3, 224, 224). Bare: PyAV
  decodes up to the last frame that is taken, whose number it takes from the header.

What ours does besides: it checks that the file is inside the data's folder, whole and of sane size,
and counts the packets of a video, whose header may be wrong. Rates are per CPU second of this
process (decoders have threads), so that other processes matter little. The sides take turns file
by file; the order changes from round to round, and ratios are taken round by round. The bar: ours
within 20 % of the bare library.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

import av  # noqa: E402
import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from method_step import machine  # noqa: E402
from PIL import Image  # noqa: E402
from reading import filter_banks, write_clip  # noqa: E402

from data.config import Kind, ModalityConfig  # noqa: E402
from data.processors import Place, Processor, build  # noqa: E402
from data.schema import Augment  # noqa: E402
from data.sources.raw import Media, Sound, Stills, Video  # noqa: E402

SIDE = 224
VIDEO_SIZE, VIDEO_FPS, VIDEO_FRAMES = (240, 320), 25, 75
NUM_PARTS = 3
SETTINGS: dict[Kind, ModalityConfig] = {
    "image": ModalityConfig(storage="tensor", side=SIDE, train_side=SIDE),
    "audio": ModalityConfig(storage="float16", sample_rate=16_000, seconds=10.24, num_mels=128),
    "frames": ModalityConfig(
        storage="tensor", side=SIDE, train_side=SIDE, frames=NUM_PARTS, candidates=1, pick="middle"
    ),
}
Load = Callable[[], np.ndarray]


def write_video(path: Path, rng: np.random.Generator) -> None:
    """Soft shapes that drift, with grain, and noise as sound."""
    height, width = VIDEO_SIZE
    coarse = rng.integers(0, 255, (10, 24, 3), dtype=np.uint8)
    wide = Image.fromarray(coarse).resize((2 * width, height), Image.Resampling.BICUBIC)
    scene = np.asarray(wide).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=VIDEO_FPS)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(VIDEO_FRAMES):
            grain = rng.integers(-4, 5, (height, width, 1), dtype=np.int16)
            pixels = np.clip(scene[:, 2 * number : 2 * number + width] + grain, 0, 255)
            frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def squared(image: Image.Image) -> np.ndarray:
    """uint8 (3, 224, 224)."""
    resized = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(resized).transpose(2, 0, 1)


def bare_image(path: Path) -> np.ndarray:
    return squared(Image.open(path).convert("RGB"))


def bare_sound(path: Path) -> np.ndarray:
    samples, rate = soundfile.read(path, dtype="float32")
    return filter_banks(samples, rate).numpy().astype(np.float16)


def bare_video(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        part = stream.frames // NUM_PARTS
        wanted = [number * part + part // 2 for number in range(NUM_PARTS)]
        taken: list[np.ndarray] = []
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                taken.append(squared(Image.fromarray(frame.to_ndarray(format="rgb24"))))
            if number == wanted[-1]:
                break
    return np.stack(taken)


def make_pairs(root: Path, num_clips: int) -> dict[str, list[tuple[Load, Load]]]:
    """Kind of file -> ours and the bare library, per file; writes the files."""
    rng = np.random.default_rng(0)
    clips = [f"{number:04d}" for number in range(num_clips)]
    for clip in clips:
        write_clip(root, clip, rng)
        write_video(root / f"{clip}.mp4", rng)
    stills = [f"visual_frames/{clip}/{place:05d}.jpg" for clip in clips for place in range(3)]
    sounds = [f"AudioWAV/{clip}.wav" for clip in clips]
    videos = [f"{clip}.mp4" for clip in clips]

    def pair(
        processor: Processor, media: Media, bare: Callable[[Path], np.ndarray], path: str
    ) -> tuple[Load, Load]:
        return lambda: processor.load(media, "test"), lambda: bare(root / path)

    image, audio, frames = (make_processor(kind, root) for kind in SETTINGS)
    return {
        "jpg": [pair(image, Stills((path,)), bare_image, path) for path in stills],
        "wav": [pair(audio, Sound(path), bare_sound, path) for path in sounds],
        "mp4": [pair(frames, Video(path), bare_video, path) for path in videos],
    }


def make_processor(kind: Kind, root: Path) -> Processor:
    place = Place(root.resolve(), official=False)
    return build(kind, kind, SETTINGS[kind], Augment(), place, list)


def check_alike(pairs: list[tuple[Load, Load]]) -> None:
    """Both sides must do the same work."""
    ours, bare = (load() for load in pairs[0])
    assert ours.shape == bare.shape, (ours.shape, bare.shape)
    assert ours.dtype == bare.dtype, (ours.dtype, bare.dtype)
    assert np.abs(ours.astype(np.float32) - bare).max() <= 1e-2


def measure(pairs: list[tuple[Load, Load]], rounds: int) -> list[tuple[float, float]]:
    """CPU seconds of all files of ours and of the bare library, per round."""
    found: list[tuple[float, float]] = []
    for turn in range(1 + rounds):
        total = [0.0, 0.0]
        for pair in pairs:
            for side in (0, 1) if turn % 2 == 0 else (1, 0):
                began = time.process_time()
                pair[side]()
                total[side] += time.process_time() - began
        if turn > 0:  # the first round warms caches and imports
            found.append((total[0], total[1]))
    return found


def run(num_clips: int, rounds: int) -> dict[str, float]:
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, pairs in make_pairs(Path(folder), num_clips).items():
            check_alike(pairs)
            found = measure(pairs, rounds)
            ratios = [bare / ours for ours, bare in found]
            result[f"files_per_cpu_second_{name}"] = len(pairs) / median(o for o, _ in found)
            result[f"files_per_cpu_second_{name}_bare"] = len(pairs) / median(b for _, b in found)
            result[f"ratio_{name}"] = median(ratios)
            result[f"ratio_{name}_min"] = min(ratios)
            result[f"ratio_{name}_max"] = max(ratios)
    return {name: round(value, 3) for name, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=12, help="3 JPEG, 1 WAV and 1 MP4 file each")
    parser.add_argument("--rounds", type=int, default=9, help="timed passes over all files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = machine(threads=1)
    found = run(args.clips, args.rounds)
    result = {"bench": "decode", "machine": about, "config": vars(args), **found}
    print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
    main()
