"""Files of images and videos hold the pixels they were made of, and play while they load."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from pipeboost.core.errors import ConfigurationError, PipeboostError
from pipeboost.serving.errors import StorageError
from pipeboost.serving.media import encode_image, encode_video, spritesheet, thumbnail
from tests.serving.jobs import files_at_most

RED = (220, 30, 60)


def _gradient(height=48, width=64, channels=3):
    down, across = np.mgrid[0:height, 0:width]
    planes = [down * 255 // height, across * 255 // width, (down + across) % 256, np.full_like(down, 128)]
    return np.stack(planes[:channels], axis=-1).astype(np.uint8)


def _frames(count=12, height=48, width=64, colour=RED):
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = colour
    return frames


def _opened(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_holds_every_bit(channels):
    pixels = _gradient(channels=channels)
    for compression in (None, 100):
        image = _opened(encode_image(pixels, "png", compression))
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image).reshape(pixels.shape), pixels)


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_jpeg_and_webp_are_near_and_smaller_with_less_quality(format):
    pixels = _gradient()
    sizes = []
    for compression in (0, 50, None, 100):
        data = encode_image(pixels, format, compression)
        image = _opened(data)
        assert (image.format, image.size) == (format.upper(), (64, 48))
        sizes.append(len(data))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4
    error = np.abs(np.asarray(_opened(encode_image(pixels, format)).convert("RGB")).astype(int) - pixels)
    assert error.mean() < 4


def test_transparency_stays_in_webp_and_becomes_white_in_jpeg():
    pixels = np.zeros((16, 16, 4), np.uint8)
    assert _opened(encode_image(pixels, "webp")).mode == "RGBA"
    assert np.asarray(_opened(encode_image(pixels, "jpeg"))).min() >= 254


@pytest.mark.parametrize(
    ("format", "compression", "message"),
    [
        ("gif", None, "output_format='gif' is not allowed; use one of 'png', 'jpeg', 'webp'"),
        ("jpeg", 101, "output_compression=101 must be an integer from 0 to 100"),
        ("webp", True, "output_compression=True must be"),
        ("png", 50, "output_compression=50 is for jpeg and webp"),
    ],
)
def test_other_formats_and_compressions_are_refused(format, compression, message):
    with pytest.raises(ConfigurationError, match=message):
        encode_image(_gradient(), format, compression)


def test_an_image_larger_than_the_format_has_room_for_is_one_sentence():
    with pytest.raises(PipeboostError, match="an image of 16400x1 cannot be written as webp: ") as caught:
        encode_image(np.zeros((1, 16400, 3), np.uint8), "webp")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("fps", "rate"), [(16, 16.0), (29.97, 29.97), (24000 / 1001, 24000 / 1001)])
def test_a_video_has_its_frames_rate_size_and_colours(tmp_path, fps, rate):
    frames = _frames()
    frames[6:] = (20, 200, 40)
    encode_video(frames, fps, tmp_path / "0.mp4")
    with av.open(str(tmp_path / "0.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == pytest.approx(rate, rel=1e-3)
        assert (stream.width, stream.height) == (64, 48)
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.codec_context.colorspace == 1  # BT.709, as players take it to be for large videos
    assert len(decoded) == 12
    for ours, theirs in zip(frames, decoded, strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= 6
    assert [path.name for path in tmp_path.iterdir()] == ["0.mp4"]


def test_a_videos_index_comes_before_its_pictures(tmp_path):
    encode_video(_frames(), 16, tmp_path / "0.mp4")
    data = (tmp_path / "0.mp4").read_bytes()
    boxes, place = [], 0
    while place < len(data):
        boxes.append(data[place + 4 : place + 8])
        place += int.from_bytes(data[place : place + 4], "big")
    assert place == len(data)
    assert boxes.index(b"moov") < boxes.index(b"mdat")


def test_odd_sides_get_one_row_and_column_more_and_no_pixel_moves(tmp_path):
    frames = _frames(3, 47, 63, colour=(200, 200, 200))
    frames[:, :, ::2] = 40
    encode_video(frames, 8, tmp_path / "0.mp4")
    with av.open(str(tmp_path / "0.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.pix_fmt) == (64, 48, "yuv420p")
        (first, *_) = container.decode(stream)
        assert np.abs(first.to_ndarray(format="rgb24")[:47, :63].astype(int) - frames[0]).max() <= 12


def test_a_video_that_does_not_fit_on_the_disk_is_not_there_and_an_earlier_one_stays(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 96, 96, 3), np.uint8)
    (tmp_path / "0.mp4").write_bytes(b"earlier")
    with files_at_most(20_000), pytest.raises(StorageError, match=r"0\.mp4 cannot be written"):
        encode_video(noise, 16, tmp_path / "0.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["0.mp4"]
    assert (tmp_path / "0.mp4").read_bytes() == b"earlier"


def test_a_thumbnail_is_the_middle_frame_small_and_webp():
    frames = _frames(9, 600, 800, colour=(0, 0, 0))
    frames[4] = RED
    image = _opened(thumbnail(frames))
    assert (image.format, image.size) == ("WEBP", (512, 384))
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - RED).max() <= 8


@pytest.mark.parametrize(("count", "grid"), [(1, (1, 1)), (3, (3, 1)), (7, (5, 2)), (81, (5, 5))])
def test_a_spritesheet_has_evenly_spread_frames_in_their_order(count, grid):
    frames = _frames(count, 24, 32)
    frames[...] = np.linspace(40, 240, count).astype(np.uint8).reshape(-1, 1, 1, 1)
    image = _opened(spritesheet(frames))
    assert (image.format, image.size) == ("JPEG", (32 * grid[0], 24 * grid[1]))
    pixels = np.asarray(image.convert("L")).astype(int)
    shown = [pixels[row * 24 + 12, column * 32 + 16] for row in range(grid[1]) for column in range(grid[0])]
    shown = shown[: min(count, 25)]
    assert shown == sorted(shown)
    assert abs(shown[0] - frames[0].max()) <= 3
    assert abs(shown[-1] - frames[-1].max()) <= 3
