"""Models in diffusers' format, read from a folder or the Hugging Face Hub as weights only."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from diffbackbone.models.base import BlockTable
from diffbackbone.models.diffusers.dit import DiffusersDiT
from diffbackbone.models.diffusers.model import DiffusersModel
from diffbackbone.models.diffusers.unet import DiffusersUNet
from diffbackbone.utils import UserError, first_not_finite, require

NETWORKS = {
    "UNet2DModel": DiffusersUNet,
    "UNet2DConditionModel": DiffusersUNet,
    "DiTTransformer2DModel": DiffusersDiT,
}
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

    def __post_init__(self) -> None:
        if self.taps not in ("normalized", "raw"):
            raise UserError(f"taps must be 'normalized' or 'raw', got {self.taps!r:.200}")

    def __str__(self) -> str:
        return f"diffusers://{self.source}"

    def replace(self, **changes: Any) -> DiffusersConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    # ------------------------------------------------------------------------------ what is there

    @functools.cached_property
    def _place(self) -> tuple[str, str | None]:
        """Folder or id, and the subfolder of the network in it."""
        name = self.source
        folder = Path(name).expanduser()
        if folder.is_dir():
            if (folder / "model_index.json").is_file():
                return str(folder), None
            if (folder.parent / "model_index.json").is_file():
                return str(folder.parent), folder.name
            return str(folder), None
        if name.count("/") == 0 or name.startswith(("/", ".", "~")):
            raise FileNotFoundError(f"{self}: there is no folder {folder}")
        parts = name.split("/")
        return "/".join(parts[:2]), "/".join(parts[2:]) or None

    def _read(self, name: str) -> dict[str, Any] | None:
        """Read a JSON file of the folder or repository; None if there is no such file."""
        root, _ = self._place
        path = Path(root) / name
        if not Path(root).is_dir():
            from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
            from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

            try:
                path = Path(hf_hub_download(root, name, revision=self.revision))
            except Exception as error:  # no such repository, no access, no network: many types
                missing = isinstance(error, EntryNotFoundError)
                if isinstance(error, LocalEntryNotFoundError):  # offline: what an earlier run saw
                    known = try_to_load_from_cache(root, name, revision=self.revision)
                    missing = known is _CACHED_NO_EXIST
                if missing:
                    return None
                reason = " ".join(str(error).split())[:500]
                raise UserError(
                    f"{self} is neither a folder nor to be had from the Hugging Face Hub: {reason}"
                ) from error
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @functools.cached_property
    def _index(self) -> dict[str, Any]:
        """The pipeline's parts by name, [library, class]; empty for a model's own folder."""
        return self._read("model_index.json") or {}

    def _class_of(self, part: str) -> str | None:
        """Class of a part of the pipeline; None if it lacks the part."""
        return self._index.get(part, (None, None))[1]

    @functools.cached_property
    def _part(self) -> str | None:
        """Subfolder of the network; None for a model's own folder."""
        if self._place[1] is not None:
            return self._place[1]
        if not self._index:
            return None
        for name in ("unet", "transformer"):
            if self._class_of(name):
                return name
        raise UserError(f"{self}: the pipeline has no unet and no transformer")

    @functools.cached_property
    def network(self) -> dict[str, Any]:
        """The network's own configuration, as diffusers has written it."""
        name = "config.json" if self._part is None else f"{self._part}/config.json"
        config = self._read(name)
        if config is None:
            raise UserError(
                f"{self} has no {name}; give the folder that save_pretrained of a "
                "pipeline or model has written"
            )
        kind = config.get("_class_name")
        if kind not in NETWORKS:
            raise UserError(
                f"{self} is a {kind}, which is not supported; networks may be {', '.join(NETWORKS)}"
            )
        return config

    @functools.cached_property
    def _vae_place(self) -> tuple[str, str | None] | None:
        """Folder or id and subfolder of the autoencoder; None for a network of images."""
        if self.vae is not None:
            return self.vae, None
        for name in ("vae", "vqvae"):
            if self._class_of(name):
                return self._place[0], name
        return None

    @functools.cached_property
    def _scheduler(self) -> dict[str, Any]:
        name = "scheduler/scheduler_config.json" if self._index else "scheduler_config.json"
        return self._read(name) or {}

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

    # ------------------------------------------------------------------------------- its geometry

    @functools.cached_property
    def _empty(self) -> DiffusersModel:
        return self._build_empty()

    @property
    def blocks(self) -> BlockTable:
        """The table of blocks."""
        return self._empty.blocks

    @property
    def num_classes(self) -> int | None:
        """Classes of a class-conditional network."""
        return self._empty.num_classes

    @property
    def labels_optional(self) -> bool:
        """Whether a class-conditional network also runs without labels."""
        return True

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        model = self._empty
        return (model.net if model.vae is None else model.vae).config.in_channels

    @property
    def image_size(self) -> int:
        """Resolution in pixels that the network was trained at; 256 where it doesn't say."""
        size = self.network.get("sample_size") or 256 // self._empty.input_stride
        side = size if isinstance(size, int) else min(size)
        return side * self._empty.input_stride

    def _build_empty(self, *args: Any) -> DiffusersModel:
        """Build the network on the meta device: shapes without weights."""
        with torch.device("meta"):
            net = getattr(diffusers, self.network["_class_name"]).from_config(self.network)
            vae = None
            if self._vae_place is not None:
                kind, config = self._autoencoder()
                vae = kind.from_config(config)
            tokens = pooled = None
            if width := self._token_width():
                tokens = torch.empty(1, TOKENS, width)
            if width := self._pooled_width():
                pooled = torch.empty(1, width)
        return self._wrap(net, vae, tokens, pooled, *args)

    def _autoencoder(self) -> tuple[type[nn.Module], dict[str, Any]]:
        place, part = self._vae_place
        config = diffusers.AutoencoderKL.load_config(
            place, subfolder=part, **self._hub(self.vae is None)
        )
        kind = config.get("_class_name")
        if kind not in AUTOENCODERS:
            raise UserError(f"{self}: the autoencoder {kind} is not supported")
        return getattr(diffusers, kind), config

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

    # ------------------------------------------------------------------------------- its weights

    def build(
        self,
        last_block: int | None = None,
        activation_checkpointing: bool = False,
        activation_budget: float | None = None,
        pretrained: bool = True,
    ) -> DiffusersModel:
        """Load the network; on the meta device, build it without weights.

        Args:
            last_block: See :class:`DiffusionModel`, as for the next two.
            activation_checkpointing: Recompute blocks in the backward pass.
            activation_budget: GB of activations to keep.
            pretrained: Not used: the autoencoder's weights are always those of the source.

        Raises:
            UserError: Something is missing, damaged or not supported; the message says what.
        """
        options = (last_block, activation_checkpointing, activation_budget)
        if torch.get_default_device().type == "meta":
            return self._build_empty(*options)
        kind = getattr(diffusers, self.network["_class_name"])
        net = self._load(kind, self._place[0], self._part)
        vae = None
        if self._vae_place is not None:
            vae = self._load(self._autoencoder()[0], *self._vae_place)
        tokens, pooled = self._read_condition()
        model = self._wrap(net, vae, tokens, pooled, *options)
        model.pretrained = True
        return model

    def _wrap(
        self,
        net: nn.Module,
        vae: nn.Module | None,
        tokens: Tensor | None,
        pooled: Tensor | None,
        *args: Any,
    ) -> DiffusersModel:
        kind = NETWORKS[type(net).__name__]
        if vae is not None and vae.config.latent_channels != net.config.in_channels:
            raise UserError(
                f"{self}: the network reads {net.config.in_channels} channels, but the "
                f"autoencoder's latents have {vae.config.latent_channels}"
            )
        if kind is DiffusersDiT:
            model = DiffusersDiT(net, vae, self.taps == "raw", *args)
        else:
            learned = self.condition == "learned"
            model = DiffusersUNet(net, vae, tokens, pooled, learned, *args)
        model.config = self
        return model

    def _hub(self, own: bool = True) -> dict[str, Any]:
        return {"revision": self.revision} if own and self.revision else {}

    def _load(self, kind: type, place: str, part: str | None) -> nn.Module:
        """Load weights by diffusers, from safetensors files alone."""
        own = place == self._place[0]
        options = self._hub(own)
        if part is not None:
            options["subfolder"] = part
        if self.variant is not None and own:
            options["variant"] = self.variant
        try:
            model, info = kind.from_pretrained(
                place,
                use_safetensors=True,
                torch_dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
        except Exception as error:  # a damaged file can fail in the reader in any way
            raise UserError(
                f"{self}: the weights of {kind.__name__} can't be read: "
                f"{' '.join(str(error).split())[:500]}"
            ) from error
        wrong = [f"{what}: {', '.join(map(str, info[what][:4]))}" for what in info if info[what]]
        if wrong:
            raise UserError(f"{self}: the weights don't fit: {'; '.join(wrong)}")
        name = first_not_finite(model.state_dict().items())
        if name is not None:
            raise UserError(f"{self}: {name} holds NaN or infinite weights")
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
        if self.condition not in ("null", "learned"):
            tokens, pooled = _read_embeddings(self.condition)
        elif any(self._class_of(name) for name in ("text_encoder", "text_encoder_2")):
            tokens, pooled = self._encode_nothing()
        elif self.condition == "learned":
            tokens, pooled = torch.randn(1, TOKENS, width) * 0.02, None
            if pooled_width is not None:
                pooled = torch.zeros(1, pooled_width)
        else:
            raise UserError(
                f"{self} has no text encoder: give condition='<safetensors file with "
                "prompt_embeds>' or 'learned'"
            )
        fits = tokens.ndim == 3 and len(tokens) == 1 and tokens.shape[-1] == width
        if pooled_width is None:
            pooled = None
        else:
            fits &= pooled is not None and tuple(pooled.shape) == (1, pooled_width)
        if not fits:
            given = [None if x is None else tuple(x.shape) for x in (tokens, pooled)]
            needed = [(1, "L", width), pooled_width and (1, pooled_width)]
            raise UserError(
                f"{self} reads prompt_embeds and pooled_prompt_embeds of {needed}, got {given}"
            )
        return tokens, pooled

    @torch.no_grad()
    def _encode_nothing(self) -> tuple[Tensor, Tensor | None]:
        """Encode the empty prompt as diffusers' pipelines do, by one or two CLIP text encoders."""
        require("the empty prompt's embedding", ["transformers"], "pip install transformers")
        import transformers

        both = self._pooled_width() is not None  # SDXL: the last layer but one of both encoders
        parts, pooled = [], None
        for end in ("", "_2"):
            names = [self._class_of(f"{part}{end}") for part in ("tokenizer", "text_encoder")]
            if None in names:
                continue
            if "CLIP" not in names[1]:
                raise UserError(
                    f"{self}: the text encoder {names[1]} is not supported; give "
                    "condition='<safetensors file with prompt_embeds>'"
                )
            place, hub = self._place[0], self._hub()
            tokenizer = getattr(transformers, names[0]).from_pretrained(
                place, subfolder=f"tokenizer{end}", **hub
            )
            encoder = getattr(transformers, names[1]).from_pretrained(
                place, subfolder=f"text_encoder{end}", use_safetensors=True, **hub
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


def _read_embeddings(path: str) -> tuple[Tensor, Tensor | None]:
    """Read a condition's file."""
    from safetensors.torch import load_file

    try:
        found = load_file(Path(path).expanduser())
        tokens, pooled = found["prompt_embeds"], found.get("pooled_prompt_embeds")
    except Exception as error:  # also safetensors' own type
        raise UserError(
            "condition must be 'null', 'learned' or a safetensors file with prompt_embeds; "
            f"{path!r:.200}: {error}"
        ) from error
    return tokens.float(), None if pooled is None else pooled.float()
