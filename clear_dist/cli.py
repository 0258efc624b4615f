"""The entry of the command line: what an interrupt does is settled before anything slow is imported."""

import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `clear-dist` and exit: 0 done, 2 a wrong request, 1 a failure while running, 130 interrupted."""
    # Signals wait until their handler, too, has been imported.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    from clear_dist.launch import streams
    from clear_dist.launch.interrupts import at_once

    with streams.there(), at_once():
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        from clear_dist.commands import app

        status = app.run(sys.argv[1:] if arguments is None else arguments)
    sys.exit(status)
