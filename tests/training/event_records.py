"""TensorBoard event files, read back."""

import struct

from tensorboardX.proto.event_pb2 import Event


def _records(file):
    """The payloads of a TFRecord file: length (8 bytes), crc (4), payload, crc (4)."""
    content, position = file.read_bytes(), 0
    while position < len(content):
        (size,) = struct.unpack_from("<Q", content, position)
        yield content[position + 12 : position + 12 + size]
        position += 16 + size


def events_of(folder):
    """The events of a run folder, of the file that was written first at first."""
    files = sorted((folder / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    return [Event.FromString(record) for file in files for record in _records(file)]
