"""Side by side with other samplers: see `__main__.py`."""
