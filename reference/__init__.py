"""Reference implementations: one self-contained file per method."""
