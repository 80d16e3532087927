"""triskele demo | doctor | quantize: what the package does, from a shell."""

from __future__ import annotations

import argparse
import sys

from triskele import __version__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="triskele", description="Makes diffusers pipelines faster without changing "
                                                                  "what they draw.")
    parser.add_argument("--version", action="version", version=f"triskele {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="generate with the plain pipeline and with each arm, and compare")
    demo.add_argument("--model", metavar="PATH", help="a diffusers folder of your own in place of the trained models")
    demo.add_argument("--prompt", help="for --model: the prompt (class numbers, comma-separated, for a DiT)")
    demo.add_argument("--steps", type=int, default=20, help="for --model: denoising steps (default 20)")
    demo.add_argument("--call", action="append", default=[], metavar="NAME=VALUE",
                      help="for --model: another argument of the pipeline's call, such as height=256; repeatable")
    demo.add_argument("--device", default="cpu", help="for --model: cpu (default) or cuda")
    demo.add_argument("--out", default="triskele-demo", help="folder for the page and the record")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--scenes", default="image,video", help="of the trained models: image,video (default) or one")
    demo.add_argument("--quick", action="store_true", help="a few steps of each, no curves: a check, not a measurement")

    commands.add_parser("doctor", help="what this machine can run, and why not the rest")

    quantize = commands.add_parser("quantize", help="quantize a diffusers model folder to 4 bits and save it")
    quantize.add_argument("model", help="a folder of a transformer, or of a pipeline that has one")
    quantize.add_argument("out", help="folder to write")
    quantize.add_argument("--rank", type=int, default=32)
    quantize.add_argument("--format", choices=("int4", "nvfp4"), default="int4")
    quantize.add_argument("--activation", choices=("int8", "int4", "fp8", "none"), default="int8")
    quantize.add_argument("--scales", choices=("amax", "integer"), default="amax",
                          help="of int4 groups: the published ones, or multiples of one scale a channel")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `triskele` command. A user's mistake is one line on stderr and exit code 2."""
    args = _parser().parse_args(arguments)
    try:
        if args.command == "demo":
            from triskele.demo.main import demo

            return demo(args)
        if args.command == "doctor":
            from triskele.doctor import doctor

            return doctor()
        from triskele.quantize_folder import quantize

        return quantize(args)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"triskele {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
