"""Loaded by multiprocessing's fork server, from which the data workers of several processes come."""

import signal

import condiquant_basicsr.training  # noqa: F401  so that workers find BasicSR healed, and start at once

# A signal to the whole job leaves the server and its workers to the process that saves.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
