"""Frames of video files and of folders."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alvts_cli import AlvtsError
from alvts_cli.video import Video, read_video

COUNT = 20


@pytest.fixture(scope="module")
def film(tmp_path_factory: Any) -> Path:
    """Twenty frames of 64 x 48, ten a second, each brighter than the one before."""
    import av

    path = tmp_path_factory.mktemp("film") / "film.mkv"
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(COUNT):
            pixels = np.full((48, 64, 3), 12 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers(video: Video) -> list[int]:
    return [round(np.asarray(frame).mean() / 12) for frame in video.frames]


@pytest.mark.parametrize(
    ("most", "indices"), [(1, [10]), (4, [2, 7, 12, 17]), (99, list(range(COUNT)))]
)
def test_frames_are_evenly_spaced(film: Path, most: int, indices: list[int]) -> None:
    video = read_video(film, most)
    assert video.indices == indices == numbers(video)
    assert {(frame.mode, frame.size) for frame in video.frames} == {("RGB", (64, 48))}
    told = {"total_num_frames": COUNT, "fps": 10.0, "frames_indices": indices, "duration": 2.0}
    assert video.metadata == told


def test_a_folder_in_the_order_of_its_names(tmp_path: Path) -> None:
    for i in (2, 0, 1, 3):
        Image.new("RGB", (4, 4), (12 * i,) * 3).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("x")
    video = read_video(tmp_path, 2)
    assert (video.indices, numbers(video), video.total) == ([1, 3], [1, 3], 4)
    Image.new("RGB", (5, 4)).save(tmp_path / "4.png")
    with pytest.raises(AlvtsError, match="not all of one size"):
        read_video(tmp_path, 9)


def test_files_that_are_no_videos(film: Path, tmp_path: Path, monkeypatch: Any) -> None:
    bad = {
        "cut.mkv": film.read_bytes()[:200],
        "words.mp4": b"words",
        "empty.mp4": b"",
        # Lists of other files, which are not followed.
        "list.m3u8": f"#EXTM3U\n#EXTINF:2,\n{film}\n#EXT-X-ENDLIST\n".encode(),
        "list.ffconcat": f"ffconcat version 1.0\nfile '{film}'\n".encode(),
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(AlvtsError, match=f"cannot read the video .*{name}: "):
            read_video(tmp_path / name, 4)
    with pytest.raises(AlvtsError, match="there is no video"):
        read_video(tmp_path / "none.mp4", 4)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AlvtsError, match=r"pip install 'alvts\[video\]'"):
        read_video(film, 4)
