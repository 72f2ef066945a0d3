"""The table of configurations: its entries, the choice among them, and the errors of a wrong file."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.bench.offline.audit import jobs
from effformer.bench.offline.candidates import miscompiled
from effformer.bench.offline.tune import write_user_entries
from effformer.kernels.tiling import choose as config
from effformer.kernels.tiling.choose import (
    SHIPPED,
    Question,
    answer,
    linear_config,
    mlp_config,
    preferring,
    read_user_entries,
    shipped_table,
    user_file,
)
from effformer.kernels.tiling.device import AMPERE, CLASSES, HOPPER, TARGETS, Device, device_class
from effformer.kernels.tiling.table import DTYPES, Entry, LinearConfig, MlpConfig, as_text, read_entry, read_table

from effformer import list_models

AUDITED = Path(__file__).parents[1] / "bench/results/audit.jsonl"
ENTRY: dict[str, Any] = {
    "operation": "meta4d",
    "device": "sm_90",
    "dtype": "float16",
    "where": {"channels": "<= 48"},
    "use": {"block_m": 128, "block_h": 64, "reload": False, "num_warps": 8, "num_stages": 1},
}
H200 = Device(90, 232_448, "NVIDIA H200")
QUESTION = Question("meta4d", torch.float16, (48, 9))


# --- devices --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "shared_memory", "expected"),
    [
        (80, 166_912, "sm_80"),  # A100
        (86, 101_376, "sm_86"),  # RTX 3090
        (87, 166_912, "sm_80"),  # Orin
        (89, 101_376, "sm_86"),  # RTX 4090
        (90, 232_448, "sm_90"),  # H200
        (100, 232_448, "sm_100"),  # B200
        (103, 232_448, "sm_100"),  # B300
        (120, 101_376, "sm_86"),  # RTX 5090
        (121, 101_376, "sm_86"),  # GB10
        (130, 300_000, "sm_100"),  # not built yet
        (130, 120_000, "sm_86"),
    ],
)
def test_an_unknown_device_takes_the_nearest_class_that_fits(
    capability: int, shared_memory: int, expected: str
) -> None:
    found = device_class(Device(capability, shared_memory))
    assert found == expected
    assert CLASSES[found].shared_memory <= shared_memory


def test_a_device_without_room_is_named() -> None:
    with pytest.raises(ValueError, match="got Device.capability=75, .*allowed are GPUs with 101376 bytes"):
        device_class(Device(75, 65_536))


# --- the shipped table ----------------------------------------------------------------------------------------------------


def test_every_launch_has_an_answer_and_every_entry_a_launch() -> None:
    """For all published shapes, dtypes and device classes, at large batches and small; all of them were audited."""
    found, missing = jobs(list_models(), list(TARGETS), list(DTYPES))
    assert missing == []
    assert len(found) > 1000

    def key(operation: str, kernel: str, shapes: list[str], dtype: str, target: str, tiles: dict[str, Any]) -> str:
        return json.dumps([operation, kernel, shapes, dtype, target, tiles])

    wanted = [
        key(job.operation, job.kernel, job.shapes, job.dtype, f"sm_{job.device.capability}", job.configuration)
        for job in found
    ]
    names = ("operation", "kernel", "shapes", "dtype", "target", "configuration")
    records = [json.loads(line) for line in AUDITED.read_text().splitlines()]
    assert [key(*(record[name] for name in names)) for record in records] == wanted, "`make audit` is due"


def test_tuned_entries_do_not_make_others_superfluous() -> None:
    """Tuned entries hide general ones from the published shapes; other networks get the general ones."""
    question = Question("meta4d", torch.float16, (48, 256 * 56 * 56))
    tuned = [entry(where={"channels": 48}, use=vars(MlpConfig(64, 32, True, 4, 1)))]
    found, missing = jobs(list_models(), [90], ["float16"], extra=tuned)
    assert missing == []
    tiles = {
        (job.configuration["BLOCK_M"], job.configuration["BLOCK_H"])
        for job in found
        if job.operation == "meta4d" and job.source.constants.get("C") == 48
    }
    shipped = answer(question, HOPPER)
    assert tiles == {(64, 32), (shipped.block_m, shipped.block_h)}, "both are audited"
    assert len(tiles) == 2
    with preferring(*tuned):
        assert answer(question, HOPPER).block_h == 32
    unused = entry(where={"channels": 7})
    _, missing = jobs(list_models(), [90], ["float16"], extra=[unused])
    assert missing == ["sm_90: here (float16): no audited shape uses it"]


def test_a_users_file_that_cannot_be_used_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference goes on; only the tuner insists."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    user_file().parent.mkdir()
    user_file().write_text("[")
    config._tuned_table.cache_clear()
    try:
        with pytest.warns(UserWarning, match="the configurations tuned on this machine are not used: .*no JSON"):
            found = answer(QUESTION, H200)
        assert found == answer(QUESTION, HOPPER)
    finally:
        config._tuned_table.cache_clear()


def test_the_audit_knows_every_device_class() -> None:
    assert {device_class(device) for device in TARGETS.values()} == set(CLASSES)


def test_no_answer_is_an_error_that_names_the_shape() -> None:
    table = config.Table([])
    with pytest.raises(
        LookupError, match=r"no configuration for linear of {'outputs': 3, 'inputs': 4, 'rows': 5}, torch.float16"
    ):
        table.find("linear", torch.float16, HOPPER, 3, 4, 5)


def test_the_file_reads_as_it_is_written() -> None:
    entries = read_table(SHIPPED)
    again = [read_entry(found, "again") for found in json.loads(as_text(entries))]
    assert [e.as_json() for e in again] == [e.as_json() for e in entries]
    assert len({json.dumps(e.as_json() | {"use": None}) for e in entries}) == len(entries), "an entry nobody reaches"


def test_no_shipped_tile_is_miscompiled() -> None:
    """ptxas 12.8 breaks such tiles, and no audit shows it: on a GPU they gave wrong results."""
    entries = read_table(SHIPPED)
    assert [e.as_json() for e in entries for device in e.devices if miscompiled(e.use, device)] == []
    assert miscompiled(MlpConfig(64, 32, False, 8, 2), "sm_90")


# --- precedence and conditions --------------------------------------------------------------------------------------------


def entry(**changes: Any) -> Entry:
    return read_entry(ENTRY | changes, "here")


def test_the_first_entry_that_holds_counts() -> None:
    narrow = MlpConfig(32, 16, True, 4, 3)
    first = entry(where={"channels": ["<= 96", "multiple of 32"], "rows": "<= 1000"}, use=vars(narrow))
    second = entry(where={"channels": 40}, use=None)
    with preferring(first, second):
        assert mlp_config(Question("meta4d", torch.float16, (64, 1000)), HOPPER) == narrow
        for other in (
            mlp_config(Question("meta4d", torch.float16, (64, 1001)), HOPPER),
            mlp_config(Question("meta4d", torch.float16, (48, 1000)), HOPPER),
            mlp_config(Question("meta4d", torch.float16, (128, 1000)), HOPPER),
            mlp_config(Question("conv_mlp", torch.float16, (64, 1000)), HOPPER),
            mlp_config(Question("meta4d", torch.bfloat16, (64, 1000)), HOPPER),
            mlp_config(Question("meta4d", torch.float16, (64, 1000)), AMPERE),
        ):
            assert other not in (None, narrow)
        assert mlp_config(Question("meta4d", torch.float16, (40, 7)), HOPPER) is None
    assert mlp_config(Question("meta4d", torch.float16, (64, 1000)), HOPPER) != narrow


def test_tiles_shrink_to_the_shape() -> None:
    wide = {"block_m": 128, "widths": [128, 64, 32], "block_k": 64, "num_warps": 8, "num_stages": 3}
    with preferring(entry(operation="linear", where={}, use=wide)):
        assert linear_config(Question("linear", torch.float16, (224, 100, 9)), HOPPER).widths == (128, 64, 32)
        assert linear_config(Question("linear", torch.float16, (223, 100, 9)), HOPPER).widths == (256,)
        assert linear_config(Question("linear", torch.float16, (20, 30, 9)), HOPPER) == LinearConfig(
            128, (32,), 32, 8, 3
        )


# --- a user's file --------------------------------------------------------------------------------------------------------


def test_what_was_tuned_counts_on_that_card_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned = MlpConfig(64, 32, True, 4, 3)
    write_user_entries(user_file(), [entry(use=vars(tuned), gpu="NVIDIA H200")])
    assert user_file().is_relative_to(tmp_path)
    config._tuned_table.cache_clear()
    try:
        assert answer(QUESTION, H200) == tuned
        shipped = shipped_table().find(*QUESTION[:2], HOPPER, *QUESTION.sizes).use
        assert shipped != tuned
        assert answer(QUESTION, Device(90, 232_448, "NVIDIA H100")) == shipped
        assert answer(QUESTION, HOPPER) == shipped, "what stands in for a GPU is not that card"
        with preferring():
            assert answer(QUESTION, H200) == shipped
    finally:
        config._tuned_table.cache_clear()


def test_what_was_tuned_for_other_kernels_is_left_out_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "configurations.json"
    assert read_user_entries(path) == []
    write_user_entries(path, [entry(gpu="NVIDIA H200")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_user_entries(path)) == 1
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"fingerprint": {**found["fingerprint"], "triton": "1.0"}}))
    with pytest.warns(UserWarning, match=r"was tuned for .*'triton': '1.0'.* it is not used; `effformer bench tune`"):
        assert read_user_entries(path) == []


def test_a_file_that_is_none_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "configurations.json"
    for text, message in (
        ("[", "no JSON"),
        ("[]", "allowed are the fields fingerprint and entries: delete it"),
        ('{"entries": []}', "allowed are the fields fingerprint and entries"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_user_entries(path)
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="got dict, allowed is a list"):
        read_table(path)


# --- wrong entries --------------------------------------------------------------------------------------------------------

USE = ENTRY["use"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operation": "meta5d"}, "operation: got 'meta5d', allowed are meta4d, conv_mlp, linear"),
        ({"operation": ["meta4d", "linear"]}, "allowed together are those of one kind of tile"),
        ({"device": ["sm_90", "sm_91"]}, "device: got ['sm_90', 'sm_91'], allowed are sm_80, sm_86, sm_90, sm_100"),
        ({"device": []}, "device: got [], allowed are"),
        ({"dtype": "half"}, "dtype: got 'half', allowed are float16, bfloat16, float32"),
        ({"where": {"tokens": 4}}, "where: got ['tokens'], allowed are channels, rows"),
        ({"where": {"channels": "< 48"}}, "where.channels: got '< 48', allowed are '<= N', '>= N', 'multiple of N' and N"),
        ({"where": {"channels": "multiple of 0"}}, "where.channels: got 'multiple of 0'"),
        ({"use": None, "operation": "linear", "where": {}}, "use: got None, allowed are exactly the fields block_m, widths"),
        ({"use": {"block_m": 64}}, "allowed are exactly the fields block_m, block_h, reload, num_warps, num_stages"),
        ({"use": USE | {"block_m": 96}}, "use.block_m: got 96, allowed: powers of two from 16 to 65536"),
        ({"use": USE | {"num_warps": True}}, "use.num_warps: got True, allowed: powers of two from 1 to 32"),
        ({"use": USE | {"block_h": 8}}, "use.block_h: got 8, allowed: powers of two from 16"),
        ({"use": USE | {"num_warps": 64}}, "use.num_warps: got 64, allowed: powers of two from 1 to 32"),
        ({"operation": "linear", "where": {}, "use": {"block_m": 64, "widths": [], "block_k": 32, "num_warps": 4, "num_stages": 2}}, "use.widths: got (), allowed: powers of two from 16"),
        ({"where": []}, "where: got [], allowed is an object"),
        ({"gpu": 7}, "gpu: got 7, allowed is a name"),
        ({"use": USE | {"num_stages": 0}}, "use.num_stages: got 0, allowed: 1 to 8"),
        ({"use": {"block_m": 16, "block_h": 64, "chunk": 32, "num_warps": 4, "num_stages": 1}}, "use.block_h: got 64, allowed is the chunk of 32 at most"),
        ({"use": USE | {"reload": 1}}, "use.reload: got 1, allowed: true or false"),
        ({"colour": "red"}, "got the fields ['colour', 'device', 'dtype', 'operation', 'use', 'where'], allowed are"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_entry(ENTRY | changes, "table.json, entry 7")
    assert str(error.value).startswith("table.json, entry 7: ")


def test_an_entry_for_newer_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left out where Triton is older, and read and written as it stands."""
    entry = read_entry(ENTRY | {"triton": ">= 3.9"}, "test")
    assert entry.triton == (3, 9)
    assert read_entry(entry.as_json(), "test") == entry
    with pytest.raises(ValueError, match="test: triton: got '3.9', allowed is '>= N.M'"):
        read_entry(ENTRY | {"triton": "3.9"}, "test")
    tiles = {}
    for version in ("3.6.0", "3.8.0+git", "3.9.0", "3.10.1"):
        monkeypatch.setattr("triton.__version__", version)
        shipped_table.cache_clear()
        with config.using(shipped_table()):
            found = mlp_config(Question("meta4d", torch.float16, (224, 256 * 14 * 14)), HOPPER)
        assert isinstance(found, MlpConfig)
        tiles[version] = found.block_h
        assert (entry in config.Table([entry]).entries) == (tiles[version] == 32)
    shipped_table.cache_clear()
    assert tiles == {"3.6.0": 64, "3.8.0+git": 64, "3.9.0": 32, "3.10.1": 32}


def test_sizes_of_images_and_batches_compile_nothing_anew() -> None:
    """Beside other tiles: the kernels of a network differ in nothing but what the table says."""
    from effformer.bench.offline.compile import source_of
    from effformer.bench.offline.launches import network_launches

    sources: dict[str, set[str]] = {}
    for batch in (128, 129, 130, 255, 256):
        for size in ((224, 224), (225, 224), (240, 320)):
            launches = network_launches("efficientformer_l1", torch.float16, HOPPER, batch=batch, size=size)
            for operation, _, launch in launches:
                if operation in ("conv_norm", "meta4d", "linear_mlp", "head"):
                    source = source_of(launch, 90)
                    sources.setdefault(source.without_attributes, set()).add(repr(source))
    assert len(sources) > 15
    anew = {key: found for key, found in sources.items() if len(found) > 1}
    assert anew == {}
