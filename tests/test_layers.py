"""The package's shape: imports point downwards, the public API is lazy, and the loop fits on a screen."""

import ast
import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import speedrl

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "speedrl"
FILES = sorted(PACKAGE.rglob("*.py"))
LEAVES = ["method.sampler", "method.schedules"]  # plain values, which a model has as well
BELOW = ["method", "system", "models", "rewards", "run"]
MAY_IMPORT = {  # each part, and the parts or modules that it may import beside itself
    "method": [],
    "system": [],
    "models": ["system", *LEAVES],
    "rewards": ["models", "method", "system"],
    "run": ["models", "method", "system"],
    "generation": ["models", "method"],
    "learner": [*BELOW, "generation"],
    "evaluation": [*BELOW, "generation", "learner"],
    "training": [*BELOW, "generation", "learner"],
    "studies": [*BELOW, "generation", "learner", "evaluation", "training"],
    "cli": ["system", "evaluation"],  # the functions of its commands by name
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in FILES}


def part_of(module: str) -> str:
    """The second part of a module's name: method, training; "" for the package itself."""
    return (module.split(".") + [""])[1]


def imports(path: Path) -> set[str]:
    """All modules that a file imports, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & MODULES) or {node.module}
    return found


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_imports_point_downwards(part):
    wrong = []
    for path in FILES:
        if part_of(module_name(path)) != part:
            continue
        for module in imports(path):
            # the package itself holds nothing but the version and lazy names
            names = {part_of(module), module.removeprefix("speedrl.")}
            if module.startswith("speedrl.") and not names & {part, *MAY_IMPORT[part]}:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_what_models_know_of_the_method_imports_nothing_else_of_it():
    for name in LEAVES:
        found = {m for m in imports(PACKAGE / f"{name.replace('.', '/')}.py") if m.startswith("speedrl")}
        assert found <= {f"speedrl.{leaf}" for leaf in LEAVES}


def test_every_module_has_its_place_in_the_order():
    known = {*MAY_IMPORT, "", "__main__"}
    assert {part_of(name) for name in MODULES} <= known


def test_the_order_has_no_circle():
    graph = {name: {m for m in imports(path) if m in MODULES and m != "speedrl"} for name, path in
             ((module_name(path), path) for path in FILES if path.name != "__init__.py")}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*above, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_the_method_imports_nothing_but_itself_torch_and_einops():
    allowed = {"torch", "einops", *sys.stdlib_module_names}
    for path in (PACKAGE / "method").glob("*.py"):
        for module in imports(path):
            top = module.partition(".")[0]
            assert top in allowed or module.startswith("speedrl.method"), f"{path.name} imports {module}"


def test_no_module_has_the_name_of_a_function_that_it_or_the_package_exports():
    names = {name.rpartition(".")[2] for name in MODULES if name != "speedrl"}
    assert not names & set(speedrl.__all__)
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert path.stem not in defined, path


def test_every_public_name_resolves_and_is_declared_for_type_checkers():
    for name in speedrl.__all__:
        assert getattr(speedrl, name) is not None, name
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    declared = {alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert declared - {None} == set(speedrl.__all__) - {"__version__"}
    assert set(speedrl.__all__) <= set(dir(speedrl))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = speedrl.nothing


HEAVY = "{'torch', 'numpy', 'transformers', 'diffusers', 'open_clip', 'matplotlib', 'PIL', 'einops', 'rich.console'}"


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    where = os.environ | {"PYTHONPATH": ""}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", env=where)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_imports_nothing_heavy():
    assert python(f"import sys, speedrl; print(*sorted({HEAVY} & set(sys.modules)))") == "\n"


def test_the_help_does_not_import_torch():
    """That of the commands together; one command's options are those of its function, which is imported for them."""
    code = "import sys, contextlib\nsys.argv = ['speedrl', '--help']\nfrom speedrl.cli import app\n"
    code += "with contextlib.suppress(SystemExit):\n    app()\n"
    code += f"print('heavy:', *sorted({HEAVY} & set(sys.modules) - {{'rich.console'}}))"  # what help is shown by
    said = python(code)
    assert all(word in said for word in ("--help", "train", "sample", "export", "eval", "ablate"))
    assert said.splitlines()[-1].strip() == "heavy:"


def lines_of_code(node: ast.AST, source: str) -> int:
    """The lines of a node that are no comment, no docstring and not empty."""
    lines = set(range(node.lineno, node.end_lineno + 1))
    body = getattr(node, "body", [])
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        lines -= set(range(body[0].lineno, body[0].end_lineno + 1))
    text = source.splitlines()
    return sum(bool(text[i - 1].strip()) and not text[i - 1].lstrip().startswith("#") for i in lines)


def statements(node: ast.AST) -> int:
    """The statements in a node, nested ones included, its docstring and itself not."""
    found = sum(isinstance(each, ast.stmt) for each in ast.walk(node)) - isinstance(node, ast.stmt)
    return found - (isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None)


def function(tree: ast.Module, name: str) -> ast.FunctionDef:
    (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return found


def test_the_loop_is_at_most_60_statements_and_calls_its_loss_of_at_most_30_by_name():
    tree = ast.parse((PACKAGE / "training.py").read_text(encoding="utf-8"))
    loops = [node for node in ast.walk(function(tree, "train"))
             if isinstance(node, ast.For) and "run.iterations()" in ast.unparse(node.iter)]
    assert len(loops) == 1 and 20 < statements(loops[0]) <= 60
    assert 10 < statements(function(tree, "grpo_loss")) <= 30
    called = {ast.unparse(node.func) for node in ast.walk(loops[0]) if isinstance(node, ast.Call)}
    # what the method is, in the loop itself and not in helpers of the loop
    assert {"grpo_loss", "rollout", "speed_reward", "combine", "count_residuals", "group_advantages", "leave_one_out",
            "std_percentile", "low_quality", "hide", "step_loss", "learner.step"} <= called
    inside = {ast.unparse(node.func) for node in ast.walk(function(tree, "grpo_loss")) if isinstance(node, ast.Call)}
    assert {"score", "likelihood", "policy_loss", "count_weights", "hindsight_weights"} <= inside


def test_the_minimal_experiment_is_at_most_45_lines_and_trains_the_embedded_model(monkeypatch):
    from experiments import minimal

    source = Path(minimal.__file__).read_text(encoding="utf-8")
    (main,) = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "main")
    assert lines_of_code(main, source) <= 45
    tree = ast.parse(source)
    assert {m for m in imports(Path(minimal.__file__)) if m.startswith("speedrl")} == {"speedrl"}, (
        "the public API alone"
    )
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            and node.value.id == "speedrl"}
    assert used <= set(speedrl.__all__)
    monkeypatch.setattr(minimal, "G", 2)
    monkeypatch.setattr(minimal, "N", 3)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        minimal.main(2)
    assert [line.partition(":")[0] for line in said.getvalue().splitlines()] == ["1", "2"]
    assert "nan" not in said.getvalue()
