"""``condiquant train`` and ``condiquant test``."""
