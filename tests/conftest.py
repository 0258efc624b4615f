"""What all tests share."""

import signal

# A run that was started in the background ignores Ctrl-C, and commands under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
