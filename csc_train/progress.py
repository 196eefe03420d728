"""Progress of long loops: a bar on a terminal, a line a minute elsewhere."""

import io
import logging
import sys
import threading

from tqdm import tqdm

logger = logging.getLogger(__name__)
LINE_INTERVAL_S = 60.0
"""Interval of lines, if standard error is not a terminal."""
_LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} elapsed, {remaining} left"


class ProgressBar(tqdm):
    """tqdm on a terminal. Elsewhere a thread logs a line every `LINE_INTERVAL_S`, however long a step takes."""

    def __init__(self, *args, **kwargs):
        """As tqdm; elsewhere than on a terminal, nothing is written to standard error."""
        self._closed, self._draws = threading.Event(), sys.stderr.isatty()
        if not self._draws:
            kwargs |= {"file": io.StringIO(), "bar_format": _LINE, "mininterval": 0, "miniters": 1}
        super().__init__(*args, **kwargs)
        if not self.disable and not self._draws:
            threading.Thread(target=self._log_lines, daemon=True).start()

    def close(self) -> None:
        """End the bar, or the lines."""
        self._closed.set()
        super().close()

    def display(self, *args, **kwargs) -> None:
        """Draw the bar, on a terminal only."""
        if self._draws:
            super().display(*args, **kwargs)

    def _log_lines(self) -> None:
        while not self._closed.wait(LINE_INTERVAL_S):
            if self.n != self.total:  # else another loop follows before this bar is closed
                logger.info(str(self))
