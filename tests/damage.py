"""Files that are damaged, and one that must not be unpickled."""

import json
from pathlib import Path


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def damaged(rng, file, whole):
    """The bytes of a file, cut, changed or with others put in; or another value in a JSON."""
    if file.suffix == ".json" and rng.random() < 0.5:
        config = json.loads(whole)
        values = [None, True, 0, -1, 7, 2**63, 0.5, 1e308, "Attn", [], {}, [[8]], [8, 8], [None]]
        config[str(rng.choice([*config]))] = values[rng.integers(len(values))]
        return json.dumps(config).encode()
    header = 8 + int.from_bytes(whole[:8], "little") if file.suffix == ".safetensors" else 10_000
    at, n = int(rng.integers(min(len(whole), header))), int(rng.integers(1, 9))
    return [
        whole[:at],
        whole[:at] + whole[at + n :],
        whole[:at] + rng.bytes(n) + whole[at:],
        whole[:at] + rng.bytes(n) + whole[at + n :],
    ][rng.integers(4)]
