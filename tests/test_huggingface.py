"""Networks that Hugging Face's tools save and load, and transformers' backbone over timm's registry; offline."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_hub
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import effformer
from effformer import create_model
from effformer.checkpoints.formats import CheckpointError
from effformer.checkpoints.load import load_checkpoint, network_of
from effformer.config import ConfigError
from effformer.testing import randomise

pytest.importorskip("huggingface_hub")
from effformer.huggingface import EfficientFormer

Narrow = Callable[..., effformer.EfficientFormer]
ROOT = Path(__file__).parent.parent


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value != "absent"}))


@pytest.fixture
def folder(narrow: Narrow, tmp_path: Path) -> Path:
    EfficientFormer.from_network(narrow()).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# --- saving and loading -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"dtype": torch.bfloat16, "in_chans": 4},
        {"num_classes": 0, "feature_norm": "inline", "bias_resize": "matrix-bilinear", "act": "relu"},
        {"num_classes": 0, "feature_norm": "tap", "bias_resize": "matrix-bicubic", "table_resolution": 16},
        {"global_pool": "", "num_vit": 2, "value_ratio": 2.5, "mlp_ratio": 3, "act": "prelu"},
    ],
    ids=str,
)
def test_what_is_saved_is_rebuilt(narrow: Narrow, tmp_path: Path, keywords: dict[str, Any]) -> None:
    network = EfficientFormer.from_network(narrow(**keywords))
    network.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    loaded = EfficientFormer.from_pretrained(tmp_path)
    assert type(loaded) is EfficientFormer
    assert not loaded.training
    assert loaded.config == network.config
    assert {k: (v.dtype, v.shape) for k, v in loaded.state_dict().items()} == {
        k: (v.dtype, v.shape) for k, v in network.state_dict().items()
    }
    x = draw(2, network.in_chans, 50, 97, dtype=network.norm.weight.dtype)
    assert torch.equal(loaded(x), network(x))
    for got, want in zip(loaded.forward_intermediates(x)[1], network.forward_intermediates(x)[1], strict=True):
        assert torch.equal(got, want)


@torch.no_grad()
def test_the_network_of_a_saved_folder(narrow: Narrow, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`config.json` shows the activation and the kind of norms, which weights do not; no published widths are needed."""
    network = narrow(act="relu", feature_norm="tap", bias_resize="matrix-bicubic", drop_rate=0.1, num_classes=3)
    EfficientFormer.from_network(network).save_pretrained(tmp_path)
    for checkpoint in (tmp_path, tmp_path / "model.safetensors"):
        name, keywords = network_of(checkpoint)
        rebuilt = create_model(name, **keywords).eval()
        load_checkpoint(rebuilt, tmp_path / "model.safetensors")
        assert (rebuilt.config, rebuilt.drop_rate) == (network.config, 0.1)
        x = draw(1, 3, 64, 64)
        assert torch.equal(rebuilt(x), network(x))
    assert capsys.readouterr().out == ""
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "alone.safetensors")
    with pytest.raises(CheckpointError, match="widths"):
        network_of(tmp_path / "alone.safetensors")
    edit(tmp_path, num_vit="absent")
    with pytest.raises(ConfigError, match="num_vit: missing"):
        network_of(tmp_path)


def test_rates_are_rebuilt_and_runtime_choices_made_anew(narrow: Narrow, tmp_path: Path) -> None:
    network = narrow(drop_rate=0.1, proj_drop_rate=0.2, attn_drop=0.3, drop_path_rate=0.7, backend="eager")
    network.set_grad_checkpointing()
    EfficientFormer.from_network(network.train()).save_pretrained(tmp_path)

    def rates(network: nn.Module) -> list[tuple[str, float]]:
        found = [(name, getattr(m, "p", getattr(m, "rate", None))) for name, m in network.named_modules()]
        return [(name, rate) for name, rate in found if rate is not None]

    loaded = EfficientFormer.from_pretrained(tmp_path)
    assert rates(loaded) == rates(network)
    assert {rate for _, rate in rates(network)} > {0.1, 0.2, 0.3}
    assert loaded.stages[0].blocks[0].backend == "auto"
    other = EfficientFormer.from_pretrained(
        tmp_path, backend="triton", drop_path_rate=0.0, bias_resize="matrix-bilinear", dtype=torch.float32
    )
    assert other.stages[0].blocks[0].backend == "triton"
    assert not any("drop_path" in name for name, _ in rates(other))
    assert other.config.bias_resize == "matrix-bilinear"
    assert other.head.weight.dtype == torch.float32


def test_what_is_saved_is_the_network_as_it_is(narrow: Narrow, tmp_path: Path) -> None:
    """The mixin alone would write the constructor's arguments and lose later changes."""
    network = EfficientFormer.from_network(narrow()).to(memory_format=torch.channels_last)
    for change in (lambda: network.reset_classifier(3), lambda: network.reset_classifier(0, ""), network.bfloat16):
        change()
        network.save_pretrained(tmp_path)
        loaded = EfficientFormer.from_pretrained(tmp_path)
        assert (loaded.num_classes, loaded.global_pool) == (network.num_classes, network.global_pool)
        assert list(loaded.state_dict()) == list(network.state_dict())
        for got, want in zip(loaded.state_dict().values(), network.state_dict().values(), strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


def test_what_cannot_be_rebuilt_is_not_saved(narrow: Narrow, folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    pruned, replaced, mixed = (EfficientFormer.from_network(narrow()) for _ in range(3))
    pruned.prune_intermediate_layers([0, 1])
    replaced.head = nn.Linear(24, 3)
    mixed.norm.float()
    for network, key in ((pruned, "norm.bias"), (replaced, "head.bias"), (mixed, "norm.bias")):
        with pytest.raises(ValueError, match=f"network: {key} does not fit the config"):
            network.save_pretrained(folder)
    with pytest.raises(ValueError, match="config: got one, allowed is None"):
        EfficientFormer.from_network(narrow()).save_pretrained(folder, config={"num_classes": 3})
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_network_by_name_and_from_one_that_is_there(narrow: Narrow) -> None:
    named = EfficientFormer.create("efficientformer_l1", num_classes=3, device="meta")
    assert type(named) is EfficientFormer
    assert named.num_classes == 3
    with pytest.raises(TypeError, match="classes: unknown key"):
        EfficientFormer.create("efficientformer_l1", classes=3)

    network = narrow()
    view = EfficientFormer.from_network(network)
    x = draw(1, 3, 64, 64)
    assert torch.equal(effformer.freeze(view, torch.float64)(x), effformer.freeze(network, torch.float64)(x))
    assert type(network) is effformer.EfficientFormer
    assert all(one is other for one, other in zip(view.parameters(), network.parameters(), strict=True))
    network.reset_classifier(3)
    network.train()
    assert view.training
    assert view.num_classes == 3
    assert view.head is network.head
    with pytest.raises(TypeError, match="network: got Linear, allowed is an effformer.EfficientFormer"):
        EfficientFormer.from_network(nn.Linear(1, 1))  # type: ignore[arg-type]


def test_a_class_that_computes_something_else_is_not_frozen(narrow: Narrow) -> None:
    class Twice(EfficientFormer):
        def logits(self, pooled: Tensor) -> Tensor:
            return 2 * super().logits(pooled)

    with pytest.raises(ValueError, match="model: the model: it is a Twice of test_huggingface, not a EfficientFormer"):
        effformer.freeze(Twice.from_network(narrow()), torch.float64)


def test_overrides(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"head.weight: got \[10, 24\], allowed is \[3, 24\]"):
        EfficientFormer.from_pretrained(folder, num_classes=3)
    assert EfficientFormer.from_pretrained(folder, num_classes=3, reset_head=True).head.weight.shape == (3, 24)
    with pytest.raises(TypeError, match=r"drop_path: unknown key \(did you mean 'drop_path_rate'"):
        EfficientFormer.from_pretrained(folder, drop_path=0.1)
    with pytest.raises(TypeError, match="map_location: unknown key"):
        EfficientFormer.from_pretrained(folder, map_location="cpu")
    with pytest.raises(ValueError, match="backend: got 'cuda'"):
        EfficientFormer.from_pretrained(folder, backend="cuda")


def test_folders_of_something_else(folder: Path, tmp_path: Path) -> None:
    for changes, error, message in (
        ({"with": 1}, ConfigError, "with: unknown key .*did you mean 'widths'"),
        ({"num_heads": "absent"}, ConfigError, "num_heads: missing"),
        ({"num_heads": 0}, ConfigError, "num_heads: got 0"),
        ({"dtype": "float1"}, ConfigError, "dtype: got 'float1'"),
        ({"dtype": "int8"}, TypeError, "dtype: got torch.int8"),
        ({"architecture": "efficientformer_l1"}, ValueError, "architecture: got 'efficientformer_l1', allowed is"),
        ({"architecture": "absent"}, ValueError, "architecture: got None, allowed is"),
        ({"depths": [1, 1, 2, 3]}, CheckpointError, "missing"),
        ({"depths": [1, 1, 1, 2]}, CheckpointError, "unexpected"),
        ({"key_dim": 8}, CheckpointError, "mis-shaped"),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        edit(copy, **changes)
        with pytest.raises(error, match=message):
            EfficientFormer.from_pretrained(copy)
        shutil.rmtree(copy)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    for changed, message in (
        ({key: value for key, value in state.items() if key != "norm.bias"}, "missing.*\n.*norm.bias"),
        (state | {"stem.conv3.weight": torch.zeros(1)}, "unexpected.*\n.*stem.conv3.weight"),
        ({key.replace("stem.", "root."): value for key, value in state.items()}, "no known EfficientFormer"),
    ):
        safetensors.torch.save_file(changed, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            EfficientFormer.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has none of model.safetensors"):
        EfficientFormer.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="architecture: got no config.json"):
        EfficientFormer.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="not a file, a folder or a hub id"):
        EfficientFormer.from_pretrained(tmp_path / "nowhere" / "at" / "all")


def test_a_repository_of_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "cache" / "models--someone--network"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(fake_hub.REVISION)
    (repository / "refs" / "v1").write_text("1" * 40)
    shutil.copytree(folder, repository / "snapshots" / fake_hub.REVISION)
    shutil.copytree(folder, repository / "snapshots" / ("1" * 40))
    edit(repository / "snapshots" / ("1" * 40), drop_rate=0.5)
    fake_hub.use(tmp_path / "empty", monkeypatch)
    with pytest.raises(OSError, match="(?i)hub|cache|offline"):
        EfficientFormer.from_pretrained("someone/network")
    assert EfficientFormer.from_pretrained("someone/network", cache_dir=tmp_path / "cache").drop_rate == 0
    fake_hub.use(tmp_path / "cache", monkeypatch)
    assert EfficientFormer.from_pretrained("someone/network").drop_rate == 0
    assert EfficientFormer.from_pretrained("someone/network", revision="v1").drop_rate == 0.5
    assert EfficientFormer.from_pretrained("someone/network@v1").drop_rate == 0.5
    fake_hub.write(tmp_path / "cache")
    with pytest.raises(ValueError, match="architecture: got 'efficientformer_l1', allowed is"):
        EfficientFormer.from_pretrained("timm/efficientformer_l1.snap_dist_in1k")


def test_pushing_uploads_what_is_saved(narrow: Narrow, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.hub_mixin

    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, **kwargs: Any) -> None: ...

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id: str, folder_path: Path, **kwargs: Any) -> str:
            seen[repo_id] = EfficientFormer.from_pretrained(folder_path)
            return "uploaded"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    network, x = EfficientFormer.from_network(narrow()), draw(1, 3, 64, 64)
    network.reset_classifier(3)
    assert network.push_to_hub("someone/network") == "uploaded"
    assert torch.equal(seen["someone/network"](x), network(x))


def test_missing_huggingface_hub_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "effformer.huggingface")
    with pytest.raises(ImportError, match='pip install "huggingface_hub>='):
        importlib.import_module("effformer.huggingface")


def test_the_rest_of_effformer_takes_such_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from effformer.commands.common import load_network

    network = randomise(create_model("efficientformer_l1", num_classes=5, act="relu", dtype=torch.bfloat16)).eval()
    EfficientFormer.from_network(network).save_pretrained(tmp_path / "l1")
    assert json.loads((tmp_path / "l1" / "config.json").read_text())["architecture"] == "effformer.EfficientFormer"
    created = create_model("efficientformer_l1", checkpoint=str(tmp_path / "l1"), num_classes=5, act="relu")
    assert torch.equal(created.head.weight, network.head.weight.float())
    with pytest.raises(ValueError, match="act: got 'gelu' by default, and the checkpoint has 'relu': say which"):
        create_model("efficientformer_l1", checkpoint=str(tmp_path / "l1"), num_classes=5)
    for checkpoint in (tmp_path / "l1", tmp_path / "l1" / "model.safetensors"):
        found, name, config, _ = load_network(None, str(checkpoint), "eager")
        assert name == "efficientformer_l1"
        assert found.config == network.config  # the keys do not say that it is relu
        assert found.stages[0].blocks[0].backend == "eager"
        assert config["num_classes"] == 5
        assert all(torch.equal(one, other) for one, other in zip(found.parameters(), network.parameters(), strict=True))
    with pytest.raises(ValueError, match="--model: got efficientformer_l3, allowed is efficientformer_l1"):
        load_network("efficientformer_l3", str(tmp_path / "l1"), "eager")
    assert "loaded:" in capsys.readouterr().out


def test_such_a_folder_of_no_published_size(folder: Path, narrow: Narrow) -> None:
    from effformer.commands.common import load_network

    network, name, _, _ = load_network(None, str(folder), "auto")
    assert name == "efficientformer"
    assert torch.equal(network.eval()(x := draw(1, 3, 64, 64)), narrow()(x))


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def transformers(timm: Any) -> Any:
    import effformer.timm

    assert effformer.timm.default_cfgs
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    return transformers


def backbone(transformers: Any, *out_indices: int) -> Any:
    config = transformers.TimmBackboneConfig(backbone="effformer_l1", out_indices=list(out_indices))
    return transformers.AutoBackbone.from_config(config).eval()


@torch.no_grad()
def test_transformers_backbone(transformers: Any) -> None:
    """As of transformers 5.23; its quirks, here and below, are the same with timm's own EfficientFormer."""
    ours = backbone(transformers, 1, -1)
    assert type(ours).__name__ == "TimmBackbone"
    assert list(ours.channels) == [96, 448]
    assert list(ours.out_indices) == [1, 3]
    assert list(ours.out_features) == ["stages.1", "stages.3"]
    assert list(ours.stage_names) == [f"stages.{index}" for index in range(4)]
    network = randomise(create_model("efficientformer_l1")).eval()
    ours._backbone.model.load_state_dict(
        {k: v for k, v in network.state_dict().items() if k in ours._backbone.model.state_dict()}
    )
    x = torch.randn(1, 3, 64, 96)
    want = network.forward_intermediates(x, intermediates_only=True)
    found = ours(x).feature_maps
    assert all(torch.equal(one, other) for one, other in zip(found, (want[1], want[3]), strict=True))
    # A quirk: with output_hidden_states it indexes the maps of `out_indices` by stage, so that only all stages will do.
    everything = backbone(transformers, 0, 1, 2, 3)(x, output_hidden_states=True)
    assert [tuple(state.shape) for state in everything.hidden_states] == [tuple(map.shape) for map in want]
    with pytest.raises(IndexError):
        ours(x, output_hidden_states=True)


@torch.no_grad()
def test_transformers_backbone_saved_and_loaded(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, x = backbone(transformers, 1, 3), torch.randn(1, 3, 64, 64)
    randomise(ours._backbone)
    ours.save_pretrained(tmp_path / "saved")

    # A quirk: from_pretrained takes names of timm's alone, for `pretrained=True`. What was saved is loaded by hand.
    with pytest.raises(ValueError, match="local-dir"):
        transformers.TimmBackbone.from_pretrained(str(tmp_path / "saved"))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "saved")
    assert config.backbone == "effformer_l1"
    loaded = transformers.AutoBackbone.from_config(config).eval()
    loaded.load_state_dict(safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors"))
    assert all(torch.equal(*maps) for maps in zip(loaded(x).feature_maps, ours(x).feature_maps, strict=True))

    # Another: of timm's own it resets BatchNorm's statistics on the way.
    fake_hub.write(tmp_path / "cache")
    fake_hub.use(tmp_path / "cache", monkeypatch)
    trained = transformers.TimmBackbone.from_pretrained("effformer_l1", out_indices=[2]).eval()
    want = (
        create_model("efficientformer_l1", pretrained=True)
        .eval()
        .forward_intermediates(x, [2], intermediates_only=True)
    )
    assert torch.equal(trained(x).feature_maps[0], want[0])


def test_transformers_backbone_in_a_process_started_in_the_repository() -> None:
    """Where the folder `kernels` hides the package of that name, which transformers asks for."""
    pytest.importorskip("transformers")
    code = (
        "from effformer.bench.measure.timm_model import import_timm; import_timm()\n"
        "import effformer.timm, kernels, torch\n"
        "from transformers import AutoBackbone, TimmBackboneConfig\n"
        "config = TimmBackboneConfig(backbone='effformer_l1', out_indices=[0, 3])\n"
        "maps = AutoBackbone.from_config(config).eval()(torch.zeros(1, 3, 32, 32)).feature_maps\n"
        "print(kernels.__version__, [tuple(map.shape) for map in maps])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0.0.0 [(1, 48, 8, 8), (1, 448, 1, 1)]"
