"""The shape of the repository and of the code: who may import what, how long a function is, what lies on top."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import TEXTS


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_grpo_ext"
MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))

# Formulas that can be read and tested without TRL
PURE = [
    "advantages/combine.py",
    "advantages/comparisons.py",
    "advantages/estimators.py",
    "advantages/normalization.py",
    "advantages/returns.py",
    "advantages/settings.py",
    "advantages/sources.py",
    "kl/divergences.py",
    "kl/estimates.py",
    "kl/fused/chunks.py",
    "kl/fused/gradients.py",
    "kl/fused/plain.py",
    "kl/fused/predicted_gradient.py",
    "kl/fused/row_kernels.py",
    "kl/fused/row_operations.py",
    "kl/fused/rows.py",
    "kl/fused/tiles.py",
    "kl/fused/token_stats.py",
    "loss.py",
    "metrics.py",
    "reward_models/chat.py",
    "reward_models/encoding.py",
    "reward_models/plain_data.py",
    "reward_models/readings.py",
    "reward_models/remote/answer_cache.py",
    "reward_models/remote/images.py",
    "reward_models/remote/judge_formats.py",
    "reward_models/remote/protocols.py",
    "reward_models/rendering.py",
    "reward_models/renderings.py",
    "reward_models/texts.py",
    "rewards/gating.py",
    "rewards/step_reductions.py",
    "rewards/transforms.py",
    "rewards/turns.py",
    "steps/spans.py",
    "tables.py",
    "rewards/types.py",
]
MAY_USE_UPSTREAM = [
    *("checkpoints/trainer.py", "config.py", "distributed.py", "trainer.py"),
    *("kl/cached_reference.py", "kl/model_forward.py", "kl/own_logits.py", "kl/reference.py", "kl/trainer.py"),
    *("reward_models/backbone.py", "rewards/sources.py", "steps/step_reward.py"),
]
# Questions to objects of the user, not of TRL: a reward function's `reduce`, and what NumPy and torch have in common
# ... and the one place that sets attributes of an upstream object for a moment
MAY_ASK_FOR_ATTRIBUTES = {
    "_swapped.py": ["getattr", "setattr", "setattr", "delattr"],
    "rewards/sources.py": ["hasattr"],
    "rewards/types.py": ["hasattr"],
}
TOP_LEVEL = {
    ".ci",
    ".gitignore",
    ".pre-commit-config.yaml",
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "recipes",
    "tests",
    "trl_grpo_ext",
}


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path):
    """Modules that a file imports anywhere in it; those of the package by their file."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            folder = path.parents[node.level - 1]
            named = [node.module] if node.module else [alias.name for alias in node.names]
            targets = [folder.joinpath(*name.split(".")) for name in named]
            found |= {
                target.relative_to(PACKAGE).as_posix() + ("/__init__.py" if target.is_dir() else ".py")
                for target in targets
            }
    return found


def roots(path):
    return {name.split(".")[0] for name in imports(path) if not name.endswith(".py")}


def test_the_lists_name_modules_that_exist():
    assert set(PURE) | set(MAY_USE_UPSTREAM) | set(MAY_ASK_FOR_ATTRIBUTES) <= set(MODULES)


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_imports_torch_the_standard_library_and_pure_modules(module):
    own = {name for name in imports(MODULES[module]) if name.endswith(".py")}
    # Triton is not installed everywhere: one module imports it, and is imported where it is used
    allowed = {"torch", "triton"} if module == "kl/fused/row_kernels.py" else {"torch"}
    assert roots(MODULES[module]) - sys.stdlib_module_names - allowed == set()
    assert own <= set(PURE)


def test_trl_is_imported_in_one_place_and_reached_through_it():
    # The command runs TRL's own script
    assert [name for name, path in MODULES.items() if "trl" in roots(path)] == ["_trl.py", "cli.py"]
    users = [name for name, path in MODULES.items() if "_trl.py" in imports(path)]
    assert set(users) <= set(MAY_USE_UPSTREAM)


def test_the_package_imports_itself_relatively():
    assert [name for name, path in MODULES.items() if "trl_grpo_ext" in roots(path)] == []


def functions(path):
    return [n for n in ast.walk(tree(path)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def code_lines(function):
    """Lines of a function without those of its docstring, where the formulas stand."""
    docstring = function.body[0] if ast.get_docstring(function) else None
    documented = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
    return function.end_lineno - function.lineno + 1 - documented


@pytest.mark.parametrize("module", MODULES)
def test_no_function_has_more_than_65_lines_of_code(module):
    lengths = {node.name: code_lines(node) for node in functions(MODULES[module])}
    assert {name: length for name, length in lengths.items() if length > 65} == {}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "_trl.py"])
def test_nothing_is_asked_of_an_object_that_upstream_has_checked(module):
    calls = [n.func for n in ast.walk(tree(MODULES[module])) if isinstance(n, ast.Call)]
    called = [function.id for function in calls if isinstance(function, ast.Name)]
    asked = [name for name in called if name in ("getattr", "hasattr", "setattr", "delattr")]
    assert asked in ([], MAY_ASK_FOR_ATTRIBUTES.get(module))


@pytest.mark.parametrize("module", [name for name in MODULES if name != "_trl.py"])
def test_no_attribute_is_reached_through_vars(module):
    subscripted = [n.value for n in ast.walk(tree(MODULES[module])) if isinstance(n, (ast.Subscript, ast.Attribute))]
    called = [n.func.id for n in subscripted if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert "vars" not in called


SOURCES = [*MODULES.values(), *RECIPES]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_statement_holds_one_thought(path):
    """No `a, b = x, y`: two assignments on a line hide one of them. A swap, `a, b = b, a`, is one thought."""
    packed = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            targets = [target for target in node.targets if isinstance(target, ast.Tuple)]
            names = {ast.unparse(element) for target in targets for element in target.elts}
            if targets and names != {ast.unparse(element) for element in node.value.elts}:
                packed.append(node.lineno)
    assert packed == []


def test_shape_suffixes_are_those_of_the_table():
    table = set(re.findall(r"^\| `([A-Z])` \|", ast.get_docstring(tree(MODULES["__init__.py"])), re.M))
    used = set()
    for path in MODULES.values():
        for node in ast.walk(tree(path)):
            name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else ""
            if suffix := re.search(r"^_?[a-z][a-z0-9_]*_([A-Z0-9]+)$", name):
                used |= set(suffix[1])
    assert used - set("0123456789") == table


def test_what_is_public_is_what_readme_and_recipes_use():
    import trl_grpo_ext

    public = set(trl_grpo_ext.__all__)
    imported = set()
    for path in RECIPES:
        if path.parent.name != "bench":
            deeper = [name for name in imports(path) if name.startswith("trl_grpo_ext.")]
            assert deeper == [], f"{path.name} imports {deeper}"
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module == "trl_grpo_ext":
                imported |= {alias.name for alias in node.names}
    documents = "\n".join(TEXTS.values())
    assert imported <= public
    assert {name for name in public - imported if name not in documents} == set()


@pytest.mark.parametrize("module", MODULES)
def test_every_module_class_and_public_function_has_a_docstring(module):
    def private(name):
        return name.startswith("_")

    parsed = tree(MODULES[module])
    public = [n for n in parsed.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not private(n.name)]
    public = [n for n in public if "overload" not in [ast.unparse(decorator) for decorator in n.decorator_list]]
    assert ast.get_docstring(parsed)
    assert [node.name for node in public if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_recipe_compiles_and_uses_the_package_as_installed(recipe):
    compile(recipe.read_text(encoding="utf-8"), str(recipe), "exec")
    assert "tests" not in roots(recipe)


def tracked_files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip("not a git checkout")
    return listed.stdout.splitlines()


def test_nothing_else_lies_on_top():
    assert {name.split("/")[0] for name in tracked_files()} <= TOP_LEVEL


def test_no_file_is_called_utils():
    assert [name for name in tracked_files() if re.search(r"(^|/)(utils|helpers|common|core)(\.py|/)", name)] == []
