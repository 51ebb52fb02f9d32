"""What a recipe prints where its reader looks for what went wrong."""

import re


# A bar that is drawn: `50%|#### | 1/2 [00:00<00:00, 6.09it/s]`, and the spaces that wipe it out
BAR = re.compile(r".*\d+%\|.*\| [\d.]+\w*/[\d.]+\w* \[.*\]|\s*")
# Of libraries that these recipes do not need, where they are installed
OF_OTHERS = re.compile(r"Failed to load CPU gemm_4bit_forward from kernels-community|.*Setting accelerator to CPU\.")


def unexpected_lines(stderr: str) -> list[str]:
    """The lines of the standard error that are no progress bar: a first run that warns looks broken."""
    # One bar below another moves the cursor up
    lines = re.split(r"[\r\n]+", stderr.replace("\x1b[A", ""))
    return [line for line in lines if not BAR.fullmatch(line) and not OF_OTHERS.match(line)]
