"""Other libraries; each module is imported by its own name and needs its library installed."""
