"""Networks of diffusers: the same outputs, the same trajectories; files that are wrong say how."""

import json
import math
import pickle
import re
from functools import cache, partial

import diffusers_reference as peer
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import Payload, damaged
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

import steindiff_jax as sd
from steindiff_jax.interop import _weights
from steindiff_jax.interop.checkpoints import load_diffusers
from steindiff_jax.interop.networks import UNet2DCondition

SCHEDULER = "scheduler_config.json"
SMALLEST = "class identity"
# Parameters of the published networks, counted with diffusers.
PUBLISHED = {
    "stable diffusion 1": ({"cross_attention_dim": 768}, 859_520_964),
    "stable diffusion 2": (
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        865_910_724,
    ),
    "stable diffusion xl": (
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        2_567_463_684,
    ),
}


@cache
def reference():
    with np.load(peer.FILE) as arrays:
        return dict(arrays)


def configuration(name):
    return json.loads(str(reference()[f"{name}/config"]))


def arguments(name):
    return peer.inputs(configuration(name), peer.CONFIGS[name][2])


def write(folder, name, config=(), rename=lambda key: key, scheduler=None):
    """A network's folder as diffusers writes it, with other keys of its configuration in place."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(configuration(name) | dict(config)))
    shapes = json.loads(str(reference()[f"{name}/shapes"]))
    arrays = {rename(key): peer.draw(key, tuple(shape)) for key, shape in shapes.items()}
    save_file(arrays, folder / peer.WEIGHTS)
    if scheduler is not None:
        (folder / SCHEDULER).write_text(json.dumps({"_class_name": "DDIMScheduler"} | scheduler))
    return folder


# Without XLA's optimisations: compiled sooner, and each network runs once.
@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def evaluate(module, variables, x, t, *cond):
    return module.apply(variables, x, t, *cond)


def output(name, folder):
    loaded = load_diffusers(folder)
    found = evaluate(loaded.module, loaded.variables, *arguments(name))
    assert found.dtype == jnp.float32
    return found


def some(names, every):
    """All of them, of which the quick run takes one in `every`."""
    slow = pytest.mark.slow
    return [pytest.param(n, marks=slow if i % every else ()) for i, n in enumerate(names)]


# --- Parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some(peer.CONFIGS, 3))
def test_output_is_that_of_diffusers(name, tmp_path):
    """What torch computed from the same weights, in float32."""
    found = output(name, write(tmp_path, name))
    assert_allclose(found, reference()[f"{name}/output"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", peer.CONFIGS)
def test_output_is_that_of_diffusers_as_installed(name, tmp_path):
    """Weights as diffusers draws them, through its own files."""
    torch = pytest.importorskip("torch", reason="torch is in the extra `parity`")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is in the extra `parity`")
    cls, options, _ = peer.CONFIGS[name]
    torch.manual_seed(0)
    module = getattr(diffusers, cls)(**options).eval().requires_grad_(False)
    if name == "ncsnpp":  # at its scale of 16 the last digit of log t alone is worth 1e-5
        module.time_proj.weight /= 16
    module.save_pretrained(tmp_path)
    expected = peer.call(module, *arguments(name))
    assert_allclose(output(name, tmp_path), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", some([*peer.TRAJECTORIES][::-1], 2))
def test_trajectory_is_that_of_diffusers(name, tmp_path):
    """DDIM of its scheduler: noise to sample through files, schedule, prediction and solver."""
    states, steps = reference()[f"{name}/ddim"], reference()[f"{name}/timesteps"]
    loaded = load_diffusers(write(tmp_path, name, scheduler=peer.TRAJECTORIES[name]))
    _, *conds = peer.start(configuration(name))
    check_trajectory(loaded, states, steps, conds)


def test_trajectory_is_that_of_a_pipeline_as_installed(tmp_path):
    pytest.importorskip("torch", reason="torch is in the extra `parity`")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is in the extra `parity`")
    module = peer.build("ddpm-cifar10")
    options = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **options)
    diffusers.DDIMPipeline(module, scheduler).save_pretrained(tmp_path)
    check_trajectory(load_diffusers(tmp_path), *peer.ddim(module, **options), [()])


def check_trajectory(loaded, states, steps, conds):
    is_text = isinstance(loaded.module, UNet2DCondition)
    names = ("encoder_hidden_states", "text_embeds", "time_ids") if is_text else ("class_labels",)
    denoiser, *others = [
        sd.from_linen(**loaded._asdict(), cond=dict(zip(names, cond, strict=False)))
        for cond in conds
    ]
    for other in others:
        denoiser = sd.guided(denoiser, other, peer.GUIDANCE)
    sigmas = np.append(loaded.schedule.ratio(jnp.asarray(steps, jnp.float32)), np.float32(0))
    alphas = 1 / np.hypot(1, sigmas)[:, None, None, None, None]
    solution = sd.sample(
        jax.random.key(0),
        denoiser,
        sigmas=sigmas,
        solver=sd.DDIM(),
        x_init=states[0] / alphas[0],
        record=lambda state, _: state.x,
    )
    assert_allclose(alphas[1:] * solution.record, states[1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", peer.SCHEDULES)
def test_schedule_and_prediction(name, tmp_path):
    config = configuration(f"schedule {name}")
    _, _, schedule, prediction = load_diffusers(write(tmp_path, SMALLEST, scheduler=config))
    expected = reference()[f"schedule {name}/alphas_cumprod"]
    # Zero terminal SNR itself is out of reach: see `Discrete.zero_terminal_snr`.
    n = expected.size - (name == "zero terminal snr")
    alpha = schedule.alpha(jnp.arange(n, dtype=jnp.float64))
    assert_allclose(alpha**2, expected[:n], rtol=1e-4)
    published = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
    assert prediction == published[config["prediction_type"]]


@pytest.mark.slow
def test_derivative_in_float64(tmp_path):
    """That of every correction's probe; and the output has the dtype of x."""
    module, variables, _, _ = load_diffusers(write(tmp_path, SMALLEST))
    x, t, labels = map(np.float64, arguments(SMALLEST))
    v = np.random.default_rng(2).standard_normal(x.shape)
    output = partial(evaluate, module, variables, t=t, labels=labels)
    found, slope = jax.jvp(output, (x,), (v,))
    assert found.dtype == jnp.float64
    assert_allclose(found, reference()[f"{SMALLEST}/output"], rtol=0, atol=1e-5)
    assert_allclose(slope, (output(x + 1e-5 * v) - output(x - 1e-5 * v)) / 2e-5, atol=1e-8)


def test_half_precision(tmp_path):
    """Weights keep the file's dtype; the output has that of x."""
    whole = load_diffusers(write(tmp_path, SMALLEST)).variables
    arrays = load_file(tmp_path / peer.WEIGHTS)
    save_file({key: a.astype(jnp.bfloat16) for key, a in arrays.items()}, tmp_path / peer.WEIGHTS)
    module, half, _, _ = load_diffusers(tmp_path)
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(whole), strict=True):
        assert a.dtype == jnp.bfloat16
        assert_allclose(np.float32(a), b, rtol=2**-8)
    assert jax.eval_shape(module.apply, half, *arguments(SMALLEST)).dtype == jnp.float32


def test_half_precision_throughout(tmp_path):
    """Neither times nor texts in float32 bring what follows to it, but sums of norms are in it."""
    module, variables, _, _ = load_diffusers(write(tmp_path, "stable diffusion xl"))
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables)
    x, *rest = arguments("stable diffusion xl")
    operations = jax.make_jaxpr(module.apply)(half, x.astype(jnp.bfloat16), *rest)
    assert operations.out_avals[0].dtype == jnp.bfloat16
    assert {*re.findall(r"(\w+)\[[^]]*\] = reduce_sum", str(operations))} == {"f32"}
    assert {*re.findall(r"(\w+)\[[^]]*\] = conv_general", str(operations))} == {"bf16"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_published_networks(name, tmp_path):
    """The defaults and the levels of the real ones, whose weights are not at hand."""
    config, count = PUBLISHED[name]
    shapes = _weights.expected(UNet2DCondition(**config), tmp_path).values()
    assert sum(math.prod(shape) for _, shape in shapes) == count


# --- Layouts and names ---------------------------------------------------------------------------


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(assert_array_equal, a, b)


def test_layouts(tmp_path):
    """A network alone, one beside its scheduler's file, pipelines of both kinds, shards."""
    alone = load_diffusers(write(tmp_path / "alone", SMALLEST))
    assert alone.schedule is None
    assert alone.prediction is None
    beside = load_diffusers(write(tmp_path / "beside", SMALLEST, scheduler={}))
    assert_array_equal(beside.schedule.betas, sd.Discrete.linear().betas)
    for kind in ("unet", "transformer"):
        pipeline = tmp_path / f"pipeline of a {kind}"
        pipeline.mkdir()
        write(pipeline / kind, SMALLEST)
        (pipeline / "scheduler").mkdir()
        config = {"_class_name": "ScoreSdeVeScheduler", "sigma_max": 1348}
        (pipeline / "scheduler" / SCHEDULER).write_text(json.dumps(config))
        loaded = load_diffusers(str(pipeline))
        assert isinstance(loaded.schedule, sd.EDM)
        assert loaded.prediction == "score"
        same(loaded.variables, alone.variables)
    shards = write(tmp_path / "shards", SMALLEST)
    whole = load_file(shards / peer.WEIGHTS)
    (shards / peer.WEIGHTS).unlink()
    for i in range(2):
        part = {key: whole[key] for key in sorted(whole)[i::2]}
        save_file(part, shards / f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors")
    same(load_diffusers(shards).variables, alone.variables)


def test_names_of_old(tmp_path):
    """Arrays and blocks as diffusers named them at first; the networks of then keep them."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(key):
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.")
        return "time_proj.W" if key == "time_proj.weight" else key

    for name, blocks in {
        "ncsnpp": {},
        "learned variance": {
            "down_block_types": ["UNetResAttnDownBlock2D", "UNetResDownBlock2D"],
            "up_block_types": ["UNetResUpBlock2D", "UNetResAttnUpBlock2D"],
        },
    }.items():
        new = load_diffusers(write(tmp_path / name, name))
        before = load_diffusers(write(tmp_path / f"old {name}", name, blocks, rename))
        assert before.module == new.module
        same(before.variables, new.variables)


def test_transformer_2d_with_the_keys_of_dit(tmp_path):
    old = {"_class_name": "Transformer2DModel", "cross_attention_dim": None}
    old |= {"only_cross_attention": False, "num_vector_embeds": None}
    new = load_diffusers(write(tmp_path / "new", "DiT-XL-2"))
    before = load_diffusers(write(tmp_path / "old", "DiT-XL-2", old))
    assert before.module == new.module
    same(before.variables, new.variables)


# --- Errors --------------------------------------------------------------------------------------

UNSUPPORTED = {
    "class": (SMALLEST, {"_class_name": "UNet3DConditionModel"}, "_class_name.*UNet3DCondition"),
    "unknown key": (SMALLEST, {"dual_cross_attention": True}, "key 'dual_cross_attention' = True"),
    "activation": (SMALLEST, {"act_fn": "tanh"}, "key 'act_fn' must be .*'silu'.*, got 'tanh'"),
    "resnet": (SMALLEST, {"resnet_time_scale_shift": "ada_group"}, "key 'resnet_time_scale_shift'"),
    "block": (SMALLEST, {"down_block_types": ["KDownBlock2D"]}, "key 'down_block_types'.*KDown"),
    "classes": (SMALLEST, {"class_embed_type": "projection"}, "key 'class_embed_type'"),
    "padding": (SMALLEST, {"downsample_padding": 2}, "key 'downsample_padding'.*got 2"),
    "more channels": (SMALLEST, {"out_channels": 4}, "out_channels must be .*got 4 for 3"),
    "count": (SMALLEST, {"layers_per_block": 2.5}, "key 'layers_per_block' must be .*int.*2.5"),
    "negative": (SMALLEST, {"in_channels": -3}, "key 'in_channels' .*got -3"),
    "truth": (SMALLEST, {"norm_num_groups": True}, "key 'norm_num_groups' .*got True"),
    "not finite": (SMALLEST, {"norm_eps": float("nan")}, "key 'norm_eps' .*got nan"),
    "lengths": (SMALLEST, {"up_block_types": ["UpBlock2D"] * 2}, "must have one length"),
    "indivisible": (SMALLEST, {"norm_num_groups": 3}, "no network can be built"),
    "heads": (SMALLEST, {"attention_head_dim": 16}, "attention_head_dim=16 exceeds the 8"),
    "no channels": (SMALLEST, {"block_out_channels": []}, "key 'block_out_channels'.*got \\[\\]"),
    "endless": (SMALLEST, {"layers_per_block": 2**20}, "1048576 layers, but .* are 104 arrays"),
    "wide": (SMALLEST, {"block_out_channels": [2**20]}, r"must be .* of shape \(1048576"),
    "deep": (
        SMALLEST,
        {"block_out_channels": [8] * 90, "down_block_types": ["DownBlock2D"] * 90}
        | {"up_block_types": ["UpBlock2D"] * 90},
        "no network can be built",
    ),
    "more layers": (SMALLEST, {"layers_per_block": 3}, "arrays missing, such as"),
    "fewer layers": (
        "no middle",
        {"layers_per_block": 1},
        "not in the network of its conf",
    ),
    "other width": (SMALLEST, {"time_embedding_dim": 24}, r"of shape \(.*24\), got F32 \(.*20\)"),
    "norm": ("DiT-XL-2", {"norm_type": "ada_norm"}, "key 'norm_type'.*'ada_norm_zero'"),
    "feed-forward": ("DiT-XL-2", {"activation_fn": "geglu"}, "key 'activation_fn'.*'geglu'"),
    "text": ("DiT-XL-2", {"cross_attention_dim": 64}, "key 'cross_attention_dim' = 64"),
    "no such key": ("stable diffusion 1", {"freeu": 1}, "key 'freeu' = 1"),
    "guidance as input": (
        "stable diffusion 1",
        {"time_cond_proj_dim": 256},
        "key 'time_cond_proj_dim' = 256",
    ),
    "text block": (
        "stable diffusion 1",
        {"down_block_types": ["SimpleCrossAttnDownBlock2D"]},
        "key 'down_block_types'.*SimpleCross",
    ),
    "added": (
        "stable diffusion 1",
        {"addition_embed_type": "image"},
        "'addition_embed_type'.*image",
    ),
    "added without width": (
        "stable diffusion xl",
        {"addition_time_embed_dim": None},
        "'text_time' needs addition_time_embed_dim",
    ),
    "inpainting": ("stable diffusion 1", {"in_channels": 9}, "in_channels.*got 4 for 9"),
    "heads of levels": ("stable diffusion 2", {"attention_head_dim": [1]}, "must have one length"),
    "indivisible heads": ("stable diffusion 2", {"attention_head_dim": 3}, "3 heads do not divide"),
    "endless transformer": (
        "stable diffusion 1",
        {"transformer_layers_per_block": [1, 2**20]},
        "1048576 layers, but .* are 208 arrays",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_configuration_says_which_key(case, tmp_path):
    name, config, message = UNSUPPORTED[case]
    with pytest.raises(ValueError, match=message):
        load_diffusers(write(tmp_path, name, config))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"_class_name": "CMStochasticIterativeScheduler"}, "'_class_name'.*CMStoch.*loads alone"),
        ({"beta_schedule": "laplace"}, "key 'beta_schedule'.*'laplace'"),
        ({"prediction_type": "flow_prediction"}, "key 'prediction_type'.*'flow_prediction'"),
        ({"timestep_type": "continuous"}, "key 'timestep_type'.*'continuous'"),
        ({"predict_epsilon": False}, "key 'predict_epsilon'.*got False"),
        ({"beta_end": 1.5}, "betas must lie between 0 and 1, got 1.5"),
        ({"trained_betas": [0.1, "0.2"]}, "key 'trained_betas'"),
        ({"trained_betas": [0.1, 0.2], "rescale_betas_zero_snr": True}, "needs 3 betas .*got 2"),
    ],
)
def test_unsupported_scheduler_says_which_key(scheduler, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_diffusers(write(tmp_path, SMALLEST, scheduler=scheduler))


@pytest.mark.parametrize("weights", ["diffusion_pytorch_model.bin", peer.WEIGHTS, SCHEDULER])
def test_a_pickle_is_refused_and_not_run(weights, tmp_path):
    write(tmp_path, SMALLEST, scheduler={})
    if weights.endswith("bin"):
        (tmp_path / peer.WEIGHTS).unlink()
    (tmp_path / weights).write_bytes(pickle.dumps(Payload(tmp_path / "was here")))
    message = "Pickles .* may run code" if weights.endswith("bin") else "damaged|no JSON"
    with pytest.raises(ValueError, match=message):
        load_diffusers(tmp_path)
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"[]", b"[" * 100_000, b'{"_class_name": []}', b"1" * 10_000]
)
@pytest.mark.parametrize("name", ["config.json", SCHEDULER])
def test_configurations_that_are_none(name, text, tmp_path):
    (write(tmp_path, SMALLEST, scheduler={}) / name).write_bytes(text)
    with pytest.raises(ValueError, match=f"{name}.* (no JSON|must hold|'_class_name' must be)"):
        load_diffusers(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match=r"no config.json in .*save_pretrained"):
        load_diffusers(tmp_path / "nowhere")


@pytest.mark.parametrize("value", [np.float32(np.nan), np.int32(1)])
def test_weights_that_are_no_numbers(value, tmp_path):
    write(tmp_path, SMALLEST)
    arrays = load_file(tmp_path / peer.WEIGHTS)
    arrays["conv_in.bias"] = np.full_like(arrays["conv_in.bias"], value, dtype=value.dtype)
    save_file(arrays, tmp_path / peer.WEIGHTS)
    with pytest.raises(ValueError, match=r"conv_in.bias (has values .* not finite|must be float)"):
        load_diffusers(tmp_path)


@pytest.mark.parametrize("count", [100, pytest.param(6000, marks=pytest.mark.slow)])
def test_damaged_files_are_errors(count, tmp_path, monkeypatch):
    """Either a network that can be called or a ValueError, never anything else."""
    write(tmp_path, SMALLEST, scheduler={"beta_schedule": "linear", "trained_betas": [0.1, 0.2]})
    whole = {file: file.read_bytes() for file in sorted(tmp_path.iterdir())}
    # A network as it should be is traced once.
    monkeypatch.setattr(_weights, "expected", cache(_weights.expected))
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(count):
        file = list(whole)[rng.integers(len(whole))]
        file.write_bytes(damaged(rng, file, whole[file]))
        try:
            loaded = load_diffusers(tmp_path)
        except ValueError:
            refused += 1
        else:
            assert jax.tree.structure(loaded.variables).num_leaves == 104
        file.write_bytes(whole[file])
    assert refused > count // 2


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((2, 6, 8, 2), None, r"multiples of 4, got \(2, 6, 8, 2\)|height, width, 3"),
        ((2, 8, 8, 3), np.zeros(2, int), "knows no classes"),
    ],
)
def test_arguments_of_the_u_net(shape, labels, message, tmp_path):
    module, variables, _, _ = load_diffusers(write(tmp_path, "adm-lsun"))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.apply, variables, jnp.zeros(shape), jnp.ones(2), labels)


@pytest.mark.parametrize("name", ["DiT-XL-2", "class timestep"])
def test_classes_are_needed(name, tmp_path):
    module, variables, _, _ = load_diffusers(write(tmp_path, name))
    x = jnp.zeros((1, 8, 8, module.in_channels))
    with pytest.raises(ValueError, match="class_labels"):
        jax.eval_shape(module.apply, variables, x, jnp.ones(1))


@pytest.mark.parametrize(
    ("name", "drop", "message"),
    [
        ("stable diffusion 1", {}, "takes no text_embeds and no time_ids"),
        (
            "stable diffusion xl",
            {"text_embeds": None},
            r"needed with k \+ 8 n = 58, got k=0 and n=6",
        ),
        ("stable diffusion xl", {"time_ids": np.zeros((2, 5))}, "k=10 and n=5"),
        ("stable diffusion 2", {"encoder_hidden_states": np.zeros((2, 12))}, r"tokens, 12\), got"),
    ],
)
def test_arguments_of_stable_diffusion(name, drop, message, tmp_path):
    module, variables, _, _ = load_diffusers(write(tmp_path, name))
    x, t, sequence, pooled, ids = arguments("stable diffusion xl")
    cond = {"encoder_hidden_states": sequence, "text_embeds": pooled, "time_ids": ids}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partial(module.apply, variables), x, t, **cond | drop)
