"""Models in diffusers' format, read from a folder or the Hugging Face Hub as weights only."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor, nn

from diffbackbone.models.base import BlockTable
from diffbackbone.models.diffusers.dit import DiffusersDiT
from diffbackbone.models.diffusers.model import DiffusersModel
from diffbackbone.models.diffusers.unet import DiffusersUNet
from diffbackbone.utils import UserError, check_names, first_not_finite, require

NETWORKS = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
"""Classes of diffusers that can be backbones."""
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "VQModel")
TOKENS = 77
"""Text tokens that Stable Diffusion reads."""


@dataclasses.dataclass(frozen=True)
class DiffusersConfig:
    """A network in diffusers' format and how its features are taken.

    Attributes:
        source: A pipeline's folder, a model's own folder, or the id of either on the Hugging Face
            Hub; ``<id>/<subfolder>`` names a part of a pipeline.
        condition: What cross-attention reads: ``"null"``, the embedding of the empty prompt by the
            pipeline's text encoder; ``"learned"``, which starts from it where there is a text
            encoder and is trained even if the network is frozen; or a safetensors file with
            ``prompt_embeds`` (1, L, C) and, for SDXL, ``pooled_prompt_embeds`` (1, C).
        taps: ``"normalized"`` or ``"raw"``, for DiT; see :class:`DiffusersDiT`.
        vae: Folder or id of the autoencoder, for a model's own folder; else the pipeline's.
        revision: Branch, tag or commit on the Hub.
        variant: Variant of the weights' files, such as ``"fp16"``.
    """

    source: str
    condition: str = "null"
    taps: str = "normalized"
    vae: str | None = None
    revision: str | None = None
    variant: str | None = None

    labels_optional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_names("taps", [self.taps], ("normalized", "raw"))

    def __str__(self) -> str:
        return f"diffusers://{self.source}"

    def replace(self, **changes: Any) -> DiffusersConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @functools.cached_property
    def _place(self) -> tuple[str, str | None]:
        """Folder or id, and the subfolder of the network in it."""
        name = self.source
        folder = Path(name).expanduser()
        if folder.is_dir():
            is_part = (folder.parent / "model_index.json").is_file()
            if is_part and not (folder / "model_index.json").is_file():
                return str(folder.parent), folder.name
            return str(folder), None
        if name.count("/") == 0 or name.startswith(("/", ".", "~")):
            raise FileNotFoundError(f"{self}: there is no folder {folder}")
        parts = name.split("/")
        return "/".join(parts[:2]), "/".join(parts[2:]) or None

    @functools.cached_property
    def _index(self) -> dict[str, Any]:
        """The pipeline's parts by name, [library, class]; empty for a model's own folder."""
        try:
            return diffusers.DiffusionPipeline.load_config(self._place[0], **self._hub())
        except OSError:  # also where nothing can be had; then the network's own can't either
            return {}

    def _class_of(self, part: str) -> str | None:
        """Class of a part of the pipeline; None if it lacks the part."""
        return self._index.get(part, (None, None))[1]

    @functools.cached_property
    def _part(self) -> str | None:
        """Subfolder of the network; None for a model's own folder."""
        parts = [name for name in ("unet", "transformer") if self._class_of(name)]
        return self._place[1] or next(iter(parts), None)

    @functools.cached_property
    def network(self) -> dict[str, Any]:
        """The network's own configuration, as diffusers has written it."""
        place, options = self._place[0], self._hub()
        try:
            config = diffusers.UNet2DModel.load_config(place, subfolder=self._part, **options)
        except OSError as error:
            raise UserError(
                f"{self} is neither a folder that save_pretrained of a pipeline or model has "
                f"written, nor to be had from the Hugging Face Hub: {_one_line(error)}"
            ) from error
        self._class_in(config, NETWORKS)
        return config

    def _class_in(self, config: dict[str, Any], supported: Collection[str]) -> type:
        """Return diffusers' class of a configuration, which must be one of those supported."""
        kind = config.get("_class_name")
        if kind not in supported:
            raise UserError(
                f"{self} has a {kind}, which is not supported; choose from {', '.join(supported)}"
            )
        return getattr(diffusers, kind)

    @functools.cached_property
    def _vae_place(self) -> tuple[str, str | None] | None:
        """Folder or id and subfolder of the autoencoder; None for a network of images."""
        if self.vae is not None:
            return self.vae, None
        parts = [name for name in ("vae", "vqvae") if self._class_of(name)]
        return (self._place[0], parts[0]) if parts else None

    @functools.cached_property
    def _scheduler(self) -> dict[str, Any]:
        part = "scheduler" if self._index else None
        try:
            scheduler = diffusers.DDPMScheduler
            return scheduler.load_config(self._place[0], subfolder=part, **self._hub())
        except OSError as error:
            if self._class_of("scheduler") or not self._is_absent("scheduler_config.json", error):
                raise UserError(f"{self}: no scheduler can be had: {_one_line(error)}") from error
            return {}

    def _is_absent(self, name: str, error: OSError) -> bool:
        """Whether a file that could not be read does not exist: offline, in an earlier run."""
        from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        place, cause = self._place[0], error.__context__
        if Path(place).is_dir():
            return not Path(place, name).exists()
        if isinstance(cause, LocalEntryNotFoundError):
            return try_to_load_from_cache(place, name, revision=self.revision) is _CACHED_NO_EXIST
        return isinstance(cause, EntryNotFoundError)

    @functools.cached_property
    def noise_schedule(self) -> str | tuple[float, ...]:
        """Betas of the pipeline's scheduler; without one, those of the network's family."""
        found = self._scheduler
        if found and not {"beta_schedule", "trained_betas"} & found.keys():
            raise UserError(
                f"{self}: {found.get('_class_name')} has no variance-preserving noise "
                "schedule (betas), so x_t can't be computed"
            )
        if not found:
            if self.network["_class_name"] != "UNet2DConditionModel":
                return "linear"
            found = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        scheduler = diffusers.DDPMScheduler.from_config(found)
        return tuple(scheduler.betas.double().tolist())

    @property
    def prediction_type(self) -> str:
        """What the network predicts: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``."""
        return self._scheduler.get("prediction_type", "epsilon")

    @functools.cached_property
    def _empty(self) -> DiffusersModel:
        """The network on the meta device: shapes without weights."""
        with torch.device("meta"):
            return self.build()

    @property
    def blocks(self) -> BlockTable:
        """The table of blocks."""
        return self._empty.blocks

    @property
    def num_classes(self) -> int | None:
        """Classes of a class-conditional network."""
        return self._empty.num_classes

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self._empty.in_channels

    @property
    def image_size(self) -> int:
        """Resolution in pixels that the network was trained at; 256 where it doesn't say."""
        size = self.network.get("sample_size") or 256 // self._empty.input_stride
        side = size if isinstance(size, int) else min(size)
        return side * self._empty.input_stride

    def _token_width(self) -> int | None:
        """Channels of the text tokens; None for a network that reads none."""
        net = self.network
        names = ("down_block_types", "mid_block_type", "up_block_types", "addition_embed_type")
        reads = str([net.get(name) for name in names])
        if net["_class_name"] != "UNet2DConditionModel" or not (
            "CrossAttn" in reads or "'text'" in reads
        ):
            return None
        width = net.get("encoder_hid_dim") or net.get("cross_attention_dim")
        return width if isinstance(width, int) else width[0]

    def _pooled_width(self) -> int | None:
        """Channels of the pooled text embedding that SDXL reads beside the numbers of sizes."""
        if self.network.get("addition_embed_type") != "text_time":
            return None
        whole = self.network["projection_class_embeddings_input_dim"]
        sizes = 5 if self._index.get("requires_aesthetics_score") else 6
        return whole - sizes * self.network["addition_time_embed_dim"]

    def build(self, pretrained: bool = True, **options: Any) -> DiffusersModel:
        """Load the network; on the meta device, build it without weights.

        Args:
            pretrained: Not used: the autoencoder's weights are always those of the source.
            **options: See :class:`DiffusionModel`.

        Raises:
            UserError: Something is missing, damaged or not supported; the message says what.
        """
        tokens, pooled = self._read_condition()
        net, vae = self._module(self.network, NETWORKS, self._place[0], self._part), None
        if self._vae_place is not None:
            place, part = self._vae_place
            config = diffusers.AutoencoderKL.load_config(place, subfolder=part, **self._hub(place))
            vae = self._module(config, AUTOENCODERS, place, part)
        if isinstance(net, diffusers.DiTTransformer2DModel):
            model = DiffusersDiT(net, vae, self.taps == "raw", **options)
        else:
            model = DiffusersUNet(net, vae, tokens, pooled, self.condition == "learned", **options)
        model.config = self
        model.pretrained = not _on_meta()
        return model

    def _hub(self, place: str | None = None) -> dict[str, Any]:
        """Return the arguments that name the revision of a place; another one has no such."""
        own = place in (None, self._place[0])
        return {"revision": self.revision} if own and self.revision else {}

    def _module(
        self, config: dict[str, Any], supported: Collection[str], place: str, part: str | None
    ) -> nn.Module:
        """Load weights by diffusers, from safetensors files alone; none on the meta device."""
        kind = self._class_in(config, supported)
        if _on_meta():
            return kind.from_config(config)
        try:
            model, info = kind.from_pretrained(
                place,
                subfolder=part,
                variant=self.variant if place == self._place[0] else None,
                use_safetensors=True,
                torch_dtype=torch.float32,
                output_loading_info=True,
                **self._hub(place),
            )
        except Exception as error:  # a damaged file can fail in the reader in any way
            raise UserError(
                f"{self}: the weights of {kind.__name__} can't be read: {_one_line(error)}"
            ) from error
        wrong = [f"{what}: {', '.join(map(str, info[what][:4]))}" for what in info if info[what]]
        if name := first_not_finite(model.state_dict().items()):
            wrong.append(f"{name} holds NaN or infinite weights")
        if wrong:
            raise UserError(f"{self}: the weights don't fit: {'; '.join(wrong)}")
        return model

    def _read_condition(self) -> tuple[Tensor | None, Tensor | None]:
        """Return tokens (1, L, C) and the pooled embedding (1, C) that the network reads."""
        width, pooled_width = self._token_width(), self._pooled_width()
        if width is None:
            if self.condition != "null":
                raise UserError(
                    f"{self} has no cross-attention: condition must be 'null', got "
                    f"{self.condition!r:.200}"
                )
            return None, None
        if not _on_meta():
            if self.condition not in ("null", "learned"):
                return _read_embeddings(self.condition, width, pooled_width)
            kinds = {end: self._class_of(f"text_encoder{end}") or "" for end in ("", "_2")}
            ends = [end for end, kind in kinds.items() if "CLIP" in kind]
            if ends:
                return self._encode_nothing(ends)
            if self.condition == "null":
                raise UserError(
                    f"{self} has no CLIP text encoder: give condition='<safetensors file with "
                    "prompt_embeds>' or 'learned'"
                )
        pooled = None if pooled_width is None else torch.zeros(1, pooled_width)
        return torch.randn(1, TOKENS, width) * 0.02, pooled

    @torch.no_grad()
    def _encode_nothing(self, ends: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Encode the empty prompt as diffusers' pipelines do, by one or two CLIP text encoders."""
        require("the empty prompt's embedding", ["transformers"], "pip install transformers")
        import transformers

        both = self._pooled_width() is not None  # SDXL: the last layer but one of both encoders
        parts, pooled = [], None
        for end in ends:
            kinds = [self._class_of(f"{part}{end}") for part in ("tokenizer", "text_encoder")]
            tokenizer = getattr(transformers, kinds[0]).from_pretrained(
                self._place[0], subfolder=f"tokenizer{end}", **self._hub()
            )
            encoder = getattr(transformers, kinds[1]).from_pretrained(
                self._place[0],
                subfolder=f"text_encoder{end}",
                use_safetensors=True,
                **self._hub(),
            )
            length = tokenizer.model_max_length
            ids = tokenizer("", padding="max_length", max_length=length, return_tensors="pt")
            masked = getattr(encoder.config, "use_attention_mask", False)
            out = encoder.float().eval()(
                ids.input_ids,
                attention_mask=ids.attention_mask if masked else None,
                output_hidden_states=True,
            )
            parts.append(out.hidden_states[-2] if both else out[0])
            pooled = out[0]
        return torch.cat(parts, dim=-1), pooled if both else None


def _read_embeddings(
    path: str, width: int, pooled_width: int | None
) -> tuple[Tensor, Tensor | None]:
    """Read a condition's file: tokens (1, L, width), and the pooled (1, pooled_width) of SDXL."""
    from safetensors.torch import load_file

    try:
        found = load_file(Path(path).expanduser())
        tokens, pooled = found["prompt_embeds"].float().expand(1, -1, width), None
        if pooled_width is not None:
            pooled = found["pooled_prompt_embeds"].float().expand(1, pooled_width)
    except Exception as error:  # also safetensors' own type
        pooled_embeds = f" and pooled_prompt_embeds (1, {pooled_width})" * bool(pooled_width)
        raise UserError(
            "condition must be 'null', 'learned' or a safetensors file with prompt_embeds "
            f"(1, L, {width}){pooled_embeds}; {path!r:.200}: {error}"
        ) from error
    return tokens, pooled


def _on_meta() -> bool:
    return torch.get_default_device().type == "meta"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
