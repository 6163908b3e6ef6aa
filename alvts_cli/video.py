"""Videos: a few frames of a file, or of a folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from .errors import AlvtsError
from .files import open_regular


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a video.

    Attributes:
        frames: at least one, all of one size, RGB, in their order in time.
        indices: of each among all frames.
        total: frames of the whole video.
        fps: frames of the whole video in a second.
    """

    frames: Sequence[Image.Image]
    indices: Sequence[int]
    total: int
    fps: float

    @property
    def metadata(self) -> dict[str, Any]:
        """As processors of transformers take it."""
        return {
            "total_num_frames": self.total,
            "fps": self.fps,
            "frames_indices": list(self.indices),
            "duration": self.total / self.fps,
        }


def read_video(path: Path, most: int) -> Video:
    """At most so many frames, evenly spaced.

    Args:
        path: a file, or a folder of pictures, whose names say their order; one is a second there.
        most: at least 1.

    Raises:
        AlvtsError: no such file, no video, no library to read files with, or frames of different
            sizes.
    """
    if path.is_dir():
        from .data import pictures_in, read_pictures

        files = pictures_in(path)
        indices = _evenly(len(files), most)
        frames = read_pictures(files[i] for i in indices)
        if len({frame.size for frame in frames}) > 1:
            raise AlvtsError(f"the frames in {path} are not all of one size")
        return Video(frames, indices, len(files), 1.0)
    with open_regular(path, "video") as file:
        try:
            import av
        except ImportError:
            raise AlvtsError(
                "reading video files needs av; run: pip install 'alvts[video]', or give a folder "
                "of frames"
            ) from None
        try:
            # A playlist opens nothing that it names.
            with av.open(file, "r", options={"protocol_whitelist": "none"}) as container:
                fps = float(container.streams.video[0].average_rate or 24)
                total = sum(packet.size > 0 for packet in container.demux(video=0))
                container.seek(0)
                indices = _evenly(total, most)
                shown = enumerate(islice(container.decode(video=0), total))
                frames = [frame.to_image() for i, frame in shown if i in indices]
        # Whatever ffmpeg says of a damaged file.
        except Exception as error:
            reason = getattr(error, "strerror", None) or "it is damaged or not a video"
            raise AlvtsError(f"cannot read the video {path}: {reason}") from None
    if not frames:
        raise AlvtsError(f"cannot read the video {path}: it has no frames")
    return Video(frames, indices[: len(frames)], total, fps)


def _evenly(total: int, most: int) -> list[int]:
    """The numbers of at most `most` of `total` frames, in the middles of equal parts."""
    count = min(total, most)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]
