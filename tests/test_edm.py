"""Networks of EDM, guided-diffusion and consistency models: the same outputs, from inert files."""

import dataclasses
import json
import pickle
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import edm_reference as peer
import jax
import jax.numpy as jnp
import jaxtyping
import msgpack
import numpy as np
import pytest
import score_sde_reference as flax_peer
import snapshots
from closed_forms import reference as stored
from damage import Payload
from diffusers_reference import draw
from flax import serialization
from flax.traverse_util import unflatten_dict
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd
from steindiff_jax._pytree import pytree
from steindiff_jax.interop import _weights, networks
from steindiff_jax.interop.edm import LogSigma, SubVP, load_edm

SMALLEST = "edm ddpmpp edm"


@cache
def reference():
    with np.load(peer.FILE) as arrays:
        return dict(arrays)


NAMES = [name.removesuffix("/config") for name in reference() if name.endswith("/config")]


def configuration(name):
    return json.loads(str(reference()[f"{name}/config"]))


@cache
def traced(module, expected=_weights.expected):
    return expected(module, Path("file"))


@pytest.fixture(autouse=True)
def _each_network_is_traced_once(monkeypatch):
    monkeypatch.setattr(_weights, "expected", lambda module, _: traced(module))


@cache
def weights(name):
    shapes = configuration(name)["shapes"]
    return {key: draw(key, tuple(shape)) for key, shape in shapes.items()}


def write(folder, name, arrays=None, **config):
    """A network's file as their code writes it."""
    arrays = weights(name) if arrays is None else arrays
    config = configuration(name) | config
    if "class" in config:
        file = folder / "network-snapshot.pkl"
        file.write_bytes(snapshots.snapshot(config, arrays))
    else:
        file = folder / "weights.pt"
        file.write_bytes(snapshots.zipped({k: snapshots.tensor(a) for k, a in arrays.items()}))
    return file


def flax_configuration(name):
    return json.loads(str(stored("score_sde")[f"{name}/config"]))


def flax_flags(name):
    flags = flax_configuration(name)["flags"]
    return flags | {"attn_resolutions": tuple(flags["attn_resolutions"])}


def flax_write(folder, name, **changes):
    """A checkpoint as their code writes it, of which the parameters of the optimizer do not count.

    changes: of `params_ema` by their paths, where __ is a slash; None leaves one out.
    """
    arrays = flax_peer.weights(flax_configuration(name)["shapes"])
    other = {"target": unflatten_dict({path: 0 * a for path, a in arrays.items()}, sep="/")}
    arrays |= {path.replace("__", "/"): a for path, a in changes.items()}
    arrays = {path: a for path, a in arrays.items() if a is not None}
    optimizer = "opt_state" if name == "consistency" else "optimizer"
    state = {"step": 1, optimizer: other, "lr": 2e-4, "model_state": {}, "ema_rate": 0.999}
    state |= {"params_ema": unflatten_dict(arrays, sep="/"), "rng": np.zeros(2, np.uint32)}
    file = folder / "checkpoint_1"
    file.write_bytes(serialization.to_bytes(state))
    return file


# Without XLA's optimisations: compiled sooner, and each network runs twice.
@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def evaluate(denoiser, x, sigma):
    return denoiser(x, sigma)


def denoiser_of(loaded):
    knows = getattr(loaded.module, "label_dim", getattr(loaded.module, "num_class_embeds", None))
    cond = {"class_labels": peer.LABELS} if knows else {}
    return sd.from_linen(**loaded._asdict(), cond=cond)


def given(sigma):
    """What the networks of the reference were given."""
    return peer.inputs() * np.hypot(1, sigma), sigma


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(assert_array_equal, a, b)


# --- Parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_denoiser_is_theirs(name, tmp_path):
    """What torch computed from the same weights, in float32, with their preconditioning."""
    config = configuration(name)
    denoiser = denoiser_of(load_edm(write(tmp_path, name), **config.get("flags", {})))
    sigmas, outputs = np.float32(config["sigmas"]), reference()[f"{name}/outputs"]
    for sigma, expected in zip(sigmas, outputs, strict=True):
        if name not in FAR or sigma < 2:
            assert_allclose(evaluate(denoiser, *given(sigma)), expected, rtol=0, atol=1e-5)


# Where these two are told times of some hundred, float32 decides: by its last digits of the time in
# EDM's formula for VP, by those of the frequencies for iDDPM. A phase is their product.
FAR = ("edm ddpmpp vp", "edm adm iddpm")


@pytree
class Told(sd.EDM):
    """The schedule with a time of its own."""

    schedule: Any
    t: Any

    def at(self, ratio):
        return (self.t, *self.schedule.at(ratio)[1:])


@pytest.mark.parametrize("name", FAR)
def test_denoiser_is_theirs_at_their_time_and_frequencies(name, tmp_path, monkeypatch):
    def waves(t, features, cosine_first=True, shift=1.0):
        k = np.arange(features // 2, dtype=np.float32)
        w = np.float32(np.float64(np.float32(1e-4)) ** (k / np.float32(features // 2 - shift)))
        found = [jnp.sin(t[:, None] * w[None]), jnp.cos(t[:, None] * w[None])]
        return jnp.concatenate(found[:: -1 if cosine_first else 1], axis=-1)

    monkeypatch.setattr(networks, "sinusoids", waves)
    config, loaded = configuration(name), load_edm(write(tmp_path, name))
    sigmas, outputs = np.float32(config["sigmas"]), reference()[f"{name}/outputs"]
    for sigma, t, expected in zip(sigmas, config["times"], outputs, strict=True):
        told = loaded._replace(schedule=Told(loaded.schedule, np.float32(t)), time_scale=1.0)
        found = evaluate(denoiser_of(told), *given(sigma))
        assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_times_of_vp_and_iddpm(tmp_path):
    """VP's are those of float64, rounded; iDDPM's are EDM's, which are whole."""
    vp, iddpm = (load_edm(write(tmp_path, name)) for name in FAR)
    sigmas = np.float32(configuration(FAR[0])["sigmas"])
    exact = 999 * (np.sqrt(0.1**2 + 2 * 19.9 * np.log1p(np.float64(sigmas) ** 2)) - 0.1) / 19.9
    found = np.float32(vp.time_scale) * vp.schedule.time(jnp.asarray(sigmas))
    assert found.dtype == np.float32
    assert (np.abs(found - exact) <= np.spacing(found)).all()
    config = configuration(FAR[1])
    found = iddpm.schedule.time(jnp.asarray(config["sigmas"], jnp.float32))
    assert_array_equal(found, config["times"])


def test_one_step_of_ddim_is_the_denoiser(tmp_path):
    """`sample` takes what the file gives: a step to sigma = 0 ends at their D(x, sigma)."""
    denoiser = denoiser_of(load_edm(write(tmp_path, SMALLEST)))
    sigma, expected = configuration(SMALLEST)["sigmas"][1], reference()[f"{SMALLEST}/outputs"][1]
    solution = sd.sample(
        jax.random.key(0),
        denoiser,
        sigmas=np.float32([sigma, 0]),
        solver=sd.DDIM(),
        x_init=peer.inputs() * np.hypot(1, np.float32(sigma)),
    )
    assert_allclose(solution.x, expected, rtol=0, atol=1e-5)


def test_no_class_is_a_label_outside(tmp_path):
    """As a network whose labels weigh nothing."""
    loaded = load_edm(write(tmp_path, SMALLEST))
    arrays = weights(SMALLEST) | {"model.map_label.weight": np.zeros((8, 3), np.float32)}
    deaf = load_edm(write(tmp_path, SMALLEST, arrays))
    none = dataclasses.replace(denoiser_of(loaded), cond={"class_labels": jnp.array([-1, 3])})
    x = peer.inputs()
    found = evaluate(none, x, np.float32(1))
    assert_allclose(found, evaluate(denoiser_of(deaf), x, np.float32(1)), rtol=0, atol=1e-6)
    assert np.abs(found - evaluate(denoiser_of(loaded), x, np.float32(1))).max() > 1e-2
    with pytest.raises(ValueError, match="class_labels"):
        jax.eval_shape(loaded.module.apply, loaded.variables, jnp.asarray(x), jnp.ones(2))


def test_times_of_ve():
    """log(sigma / 2), and back."""
    ratio = jnp.array([0.02, 1.0, 100.0])
    t, alpha, sigma = LogSigma().at(ratio)
    assert_allclose(t, np.log(ratio / 2), rtol=1e-6)
    assert_allclose(LogSigma().sigma(t) / LogSigma().alpha(t), ratio, rtol=1e-5)
    assert_allclose(sigma / alpha, ratio)


@pytest.mark.parametrize("name", [*flax_peer.CASES, "consistency"])
def test_denoiser_is_that_of_score_sde(name, tmp_path):
    """What their Flax code computed from the same weights, in float64."""
    config = flax_configuration(name)
    denoiser = denoiser_of(load_edm(flax_write(tmp_path, name), **flax_flags(name)))
    outputs = stored("score_sde")[f"{name}/outputs"]
    for sigma, expected in zip(np.float32(config["sigmas"]), outputs, strict=True):
        assert_allclose(evaluate(denoiser, *given(sigma)), expected, rtol=0, atol=1e-5)


def test_times_of_sub_vp():
    """Song et al. 2021, arXiv:2011.13456, eq. 29, and back."""
    t, schedule = jnp.linspace(0.01, 1, 9), SubVP()
    alpha = np.exp(-(t**2) * 19.9 / 4 - t * 0.1 / 2)
    assert_allclose(schedule.alpha(t), alpha, rtol=1e-12)
    assert_allclose(schedule.sigma(t), 1 - alpha**2, rtol=1e-12)
    for found, expected in zip(
        schedule.at(jnp.asarray((1 - alpha**2) / alpha)), (t, alpha, 1 - alpha**2), strict=True
    ):
        assert_allclose(found, expected, rtol=1e-10)
    assert_allclose(schedule.time(schedule.sigma_max), 1.0, rtol=1e-10)


# --- Files ---------------------------------------------------------------------------------------


def test_torch_wrote_its_weights_differently_before(tmp_path):
    """The same arrays from a zip and from the layout before, in their own dtypes; views too."""
    name = "guided one level"
    new = load_edm(write(tmp_path, name), num_head_channels=16)
    tensors = {key: snapshots.tensor(a) for key, a in weights(name).items()}
    file = tmp_path / "before.pt"
    file.write_bytes(snapshots.legacy(tensors))
    same(load_edm(file, num_head_channels=16).variables, new.variables)
    key = "time_embed.0.weight"
    turned = np.ascontiguousarray(weights(name)[key].T)
    padded = snapshots.Stored(np.append(np.float32(7), turned.ravel()))
    stride = (1, turned.shape[1])
    tensors[key] = snapshots.tensor(weights(name)[key], padded, 1, stride)
    file.write_bytes(snapshots.zipped(tensors))
    same(load_edm(file, num_head_channels=16).variables, new.variables)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_dtypes(dtype, tmp_path):
    """Weights keep the dtype of the file."""
    name = "guided one level"
    arrays = {key: a.astype(dtype) for key, a in weights(name).items()}
    found = load_edm(write(tmp_path, name, arrays), num_head_channels=16).variables["params"]
    kernel = found["time_embedding.linear_1"]["kernel"]
    assert kernel.dtype == dtype
    assert_array_equal(kernel, arrays["time_embed.0.weight"].T)


def test_files_of_torch_as_installed(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is in the extra `parity`")
    name, file = "guided one level", tmp_path / "weights.pt"
    expected = load_edm(write(tmp_path, name), num_head_channels=16).variables
    state = {key: torch.from_numpy(a.copy()) for key, a in weights(name).items()}
    for is_zip in (True, False):
        torch.save(state, file, _use_new_zipfile_serialization=is_zip)
        same(load_edm(file, num_head_channels=16).variables, expected)


# --- Errors --------------------------------------------------------------------------------------


def changed(**arguments):
    return {"arguments": configuration(SMALLEST)["arguments"] | arguments}


UNSUPPORTED = {
    "preconditioning": ({"class": "Precond"}, "preconditioning must be one of .*'Precond'"),
    "network": ({"model": "UNet"}, "network must be one of .*'UNet'"),
    "unknown key": (changed(is_deep=True), "key 'is_deep' is not supported"),
    "decoder": (changed(decoder_type="skip"), "key 'decoder_type' must be .*got 'skip'"),
    "filter": (changed(resample_filter=[3, 1]), r"resample_filter must be .*\(3, 1\)"),
    "count": (changed(num_blocks=1.5), "key 'num_blocks' must be .*int.*1.5"),
    "endless": (changed(num_blocks=2**20), "1048576 blocks, but .* arrays"),
    "deep": (changed(channel_mult=[1] * 40), "no network .*img_resolution=8 halved 39 times"),
    "a list of lists": (changed(channel_mult=[[1]]), "key 'channel_mult' must be a few numbers"),
    "no size": ({"arguments": {"label_dim": 3}}, "configuration is incomplete: .*img_resolution"),
    "other size": (changed(img_resolution=16), "arrays missing, such as"),
    "more blocks": (changed(num_blocks=2), "arrays missing, such as .*block"),
    "no attention": (changed(attn_resolutions=0), "not in the network"),
    "wide": (changed(model_channels=16), "must be floating point of shape .*, got float32"),
    "sigma_data": ({"state": {"sigma_data": -1.0}}, "'sigma_data' must be a number from"),
    "cosine": ({"class": "iDDPMPrecond", "state": {"C_2": 0.1}}, "'C_2' must be a number from"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_snapshot_says_why(case, tmp_path):
    config, message = UNSUPPORTED[case]
    with pytest.raises(ValueError, match=message):
        load_edm(write(tmp_path, SMALLEST, **config))


@pytest.mark.parametrize(
    ("arrays", "flags", "message"),
    [
        ({}, {"noise_schedule": "quadratic"}, "noise_schedule must be .*'quadratic'"),
        ({}, {"num_head_channels": 0}, "num_head_channels must be at least 1"),
        ({}, {"num_head_channels": 64}, "num_head_channels=64, num_heads=None must fit 32"),
        ({}, {"num_heads": 3}, "num_heads=3 must fit 32"),
        ({}, {"num_heads": 0}, "num_heads must be at least 1"),
        ({"input_blocks.0.0.weight": np.zeros((32, 6, 3, 3))}, {}, "must have 3 channels"),
        ({"out.2.weight": np.zeros((3, 32, 3, 3), np.int64)}, {}, "out.2.weight must be floating"),
        ({"out.2.bias": np.full(3, np.nan)}, {}, "out.2.bias has values that are not finite"),
        ({"head.weight": np.zeros(3)}, {}, "1 arrays not in the network.*head.weight"),
        ({"middle_block.1.qkv.weight": None}, {}, "no 'middle_block.1.qkv.weight'"),
        ({"out.0.bias": None}, {}, "1 arrays missing, such as .'out.0.bias'"),
    ],
)
def test_unsupported_weights_say_why(arrays, flags, message, tmp_path):
    name = "guided one level"
    found = {key: a for key, a in (weights(name) | arrays).items() if a is not None}
    with pytest.raises(ValueError, match=message):
        load_edm(write(tmp_path, name, found), **{"num_head_channels": 16} | flags)


@pytest.mark.parametrize(
    ("arrays", "flags", "message"),
    [
        ({}, {"sde": "vesde"}, "sde must be 'vpsde' or 'subvpsde', got 'vesde'"),
        ({}, {"image_size": 0}, "image_size must be at least 1"),
        ({}, {"image_size": 1}, "no network .*img_resolution=1 halved 1 times"),
        ({}, {"attn_resolutions": (2,)}, "not in the network.*AttnBlockpp_1"),
        ({"Conv_1__bias": np.zeros(3, int)}, {}, "Conv_1.bias must be floating"),
        ({"Conv_1__bias": np.zeros(4)}, {}, r"Conv_1.bias must be .*\(3,\), got float64 \(4,\)"),
        ({"Conv_1__bias": np.zeros(3, complex)}, {}, "'Conv_1.bias.' is neither"),
        ({"Conv_1__bias": np.full(3, np.nan)}, {}, "Conv_1.bias has values that are not finite"),
        ({"Conv_1__bias": None}, {}, "1 arrays missing, such as .'Conv_1.bias'"),
        ({"Conv_2__bias": np.zeros(3)}, {}, "1 arrays not in the network.*Conv_2.bias"),
        ({"Conv_0__kernel": np.zeros(3)}, {}, "no 'Conv_0.weight' of 4 axes"),
        ({"Conv_0__kernel": np.zeros((3, 3, 3, 0))}, {}, "no 'Conv_0.weight' of 4 axes"),
        ({"ResnetBlockBigGANpp_0__Conv_0__kernel": None}, {}, "no 'ResnetBlockBigGANpp_0.Conv_0"),
    ],
)
def test_unsupported_checkpoints_say_why(arrays, flags, message, tmp_path):
    file = flax_write(tmp_path, "ddpmpp vp", **arrays)
    with pytest.raises(ValueError, match=message):
        load_edm(file, **flax_flags("ddpmpp vp") | flags)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*nowhere"):
        load_edm(tmp_path / "nowhere")


# --- Hostile files -------------------------------------------------------------------------------

SYSTEM = b"cposix\nsystem\n"
CALL = SYSTEM + b"(X\x09\x00\x00\x00echo pwnd\x85R"
STORAGE = snapshots.Stored(np.zeros(4, np.float32))
FUNCTION = "torch._utils._rebuild_tensor_v2"


def unpickled(data):
    return snapshots.pickled(snapshots.Call("torch.storage._load_from_bytes", data))


def doubled(opener, closer, times):
    """A container that holds twice one that holds twice..., in a few bytes for each."""
    steps = b"".join(b"(h%ch%c%c" % (i, i, closer) + b"q%c" % (i + 1) for i in range(times))
    return b"\x80\x02" + opener + b"q\x00" + steps + b"."


def packed(params, **more):
    return msgpack.packb({"params_ema": params} | more)


def ndarray(shape, dtype, data):
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))


HOSTILE = {
    "msgpack without blocks": (packed({}), "too few residual blocks"),
    "msgpack of text": (packed("weights"), "neither parameters nor an array"),
    "msgpack of objects": (packed({"a": ndarray((1,), "O", bytes(8))}), "can be read"),
    "msgpack of another size": (packed({"a": ndarray((10**9,), "f4", b"")}), "can be read"),
    "msgpack of no dtype": (packed({"a": ndarray((1,), 3, bytes(4))}), "can be read"),
    "msgpack of half a dtype": (packed({"a": ndarray((1,), ",4", bytes(4))}), "can be read"),
    "msgpack in no chunks": (packed({"__msgpack_chunked_array__": True}), "can be read"),
    "msgpack of many": (b"\x81\xaaparams_ema\xdd\xff\xff\xff\xff", "can be read"),
    "msgpack in itself": (b"\x81\xaaparams_ema" + b"\x91" * 10**5, "can be read"),
    "msgpack in dicts": (b"\x81\xaaparams_ema" + b"\x81\xa1a" * 300 + b"\xc0", "is neither"),
    "msgpack and more": (packed({}) + b"\x00", "can be read"),
    "other msgpack": (msgpack.packb({"step": 1}), "neither"),
    "os.system": (CALL + b".", "names posix.system.*nothing was run"),
    "eval": (b"cbuiltins\neval\n(X\x01\x00\x00\x001\x85R.", "names builtins.eval"),
    "by the stack": (b"\x8c\x02os\x8c\x06system\x93.", "names os.system"),
    "an import": (b"cantigravity\nfly\n.", "names antigravity.fly"),
    "a dotted name": (b"ctorch\nnn.modules.os.system\n)R.", "no 'ema'|neither"),
    "escapes in a name": (b"c\\F\n\\x41\n.", r"names \\F.\\x41"),
    "instance": (b"(iposix\nsystem\n.", "instruction INST"),
    "object": (b"(" + SYSTEM + b"o.", "names posix.system"),
    "text with escapes": (b"S'\\\\q'\n.", "instruction STRING"),
    "registry": (b"\x82\x01.", "instruction EXT1"),
    "in torch's bytes": (unpickled(CALL + b"."), "names posix.system"),
    "bytes in bytes": (unpickled(unpickled(b"")), "storages lie within storages"),
    "a call of text": (b"X\x01\x00\x00\x00a)R.", "calls what is no name"),
    "a call of a storage": (b"ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
    "unknown instruction": (b"\xff.", "instruction b.*no use"),
    "a storage of none": (b"NQ.", "names a storage"),
    "reading ahead": (b"\x8e" + b"\xff" * 8 + b"abc.", "expected|exceed|bytes"),
    "a large array of bytes": (
        b"\x96" + b"\x00\x00\x00\x00\xff\x00\x00\x00.",
        "instruction BYTEARRAY8",
    ),
    "a large memo": (b"Nr\xff\xff\xff\x7f.", "neither"),
    "a large frame": (b"\x80\x04\x95" + b"\xff" * 8 + b"N.", "neither"),
    "a large number": (b"\x8b\xff\xff\xff\x7f.", "instruction LONG4"),
    "itself": (b"]q\x00h\x00a.", "neither"),
    "itself as ema": (b"}q\x00X\x03\x00\x00\x00emah\x00s.", "neither"),
    "doubled": (doubled(b")", ord("t"), 200), "neither"),
    "doubled key": (doubled(b")", ord("t"), 99)[:-1] + b"}h\x63Ns.", "keys must be text"),
    "no memo": (b"h\x00.", "0"),
    "no stack": (b".", "."),
    "no mark": (b"t.", "."),
    "no end": (b"]" * 1000, "no end"),
    "nothing": (b"", "no end"),
    "set's items": (b"\x8f(" + b"N" * 10 + b"\x90.", "neither"),
    "a zip of nothing": (b"PK\x05\x06" + bytes(18), "."),
    "another zip": (snapshots.zipped({})[:-30], "."),
    "big-endian": (snapshots.zipped({}, b"big"), "big-endian"),
    "deflated": (
        snapshots.zipped({"a": snapshots.tensor(np.zeros(10**5))}, b"little", 8),
        "not one of torch.save",
    ),
    **{
        f"tensor {what}": (snapshots.zipped({"a": snapshots.Call(FUNCTION, *arguments)}), message)
        for what, arguments, message in [
            ("beyond its storage", (STORAGE, 1, (4,), (1,)), "does not fit its storage"),
            ("before its storage", (STORAGE, -1, (4,), (1,)), "must be a view of a storage"),
            ("with long strides", (STORAGE, 0, (2, 2), (1, 2**62)), "does not fit its storage"),
            ("expanded", (STORAGE, 0, (10**9, 10**9), (0, 0)), "does not fit its storage"),
            ("of nothing", (STORAGE, 0, (0,), (1,)), "does not fit its storage"),
            ("of many axes", (STORAGE, 0, (1,) * 70, (1,) * 70), "short tuple"),
            ("of uneven strides", (STORAGE, 0, (2, 2), (1,)), "."),
            ("of text", ("storage", 0, (4,), (1,)), "must be a view of a storage"),
        ]
    },
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_and_not_run(case, tmp_path, capfd):
    data, message = HOSTILE[case]
    file = tmp_path / "hostile"
    file.write_bytes(data)
    before = set(sys.modules)
    with pytest.raises(ValueError, match=message) as error:
        load_edm(file)
    assert not isinstance(error.value, jaxtyping.TypeCheckError)
    assert len(str(error.value)) < 500
    assert "antigravity" not in sys.modules.keys() - before
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("where", ["alone", "options", "arguments", "module_src", "storage"])
def test_a_payload_anywhere_in_a_snapshot_is_not_run(where, tmp_path):
    """What touches a file when it is unpickled."""
    mark = tmp_path / "was here"
    touch = snapshots.Call("pathlib.Path.touch", snapshots.Call("pathlib.Path", str(mark)))
    file = tmp_path / "network-snapshot.pkl"
    if where == "alone":
        file.write_bytes(pickle.dumps(Payload(mark)))
    elif where == "storage":
        storage = snapshots.Call("torch.storage._load_from_bytes", pickle.dumps(Payload(mark)))
        file.write_bytes(snapshots.pickled({"ema": snapshots.tensor(np.zeros(1), storage)}))
    elif where == "arguments":
        file = write(tmp_path, SMALLEST, **changed(num_blocks=touch))
    else:
        file.write_bytes(snapshots.pickled({where: touch}))
    with pytest.raises(ValueError, match=r"names .*(Path|getattr).*nothing was run"):
        load_edm(file)
    assert not mark.exists()


def test_source_in_a_snapshot_is_not_run(tmp_path, monkeypatch):
    """EDM's own loader runs it."""
    expected = load_edm(write(tmp_path, SMALLEST)).variables
    mark = tmp_path / "was here"
    monkeypatch.setattr(snapshots, "SOURCE", f"open({str(mark)!r}, 'w').close()")
    file = write(tmp_path, SMALLEST)
    assert snapshots.SOURCE.encode() in file.read_bytes()
    same(load_edm(file).variables, expected)
    assert not mark.exists()


def test_modules_and_arrays_that_share(tmp_path):
    """A module in itself, or bytes used twice, could be as large as they like."""
    name, file = "guided one level", tmp_path / "weights.pt"
    big = max(weights(name).values(), key=lambda a: a.size)
    shared = snapshots.Stored(big.ravel())
    tensors = {
        key: snapshots.tensor(a, None if a.size < 1000 else shared)
        for key, a in weights(name).items()
    }
    file.write_bytes(snapshots.zipped(tensors))
    with pytest.raises(ValueError, match="larger than the file, as some share their bytes"):
        load_edm(file, num_head_channels=16)
    inner = snapshots.module({}, _init_kwargs=configuration(SMALLEST)["arguments"])
    layer = snapshots.persistent("Layer", snapshots.module({}))
    inner["_modules"] = {"a": layer, "b": layer}
    outer = snapshots.module({})
    outer["_modules"] = {"model": snapshots.persistent("SongUNet", inner)}
    file.write_bytes(snapshots.pickled({"ema": snapshots.persistent("EDMPrecond", outer)}))
    with pytest.raises(ValueError, match="no module of its own"):
        load_edm(file)


@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_files_are_errors(count, tmp_path, monkeypatch):
    """Either a network with all arrays or a ValueError that says little, never anything else."""
    names = [SMALLEST, "guided one level"]
    files = {name: write(tmp_path, name) for name in names}
    before = tmp_path / "before.pt"
    tensors = {key: snapshots.tensor(a) for key, a in weights(names[1]).items()}
    before.write_bytes(snapshots.legacy(tensors))
    files["before"] = before
    flags = {"num_head_channels": 16} | flax_flags("ddpmpp vp")
    files["flax"] = flax_write(tmp_path, "ddpmpp vp")
    whole = {file: file.read_bytes() for file in files.values()}
    expected = {file: load_edm(file, **flags) for file in whole}
    structures = {file: jax.tree.structure(loaded.variables) for file, loaded in expected.items()}
    known = [loaded.module for loaded in expected.values()]

    def build(module, _):
        if count < 1000 and module not in known:  # seconds for each
            raise ValueError("another network")
        return traced(module)

    monkeypatch.setattr(_weights, "expected", build)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(count):
        file = list(whole)[rng.integers(len(whole))]
        data = bytearray(whole[file])
        if rng.random() < 0.2:
            del data[rng.integers(len(data)) :]
        else:  # most of a file is numbers, of which any will do
            ends = 20_000 if rng.random() < 0.8 else len(data)
            for at in rng.integers(ends, size=rng.integers(1, 5)):
                data[at if rng.random() < 0.5 else -1 - at] = rng.integers(256)
        file.write_bytes(data)
        refusal = None
        try:
            loaded = load_edm(file, **flags)
        except ValueError as error:
            refusal = error
        if refusal:
            assert not isinstance(refusal, jaxtyping.TypeCheckError)
            assert len(str(refusal)) < 2000
            refused += 1
        else:
            structure = jax.tree.structure(loaded.variables)
            assert loaded.module not in known or structure == structures[file]
        file.write_bytes(whole[file])
    assert refused > count // 4
