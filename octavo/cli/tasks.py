"""`octavo eval PATH --tasks NAMES`: scores on tasks of lm_eval, instead of perplexity on a text."""

from __future__ import annotations

import argparse

from octavo.cli.terminal import Answer, Terminal
from octavo.cli.verb import CommandError, a_path, device_of, keep_cache, not_negative, positive
from octavo.errors import MissingExtra

__all__ = ["add_options", "refuse_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --tasks and the options that go with it."""
    tasks = parser.add_argument_group("tasks of lm_eval, instead of a text (pip install 'octavo[lm-eval]')")
    tasks.add_argument("--tasks", metavar="NAMES", help="such as arc_easy,hellaswag; `lm_eval ls tasks` lists them")
    tasks.add_argument("--limit", metavar="N", type=positive, help="the first N documents of each task (default all)")
    tasks.add_argument(
        "--fewshot", metavar="K", type=not_negative, help="examples before each document, where a task lets you"
    )
    tasks.add_argument("--chat", action="store_true", help="put prompts into the model's chat template")
    tasks.add_argument("--include-path", metavar="DIR", type=a_path, help="a folder with tasks of your own, in YAML")
    tasks.add_argument("--batch-size", metavar="B", type=positive, help="requests at once (default 1)")


def refuse_options(args: argparse.Namespace) -> None:
    """Raise CommandError for options of tasks without --tasks, and for options of texts with it."""
    others: tuple[str, ...] = ("text", "window", "tokens")
    why = "is for a text, and --tasks are judged instead of one; leave it out"
    if args.tasks is None:
        others = ("limit", "fewshot", "chat", "include_path", "batch_size")
        why = "is for --tasks, which is not given"
    for name in others:
        if (value := getattr(args, name)) is not None and value is not False:
            raise CommandError(f"--{name.replace('_', '-')} {why}")


def run(args: argparse.Namespace, terminal: Terminal) -> Answer:
    """The scores of PATH, next to the baseline's."""
    try:
        from octavo.integrations.lm_eval import evaluate_tasks, find_tasks
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{error.name} is needed for --tasks: pip install 'octavo[lm-eval]'") from error
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    with terminal.progress("looking up tasks"):
        found = find_tasks(names, include_path=args.include_path)
    with terminal.progress(f"loading {args.path}"):
        from octavo.integrations import language_model

        device = device_of(args)
        model, tokenizer = language_model.load_language_model(args.path, device=device)
        cache = keep_cache(model, args.cache)
        baseline = None if args.baseline is None else language_model.load_causal(args.baseline, device=device)
    with terminal.progress(f"tasks of {args.path}") as progress, terminal.without_bars():
        report = evaluate_tasks(
            model, tokenizer, found, baseline=baseline, limit=args.limit, fewshot=args.fewshot, chat=args.chat,
            batch_size=args.batch_size or 1, progress=progress,
        )  # fmt: skip
    data = {"path": args.path, "cache": cache, "limit": args.limit, "fewshot": args.fewshot, **report.to_dict()}
    if args.baseline is not None:
        data["baseline"] = args.baseline
    return Answer(data, (report.table(models=(str(args.baseline), args.path)),))
