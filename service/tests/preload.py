"""Imported once by the fork server of `warm`: all that `reco serve` and the other commands
import.
"""

import pyarrow.parquet  # noqa: F401
import uvloop  # noqa: F401

import service.app
import service.server.connection_limits
import service.server.server  # noqa: F401
from models.encoder.loading.load import import_libraries

import_libraries()
