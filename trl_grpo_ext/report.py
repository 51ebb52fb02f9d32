"""
The report of a run that has logged credit: one HTML file that works offline.

    python -m trl_grpo_ext.report RUN_FOLDER [--output credit.html] [--open]

It needs `pip install "trl_grpo_ext[report]"` and the folder `credit` that `log_credit` writes. Curves are the
trainer's own if a `trainer_state.json` is there, in the newest checkpoint or where `trainer.save_state()` writes it,
and else means over the recorded completions.
"""

import argparse
import os
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from .credit.page_of_run import page_of_run


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, write the report and say where it is."""
    parser = argparse.ArgumentParser("python -m trl_grpo_ext.report", description="Write the report of a run.")
    parser.add_argument("run_folder", type=Path, help="The run's output_dir, with the folder `credit`.")
    parser.add_argument("--output", type=Path, help="File to write. Default: credit.html in the run's folder.")
    parser.add_argument("--open", action="store_true", help="Open it in the browser.")
    options = parser.parse_args(arguments)
    output = options.output or options.run_folder / "credit.html"
    try:
        page, passed_over = page_of_run(options.run_folder)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        sys.exit(str(error))
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, output)
    for name, reason in passed_over.items():
        print(f"Passed over {name}: {reason}", file=sys.stderr)
    print(f"{output} ({output.stat().st_size / 1e6:.1f} MB)")
    if options.open:
        webbrowser.open(output.resolve().as_uri())


if __name__ == "__main__":
    main()
