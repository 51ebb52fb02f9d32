"""What is installed, and from what: the metadata, both distributions, and the package without its extras."""

import ast
import email
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import metadata, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import trl_grpo_ext
from tests.support.documents import TEXTS


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_grpo_ext"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# The one module that may import what the extra [serve] installs
SERVER = PACKAGE / "reward_models" / "remote" / "server.py"


# ... and [report]
REPORT = PACKAGE / "credit" / "page_of_run.py"
# Prints a table where rich is installed, as TRL does
TABLE = PACKAGE / "credit" / "step_table.py"


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(requirement).name) for requirement in requirements}


def imported(paths: list[Path]) -> set[str]:
    """The distributions that files import anything from."""
    modules = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.split(".")[0])
    owners = packages_distributions()
    return {canonicalize_name(owners[module][0]) for module in modules if module in owners} - {"trl-grpo-ext"}


def test_dependencies_are_what_the_package_imports():
    modules = set(PACKAGE.rglob("*.py")) - {SERVER, REPORT, TABLE}
    assert imported(sorted(modules)) == names(PROJECT["dependencies"])
    assert imported([TABLE]) - names(PROJECT["dependencies"]) == {"rich"}
    for extra, module in {"serve": SERVER, "report": REPORT}.items():
        assert imported([module]) - names(PROJECT["dependencies"]) == names(PROJECT["optional-dependencies"][extra])


def test_dependencies_install_on_every_python_that_is_promised():
    (promised,) = SpecifierSet(PROJECT["requires-python"])
    for name in names(PROJECT["dependencies"]):
        required = metadata(name)["Requires-Python"]
        assert promised.operator == ">=" and promised.version in SpecifierSet(required), f"{name} needs {required}"


def test_commands_of_the_documents_install_what_they_need():
    """The extra in the README's first command has what its recipe imports; no command names an extra that is gone."""
    extras = PROJECT["optional-dependencies"]
    texts = list(TEXTS.values())
    named = re.findall(r"(?:\.|trl_grpo_ext)\[([\w,]+)\]", "\n".join(texts))
    assert {extra for group in named for extra in group.split(",")} <= set(extras)
    # `.ci/run` takes this command, too, by how it begins and ends
    (command,) = re.findall(r"^pip install .*quickstart.*$", texts[0], re.M)
    (installed,) = re.findall(r'^pip install -e "?\.(?:\[(\w+)\])?"?', command)
    available = names(PROJECT["dependencies"] + extras.get(installed, []))
    recipe = [ROOT / "recipes" / "quickstart.py", *(ROOT / "recipes" / "running_sums").glob("*.py")]
    assert imported(recipe) <= available


WITHOUT_EXTRAS = """
import sys
extras = ["matplotlib", "rich", "starlette", "uvicorn"]
# What TRL has imported of them
for name in [name for name in sys.modules if name.split(".")[0] in extras]:
    del sys.modules[name]
sys.modules |= dict.fromkeys(extras)
import trl_grpo_ext
import trl_grpo_ext.cli
trl_grpo_ext.RemoteProcessRewardModel("http://127.0.0.1:1")
import trl_grpo_ext.serve
trl_grpo_ext.serve.main()
"""


def test_the_package_works_without_extras_and_the_server_names_its_own(forked_python):
    ran = subprocess.run([forked_python, "-c", WITHOUT_EXTRAS], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 1
    message = ran.stderr.splitlines()[-1]
    assert "starlette, uvicorn" in message and "pip install 'trl_grpo_ext[serve]'" in message


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """Folder with a source distribution and the wheel."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr
    return folder


def test_the_source_distribution_holds_all_that_the_tests_read(distributions):
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.split("/", 1)[1] for name in tar.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip("not a git checkout")
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    left_out = {name for name in tracked - packed if not name.startswith((".ci/", ".pre-commit"))}
    assert left_out == set()


def test_the_wheel_holds_the_package_alone_and_its_command(distributions):
    (archive,) = distributions.glob("*.whl")
    with zipfile.ZipFile(archive) as wheel:
        files = wheel.namelist()
        folders = {name.split("/")[0] for name in files}
        info = f"trl_grpo_ext-{trl_grpo_ext.__version__}.dist-info"
        assert folders == {"trl_grpo_ext", info}
        assert {"trl_grpo_ext/py.typed", f"{info}/licenses/LICENSE"} <= set(files)
        assert (
            wheel.read(f"{info}/entry_points.txt").decode().split("\n")[1] == "trl-grpo-ext = trl_grpo_ext.cli:launch"
        )
        described = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    # There is no repository beside the page of the package index
    text = described.get_payload()
    assert re.findall(r"\]\((?!https?://)[^)]*\)", text) == []
    assert len(text) > 0.8 * len((ROOT / "README.md").read_text(encoding="utf-8"))
