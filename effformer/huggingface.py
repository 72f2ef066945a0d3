"""An EfficientFormer with Hugging Face's `save_pretrained`, `from_pretrained` and `push_to_hub` (extra `hub`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .checkpoints import config_file as saved
from .checkpoints import hub
from .checkpoints.load import load_checkpoint
from .extras import install
from .factory import create_model
from .files import Content, write_together
from .model import network as model

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError as error:
    raise ImportError(f"effformer.huggingface: no huggingface_hub, or too old a one: {install('hub')}") from error
except ValueError as error:  # of a variable that it reads, such as HF_HUB_ETAG_TIMEOUT=2.5
    raise ImportError(f"effformer.huggingface: huggingface_hub refuses a variable HF_...: {error}") from error


class EfficientFormer(
    model.EfficientFormer,
    PyTorchModelHubMixin,
    library_name="effformer",
    license="apache-2.0",
    pipeline_tag="image-classification",
    tags=["efficientformer", "vision", "backbone"],
):
    """An `effformer.EfficientFormer` that Hugging Face's tools save, load and push.

    `EfficientFormer.create("efficientformer_l1", ...)` builds one by name; `EfficientFormer.from_network(network)`
    makes one of an existing network. `save_pretrained(folder)` and `push_to_hub(name)` write `model.safetensors` with
    timm's keys, and a `config.json` from which `from_pretrained` rebuilds the network exactly: architecture, heads,
    drop rates, dtype. Backend and device are chosen anew. `create_model(..., checkpoint=folder)` takes the folder, too.
    """

    @classmethod
    def create(cls, name: str, **kwargs: Any) -> EfficientFormer:
        """`effformer.create_model`, with its arguments and errors."""
        return cls.from_network(create_model(name, **kwargs))

    @classmethod
    def from_network(cls, network: model.EfficientFormer) -> EfficientFormer:
        """The same network as an instance of this class. Nothing is copied: both share all parameters and settings.

        Raises:
            TypeError: for anything but an `effformer.EfficientFormer`.
        """
        if not isinstance(network, model.EfficientFormer):
            raise TypeError(f"network: got {type(network).__name__}, allowed is an effformer.EfficientFormer")
        view = cls.__new__(cls)
        object.__setattr__(view, "__dict__", network.__dict__)
        return view

    def save_pretrained(  # the mixin's would remove the old config.json before it writes the new weights
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """As the mixin's, but the network gives the `config`, and the files are written whole.

        Raises:
            ValueError: for another `config`; for a pruned network, or one with replaced modules.
            OSError: naming the file that cannot be written; the old ones are left then.
        """
        settings = saved.settings_of(self)
        if config not in (None, settings):
            raise ValueError("config: got one, allowed is None: it is written from the network")
        folder, kwargs = Path(save_directory), model_card_kwargs or {}
        # A tensor under two names is saved twice: each name is read again.
        state = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in self.state_dict().items()}
        files: dict[str | Path, Content] = {
            folder / "model.safetensors": safetensors.torch.save(state, {"format": "pt"}),
            folder / "config.json": json.dumps(settings, sort_keys=True, indent=2),
        }
        if not (folder / "README.md").exists():
            files[folder / "README.md"] = str(self.generate_model_card(**kwargs))
        write_together(files)
        if not push_to_hub:
            return None
        name = folder.name if repo_id is None else repo_id
        return self.push_to_hub(repo_id=name, config=settings, model_card_kwargs=kwargs, **push_to_hub_kwargs)

    @classmethod
    def from_pretrained(  # the mixin's would load the keys that fit and ignore the others
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        reset_head: bool = False,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **overrides: Any,
    ) -> EfficientFormer:
        """The network that `save_pretrained` or `push_to_hub` wrote, in eval mode.

        Args:
            pretrained_model_name_or_path: a folder or a hub id "owner/name".
            reset_head: initialise both heads anew where the overrides ask for another number of classes.
            force_download, token, cache_dir, local_files_only, revision: as for `huggingface_hub.hf_hub_download`.
            **overrides: fields of `EfficientFormerConfig` and keywords of `effformer.EfficientFormer`, as backend,
                device, dtype or drop_path_rate, in place of the saved ones.

        Raises:
            CheckpointError: (a RuntimeError) where the weights are not exactly those of the network.
            OSError: where the folder or repository does not exist, or has no weights.
            TypeError: for an unknown override.
            ValueError: for a `config.json` of another model, or with unknown or missing keys.
        """
        source = str(pretrained_model_name_or_path)
        download: dict[str, Any] = {
            "force_download": force_download, "token": token, "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }  # fmt: skip
        if revision is not None:  # else that of "owner/name@revision", if any
            download["revision"] = revision
        network = saved.rebuild(hub.read_config(source, **download), source, cls, **overrides)
        load_checkpoint(network, hub.locate(source, **download), reset_head=reset_head)
        return network.eval()
