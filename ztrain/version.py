"""The release, once: packaging, exports and `ztrain.__version__` read it here."""

VERSION = "0.1.0"
