"""A folder that is read slowly and tells who reads it, for workers in processes of their own."""

import os
import shutil
import time
from pathlib import Path

from repack.sources.folder import FolderReader, FolderSource


class SlowReader(FolderReader):
    """Waits before each read, and adds a byte to FOLDER/readers/PID."""

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        with open(self._folder / "readers" / str(os.getpid()), "ab") as log:
            log.write(b".")
        time.sleep(0.02)
        super().read_into(file, offset, buffer)


class SlowFolder(FolderSource):
    """A source whose readers are slow."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        shutil.rmtree(folder / "readers", ignore_errors=True)
        (folder / "readers").mkdir()

    def reader(self) -> SlowReader:
        return SlowReader(self.folder, self._stamps)

    def reads(self) -> dict[int, int]:
        """How many reads each process has made, by its id."""
        return {int(path.name): path.stat().st_size for path in (self.folder / "readers").iterdir()}
