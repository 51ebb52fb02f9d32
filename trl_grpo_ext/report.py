"""
The report of a run that has logged credit: one HTML file that works offline.

    python -m trl_grpo_ext.report RUN_FOLDER [--output credit.html] [--open]

It needs `pip install "trl_grpo_ext[report]"` and the folder `credit` that `log_credit` writes. Curves are the
trainer's own if a `trainer_state.json` is there, in the newest checkpoint or, once the training has ended, in the
run's folder; and else means over the recorded completions.
"""

import argparse
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from .credit.page_of_run import PAGE_NAME, write_page


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, write the report and say where it is."""
    parser = argparse.ArgumentParser("python -m trl_grpo_ext.report", description="Write the report of a run.")
    parser.add_argument("run_folder", type=Path, help="The run's output_dir, with the folder `credit`.")
    parser.add_argument("--output", type=Path, help="File to write. Default: credit.html in the run's folder.")
    parser.add_argument("--open", action="store_true", help="Open it in the browser.")
    options = parser.parse_args(arguments)
    output = options.output or options.run_folder / PAGE_NAME
    try:
        passed_over = write_page(options.run_folder, output)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        sys.exit(str(error))
    for name, reason in passed_over.items():
        print(f"Passed over {name}: {reason}", file=sys.stderr)
    print(f"{output} ({output.stat().st_size / 1e6:.1f} MB)")
    if options.open:
        webbrowser.open(output.resolve().as_uri())


if __name__ == "__main__":
    main()
