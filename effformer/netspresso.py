"""Our backbone in NetsPresso Trainer, in place of its own.

`python -m effformer.netspresso train ...` is the trainer's `netspresso-train ...` with our backbone; `evaluate` and
`infer` are its other two programs. All take the trainer's options, `--gpus 0,1` included.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .checkpoints.contents import NETSPRESSO
from .checkpoints.formats import normalise
from .config import ConfigError
from .model.netspresso import Backbone, build_backbone
from .model.netspresso_yaml import plain


def efficientformer(task: str, conf_model_backbone: Mapping[str, Any]) -> Backbone:
    """Build the backbone, with the arguments that the trainer gives to its own `efficientformer`.

    The trainer's own weights load into it with `load_state_dict`, alone or as part of a trainer's model; q, k and v are
    interleaved then. Saved files have our keys, and load again.

    Args:
        task: the trainer's `model.task`.
        conf_model_backbone: its `model.architecture.backbone`, a mapping or an OmegaConf node.

    Raises:
        ConfigError: (a ValueError) as `effformer.build_backbone`.

    Source: models/builder.py of NetsPresso Trainer 1.4.1, `load_backbone_and_head_model`.
    """
    problems: list[str] = []
    resolved = plain(conf_model_backbone, "", problems)
    if problems:
        raise ConfigError(problems, "model.architecture.backbone")
    backbone = build_backbone({**resolved, "name": "efficientformer"}, task)  # under any registered name
    backbone.register_load_state_dict_pre_hook(_take_the_trainers_keys)  # type: ignore[no-untyped-call]
    return backbone


def register(name: str = "efficientformer") -> None:
    """Put `efficientformer` into the trainer's registry under `name`, by default in place of its own.

    With several GPUs the trainer starts a process for each, which would build its own backbone. Its launchers are
    replaced, too: they start `python -m effformer.netspresso`, which registers again in each process.

    Raises:
        ImportError: where NetsPresso Trainer is not installed.

    Warns:
        UserWarning: where its launchers are not those of 0.2 to 1.4, so that only training on one GPU has our backbone.
    """
    _registry()[name] = efficientformer
    replaced = [_replace_launcher(program) for program in _PROGRAMS.values() if program.launcher]
    if not all(replaced):
        warnings.warn(
            "effformer.netspresso.register: this version of NetsPresso Trainer starts the processes of several GPUs in "
            "an unknown way: they will build its own backbone; use one GPU",
            stacklevel=2,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a program of the trainer with our backbone; see `python -m effformer.netspresso --help`."""
    parser = argparse.ArgumentParser(
        prog="python -m effformer.netspresso",
        usage="%(prog)s {train,evaluate,infer} [--name NAME] [the trainer's options]",
        description="NetsPresso Trainer with effformer's backbone, on one GPU or several (--gpus 0,1).",
        epilog="`netspresso-train --help` lists the trainer's options.",
        allow_abbrev=False,
    )
    parser.add_argument("program", choices=_PROGRAMS)
    help_name = "a name in model.architecture.backbone.name to which our backbone answers (default: efficientformer)"
    parser.add_argument("--name", action="append", help=help_name)
    parser.add_argument("--one-of-several", action="store_true", help=argparse.SUPPRESS)  # for our launcher
    options, rest = parser.parse_known_args(arguments)
    try:
        for name in options.name or ["efficientformer"]:
            register(name)
    except ImportError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    program = _PROGRAMS[options.program]
    module = importlib.import_module(program.module)
    run = getattr(module, program.process if options.one_of_several else program.function)
    sys.argv = [parser.prog, *rest]  # from which the trainer reads its options
    try:
        run()
    except subprocess.CalledProcessError as error:
        print(f"{parser.prog}: {options.program} failed in a process of its own", file=sys.stderr)  # noqa: T201
        return error.returncode
    return 0


class _Program(NamedTuple):
    """A program of the trainer: its module, the function behind it, its launcher, and that of each process."""

    module: str
    function: str
    launcher: str = ""
    process: str = ""


_PROGRAMS = {
    "train": _Program(
        "netspresso_trainer.trainer_main",
        "train_cli",
        "run_distributed_training_script",
        "train_cli_without_additional_gpu_check",
    ),
    "evaluate": _Program(
        "netspresso_trainer.evaluator_main",
        "evaluation_cli",
        "run_distributed_evaluation_script",
        "evaluation_cli_without_additional_gpu_check",
    ),
    "infer": _Program("netspresso_trainer.inferencer_main", "inference_cli"),  # on one GPU only
}


def _registry() -> dict[str, Callable[..., nn.Module]]:
    try:
        from netspresso_trainer.models.registry import MODEL_BACKBONE_DICT
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "netspresso_trainer":  # but a library that it needs
            raise
        raise ImportError(
            "effformer.netspresso: NetsPresso Trainer is not installed: pip install netspresso-trainer"
        ) from error
    return MODEL_BACKBONE_DICT


def _replace_launcher(program: _Program) -> bool:
    """Make a launcher start this module in place of the trainer's; False where it is not one that we know.

    Source: trainer_main.py and evaluator_main.py of NetsPresso Trainer 0.2.0 to 1.4.1. A launcher's first argument is
    the list of GPUs; every other one is passed on as the option of the same name.
    """
    try:
        module = importlib.import_module(program.module)
        theirs = getattr(module, program.launcher)
        parameters = list(inspect.signature(theirs).parameters)
    except (ImportError, AttributeError):
        return False
    if parameters[:1] != ["gpu_ids"] or not hasattr(module, program.process):
        return False
    if not hasattr(theirs, "__wrapped__"):  # or it is ours, of an earlier call
        setattr(module, program.launcher, _launcher(program, theirs))
    return True


def _launcher(program: _Program, theirs: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(theirs)
    command = next(command for command, known in _PROGRAMS.items() if known is program)

    @functools.wraps(theirs)
    def launch(*values: Any, **named: Any) -> None:
        names = [name for name, build in _registry().items() if build is efficientformer]
        if not names:  # ours was taken out again
            theirs(*values, **named)
            return
        arguments = signature.bind(*values, **named).arguments
        gpus = arguments.pop("gpu_ids")
        options = [part for name, value in arguments.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        options += [part for name in names for part in ("--name", name)]
        # --standalone: on a free port, since the trainer knows one machine only.
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={len(gpus)}"]
        ours = ["-m", "effformer.netspresso", command, "--one-of-several"]
        process = subprocess.Popen([sys.executable, *torchrun, *ours, *options])
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        if status:
            raise subprocess.CalledProcessError(status, process.args)

    return launch


def _take_the_trainers_keys(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    theirs = {key.removeprefix(prefix): key for key in state if key.startswith(prefix)}
    if NETSPRESSO in theirs:
        ours = normalise({name: state.pop(key) for name, key in theirs.items()}).state
        state.update({f"{prefix}network.{name}": value for name, value in ours.items()})


if __name__ == "__main__":
    from effformer.netspresso import main as run_main  # of the module itself: the registry holds its functions

    sys.exit(run_main())
