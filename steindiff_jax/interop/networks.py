"""The networks of public checkpoints in Flax: three U-Nets and a diffusion transformer (DiT).

Fields of `UNet2D`, `UNet2DCondition` and `DiT` are the keys of a diffusers `config.json`, with its
defaults, and their annotations are what `load_diffusers` accepts. A parameter's path joined by dots
is its name in a diffusers checkpoint. `SongUNet` is the one of `load_edm`. Images are (batch,
height, width, channels). All networks are for inference: no dropout.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

from steindiff_jax.protocols import Batch, Rows

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "mish": jax.nn.mish,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu-approximate": nn.gelu,
    "relu": nn.relu,
}

SQRT2 = math.sqrt(2)  # by which Skip blocks divide, so that a sum keeps its variance

DownBlock = Literal[
    "DownBlock2D",
    "AttnDownBlock2D",
    "ResnetDownsampleBlock2D",
    "SkipDownBlock2D",
    "AttnSkipDownBlock2D",
]
UpBlock = Literal[
    "UpBlock2D",
    "AttnUpBlock2D",
    "ResnetUpsampleBlock2D",
    "SkipUpBlock2D",
    "AttnSkipUpBlock2D",
]


class UNet2D(nn.Module):
    """The U-Net that diffusers' `UNet2DModel` configures.

    DDPM's (Ho et al. 2020, arXiv:2006.11239), ADM's (Dhariwal & Nichol 2021, arXiv:2105.05233) with
    scale_shift and resnet resampling, NCSN++ (Song et al. 2021, arXiv:2011.13456) with Skip blocks
    and fourier times. num_heads, of guided-diffusion alone, counts the heads of every attention in
    place of attention_head_dim.

    Call: x (batch, height, width, in_channels), each side a multiple of 2^(levels - 1); t (batch,);
    class_labels (batch,) where the network knows classes, (batch, features) if "identity" embeds
    them. Returns an array like x: a learned variance, the second half of the channels, is dropped.
    """

    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: Literal["positional", "fourier", "learned"] = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0.0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[DownBlock, ...] = (
        "DownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
    )
    mid_block_type: Literal["UNetMidBlock2D"] | None = "UNetMidBlock2D"
    up_block_types: tuple[UpBlock, ...] = (
        "AttnUpBlock2D",
        "AttnUpBlock2D",
        "AttnUpBlock2D",
        "UpBlock2D",
    )
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: Literal[0, 1] = 1
    downsample_type: Literal["conv", "resnet"] | None = "conv"
    upsample_type: Literal["conv", "resnet"] | None = "conv"
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int | None = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: bool = True
    class_embed_type: Literal["timestep", "identity"] | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None
    num_heads: int | None = None

    def example(self) -> tuple[Array, Array, Array | None]:
        """Arguments of a smallest call, as `init` takes them."""
        side = 2 ** (len(self.block_out_channels) - 1)
        labels = None if self.num_class_embeds is None else jnp.zeros(1, int)
        if self.class_embed_type:
            shape = (1, self._embedding) if self.class_embed_type == "identity" else (1,)
            labels = jnp.zeros(shape)
        return jnp.zeros((1, side, side, self.in_channels)), jnp.ones(1), labels

    @nn.compact
    def __call__(self, x: Batch, t: Rows, class_labels: Array | None = None) -> Batch:
        levels = len(self.block_out_channels)
        _check_size(x, 2 ** (levels - 1), self.in_channels)
        _check_lengths(self, "block_out_channels", "down_block_types", "up_block_types")
        emb = self._embed(t, class_labels)
        image = 2 * x - 1 if self.center_input_sample else x
        h = _conv(image, self.block_out_channels[0], "conv_in")

        kept = [h]
        for i in range(levels):
            h, image = self._down(i, h, image, emb, kept)
        if self.mid_block_type:
            h = self._middle(h, emb)
        image = None  # of the output, which Skip blocks grow
        for i in range(levels):
            h, image = self._up(i, h, image, emb, kept)

        h = nn.silu(_group_norm(h, self.norm_num_groups, self.norm_eps, "conv_norm_out"))
        h = _conv(h, self.out_channels, "conv_out")
        h = h if image is None else h + image
        h = h / t[:, None, None, None] if self.time_embedding_type == "fourier" else h
        return _without_variance(h, x)

    def _down(
        self, i: int, h: Array, image: Array, emb: Array, kept: list[Array]
    ) -> tuple[Array, Array]:
        kind, name = self.down_block_types[i], f"down_blocks.{i}"
        features, options = self.block_out_channels[i], self._options(kind)
        for j in range(self.layers_per_block):
            h = self._resnet(h, emb, features, f"{name}.resnets.{j}", **options)
            if kind == "AttnDownBlock2D":
                h = self._attend(h, f"{name}.attentions.{j}", _groups(h, self.norm_num_groups))
            elif kind == "AttnSkipDownBlock2D":
                h = self._attend(h, f"{name}.attentions.{j}", 32, SQRT2)
            kept.append(h)
        if i + 1 == len(self.block_out_channels):
            return h, image
        if "Skip" in kind:
            options |= {"resample": fir_halve, "shortcut": True}
            h = self._resnet(h, emb, features, f"{name}.resnet_down", **options)
            image = fir_halve(image)
            h = h + nn.Conv(features, (1, 1), name=f"{name}.skip_conv")(image)
        elif _by_resnet(kind, self.downsample_type):
            options |= {"resample": halve}
            h = self._resnet(h, emb, features, f"{name}.downsamplers.0", **options)
        else:
            padding = 1 if self.downsample_padding else ((0, 1), (0, 1))
            h = _conv(h, features, f"{name}.downsamplers.0.conv", 2, padding)
        kept.append(h)
        return h, image

    def _middle(self, h: Array, emb: Array) -> Array:
        rescale, groups = self.mid_block_scale_factor, self.norm_num_groups
        options = {"groups": groups, "rescale": rescale}
        h = self._resnet(h, emb, h.shape[-1], "mid_block.resnets.0", **options)
        if self.add_attention:
            normed = self.resnet_time_scale_shift == "default"
            groups = self.attn_norm_num_groups or (_groups(h, groups) if normed else None)
            h = self._attend(h, "mid_block.attentions.0", groups, rescale)
        return self._resnet(h, emb, h.shape[-1], "mid_block.resnets.1", **options)

    def _up(
        self, i: int, h: Array, image: Array | None, emb: Array, kept: list[Array]
    ) -> tuple[Array, Array | None]:
        kind, name = self.up_block_types[i], f"up_blocks.{i}"
        features, options = self.block_out_channels[-1 - i], self._options(kind)
        for j in range(self.layers_per_block + 1):
            other = kept.pop()
            if kind == "AttnSkipUpBlock2D":  # its groups as published, a slip of brackets
                options["groups_in"] = min(h.shape[-1] + other.shape[-1] // 4, 32)
            h = jnp.concatenate([h, other], axis=-1)
            h = self._resnet(h, emb, features, f"{name}.resnets.{j}", **options)
            if kind == "AttnUpBlock2D":
                h = self._attend(h, f"{name}.attentions.{j}", _groups(h, self.norm_num_groups))
        if kind == "AttnSkipUpBlock2D":
            h = self._attend(h, f"{name}.attentions.0", 32, SQRT2)
        if "Skip" in kind and image is not None:
            image = fir_double(image)
        if i + 1 == len(self.block_out_channels):
            return h, image
        if "Skip" in kind:
            detail = nn.silu(_group_norm(h, None, self.norm_eps, f"{name}.skip_norm"))
            detail = _conv(detail, self.in_channels, f"{name}.skip_conv")
            image = detail if image is None else image + detail
            options = self._options(kind) | {"resample": fir_double, "shortcut": True}
            h = self._resnet(h, emb, features, f"{name}.resnet_up", **options)
        elif _by_resnet(kind, self.upsample_type):
            options |= {"resample": double}
            h = self._resnet(h, emb, features, f"{name}.upsamplers.0", **options)
        else:
            h = _conv(double(h), features, f"{name}.upsamplers.0.conv")
        return h, image

    def _options(self, kind: str) -> dict[str, Any]:
        return {"rescale": SQRT2} if "Skip" in kind else {"groups": self.norm_num_groups}

    @property
    def _embedding(self) -> int:
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    def _resnet(self, h: Array, emb: Array, features: int, name: str, **options: Any) -> Array:
        scale_shift = self.resnet_time_scale_shift == "scale_shift"
        options |= {"eps": self.norm_eps, "scale_shift": scale_shift, "name": name}
        return Resnet(features, act=ACTIVATIONS[self.act_fn], **options)(h, emb)

    def _attend(self, h: Array, name: str, groups: int | None, rescale: float = 1.0) -> Array:
        width = self.attention_head_dim or h.shape[-1]
        width = h.shape[-1] // self.num_heads if self.num_heads else width
        if width > h.shape[-1]:
            raise ValueError(f"attention_head_dim={width} exceeds the {h.shape[-1]} channels")
        attention = Attention(h.shape[-1] // width, width, groups, self.norm_eps, name=name)
        return (h + attention(h)) / rescale

    def _embed(self, t: Array, class_labels: Array | None) -> Array:
        """Time and class, (batch, features)."""
        width, features = self.block_out_channels[0], self._embedding
        if self.time_embedding_type == "positional":

            def project(t: Array) -> Array:
                return sinusoids(t, width, self.flip_sin_to_cos, self.freq_shift)

        elif self.time_embedding_type == "fourier":
            weight = self.param("time_proj.weight", nn.initializers.normal(16.0), (width,))

            def project(t: Array) -> Array:
                angles = jnp.log(t)[:, None] * weight[None] * (2 * math.pi)
                return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

        else:
            if self.num_train_timesteps is None:
                raise ValueError("time_embedding_type='learned' needs num_train_timesteps")
            table = nn.Embed(self.num_train_timesteps, width, name="time_proj")

            def project(t: Array) -> Array:
                return table(jnp.rint(t).astype(int))

        emb = _mlp(project(t), features, "time_embedding")
        if self.class_embed_type is None and self.num_class_embeds is None:
            if class_labels is not None:
                raise ValueError("the network knows no classes: leave class_labels out")
            return emb
        labels = _labels(class_labels)
        if self.class_embed_type == "identity":
            return emb + labels
        if self.class_embed_type == "timestep":
            return emb + _mlp(project(labels), features, "class_embedding")
        classes = self.num_class_embeds or 0
        return emb + nn.Embed(classes, features, name="class_embedding")(labels)


class UNet2DCondition(nn.Module):
    """The U-Net of Stable Diffusion 1, 2 and XL, diffusers' `UNet2DConditionModel`.

    Rombach et al. 2022, arXiv:2112.10752; Podell et al. 2023, arXiv:2307.01952. It works on latents
    and on the embeddings of a text; encoding and decoding are not part of it. attention_head_dim is
    the number of heads, which diffusers gave that name; a tuple has a value for each level.

    Call: x (batch, height, width, in_channels), each side a multiple of 2^(levels - 1); t (batch,);
    encoder_hidden_states (batch, tokens, cross_attention_dim); with "text_time" also the pooled
    text_embeds (batch, k) and time_ids (batch, n): sizes and crop, whose sinusoids make up the rest
    of projection_class_embeddings_input_dim = k + n addition_time_embed_dim. Returns an array like
    x.
    """

    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[Literal["CrossAttnDownBlock2D", "DownBlock2D"], ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    up_block_types: tuple[Literal["CrossAttnUpBlock2D", "UpBlock2D"], ...] = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    attention_head_dim: int | tuple[int, ...] = 8
    transformer_layers_per_block: int | tuple[int, ...] = 1
    use_linear_projection: bool = False
    addition_embed_type: Literal["text_time"] | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    def example(self) -> tuple[Array | None, ...]:
        """Arguments of a smallest call, as `init` takes them."""
        side, pooled, ids = 2 ** (len(self.block_out_channels) - 1), None, None
        if self.addition_embed_type:
            each, total = self._added
            pooled, ids = jnp.zeros((1, max(total - each, 0))), jnp.zeros((1, 1))
        x, text = (1, side, side, self.in_channels), (1, 1, self.cross_attention_dim)
        return jnp.zeros(x), jnp.ones(1), jnp.zeros(text), pooled, ids

    @nn.compact
    def __call__(
        self,
        x: Batch,
        t: Rows,
        encoder_hidden_states: Array,
        text_embeds: Array | None = None,
        time_ids: Array | None = None,
    ) -> Batch:
        levels, width = len(self.block_out_channels), self.cross_attention_dim
        _check_size(x, 2 ** (levels - 1), self.in_channels)
        _check_lengths(
            self,
            "block_out_channels",
            "down_block_types",
            "up_block_types",
            "attention_head_dim",
            "transformer_layers_per_block",
        )
        if encoder_hidden_states.ndim != 3 or encoder_hidden_states.shape[-1] != width:
            raise ValueError(
                f"encoder_hidden_states must be (batch, tokens, {width}), got "
                f"{encoder_hidden_states.shape}"
            )
        text = encoder_hidden_states.astype(x.dtype)  # or the whole network would have its dtype
        emb = self._embed(t, text_embeds, time_ids)

        def resnet(h: Array, level: int, name: str) -> Array:
            features, groups = self.block_out_channels[level], self.norm_num_groups
            return Resnet(features, groups, eps=self.norm_eps, name=name)(h, emb)

        def layer(h: Array, level: int, kind: str, name: str, j: int) -> Array:
            h = resnet(h, level, f"{name}.resnets.{j}")
            if not kind.startswith("CrossAttn"):
                return h
            heads, depth = (
                value[level] if isinstance(value, tuple) else value
                for value in (self.attention_head_dim, self.transformer_layers_per_block)
            )
            options = {"groups": self.norm_num_groups, "linear": self.use_linear_projection}
            return Transformer(heads, depth, **options, name=f"{name}.attentions.{j}")(h, text)

        h = _conv(x, self.block_out_channels[0], "conv_in")
        kept = [h]
        for i, kind in enumerate(self.down_block_types):
            name = f"down_blocks.{i}"
            for j in range(self.layers_per_block):
                h = layer(h, i, kind, name, j)
                kept.append(h)
            if i + 1 < levels:
                h = _conv(h, h.shape[-1], f"{name}.downsamplers.0.conv", 2)
                kept.append(h)
        h = layer(h, -1, "CrossAttn", "mid_block", 0)
        h = resnet(h, -1, "mid_block.resnets.1")
        for i, kind in enumerate(self.up_block_types):
            name = f"up_blocks.{i}"
            for j in range(self.layers_per_block + 1):
                h = layer(jnp.concatenate([h, kept.pop()], axis=-1), -1 - i, kind, name, j)
            if i + 1 < levels:
                h = _conv(double(h), h.shape[-1], f"{name}.upsamplers.0.conv")
        h = nn.silu(_group_norm(h, self.norm_num_groups, self.norm_eps, "conv_norm_out"))
        return _without_variance(_conv(h, self.out_channels, "conv_out"), x)

    @property
    def _added(self) -> tuple[int, int]:
        """Sinusoids of each of the time_ids, and the width of these and text_embeds together."""
        each, total = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        if each is None or total is None:
            raise ValueError(
                "addition_embed_type='text_time' needs addition_time_embed_dim and "
                "projection_class_embeddings_input_dim"
            )
        return each, total

    def _embed(self, t: Array, text_embeds: Array | None, time_ids: Array | None) -> Array:
        """Time, and with "text_time" pooled text and sizes, (batch, features)."""
        width = self.block_out_channels[0]
        emb = _mlp(sinusoids(t, width, shift=0.0), 4 * width, "time_embedding")
        if self.addition_embed_type is None:
            if text_embeds is not None or time_ids is not None:
                raise ValueError("the network takes no text_embeds and no time_ids: leave them out")
            return emb
        each, total = self._added
        k, n = (0 if a is None else a.shape[-1] for a in (text_embeds, time_ids))
        if text_embeds is None or time_ids is None or k + n * each != total:
            raise ValueError(
                f"text_embeds (batch, k) and time_ids (batch, n) are needed with k + {each} n = "
                f"{total}, got k={k} and n={n}"
            )
        ids = sinusoids(time_ids.reshape(-1), each, shift=0.0).reshape(len(time_ids), -1)
        added = jnp.concatenate([text_embeds, ids], axis=-1)
        return emb + _mlp(added, 4 * width, "add_embedding")


class SongUNet(nn.Module):
    """The U-Net of score_sde, DDPM++ or NCSN++, as the snapshots of Karras et al. configure it.

    Song et al. 2021, arXiv:2011.13456, appendix H: blocks of BigGAN, sums divided by sqrt(2), and
    in NCSN++ Fourier features of the time, the filter (1, 3, 3, 1) and a residual pyramid of the
    input. With the choices of Karras et al. 2022, arXiv:2206.00364, table 7.

    Call: x (batch, height, width, in_channels), each side a multiple of 2^(levels - 1); t (batch,);
    class_labels (batch,) where label_dim is a number, of which any outside [0, label_dim) is no
    class. Returns an array like x. img_resolution names the weights and places the attention.
    """

    img_resolution: int
    in_channels: int = 3
    out_channels: int = 3
    label_dim: int | None = None
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] | None = (16,)
    embedding_type: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: int = 1
    encoder_type: Literal["standard", "residual"] = "standard"
    decoder_type: Literal["standard"] = "standard"
    resample_filter: tuple[Literal[1, 3], ...] = (1, 1)

    def example(self) -> tuple[Array, Array, Array | None]:
        """Arguments of a smallest call, as `init` takes them."""
        side = 2 ** (len(self.channel_mult) - 1)
        labels = None if self.label_dim is None else jnp.zeros(1, int)
        return jnp.zeros((1, side, side, self.in_channels)), jnp.ones(1), labels

    @nn.compact
    def __call__(self, x: Batch, t: Rows, class_labels: Array | None = None) -> Batch:
        levels = len(self.channel_mult)
        _check_size(x, 2 ** (levels - 1), self.in_channels)
        if self.img_resolution >> (levels - 1) < 1:
            raise ValueError(f"img_resolution={self.img_resolution} halved {levels - 1} times is 0")
        if self.resample_filter not in ((1, 1), (1, 3, 3, 1)):
            raise ValueError(f"resample_filter must be 1 1 or 1 3 3 1, got {self.resample_filter}")
        is_fir = len(self.resample_filter) == 4
        narrow, widen = (fir_halve, fir_double) if is_fir else (halve, double)
        emb = self._embed(t, class_labels)
        at = [f"{self.img_resolution >> i}x{self.img_resolution >> i}" for i in range(levels)]
        attends = [self.img_resolution >> i in (self.attn_resolutions or ()) for i in range(levels)]

        h, image = _conv(x, self.model_channels, f"enc.{at[0]}_conv"), x
        kept = [h]
        for i, size in enumerate(at):
            if i:
                h = _block(h, emb, h.shape[-1], f"enc.{size}_down", resample=narrow, shortcut=True)
                if self.encoder_type == "residual":
                    # Zeros around as wide as both filters reach, so that these may change places.
                    image = _conv(
                        image, h.shape[-1], f"enc.{size}_aux_residual", padding=1 + is_fir
                    )
                    h = image = (h + (_fir_halve_valid if is_fir else halve)(image)) / SQRT2
                kept.append(h)
            for j in range(self.num_blocks):
                features, name = self.model_channels * self.channel_mult[i], f"{size}_block{j}"
                h = _block(h, emb, features, f"enc.{name}", attends[i])
                kept.append(h)

        h = _block(h, emb, h.shape[-1], f"dec.{at[-1]}_in0", attend=True)
        h = _block(h, emb, h.shape[-1], f"dec.{at[-1]}_in1")
        for i, size in reversed(list(enumerate(at))):
            if i + 1 < levels:
                h = _block(h, emb, h.shape[-1], f"dec.{size}_up", resample=widen, shortcut=True)
            for j in range(self.num_blocks + 1):
                h = jnp.concatenate([h, kept.pop()], axis=-1)
                features, name = self.model_channels * self.channel_mult[i], f"{size}_block{j}"
                h = _block(h, emb, features, f"dec.{name}", attends[i] and j == self.num_blocks)
        h = nn.silu(_group_norm(h, None, 1e-6, f"dec.{at[0]}_aux_norm"))
        return _without_variance(_conv(h, self.out_channels, f"dec.{at[0]}_aux_conv"), x)

    def _embed(self, t: Array, class_labels: Array | None) -> Array:
        """Time and class, (batch, features)."""
        width = self.model_channels * self.channel_mult_noise
        features = self.model_channels * self.channel_mult_emb
        if self.embedding_type == "positional":
            emb = sinusoids(t, width, cosine_first=False)
        else:
            freqs = self.param("map_noise.freqs", nn.initializers.normal(16.0), (width // 2,))
            angles = t[:, None] * freqs[None] * (2 * math.pi)
            emb = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        if self.label_dim is not None:
            hot = jax.nn.one_hot(_labels(class_labels), self.label_dim, dtype=emb.dtype)
            emb = emb + nn.Dense(width, name="map_label")(hot * math.sqrt(self.label_dim))
        elif class_labels is not None:
            raise ValueError("the network knows no classes: leave class_labels out")
        emb = nn.silu(nn.Dense(features, name="map_layer0")(emb))
        return nn.Dense(features, name="map_layer1")(emb)


class DiT(nn.Module):
    """Diffusion transformer with adaLN-Zero, as diffusers' `DiTTransformer2DModel` configures it.

    Peebles & Xie 2023, arXiv:2212.09748. It works on latents; decoding is not part of it.

    Call: x (batch, height, width, in_channels), each side a multiple of patch_size; t (batch,);
    class_labels (batch,), of which num_embeds_ada_norm itself stands for "no class", for guidance.
    Returns an array like x: a learned variance, the second half of the channels, is dropped.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: Literal["gelu", "gelu-approximate"] = "gelu-approximate"
    num_embeds_ada_norm: int = 1000
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-5

    def example(self) -> tuple[Array, Array, Array]:
        """Arguments of a smallest call, as `init` takes them."""
        side = self.patch_size
        return jnp.zeros((1, side, side, self.in_channels)), jnp.ones(1), jnp.zeros(1, int)

    @nn.compact
    def __call__(self, x: Batch, t: Rows, class_labels: Array | None = None) -> Batch:
        labels = _labels(class_labels)
        heads, head_dim = self.num_attention_heads, self.attention_head_dim
        size, width = self.patch_size, heads * head_dim
        _check_size(x, size, self.in_channels)
        act, affine = ACTIVATIONS[self.activation_fn], self.norm_elementwise_affine

        h = nn.Conv(width, (size, size), size, padding="VALID", name="pos_embed.proj")(x)
        batch, rows, columns, _ = h.shape
        h = h + positions(rows, columns, width, self.sample_size // size).astype(h.dtype)[None]
        h = h.reshape(batch, rows * columns, width)

        def embed(name: str) -> Array:
            e = _mlp(sinusoids(t, 256), width, f"{name}.timestep_embedder")
            name = f"{name}.class_embedder.embedding_table"
            return nn.silu(e + nn.Embed(self.num_embeds_ada_norm + 1, width, name=name)(labels))

        bare = partial(_layer_norm, 1e-6, use_scale=False, use_bias=False)
        embs = []  # every block has an embedding of its own; the output uses the first one's
        for i in range(self.num_layers):
            name = f"transformer_blocks.{i}"
            embs.append(embed(f"{name}.norm1.emb"))
            change = nn.Dense(6 * width, name=f"{name}.norm1.linear")(embs[-1])[:, None]
            shift, scale, gate, shift_2, scale_2, gate_2 = jnp.split(change, 6, axis=-1)
            attention = Attention(heads, head_dim, bias=self.attention_bias, name=f"{name}.attn1")
            h = h + gate * attention(bare()(h) * (1 + scale) + shift)
            third = _layer_norm(
                self.norm_eps, use_scale=affine, use_bias=affine, name=f"{name}.norm3"
            )
            m = third(h) * (1 + scale_2) + shift_2
            m = act(nn.Dense(4 * width, name=f"{name}.ff.net.0.proj")(m))
            h = h + gate_2 * nn.Dense(width, name=f"{name}.ff.net.2")(m)

        shift, scale = jnp.split(nn.Dense(2 * width, name="proj_out_1")(embs[0])[:, None], 2, -1)
        channels = self.out_channels or self.in_channels
        patches = nn.Dense(size * size * channels, name="proj_out_2")
        h = patches(bare()(h) * (1 + scale) + shift)
        h = h.reshape(batch, rows, columns, size, size, channels).swapaxes(2, 3)
        return _without_variance(h.reshape(batch, rows * size, columns * size, channels), x)


class Resnet(nn.Module):
    """Residual block on h (batch, height, width, c), moved by the embedding emb (batch, k).

    groups: of the norms; None is a quarter of the channels, at most 32. resample: of both branches.
    """

    features: int
    groups: int | None = None
    groups_in: int | None = None
    eps: float = 1e-5
    act: Callable[[Array], Array] = nn.silu
    scale_shift: bool = False
    resample: Callable[[Array], Array] = lambda h: h
    shortcut: bool = False
    rescale: float = 1.0

    @nn.compact
    def __call__(self, x: Array, emb: Array) -> Array:
        h = self.act(_group_norm(x, self.groups_in or self.groups, self.eps, "norm1"))
        x, h = self.resample(x), self.resample(h)
        h = _conv(h, self.features, "conv1")
        dense = nn.Dense(self.features * (1 + self.scale_shift), name="time_emb_proj")
        e = dense(self.act(emb)).astype(x.dtype)[:, None, None]  # times may be in a wider one
        if self.scale_shift:
            scale, shift = jnp.split(e, 2, axis=-1)
            h = _group_norm(h, self.groups, self.eps, "norm2") * (1 + scale) + shift
        else:
            h = _group_norm(h + e, self.groups, self.eps, "norm2")
        h = _conv(self.act(h), self.features, "conv2")
        if self.shortcut or x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), name="conv_shortcut")(x)
        return (x + h) / self.rescale


class Transformer(nn.Module):
    """Transformer blocks on h (batch, height, width, c), which also see text (batch, tokens, k).

    Each attends to h, then to the text, then has a feed-forward layer with a gate, GEGLU (Shazeer
    2020, arXiv:2002.05202). linear: how a file stores the first and the last projection.
    """

    heads: int
    layers: int
    groups: int
    linear: bool = False

    @nn.compact
    def __call__(self, x: Array, text: Array) -> Array:
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(
                f"attention_head_dim={self.heads} heads do not divide {width} channels"
            )
        project = partial(nn.Dense, width) if self.linear else partial(nn.Conv, width, (1, 1))
        attend = partial(Attention, self.heads, width // self.heads, bias=False)
        h = project(name="proj_in")(_group_norm(x, self.groups, 1e-6, "norm"))
        for i in range(self.layers):
            name = f"transformer_blocks.{i}"
            m = _layer_norm(1e-5, name=f"{name}.norm1")(h)
            h = h + attend(name=f"{name}.attn1")(m)
            m = _layer_norm(1e-5, name=f"{name}.norm2")(h)
            h = h + attend(name=f"{name}.attn2")(m, text)
            m = _layer_norm(1e-5, name=f"{name}.norm3")(h)
            m = nn.Dense(8 * width, name=f"{name}.ff.net.0.proj")(m)
            m, gate = jnp.split(m, 2, axis=-1)
            h = h + nn.Dense(width, name=f"{name}.ff.net.2")(m * ACTIVATIONS["gelu"](gate))
        return x + project(name="proj_out")(h)


class Attention(nn.Module):
    """Attention of all positions of h (batch, ..., c) to one another, or to other (batch, n, k).

    groups: of a group norm before it; None is no norm.
    """

    heads: int
    head_dim: int
    groups: int | None = None
    eps: float = 1e-5
    bias: bool = True

    @nn.compact
    def __call__(self, h: Array, other: Array | None = None) -> Array:
        shape = h.shape
        h = h.reshape(shape[0], -1, shape[-1])
        if self.groups:
            h = _group_norm(h, self.groups, self.eps, "group_norm")

        def project(name: str, h: Array) -> Array:
            dense = nn.Dense(self.heads * self.head_dim, use_bias=self.bias, name=name)
            return dense(h).reshape(*h.shape[:2], self.heads, self.head_dim)

        other = h if other is None else other
        query, key, value = project("to_q", h), project("to_k", other), project("to_v", other)
        # In float32 at least, from the product on: float16 would overflow (Stable Diffusion 2).
        dtype = jnp.promote_types(query.dtype, jnp.float32)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=dtype)
        weights = jax.nn.softmax(logits / math.sqrt(self.head_dim)).astype(value.dtype)
        h = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(*h.shape[:2], -1)
        return nn.Dense(shape[-1], name="to_out.0")(h).reshape(shape)


def sinusoids(t: Array, features: int, cosine_first: bool = True, shift: float = 1.0) -> Array:
    """Cosines and sines of w_k t, w_k = 10000^(-k / (features // 2 - shift)); (batch, features)."""
    half = features // 2
    if half <= shift:
        raise ValueError(f"freq_shift={shift} needs more than {features} features")
    # Rounded to float32 where training did: at t = 1000 the last digit of w moves a phase by 3e-5.
    exponents = np.float32(-math.log(10_000)) * np.arange(half, dtype=np.float32)
    w = np.exp(np.float64(exponents / np.float32(half - shift))).astype(np.float32)
    angles = t[:, None] * w[None]
    waves = [jnp.sin(angles), jnp.cos(angles)][:: -1 if cosine_first else 1]
    return jnp.pad(jnp.concatenate(waves, axis=-1), ((0, 0), (0, features % 2)))


def positions(rows: int, columns: int, features: int, base: int) -> Array:
    """Sines and cosines of column and row, scaled to a base x base grid; (rows, columns, features).

    Vaswani et al. 2017, arXiv:1706.03762, in two dimensions; features is a multiple of 4.
    """
    quarter = features // 4
    if features % 4:
        raise ValueError(f"heads times attention_head_dim must be a multiple of 4, got {features}")
    frequencies = jnp.exp(-math.log(10_000) / quarter * jnp.arange(quarter, dtype=jnp.float32))

    def waves(n: int) -> Array:
        angles = jnp.outer(jnp.arange(n, dtype=jnp.float32) * (base / n), frequencies)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    column = jnp.broadcast_to(waves(columns)[None], (rows, columns, 2 * quarter))
    row = jnp.broadcast_to(waves(rows)[:, None], (rows, columns, 2 * quarter))
    return jnp.concatenate([column, row], axis=-1)


def halve(h: Array) -> Array:
    """Mean over 2x2 pixels."""
    return nn.avg_pool(h, (2, 2), (2, 2))


def double(h: Array) -> Array:
    """Every pixel as 2x2."""
    return h.repeat(2, axis=1).repeat(2, axis=2)


def fir_halve(h: Array) -> Array:
    """Every other pixel, after the filter (1, 3, 3, 1) / 8 of Karras et al. 2020, 1912.04958."""
    return _fir(h, 1.0, window_strides=(2, 2), padding=((1, 1), (1, 1)))


def fir_double(h: Array) -> Array:
    """Zeros between the pixels, then the filter of `fir_halve`, brightness kept."""
    return _fir(h, 4.0, window_strides=(1, 1), padding=((2, 2), (2, 2)), lhs_dilation=(2, 2))


def _fir(h: Array, gain: float, **options: Any) -> Array:
    taps = jnp.array([1.0, 3.0, 3.0, 1.0], h.dtype) / 8
    channels = h.shape[-1]
    kernel = jnp.tile(gain * jnp.outer(taps, taps)[:, :, None, None], channels)
    options |= {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": channels}
    return lax.conv_general_dilated(h, kernel, **options)


def _fir_halve_valid(h: Array) -> Array:
    return _fir(h, 1.0, window_strides=(2, 2), padding="VALID")


def _block(
    h: Array, emb: Array, features: int, name: str, attend: bool = False, **options: Any
) -> Array:
    """What `SongUNet` is made of: a residual block, perhaps with attention after it."""
    h = Resnet(features, eps=1e-6, rescale=SQRT2, name=name, **options)(h, emb)
    if not attend:
        return h
    attention = Attention(1, features, _groups(h, None), 1e-6, name=f"{name}.attention")
    return (h + attention(h)) / SQRT2


_layer_norm = partial(nn.LayerNorm, use_fast_variance=False)


def _conv(h: Array, features: int, name: str, stride: int = 1, padding: Any = 1) -> Array:
    return nn.Conv(features, (3, 3), stride, padding=padding, name=name)(h)


def _groups(h: Array, groups: int | None) -> int:
    return groups or min(h.shape[-1] // 4, 32)


def _group_norm(h: Array, groups: int | None, eps: float, name: str) -> Array:
    groups = _groups(h, groups)
    return nn.GroupNorm(groups, epsilon=eps, use_fast_variance=False, name=name)(h)


def _mlp(h: Array, features: int, name: str) -> Array:
    h = nn.silu(nn.Dense(features, name=f"{name}.linear_1")(h))
    return nn.Dense(features, name=f"{name}.linear_2")(h)


def _by_resnet(kind: str, attention_s: str | None) -> bool:
    """Whether a block resamples inside a residual block; the config's choice is for Attn blocks."""
    return kind.startswith("Resnet") or ("Attn" in kind and attention_s == "resnet")


def _without_variance(h: Array, x: Array) -> Array:
    if h.shape[-1] not in (x.shape[-1], 2 * x.shape[-1]):
        raise ValueError(
            f"out_channels must be in_channels, or twice that with a learned variance: got "
            f"{h.shape[-1]} for {x.shape[-1]}"
        )
    return h[..., : x.shape[-1]]


def _labels(class_labels: Array | None) -> Array:
    if class_labels is None:
        raise ValueError("the network knows classes: class_labels (batch,) are needed")
    return class_labels


def _check_lengths(module: nn.Module, *fields: str) -> None:
    """That those of the fields that are tuples have a value for each level."""
    values = {field: getattr(module, field) for field in fields}
    lengths = {field: len(value) for field, value in values.items() if isinstance(value, tuple)}
    if len({*lengths.values()}) > 1:
        raise ValueError(f"{', '.join(lengths)} must have one length, got {[*lengths.values()]}")


def _check_size(x: Array, multiple: int, channels: int) -> None:
    if x.ndim != 4 or x.shape[1] % multiple or x.shape[2] % multiple or x.shape[3] != channels:
        raise ValueError(
            f"x must be (batch, height, width, {channels}) with height and width multiples of "
            f"{multiple}, got {x.shape}"
        )
