"""Scalars and pictures for TensorBoard."""

from __future__ import annotations

import io
import os
import socket
import struct
import time
from pathlib import Path

from PIL import Image

from dmtjepa.log_file import LogFile


class EventFile:
    """A new event file in a folder of TensorBoard.

    PyTorch's SummaryWriter ends the training at a full disk. This one writes later what cannot be written (`LogFile`).

    Args:
        folder: created if it is missing.
        purge_step: what earlier starts have written of this step and later ones is not shown.
    """

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # takes a while to import

        folder.mkdir(parents=True, exist_ok=True)
        self._file = LogFile(folder / f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}")
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Note a value, to be written by the next `flush`."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def add_picture(self, tag: str, data: bytes, step: int) -> None:
        """Note a picture in colour, the bytes of a JPEG or PNG file, to be written by the next `flush`."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, event: object) -> None:
        """Frame an event as a record: length, its checksum, data, their checksum."""
        from tensorboard.summary.writer.record_writer import masked_crc32c

        data = event.SerializeToString()  # type: ignore[attr-defined]
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        self._file.write(length + checksums[0] + data + checksums[1])
