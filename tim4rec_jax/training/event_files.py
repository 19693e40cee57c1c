"""TensorBoard event files, written at once: a disk that is full is an error in the call that finds it so."""

import pathlib
import secrets
import time
from collections.abc import Mapping

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class EventFile:
    """One event file of scalars.

    tensorboardX's SummaryWriter hands events to a thread; if that dies of a full disk, the tenth event after it waits
    for ever.

    Args:
      folder: of the event files; made if it is not there.
      purge_step: TensorBoard hides what older files say of this step and later ones; None hides nothing.
    """

    def __init__(self, folder: pathlib.Path, purge_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # File names carry whole seconds of a clock that may be set back: a second file must not overwrite the first.
        self._writer = EventsWriter(str(folder / "events"), f".{secrets.token_hex(8)}")
        if purge_step is not None:
            self._writer.write_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self._writer.flush()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars of one step, which are with the operating system when the call returns.

        Raises:
          OSError: they cannot be written.
        """
        for name, value in values.items():
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
