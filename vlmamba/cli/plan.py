"""``vlmamba plan RECIPE``: memory under every strategy, tokens and hours, before anything is downloaded."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence

from vlmamba.config import load_recipe
from vlmamba.training.plan import DEFAULT_MFU, FLAGS, GIB, RESERVE, Choice, Memory, Planner, PlanSettings

EXAMPLES = """examples:
  vlmamba plan train/vl_mamba.py:finetune --gpus 8 --memory 80
  vlmamba plan train/cobra.py:finetune --gpus 4 --memory 141 --gpu H200 --batch.micro_batch_size 8
"""


def run(words: Sequence[str]) -> int:
    """Run the verb; exit code 1 when the recipe does not fit as it stands."""
    arguments, overrides = _parser().parse_known_args(words)
    logging.getLogger("vlmamba").setLevel(logging.WARNING)
    recipe = load_recipe(arguments.recipe, overrides)
    from vlmamba.training.plan_data import data_facts

    facts = data_facts(recipe.config)
    settings = PlanSettings(
        gpus=arguments.gpus, memory=arguments.memory, gpu=arguments.gpu, mfu=arguments.mfu,
        per_host=arguments.gpus_per_host, length=arguments.length,
    )  # fmt: skip
    text = arguments.text_tokens or facts.text_tokens
    if text is not None:
        settings = dataclasses.replace(settings, text_tokens=text)
    if facts.supervised is not None:
        settings = dataclasses.replace(settings, supervised=facts.supervised)
    planner = Planner(recipe.config, settings)
    measured = "from the annotations" if facts.text_tokens else "an assumption"
    origin = "as given" if arguments.text_tokens else measured
    print(_head(planner, origin))
    chosen = planner.chosen()
    fits = planner.fits(chosen)
    print(_table(planner, chosen))
    print(_advice(planner, chosen, fits))
    print(_time(planner, planner.samples(facts.samples, facts.tokens), facts.rows))
    return 0 if fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmamba plan",
        description="Plan a run without weights, data or a GPU. Further flags are dotted overrides of the recipe.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="train/NAME.py:FUNCTION, NAME:FUNCTION, or the config.yaml of a run")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs in all (8)")
    parser.add_argument("--memory", type=float, default=80.0, help="GiB of each (80)")
    parser.add_argument("--gpu", default="A100", help="name, for its peak: A100, H100, H200 (A100)")
    parser.add_argument("--gpus-per-host", type=int, default=8, help="for fsdp2's hybrid sharding (8)")
    parser.add_argument(
        "--mfu",
        type=float,
        default=DEFAULT_MFU,
        help=f"share of the peak that is reached ({DEFAULT_MFU}, assumed)",
    )
    parser.add_argument("--length", type=int, help="tokens of the longest rows (data.max_length)")
    parser.add_argument(
        "--text-tokens", type=float, help="mean text tokens of a sample (from the files, or 250)"
    )
    return parser


def _head(planner: Planner, origin: str) -> str:
    settings, shape = planner.settings, planner.shape(planner.micro)
    return "\n".join(
        [
            f"{settings.gpus} x {settings.gpu}, {settings.memory:g} GiB each, of which {RESERVE:.0%} are "
            "left free for fragmentation and libraries (an assumption)",
            f"micro-batch: {shape.rows} row(s) of {shape.length:,} tokens with {shape.images} image(s) of "
            f"{planner.visual} visual tokens, {shape.supervised:,} supervised; {planner.micro_steps(planner.micro)} "
            "micro-step(s) a step",
            f"samples: {settings.text_tokens:.0f} text tokens on average ({origin}), "
            f"{settings.supervised:.0%} of them supervised",
            f"recomputed in backward: {_policy(planner.every_nth)}",
        ]
    )


def _policy(every_nth: int) -> str:
    return {0: "nothing", 1: "every block"}.get(every_nth, f"every {every_nth}. block")


def _table(planner: Planner, chosen: Choice) -> str:
    lines = [
        "",
        f"GiB on each GPU  {'weights':>9} {'gradients':>9} {'optimizer':>9} {'activations':>11} {'logits etc.':>11} "
        f"{'total':>7}",
    ]
    for strategy in planner.strategies():
        memory = planner.memory(dataclasses.replace(chosen, strategy=strategy))
        mark = "*" if strategy == chosen.strategy else " "
        verdict = "" if memory.total <= planner.settings.budget else "  does not fit"
        lines.append(f"{mark} {strategy:<14} {_row(memory)}{verdict}")
    return "\n".join([*lines, "* the recipe's own", ""])


def _row(memory: Memory) -> str:
    values = (memory.parameters, memory.gradients, memory.optimizer, memory.activations, memory.temporary)
    widths = (9, 9, 9, 11, 11)
    cells = [f"{value / GIB:>{width}.1f}" for value, width in zip(values, widths, strict=True)]
    return " ".join([*cells, f"{memory.total / GIB:>7.1f}"])


def _advice(planner: Planner, chosen: Choice, fits: bool) -> str:
    budget = planner.settings.budget / GIB
    if fits:
        free = budget - planner.memory(chosen).total / GIB
        return f"fits, with {free:.1f} GiB to spare"
    over = planner.memory(chosen).total / GIB - budget
    lines = [f"does not fit: {over:.1f} GiB too much. It fits with any one of these lines:"]
    for choice in planner.fitting():
        lines.append(f"  {_flags(choice, chosen):<70} {planner.memory(choice).total / GIB:>6.1f} GiB")
    if len(lines) == 1:
        lines = [
            f"does not fit: {over:.1f} GiB too much, nor does it with one row a micro-batch, everything recomputed and "
            "any strategy. Use more GPUs, shorter rows (--data.max_length), LoRA, or --sharding.cpu_offload true."
        ]
    return "\n".join(lines)


def _flags(choice: Choice, chosen: Choice) -> str:
    flags = []
    if choice.strategy != chosen.strategy:
        flags.append(FLAGS[choice.strategy])
    if choice.micro != chosen.micro:
        flags.append(f"--batch.micro_batch_size {choice.micro}")
    if choice.every_nth != chosen.every_nth:
        flags.append(f"--gradient_checkpointing true --checkpoint_every_nth {choice.every_nth}")
    return " ".join(flags)


def _time(planner: Planner, samples: float | None, rows: str) -> str:
    settings = planner.settings
    tokens = planner.visual + settings.text_tokens
    per_second = 1.0 / planner.seconds(1.0)
    lines = [
        "",
        f"time at an MFU of {settings.mfu:.0%} (assumed; --mfu), recomputation counted as work: "
        f"{planner.flops_of(1.0) / 1e12:.2f} TFLOP a sample, {per_second:.1f} samples/s, "
        f"{per_second * tokens / settings.gpus:,.0f} tokens/s on each GPU",
    ]
    if samples is None:
        lines.append("length of the run: not known, as the number of rows is not")
    else:
        lines.append(
            f"whole run: {samples:,.0f} samples ({rows}), {samples * tokens / 1e9:.2f}e9 tokens, "
            f"{planner.seconds(samples) / 3600:.1f} hours"
        )
    return "\n".join(lines)
