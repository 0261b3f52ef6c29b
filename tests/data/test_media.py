"""Opening media: whole files below the root come back exactly; everything else is named."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from data import media
from data.media import inside, num_video_frames, read_image, read_sound, read_text, read_video
from data.sources.base import RejectedSample
from tests.data.media_files import (
    RATE,
    cut,
    picture,
    tone,
    write_image,
    write_sound,
    write_video,
)

CLIP = [picture(shift=2 * number) for number in range(20)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one file, and a file beside the root."""
    folder = (tmp_path / "root").resolve()
    (folder / "clips").mkdir(parents=True)
    (folder / "clips" / "a.txt").write_text("inside")
    (tmp_path / "secret.txt").write_text("outside")
    return folder


def reason(call: Callable[[], object]) -> str:
    with pytest.raises(RejectedSample) as caught:
        call()
    return str(caught.value)


# ---- paths


@pytest.mark.parametrize("name", ["clips/a.txt", "clips/../clips/a.txt", "./clips//a.txt"])
def test_files_below_the_root(root: Path, name: str) -> None:
    assert inside(root, name).read_text() == "inside"


@pytest.mark.parametrize("name", ["../secret.txt", "clips/../../secret.txt", "/etc/hostname"])
def test_paths_out_of_the_root(root: Path, name: str) -> None:
    assert "leads out of data.root; only files below" in reason(lambda: inside(root, name))


def test_links(root: Path) -> None:
    (root / "in.txt").symlink_to(root / "clips" / "a.txt")
    assert inside(root, "in.txt").read_text() == "inside"
    (root / "out.txt").symlink_to(root.parent / "secret.txt")
    (root / "up").symlink_to(root.parent)
    for name in ("out.txt", "up/secret.txt"):
        assert "leads out of data.root" in reason(lambda name=name: inside(root, name))
    (root / "loop").symlink_to(root / "loop")
    assert "is no usable path" in reason(lambda: inside(root, "loop"))


def test_a_linked_root(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    assert inside(link.resolve(), "clips/a.txt").read_text() == "inside"


def test_no_file(root: Path) -> None:
    (root / "empty.wav").touch()
    os.mkfifo(root / "pipe")
    for name, words in {
        "missing.wav": "missing.wav does not exist",
        "clips/a.txt/b": "clips/a.txt/b does not exist",
        "clips": "clips is not a file",
        "pipe": "pipe is not a file",
        "empty.wav": "empty.wav is empty",
        "a\0b": "is no usable path",
        "x" * 300: "is no usable path",
    }.items():
        assert words in reason(lambda name=name: inside(root, name))


def test_large_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_FILE_BYTES", 5)
    assert "has 6 bytes; at most 5 are read" in reason(lambda: inside(root, "clips/a.txt"))


# ---- pictures


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "gif", "jpg"])
def test_pictures(tmp_path: Path, suffix: str) -> None:
    pixels = picture()
    options = {"lossless": True} if suffix == "webp" else {}
    found = np.asarray(
        read_image(write_image(tmp_path / f"a.{suffix}", pixels, **options), upright=True)
    )
    assert found.shape == (48, 64, 3)
    lossy = suffix in ("jpg", "gif")
    error = np.abs(found.astype(int) - pixels)
    assert error.mean() < (20 if lossy else 1e-9)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "gif", "jpg"])
def test_cut_pictures(tmp_path: Path, suffix: str) -> None:
    path = cut(write_image(tmp_path / f"a.{suffix}", picture()), 0.7)
    assert reason(lambda: read_image(path, upright=True)).startswith(
        f"a.{suffix} is not a whole picture ("
    )


def test_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_text("<html>404 not found</html>")
    words = reason(lambda: read_image(path, upright=True))
    assert words == "a.jpg is not a whole picture (cannot identify image file a.jpg)"


def write_bomb(path: Path, width: int, height: int) -> Path:
    """A PNG of some bytes whose header claims this size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    head = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )
    return path


def test_picture_that_claims_to_be_huge(tmp_path: Path) -> None:
    path = write_bomb(tmp_path / "a.png", 10_000, 10_000)
    words = "a.png claims 10000 x 10000 pixels; at most 64000000 are decoded"
    assert reason(lambda: read_image(path, upright=True)) == words
    path = write_bomb(tmp_path / "b.png", 60_000, 60_000)
    assert "b.png is not a whole picture (Image size" in reason(
        lambda: read_image(path, upright=True)
    )


def test_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    pixels = picture()
    path = write_image(tmp_path / "a.png", pixels, exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(path, upright=False)), pixels)
    turned = np.asarray(read_image(path, upright=True))
    np.testing.assert_array_equal(turned, np.rot90(pixels, -1))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_as_pil_turns_it(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write_image(tmp_path / f"a.{suffix}", picture(), exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert expected.shape == ((48, 64, 3) if orientation < 5 else (64, 48, 3))
    np.testing.assert_array_equal(np.asarray(read_image(path, upright=True)), expected)


def with_exif(path: Path, *entries: bytes) -> Path:
    """A JPEG whose EXIF has these entries as they are: tag, type, count and value."""
    head = b"MM\0*" + struct.pack(">IH", 8, len(entries))
    exif = b"Exif\0\0" + head + b"".join(entries) + bytes(4)
    return write_image(path, picture(), exif=exif)


TURN = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)


def test_odd_exif_beside_the_orientation(tmp_path: Path) -> None:
    """The width as text and the camera as a fraction: PIL reads them, and cannot write them."""
    width = struct.pack(">HHI4s", 0x0100, 2, 4, b"abc\0")
    camera = struct.pack(">HHII", 0x010F, 5, 1, 8)
    for entry in (width, camera):
        path = with_exif(tmp_path / "a.jpg", *sorted([entry, TURN]))
        with Image.open(path) as image, pytest.raises((struct.error, AttributeError)):
            ImageOps.exif_transpose(image)
        assert read_image(path, upright=True).size == (48, 64)


def test_pictures_without_readable_orientation_stay_as_they_are(tmp_path: Path) -> None:
    text = struct.pack(">HHI4s", 0x0112, 2, 4, b"six\0")
    path = with_exif(tmp_path / "a.jpg", text)
    assert read_image(path, upright=True).size == (64, 48)
    path = write_image(tmp_path / "b.webp", picture(), exif=b"no EXIF at all")
    with Image.open(path) as image, pytest.raises(SyntaxError):
        image.getexif()
    assert read_image(path, upright=True).size == (64, 48)


def test_grey_and_transparent_pictures_become_rgb(tmp_path: Path) -> None:
    grey = picture()[..., 0]
    found = np.asarray(read_image(write_image(tmp_path / "a.png", grey), upright=True))
    np.testing.assert_array_equal(found, np.repeat(grey[..., None], 3, axis=2))
    clear = np.dstack([picture(), np.full((48, 64), 9, np.uint8)])
    found = np.asarray(read_image(write_image(tmp_path / "b.png", clear), upright=True))
    np.testing.assert_array_equal(found, picture())


def test_pictures_of_16_bits_are_not_squashed(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", np.arange(4096, dtype=np.uint16).reshape(64, 64))
    assert "a.png has more than 8 bits a channel" in reason(lambda: read_image(path, upright=True))


# ---- sounds


@pytest.mark.parametrize(("suffix", "error"), [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.1)])
def test_sounds(tmp_path: Path, suffix: str, error: float) -> None:
    samples = np.stack([tone(hertz=440), tone(hertz=880)], axis=1)
    found, rate = read_sound(write_sound(tmp_path / f"a.{suffix}", samples))
    assert (found.dtype, found.shape, rate) == (np.float32, (2, RATE), RATE)
    np.testing.assert_allclose(found, samples.T, atol=error)


def loudest_hertz(samples: np.ndarray, rate: int) -> float:
    return float(np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples))


def test_mp3(tmp_path: Path) -> None:
    found, rate = read_sound(write_sound(tmp_path / "a.mp3", tone(2.0)))
    assert (found.shape[0], rate) == (1, RATE)
    assert found.shape[1] == pytest.approx(2 * RATE, rel=0.1)
    assert loudest_hertz(found[0], rate) == pytest.approx(440, abs=2)
    assert np.abs(found).max() == pytest.approx(0.5, abs=0.05)


def test_m4a_and_sounds_of_videos_are_what_pyav_decodes(tmp_path: Path) -> None:
    for name in ("a.m4a", "a.mp4", "a.mkv", "a.flv"):
        path = write_video(tmp_path / name, CLIP, sound=tone(2.0))
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
        found, rate = read_sound(path)
        assert (found.dtype, rate) == (np.float32, RATE)
        np.testing.assert_array_equal(found, np.concatenate(frames, axis=1))
        assert found.shape == (1, pytest.approx(2 * RATE, abs=3000))
        assert loudest_hertz(found[0], rate) == pytest.approx(440, abs=2)


def test_sound_of_integers_is_scaled(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", CLIP, sound=tone(2.0), sound_codec="pcm_s16le")
    found, _ = read_sound(path)
    assert found.shape == (1, 2 * RATE)
    np.testing.assert_allclose(found[0], tone(2.0), atol=1e-4)


@pytest.mark.parametrize("share", [0.4, 0.8])
@pytest.mark.parametrize("suffix", ["wav", "flac", "m4a"])
def test_cut_sounds(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "m4a":
        write_video(path, CLIP, sound=tone(2.0), movflags="faststart")
    else:
        write_sound(path, tone(2.0) * np.random.default_rng(0).random(2 * RATE))
    reason(lambda: read_sound(cut(path, share)))


def test_wav_that_promises_more(tmp_path: Path) -> None:
    path = cut(write_sound(tmp_path / "a.wav", tone()), 0.5)
    assert reason(lambda: read_sound(path)) == "a.wav is shorter than its header says"


def test_wav_of_unknown_length_is_read_to_its_end(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", tone())
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff" * 4  # as ffmpeg writes it to a pipe
    path.write_bytes(data)
    assert read_sound(path)[0].shape == (1, RATE)


def test_no_sound(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", np.zeros(0))
    assert reason(lambda: read_sound(path)) == "a.wav has no samples"
    (tmp_path / "b.wav").write_bytes(b"RIFF and so on")
    assert reason(lambda: read_sound(tmp_path / "b.wav")).startswith("b.wav has no whole sound (")
    (tmp_path / "c.mp3").write_bytes(b"")
    assert reason(lambda: read_sound(tmp_path / "c.mp3")).startswith("c.mp3 has no whole sound (")


def test_sound_without_head(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(1000))
    assert reason(lambda: read_sound(tmp_path / "a.raw")).startswith("a.raw has no whole sound (")


def test_sound_that_claims_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_sound(tmp_path / "a.wav", np.zeros((RATE, 2)))
    video = write_video(tmp_path / "a.mp4", CLIP, sound=tone(2.0))
    monkeypatch.setattr(media, "MAX_SOUND_SECONDS", 0.9)
    assert "claims 2 channels of 16000 samples at 16000 Hz; at most" in reason(
        lambda: read_sound(path)
    )
    assert "claims 1 channels of" in reason(lambda: read_sound(video))
    monkeypatch.setattr(media, "MAX_SOUND_SECONDS", 3600)
    monkeypatch.setattr(media, "MAX_SOUND_VALUES", 2 * RATE - 1)
    assert "31999 samples in all" in reason(lambda: read_sound(path))
    monkeypatch.setattr(media, "MAX_SOUND_VALUES", 2 * RATE)
    assert read_sound(path)[0].shape == (2, RATE)


def test_sound_of_a_senseless_rate(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", tone(), rate=10)
    assert reason(lambda: read_sound(path)) == "a.wav claims 10 Hz; at least 1000 are needed"


# ---- videos


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.flv", "flv"), ("a.webm", "libvpx")],
)
def test_frames_are_what_pyav_decodes(tmp_path: Path, name: str, codec: str) -> None:
    path = write_video(tmp_path / name, CLIP, codec)
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert num_video_frames(path) == len(frames) == 20
    wanted = [19, 3, 3, 0]
    for number, found in zip(wanted, read_video(path, wanted), strict=True):
        assert (found.dtype, found.shape) == (np.uint8, (48, 64, 3))
        np.testing.assert_array_equal(found, frames[number])
    assert np.abs(frames[3].astype(int) - CLIP[3]).mean() < 10


def test_frame_that_is_not_there(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", CLIP)
    words = "a.mp4 breaks off: 1 of the 2 wanted frames can be decoded"
    assert reason(lambda: read_video(path, [3, 20])) == words


def test_video_without_sound_and_sound_without_video(tmp_path: Path) -> None:
    silent = write_video(tmp_path / "a.mp4", CLIP)
    assert reason(lambda: read_sound(silent)) == "a.mp4 has no sound"
    sound = write_sound(tmp_path / "a.wav", tone())
    for call in (lambda: num_video_frames(sound), lambda: read_video(sound, [0])):
        assert reason(call) == "a.wav has no video"


@pytest.mark.parametrize("name", ["a.mp4", "b.mp4", "a.avi", "a.flv", "a.mkv"])
@pytest.mark.parametrize("share", [0.02, 0.6])
def test_videos_that_break_off(tmp_path: Path, name: str, share: float) -> None:
    options = {"movflags": "faststart"} if name == "b.mp4" else {}
    path = write_video(tmp_path / name, CLIP, sound=tone(2.0), **options)
    assert (num_video_frames(path), read_sound(path)[1]) == (20, RATE)
    cut(path, share)
    for call in (lambda: num_video_frames(path), lambda: read_sound(path)):
        assert reason(call).startswith((f"{name} breaks off after", f"{name} has no"))


def test_what_is_left_of_a_cut_video_is_said(tmp_path: Path) -> None:
    path = cut(write_video(tmp_path / "a.avi", CLIP, sound=tone(2.0)), 0.6)
    assert reason(lambda: num_video_frames(path)).endswith("of 20 frames")
    path = cut(write_video(tmp_path / "a.flv", CLIP, sound=tone(2.0)), 0.6)
    assert reason(lambda: num_video_frames(path)).endswith("of 2.1 s")


def test_long_and_large_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", CLIP)
    monkeypatch.setattr(media, "MAX_VIDEO_FRAMES", 19)
    assert reason(lambda: num_video_frames(path)) == "a.mp4 has 20 frames; at most 19 are read"
    monkeypatch.setattr(media, "MAX_PIXELS", 48 * 64 - 1)
    assert reason(lambda: read_video(path, [0])) == "a.mp4 claims 64 x 48 pixels"


def test_playlist_in_disguise(tmp_path: Path) -> None:
    """FFmpeg would follow it, whatever its suffix, to files outside of the root."""
    write_video(tmp_path / "outside.mp4", CLIP, sound=tone(2.0))
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    path = root / "a.mp4"
    path.write_text("ffconcat version 1.0\nfile link.mp4\n")
    for call in (lambda: num_video_frames(path), lambda: read_sound(path)):
        assert reason(call).startswith("a.mp4 has no whole")


# ---- texts


def test_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfGr\xc3\xbc\xc3\x9fe\r\n\xe4\xbd\xa0")
    assert read_text(path) == "Grüße\n你"
    path.write_bytes("Grüße".encode("latin-1"))
    assert reason(lambda: read_text(path)).startswith("a.txt is not UTF-8 (")


def test_long_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("four")
    monkeypatch.setattr(media, "MAX_TEXT_BYTES", 3)
    assert "a.txt has over 3 bytes of text" in reason(lambda: read_text(tmp_path / "a.txt"))


# ---- anything


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tiff", "a.wav", "a.flac", "a.avi", "a.mkv"])
def test_damaged_files_are_read_or_rejected(tmp_path: Path, name: str) -> None:
    """Never another exception, whatever bytes are flipped: it would end the preparation."""
    path = tmp_path / name
    reads: tuple[Callable[[], object], ...] = (lambda: read_image(path, upright=True),)
    if path.suffix in (".wav", ".flac"):
        write_sound(path, tone(0.1))
        reads = (lambda: read_sound(path),)
    elif path.suffix in (".avi", ".mkv"):
        write_video(path, CLIP[:4], sound=tone(0.4), sound_codec="pcm_s16le")
        reads = (lambda: num_video_frames(path), lambda: read_video(path, [0]))
        reads = (*reads, lambda: read_sound(path))
    else:
        write_image(path, picture())
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    rejected = 0
    for _ in range(40):
        data = bytearray(whole)
        for position in rng.integers(min(len(data), 200), size=3):
            data[position] = rng.integers(256)
        path.write_bytes(data)
        for read in reads:
            try:
                read()
            except RejectedSample:
                rejected += 1
    assert rejected > 0


def test_reasons_name_no_folder_of_this_machine(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.wav", "a.png"):
        path = tmp_path / name
        path.write_bytes(b"nothing of the kind")
        for call in (
            lambda path=path: read_sound(path),
            lambda path=path: read_video(path, [0]),
            lambda path=path: read_image(path, upright=True),
        ):
            words = reason(call)
            assert str(tmp_path) not in words
            assert name in words
