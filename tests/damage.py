"""Files that are damaged, and one that must not be unpickled."""

import json
from pathlib import Path

import numpy as np


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


def assert_damage_is_an_error(path, load, check, count):
    """Of `count` damaged versions of a file, each passes `check` or is a ValueError that names it.

    More than half must be errors.
    """
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(count):
        path.write_bytes(damaged(rng, path, whole))
        try:
            loaded = load(path)
        except ValueError as error:
            message = str(error)
            refused += 1
        else:
            message = str(path)
            check(loaded)
        assert str(path) in message
    assert refused > count // 2
