"""What the TPU compiler makes of `sample`, by `tpu.py`; skipped where there is no such compiler."""

import re
from collections import Counter

import jax
import pytest

import steindiff_jax as sd
import tpu

pytest.importorskip("libtpu", reason="the TPU compiler: pip install 'jax[tpu]'")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _as_users_run_it():
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("attention", ["XLA", "flash"])
@pytest.mark.parametrize(("topology", "model"), [("v5e:2x4", 2), ("v5e:16x16", 4)])
def test_what_chips_tell_one_another(topology, model, attention):
    """All that the default adds to the network's own words is one sum of a few numbers a step."""
    chips = tpu.Slice(topology, model, width=512, depth=2)
    network = chips.network(attention)
    plain, default = (chips.sampler(attention, tpu.SOLVERS[name]) for name in ("plain", "default"))
    assert network.collectives  # the weights are sharded
    assert plain.collectives == network.collectives
    more = default.collectives - network.collectives
    assert default.collectives == network.collectives + more
    [((kind, _), count)] = more.items()
    assert (kind, count) == ("all-reduce", 1)
    assert tpu.size(more) < 1000
    for program in (plain, default):
        assert program.once == 0
        assert not re.search(tpu.HOST, program.text)
    assert plain.flops < default.flops < 1.01 * network.flops


@pytest.mark.parametrize("estimator", [sd.Exact(), sd.Hutchinson()], ids=repr)
def test_a_kernel_without_forward_mode(estimator):
    """The estimator that needs it is named, before anything is compiled."""
    chips = tpu.Slice("v5e:2x4", 2, width=512, depth=1)
    with pytest.raises(ValueError, match=f"^{type(estimator).__name__}.* does not have"):
        chips.sampler("flash", sd.Stein(tpu.INNER, estimator=estimator))


def test_size():
    counts = {"f32[57]": 2, "bf16[3,2]": 1, "s8[]": 1, "pred[5]": 1}
    found = Counter({("all-reduce", array): count for array, count in counts.items()})
    assert tpu.size(found) == 2 * 57 * 4 + 3 * 2 * 2 + 1 + 5
