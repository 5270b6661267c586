"""The command line: ``monarch-compile explain | doctor | demo | bench | tune | version``."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from monarch_compile.errors import InputError, MonarchError
from monarch_compile.registry import FAMILIES
from monarch_compile.tools.commands import all_commands
from monarch_compile.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (default: the process's arguments) and return the exit status."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    args.rest = rest
    if args.rest and args.run not in (_quality, _speed, _compile, _models, _family):  # which parse them
        parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
    try:
        return int(args.run(args))
    except MonarchError as error:
        print(f"monarch-compile: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="monarch-compile", description="Attention and long convolutions, compiled to Monarch form."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    explain = commands.add_parser("explain", help="report which sites of a model are lowered, and why")
    explain.add_argument(
        "target", metavar="module:function", help="a function that returns (model, args) or (model, args, kwargs)"
    )
    explain.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="options of the backend")
    explain.add_argument("--measure", action="store_true", help="also measure the error of each site and of the output")
    explain.add_argument("--resources", action="store_true", help="also compile kernels: registers, spills, bytes")
    explain.add_argument("--html", type=Path, metavar="PATH", help="write the report as one HTML page")
    explain.add_argument("--json", type=Path, metavar="PATH", help="write the report as JSON")
    explain.set_defaults(run=_explain)

    doctor = commands.add_parser("doctor", help="versions, devices, caches and a self-test; 1 if that fails")
    doctor.add_argument("--json", action="store_true", help="print JSON instead")
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser("demo", help="transcribe speech with a lowered Whisper encoder (needs a checkout)")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="what the lowered forms gain, and what they lose")
    kinds = bench.add_subparsers(required=True, metavar="kind")
    cpu = kinds.add_parser("cpu", help="time exact against Monarch attention on one CPU thread")
    for own in all_commands():
        own.add_bench_arguments(cpu)
    cpu.set_defaults(run=_bench)
    quality = kinds.add_parser(
        "quality", help="judge trained models with their attention replaced (needs a checkout)", add_help=False
    )
    quality.set_defaults(run=_quality)

    speed = kinds.add_parser(
        "speed", help="time every form of attention side by side, peers included (needs a checkout)", add_help=False
    )
    speed.set_defaults(run=_speed)
    compiling = kinds.add_parser(
        "compile", help="time compiling BERT-base, cold and warm, beside Inductor (needs a checkout)", add_help=False
    )
    compiling.set_defaults(run=_compile)

    models = kinds.add_parser(
        "models", help="time whole models beside plain torch.compile (needs a checkout)", add_help=False
    )
    models.set_defaults(run=_models)

    for name, modules in FAMILIES.items():
        if modules.benchmark:
            own_kind = kinds.add_parser(
                name, help=f"time {name} alone, every way to compute it (needs a checkout)", add_help=False
            )
            own_kind.set_defaults(run=_family, benchmark=modules.benchmark)

    tune = commands.add_parser("tune", help="look for better schedules on this GPU, for options={'autotune': True}")
    _add_tune_arguments(tune)
    tune.set_defaults(run=_tune)

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=_version)
    return parser


def _add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    for own in all_commands():
        own.add_tune_arguments(parser)
    parser.add_argument("--backward", action="store_true", help="tune the kernels of gradients instead")
    parser.add_argument("--seconds", type=float, default=60.0, help="time to spend on each problem")
    parser.add_argument("--jobs", type=int, metavar="P", help="processes that compile ahead (default: cores - 2)")
    parser.add_argument("--fresh", action="store_true", help="also tune what the cache holds already")


def _explain(args: argparse.Namespace) -> int:
    from monarch_compile.report.explainer import explain

    result = _load(args.target)()
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise InputError(f"{args.target} must return (model, args) or (model, args, kwargs); found {type(result)}")
    model, inputs, *rest = result
    asked = {"options": _options(args.options), "measure": args.measure, "resources": args.resources}
    report = explain(model, *inputs, **asked, **(rest[0] if rest else {}))
    print(report)
    if args.html:
        print(f"wrote {report.save(args.html)}")
    if args.json:
        args.json.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        print(f"wrote {args.json}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from monarch_compile.tools.doctor import diagnose

    diagnosis = diagnose()
    print(json.dumps(diagnosis.to_dict(), indent=2) if args.json else diagnosis)
    return int(not diagnosis.healthy)


def _load(target: str) -> Callable[[], Any]:
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise InputError(f"a target is written module:function; found {target!r}")
    sys.path.insert(0, os.getcwd())  # as `python -m` does, so that a user's own file is found
    try:
        function: Callable[[], Any] = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"cannot load {target!r}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    return function


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    """``["block_size=64", "policy=always"]`` -> ``{"block_size": 64, "policy": "always"}``."""
    options = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not key or not separator:
            raise InputError(f"an option is written key=value; found {pair!r}")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    return options


def _demo(_: argparse.Namespace) -> int:
    return _run_in_checkout("examples.demo")


def _quality(args: argparse.Namespace) -> int:
    return _run_in_checkout("benchmarks.quality", *args.rest)


def _compile(args: argparse.Namespace) -> int:
    return _run_in_checkout("benchmarks.compile_time", *args.rest)


def _models(args: argparse.Namespace) -> int:
    return _in_this_process("benchmarks.models", args)


def _speed(args: argparse.Namespace) -> int:
    return _in_this_process("benchmarks.speed", args)


def _family(args: argparse.Namespace) -> int:
    return _in_this_process(args.benchmark, args)


def _in_this_process(package: str, args: argparse.Namespace) -> int:
    """Run a benchmark here, so that its results (and what it loads) are in the user's own folder."""
    sys.path.insert(0, str(_checkout(package)))
    return int(importlib.import_module(f"{package}.__main__").main(args.rest))


def _checkout(module: str) -> Path:
    root = Path(__file__).resolve().parents[2]
    if not (root / module.split(".")[0]).is_dir():
        raise InputError(f"{module} lives in a checkout of the repository, and {root} is none")
    return root


def _run_in_checkout(module: str, *arguments: str) -> int:
    root = _checkout(module)
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=root, check=False).returncode


def _bench(args: argparse.Namespace) -> int:
    for own in all_commands():
        own.bench(args)
    return 0


def _tune(args: argparse.Namespace) -> int:
    from monarch_compile.tools.autotune import Machine, gradients_of, run

    machine = Machine.here()
    irs = [ir for own in all_commands() for ir in own.problems(args, machine.device.type)]
    irs = gradients_of(irs) if args.backward else irs
    if not irs:
        raise InputError("none of these problems has kernels of gradients of its own")
    run(irs, machine, seconds=args.seconds, fresh=args.fresh, jobs=args.jobs)
    return 0


def _version(_: argparse.Namespace) -> int:
    import torch

    print(f"monarch_compile {__version__} (torch {torch.__version__}, python {sys.version.split()[0]})")
    return 0
