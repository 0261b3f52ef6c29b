"""Raw files that both the released code and ours read: small trees in the layouts of the release.

All values are whole numbers from formulas, and all files lossless (PNG inside `.jpg` names, 16-bit
WAV), so that they are the same with every version of every library.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

EXIF_ORIENTATION, TURNED = 0x0112, 6

# Clip -> emotion, and what its media are like: seconds and rate of the sound, number and size of
# the frames. Names of frames are not padded with zeros, so that their order as text matters.
CREMAD: dict[str, dict[str, str]] = {
    "train_split.csv": {"1001_IEO_SAD_LO": "SAD", "1002_TIE_ANG_XX": "ANG"},
    "val.csv": {"1003_IOM_ANG_HI": "ANG"},
    "test.csv": {"1004_IWW_SAD_MD": "SAD"},
}
KINETICS: dict[str, dict[str, str]] = {
    "train.txt": {"aaaaaaaaaaa_000010_000020": "17", "bbbbbbbbbbb_000010_000020": "3"},
    "val.txt": {"-ccccccccc-_000010_000020": "17"},
    "test.txt": {"ddddddddddd_000010_000020": "3"},
}
# In the order of the release and of ours, unlike the numbers, Hammering comes last.
UCF_CLASSES = ("Hammering", "HammerThrow")
UCF: dict[str, Sequence[str]] = {
    "trainlist01_new.txt": (
        "v_Hammering_g08_c01",
        "v_Hammering_g09_c01",
        "v_HammerThrow_g08_c01",
        "v_HammerThrow_g09_c01",
    ),
    "testlist01_new.txt": ("v_Hammering_g01_c01", "v_HammerThrow_g01_c01"),
}
FOOD: dict[str, Sequence[tuple[str, int, str]]] = {
    "train": (
        ("waffles/waffles_0", 0, "RT  The RECIPE for waffles, no #RT here"),
        ("apple_pie/apple_pie_0", 1, "Apple pie " * 300),
    ),
    "dev": (("waffles/waffles_1", 0, "Waffles #1: http://a.example/x?y=1 gone to the end\nstays"),),
    "test": (
        ("apple_pie/apple_pie_1", 1, "Crème brûlée & apple_pie - the recipe!"),
        ("waffles/waffles_2", 0, "see https://b.example\r\n\r\n joined # here"),
    ),
}
TOKENS = 512
# Rows of the indexes that are split, and where the second list begins; classes are not even.
INDEX_ROWS, INDEX_CUT = 233, 170
INDEX_CLASSES = (
    "Archery",
    "Basketball",
    *UCF_CLASSES,
    "JumpingJack",
    "JumpRope",
    "Kayaking",
    "PlayingTabla",
    "PullUps",
    "TaiChi",
    "YoYo",
    "Zumba",
)


def thin(rows: np.ndarray) -> np.ndarray:
    """Every 7th pixel of pictures, every 8th frame and band of spectrograms; all token ids."""
    if rows.ndim == 1:
        return rows
    step = 7 if rows.dtype == np.uint8 else 8
    return rows[..., ::step, ::step]


def moments(rows: np.ndarray) -> np.ndarray:
    """Mean and standard deviation over all values, float64 (2,)."""
    values = rows.astype(np.float64)
    return np.array([values.mean(), values.std()])


def sound(number: int, seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """int16 (samples, channels): a triangle wave that rises slowly, and noise."""
    t = np.arange(int(seconds * rate))
    planes = []
    for channel in range(channels):
        phase = t * (300 + 40 * number + 90 * channel) + t * t // 97
        triangle = np.abs(phase % rate - rate // 2) * 16000 // rate
        noise = t * t * (7 + number + channel) % 4099
        planes.append(triangle + noise - 6000)
    return np.stack(planes, axis=1).astype(np.int16)


def picture(number: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """uint8 (height, width, channels): slanted stripes with hard edges on slow ramps."""
    y, x = np.ogrid[:height, :width]
    planes = []
    for channel in range(channels):
        ramp = (x * (channel + 1) * 90 // width + y * 100 // height + 23 * number) % 160
        stripe = 60 * ((x * (3 + number % 4) + y * (5 - channel)) // 24 % 2)
        planes.append(ramp + stripe)
    return np.stack(planes, axis=-1).astype(np.uint8)


def write_sound(path: Path, samples: np.ndarray, rate: int) -> None:
    """A 16-bit WAV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype="PCM_16")


def write_picture(path: Path, image: Image.Image, *, turned: bool = False) -> None:
    """A PNG file of whatever name; `turned` if its EXIF says that it lies on its side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if turned:
        exif[EXIF_ORIENTATION] = TURNED
    image.save(path, format="PNG", exif=exif)


def write_text(path: Path, lines: Sequence[str]) -> None:
    """Lines in UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_clips(folder: Path, names: Sequence[str], number: int, size: tuple[int, int]) -> None:
    """A folder of frames; no two are alike."""
    for place, name in enumerate(names):
        image = Image.fromarray(picture(10 * number + place, *size))
        write_picture(folder / name, image)


def write_cremad(root: Path) -> None:
    """2.5 s and 1 s of sound at 16 kHz; 11 frames larger and 7 frames smaller than 224 pixels."""
    (root / "stat.csv").parent.mkdir(parents=True, exist_ok=True)
    (root / "stat.csv").write_text("SAD\nANG\n", encoding="utf-8-sig")
    for name, clips in CREMAD.items():
        write_text(root / name, ["clip_id,label", *(f"{c},{label}" for c, label in clips.items())])
    shapes = [(2.5, 3, (90, 120)), (1.0, 4, (120, 90)), (2.5, 11, (240, 320)), (1.0, 7, (90, 120))]
    clips = [clip for own in CREMAD.values() for clip in own]
    for number, (clip, (seconds, frames, size)) in enumerate(zip(clips, shapes, strict=True)):
        samples = sound(number, seconds, 16_000)
        write_sound(root / "AudioWAV" / f"{clip}.wav", samples, 16_000)
        names = [f"{place}.jpg" for place in range(1, frames + 1)]
        write_clips(root / "visual_frames" / clip, names, number, size)


def write_kinetics(root: Path) -> None:
    """Stereo at 44.1 kHz, 11 s that are cut, 22.05 kHz and 16 kHz; ten frames a clip."""
    header = "filename start end label"
    for name, clips in KINETICS.items():
        rows = [f"{clip} 10 20 {label}" for clip, label in clips.items()]
        write_text(root / "videos" / name, [header, *rows])
    shapes = [(1.0, 16_000, 1), (0.5, 22_050, 1), (1.0, 44_100, 2), (11.0, 8_000, 1)]
    clips = [clip for own in KINETICS.values() for clip in own]
    names = [f"frame_{place:05d}.jpg" for place in range(1, 11)]
    for number, (clip, (seconds, rate, channels)) in enumerate(zip(clips, shapes, strict=True)):
        samples = sound(number, seconds, rate, channels)
        write_sound(root / "audios" / f"{clip}.wav", samples, rate)
        write_clips(root / "videos" / clip, names, number, (85, 64))


def write_ucf101(root: Path) -> None:
    """Six frames a clip; seven flow fields in training, sixteen in the test clips."""
    rows = [f"{number} {name}" for number, name in enumerate(UCF_CLASSES, start=1)]
    write_text(root / "classInd.txt", rows)
    number = 0
    for name, clips in UCF.items():
        rows = [f"{ucf_class(clip)}/{clip}.avi {ucf_number(clip)}" for clip in clips]
        write_text(root / name, ["path label", *rows])
        for clip in clips:
            frames = [f"img_{place:05d}.jpg" for place in range(1, 7)]
            write_clips(root / "frames_rgb" / clip, frames, number, (120, 160))
            for side in ("u", "v"):
                folder = root / f"flows_{side}" / clip
                for place in range(7 if name.startswith("train") else 16):
                    field = picture(20 * number + place + 5 * (side == "v"), 120, 160, 1)
                    image = Image.fromarray(field[..., 0])
                    write_picture(folder / f"frame{place + 1:05d}.jpg", image)
            number += 1


def ucf_class(clip: str) -> str:
    """Class in a clip's name."""
    return clip.split("_")[1]


def ucf_number(clip: str) -> int:
    """Number of its class in `classInd.txt`."""
    return UCF_CLASSES.index(ucf_class(clip)) + 1


def write_food101(root: Path) -> None:
    """A colour picture, a grey one, one with transparency and one that lies on its side."""
    number = 0
    for split, rows in FOOD.items():
        records = [{"img": f"{name}.jpg", "label": label, "text": t} for name, label, t in rows]
        write_text(root / f"{split}.jsonl", [json.dumps(record) for record in records])
        for name, _, _ in rows:
            image = Image.fromarray(picture(number, 150 + 40 * number, 260))
            if number == 2:
                image = image.convert("L")
            elif number == 3:
                image.putalpha(image.convert("L"))
            folder = root / "images" / ("test" if split == "test" else "train")
            write_picture(folder / f"{name}.jpg", image, turned=number == 4)
            number += 1


def write_tokenizer(folder: Path) -> None:
    """BERT's word pieces with the letters and a few words as vocabulary."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["the", "recipe", "apple", "pie", "waf", "##fles", "here", "stays", "joined"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    marks = list(letters + "!?#:/.,&_-")
    vocabulary = [*special, *marks, *(f"##{letter}" for letter in letters), *words]
    write_text(folder / "vocab.txt", vocabulary)
    config = {"tokenizer_class": "ElectraTokenizer", "do_lower_case": True}
    write_text(folder / "tokenizer_config.json", [json.dumps(config)])


def write_index(name: str, root: Path) -> None:
    """Lists of 233 clips or images of a set in 12 classes (CREMA-D: 6), without any media."""
    rows = [(number, (7 * number + number * number // 9) % 12) for number in range(INDEX_ROWS)]
    first, second = rows[:INDEX_CUT], rows[INDEX_CUT:]
    if name == "cremad":
        emotions = ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")
        lines = [f"{1000 + n}_IEO_{emotions[c % 6]}_XX,{emotions[c % 6]}" for n, c in rows]
        parts = {"train_split": lines[:100], "val": lines[100:INDEX_CUT], "test": lines[INDEX_CUT:]}
        for list_name, part in parts.items():
            write_text(root / f"{list_name}.csv", ["clip_id,label", *part])
        for folder in ("AudioWAV", "visual_frames"):
            (root / folder).mkdir()
    elif name == "kinetics":
        for list_name, part in {"train": first, "val": second}.items():
            lines = [f"{n:011d}_000010_000020 10 20 {c}" for n, c in part]
            write_text(root / "videos" / f"{list_name}.txt", ["filename start end label", *lines])
        (root / "audios").mkdir()
    elif name == "ucf101":
        names = enumerate(INDEX_CLASSES, start=1)
        write_text(root / "classInd.txt", [f"{number} {text}" for number, text in names])
        for list_name, part in {"trainlist01_new": first, "testlist01_new": second}.items():
            lines = [(INDEX_CLASSES[c], n, c + 1) for n, c in part]
            lines = [f"{text}/v_{text}_g{n}_c01.avi {c}" for text, n, c in lines]
            write_text(root / f"{list_name}.txt", ["path label", *lines])
        for folder in ("frames_rgb", "flows_u", "flows_v"):
            (root / folder).mkdir()
    else:
        for list_name, part in {"train": first, "test": second}.items():
            dishes = [(f"{'lkjihgfedcba'[c]}_dish", n, c) for n, c in part]
            records = [{"img": f"{d}/{d}_{n}.jpg", "label": c, "text": "x y"} for d, n, c in dishes]
            write_text(root / f"{list_name}.jsonl", [json.dumps(record) for record in records])
        (root / "images").mkdir()


WRITE = {
    "cremad": write_cremad,
    "kinetics": write_kinetics,
    "ucf101": write_ucf101,
    "food101": write_food101,
}
