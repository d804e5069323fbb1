"""
The house as it is to stand (DESIGN, section 3): who imports whom, how, and how large anything may be.

Nearly all of it is read from the source. What runs without what is tried in processes that cannot import the rest.
"""

import ast
import configparser
import importlib
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import GOLDEN, TRAILS
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import multicoco


ROOT = Path(__file__).parent.parent
BOARDS = GOLDEN / "version_before" / "boards" / "train.jsonl"

# From the ground up: a module imports only what stands on lower floors, or further to the left in its own folder.
CARRIED = (  # what a checkpoint carries
    "compat",
    "configuration_multicoco",
    "processing_multicoco",
    "modeling_internvl_chat",
    "passes",
    "objectives",
    "modeling_multicoco",
)
FLOORS = (
    *CARRIED,
    "curriculum",
    "sources",
    "records",
    "data_multicoco",
    "trainer_callbacks",
    "evaluation",
    "training",
)
COMMANDS = ("train", "score", "diagnose", "model_card")
EVALUATION = (("settings", "intervals", "metric"), ("subject",), ("predictions",), ("experiments",), ("diagnosis",))
ONLY_NEEDS = {"passes": {"compat", "configuration_multicoco"}, "curriculum": {"configuration_multicoco"}}
NO_DIAGNOSIS = ("measurements", "verdicts", "page")  # they get results, not who made them
LIBRARIES_OF_CARRIED = {"torch", "transformers", "numpy", "PIL", "huggingface_hub"}
FOLDERS_OF_SCRIPTS = ("recipes", "benchmarks", "examples")
KNOWS_NOT = {  # one idea a file
    "configuration_multicoco": {"torch", "numpy", "PIL"},
    "processing_multicoco": {"modeling_internvl_chat", "modeling_multicoco", "passes"},
    "curriculum": {"torch", "PIL", "pathlib", "os", "json"},
    "sources": {"torch", "PIL", "configuration_multicoco", "processing_multicoco"},
    "records": {"torch"},
    "data_multicoco": {"modeling_internvl_chat", "modeling_multicoco", "passes"},
    "trainer_callbacks": {"processing_multicoco", "modeling_internvl_chat", "modeling_multicoco", "passes"},
}
MAX_LINES_OF_FILE, MAX_LINES_OF_FUNCTION, MAX_COMPLEXITY, MAX_FILES_AT_ROOT = 800, 80, 20, 17

MAY_TAKE_BOOLS = {  # public functions that may take a bool by its place, and why
    "InternVLChatModel.chat": "the original's own signature",
    "InternVLChatModel.batch_chat": "the original's own signature",
    "MultiCoCoModel.forward": "`use_cache` stands in the forward of transformers' models, further switches behind it",
    "MultiCoCoForConditionalGeneration.forward": "as above; the original takes it by its place",
}


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def place(path, node=None):
    return f"{path.relative_to(ROOT)}{f':{node.lineno}' if node is not None else ''}"


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


ROOT_FILES = sorted(ROOT.glob("*.py"))
LIBRARY = [path for path in ROOT_FILES if path.stem not in COMMANDS] + sources("evaluation", "training")
COMMAND_FILES = [ROOT / f"{name}.py" for name in COMMANDS]
SCRIPTS = sources(*FOLDERS_OF_SCRIPTS)
TESTS = sorted((ROOT / "tests").glob("*.py"))
TREES = {path: parse(path) for path in (*LIBRARY, *COMMAND_FILES, *SCRIPTS, *sources("metrics"), *TESTS)}


def module_name(path):
    """Of a file of the package, within it: `records`, `evaluation.subject`; of an `__init__.py` that of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path) for path in LIBRARY} - {""}
TOP_NAMES = {name.split(".")[-1] for name in MODULES} | set(COMMANDS)


class Import(NamedTuple):
    path: Path
    node: ast.stmt
    target: str  # a module of the package, as `evaluation.subject`, or the full name of another
    is_own: bool


def imports(path):
    """All imports of a file at any depth, under `TYPE_CHECKING` too; of names from a package each name's module."""
    own = path.relative_to(ROOT).parent.parts
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            targets = [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            full = [f"{base}.{alias.name}".strip(".") for alias in node.names]
            targets = [(name, node.level) for name in full]
        else:
            continue
        for name, level in targets:
            if level:
                name = ".".join((*own[: len(own) + 1 - level], name))
            elif name == "multicoco" or name.startswith("multicoco."):
                name = name.removeprefix("multicoco").strip(".")
            else:
                yield Import(path, node, name if isinstance(node, ast.Import) else node.module, False)
                continue
            known = [module for module in (*MODULES, *COMMANDS) if name == module or name.startswith(f"{module}.")]
            yield Import(path, node, max(known, key=len, default=name), True)


def offenders(found):
    """For an assertion: one line each, so that a failure can be read."""
    return "\n" + "\n".join(sorted(set(found)))


# --- 1: floors ---------------------------------------------------------------------------------------------------


def floor(module):
    """Where a module stands; within `evaluation` the order has floors of its own."""
    top, _, rest = module.partition(".")
    if module in COMMANDS:
        return (len(FLOORS), 0)
    if top not in FLOORS:
        return None
    inner = next((number for number, names in enumerate(EVALUATION) if rest in names), None)
    return (FLOORS.index(top), inner if top == "evaluation" else None)


def test_no_import_goes_upwards():
    found = []
    for path in (*LIBRARY, *COMMAND_FILES):
        mine = floor(module_name(path))
        if mine is None:
            continue
        for item in imports(path):
            other = floor(item.target) if item.is_own else None
            if other is None or item.target == module_name(path):
                continue
            in_order = None not in (mine[1], other[1]) and mine[0] == other[0] != len(FLOORS)
            if other[0] > mine[0] or (in_order and other[1] >= mine[1]):
                found.append(f"{place(path, item.node)} imports {item.target}")
    assert not found, offenders(found)


def test_every_module_has_a_floor():
    assert not [module for module in MODULES if floor(module) is None]


def test_imports_make_no_circle():
    graph = {
        module_name(path): {item.target for item in imports(path) if item.is_own and item.target in MODULES}
        for path in LIBRARY
        if path != ROOT / "__init__.py"
    }
    for module in graph:  # a folder's `__init__.py` stands for the folder only
        graph[module].discard(module)
    while leaves := [module for module, needed in graph.items() if not needed & graph.keys()]:
        for leaf in leaves:
            del graph[leaf]
    assert not graph, offenders(f"{module} needs {sorted(needed & graph.keys())}" for module, needed in graph.items())


def test_nothing_imports_a_command():
    found = [
        f"{place(path, item.node)} imports {item.target}"
        for path in (*LIBRARY, *COMMAND_FILES, *SCRIPTS)
        for item in imports(path)
        if item.is_own and item.target.split(".")[0] in COMMANDS
    ]
    assert not found, offenders(found)


def test_files_know_one_idea():
    found = []
    for path in LIBRARY:
        name = module_name(path)
        for item in imports(path):
            forbidden = item.target.split(".")[0] in KNOWS_NOT.get(name, ())
            needless = item.is_own and name in ONLY_NEEDS and item.target not in ONLY_NEEDS[name]
            looks_back = item.is_own and item.target == "evaluation.diagnosis" and path.stem in NO_DIAGNOSIS
            if forbidden or needless or looks_back:
                found.append(f"{place(path, item.node)} imports {item.target}")
    assert not found, offenders(found)


# --- 2: one way to import ----------------------------------------------------------------------------------------


def test_imports_are_relative_inside_and_absolute_outside():
    found = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            level = node.level if isinstance(node, ast.ImportFrom) else 0
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not level else []
            tops = {name.split(".")[0] for name in names}
            if path in LIBRARY and "multicoco" in tops:
                found.append(f"{place(path, node)}: absolute inside the package")
            if path not in LIBRARY and level:
                found.append(f"{place(path, node)}: relative outside of the package")
            if tops & TOP_NAMES:
                found.append(f"{place(path, node)}: {', '.join(tops & TOP_NAMES)} as a top-level name")
    assert not found, offenders(found)


def carried_files():
    return [ROOT / f"{name}.py" for name in CARRIED if (ROOT / f"{name}.py").is_file()]


def test_carried_files_import_only_each_other_and_what_every_user_has():
    """Remote code is copied file by file and checked by transformers for what it needs, inside functions too."""
    found, allowed = [], LIBRARIES_OF_CARRIED | sys.stdlib_module_names
    for path in carried_files():
        unknown = {name.split(".")[0] for name in get_imports(path)} - allowed
        found += [f"{place(path)}: transformers would ask the user for {name}" for name in unknown]
        for item in imports(path):
            is_sibling = item.is_own and getattr(item.node, "level", 0) == 1 and item.target in CARRIED
            if not is_sibling and (item.is_own or item.target.split(".")[0] not in allowed):
                found.append(f"{place(path, item.node)} imports {item.target}")
    assert not found, offenders(found)


def test_what_is_carried_is_what_the_registered_files_need():
    found = set()
    for name in ("configuration_multicoco", "processing_multicoco", "modeling_multicoco"):
        found |= {str(ROOT / f"{name}.py"), *get_relative_import_files(ROOT / f"{name}.py")}
    assert {Path(path).name for path in found} == {path.name for path in carried_files()}


# --- 3: what runs without what, and what is public ---------------------------------------------------------------

ASK = """
import json, sys
import torch
from multicoco import MultiCoCoForConditionalGeneration, MultiCoCoProcessor

torch.set_num_threads(1)
model = MultiCoCoForConditionalGeneration.from_pretrained(TRAILS)
processor = MultiCoCoProcessor.from_pretrained(TRAILS)
"""
GENERATE = """
with open(BOARDS) as file:
    record = json.loads(file.readline())
picture = BOARDS.replace("train.jsonl", record["images"][0])
content = [{"type": "image", "path": picture}, {"type": "text", "text": record["question"]}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=8)
text = processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
assert text == f"### {record['answer']}", text
"""
DATA = """
from transformers import Trainer, TrainingArguments
from multicoco import CurriculumArguments, CurriculumCallback, ReasoningCollator, StageDataset, load_records

curriculum = CurriculumArguments(c_thought=1, max_latent_stage=5)
dataset = StageDataset(load_records(BOARDS), processor, curriculum)
arguments = TrainingArguments(
    OUTPUT, max_steps=1, use_cpu=True, remove_unused_columns=False, save_strategy="no", report_to="none",
    dataloader_pin_memory=False, per_device_train_batch_size=2,
)
parts = {
    "train_dataset": dataset,
    "data_collator": ReasoningCollator(processor),
    "callbacks": [CurriculumCallback(curriculum, dataset)],
}
"""
STOCK_TRAINER = "assert Trainer(model, arguments, **parts).train().global_step == 1"
STAGE_TRAINER = """
from multicoco.training.trainer import StageTrainer
assert StageTrainer(model=model, args=arguments, curriculum=curriculum, **parts).train().global_step == 1
"""
SUBJECT = """
from multicoco import load_records
from multicoco.evaluation.subject import AskArguments, Subject

records = load_records(BOARDS)
subject = Subject(TRAILS, records, AskArguments(data=BOARDS), torch.device("cpu"))
subject.load()
for line, record in zip(subject.answer([0, 1], 5), records):
    assert line["prediction"] == record["answer"], line
"""
WITHOUT = {
    "both trainers without evaluation": (["multicoco.evaluation"], ASK + DATA + STOCK_TRAINER + STAGE_TRAINER),
    "subjects without training": (["multicoco.training"], ASK + GENERATE + SUBJECT),
    "answers with neither nor datasets": (
        ["multicoco.evaluation", "multicoco.training", "datasets", "matplotlib", "evaluate", "deepspeed"],
        ASK + GENERATE,
    ),
}
CLEAN = """
import sys
import multicoco
found = [name for name in ("datasets", "matplotlib", "deepspeed", "evaluate") if name in sys.modules]
found += [name for name in sys.modules if name.startswith(("multicoco.evaluation", "multicoco.training"))]
assert not found, found
"""


def run_code(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The processes of all cases, which run side by side: each imports half of transformers."""
    processes = {}
    for name, (blocked, code) in WITHOUT.items():
        folder = tmp_path_factory.mktemp("without")
        names = f"TRAILS, BOARDS, OUTPUT = {str(TRAILS)!r}, {str(BOARDS)!r}, {str(folder)!r}\n"
        code = f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))  # importing them fails\n{names}{code}"
        processes[name] = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    yield processes
    for process in processes.values():
        process.kill()


@pytest.mark.parametrize("name", WITHOUT)
def test_what_is_below_runs_without_what_is_above(started, name):
    _, errors = started[name].communicate(timeout=300)
    assert started[name].returncode == 0, errors[-3000:]


NO_TORCH = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name.split(".")[0] == "torch" else find_spec(name, *args)
sys.modules["torch"] = None
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import is_torch_available

assert not is_torch_available()
assert AutoConfig.from_pretrained(FOLDER, trust_remote_code=True).num_thoughts == 5
assert len(AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)) > 6
"""


def test_a_saved_configuration_loads_without_torch(trails):
    """`configuration_multicoco.py` knows no tensors; what it takes from `compat.py` does not either."""
    run_code(f"FOLDER = {str(trails)!r}\n{NO_TORCH}")


def test_importing_the_package_is_light():
    run_code(CLEAN)


def test_public_names_are_the_same_in_all_places():
    tree = TREES[ROOT / "__init__.py"]
    (checking,) = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    typed = {alias.asname or alias.name: node.module for node in checking.body for alias in node.names}
    assert typed == multicoco._MODULE_OF, "what type checkers see and what is imported when it is asked for differ"
    eager = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert not eager & typed.keys()
    assert sorted(multicoco.__all__) == sorted({*eager, *typed} - {"__version__"})
    assert len(set(multicoco.__all__)) == len(multicoco.__all__)
    for name in multicoco.__all__:
        assert getattr(multicoco, name) is not None
        assert name in dir(multicoco)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = multicoco.no_such_name


def test_pages_examples_and_recipes_use_the_public_face():
    found = []
    for path in sources("examples", "recipes"):
        found += [
            f"{place(path, node)}: {ast.unparse(node)}"
            for node in ast.walk(TREES[path])
            if re.match(r"(from|import) multicoco\.(?!recipes\b)", ast.unparse(node))
        ]
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*/README.md")):
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            lines = re.findall(r"^\s*(?:from|import) multicoco\.(?!recipes\b).*", block, flags=re.MULTILINE)
            found += [f"{place(page)}: {line.strip()}" for line in lines]
    assert not found, offenders(found)


# --- 4: sizes ----------------------------------------------------------------------------------------------------


def test_the_root_shows_the_ideas_and_the_commands():
    names = {path.stem for path in ROOT_FILES}
    planned = {name for name in FLOORS if name not in ("evaluation", "training")}
    assert names == {"__init__", *planned, *COMMANDS}
    assert len(names) <= MAX_FILES_AT_ROOT


def test_files_are_short():
    found = [
        f"{place(path)}: {length} lines"
        for path in (*LIBRARY, *COMMAND_FILES, *SCRIPTS)
        if (length := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES_OF_FILE
    ]
    assert not found, offenders(found)


def test_functions_are_short():
    """From the first decorator to the last line; a function inside counts for itself and for the one around it."""
    found = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if (length := node.end_lineno - first + 1) > MAX_LINES_OF_FUNCTION:
                    found.append(f"{place(path, node)} {node.name}: {length} lines")
    assert not found, offenders(found)


def test_the_linter_refuses_complex_functions():
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "C901" in lint["select"]
    assert lint["mccabe"]["max-complexity"] == MAX_COMPLEXITY
    assert "C901" not in (*lint.get("ignore", []), *sum(lint.get("per-file-ignores", {}).values(), []))


def test_no_function_is_complex():
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("the linter is not installed (`pip install multicoco[quality]`)")
    command = [ruff, "check", "--no-cache", "--output-format", "concise", "--select", "C901", str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


# --- 5: docstrings, types, bools ---------------------------------------------------------------------------------


class Definition(NamedTuple):
    path: Path
    node: ast.FunctionDef
    name: str
    overridden: list  # what it overrides in classes of libraries

    @property
    def arguments(self):
        """Those that may be given by their place, without `self` or `cls`, and the others."""
        args = self.node.args
        positional = [*args.posonlyargs, *args.args]
        is_static = any(getattr(one, "id", None) == "staticmethod" for one in self.node.decorator_list)
        positional = positional[1:] if "." in self.name and not is_static else positional
        return positional, [*args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]

    @property
    def inherited(self):
        """Names of arguments that the overridden method has, and those of its variable ones."""
        names = {name for base in self.overridden for name in inspect.signature(base).parameters}
        if self.overridden:
            names |= {argument.arg for argument in (self.node.args.vararg, self.node.args.kwarg) if argument}
        if self.overridden and self.node.name.startswith("on_"):  # of a callback, what comes in the base's `**kwargs`
            names |= {argument.arg for argument in self.node.args.args}
        return names

    def __str__(self):
        return f"{place(self.path, self.node)} {self.name}"


def public_definitions():
    """Functions and methods of the package whose names, and whose classes' names, do not begin with `_`."""
    for path in LIBRARY:
        module = importlib.import_module(".".join(filter(None, ("multicoco", module_name(path)))))
        for node in TREES[path].body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield Definition(path, node, node.name, [])
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                bases = getattr(module, node.name).__mro__[1:-1]
                foreign = [vars(base) for base in bases if not base.__module__.startswith("multicoco")]
                for method in node.body:
                    is_setter = any(
                        getattr(one, "attr", "") == "setter" for one in getattr(method, "decorator_list", [])
                    )
                    if not isinstance(method, ast.FunctionDef) or is_setter:
                        continue
                    if method.name == "__init__" or not method.name.startswith("_"):
                        found = [names[method.name] for names in foreign if method.name in names]
                        found = [getattr(one, "fget", getattr(one, "__func__", one)) for one in found]
                        found = [one for one in found if callable(one)]
                        yield Definition(path, method, f"{node.name}.{method.name}", found)


@pytest.fixture(scope="module")
def definitions():
    return list(public_definitions())


def test_every_module_says_what_it_knows():
    found = [place(path) for path, tree in TREES.items() if not ast.get_docstring(tree)]
    assert not found, offenders(found)


def test_public_names_have_docstrings(definitions):
    """A method that overrides a library's has that one's; a constructor is described by its class."""
    found = [
        str(one)
        for one in definitions
        if not (ast.get_docstring(one.node) or one.overridden or one.node.name == "__init__")
    ]
    found += [
        f"{place(path, node)} {node.name}"
        for path in LIBRARY
        for node in TREES[path].body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert not found, offenders(found)


def test_public_functions_are_annotated(definitions):
    """What a library's method has, an override may leave as it is there."""
    found = []
    for one in definitions:
        positional, others = one.arguments
        missing = [
            argument.arg
            for argument in (*positional, *others)
            if argument.annotation is None and argument.arg not in one.inherited
        ]
        needs_return = one.node.name != "__init__" and not one.overridden
        missing += ["return"] if needs_return and one.node.returns is None else []
        found += [f"{one}: {', '.join(missing)}"] if missing else []
    assert not found, offenders(found)


def positional_bools(one):
    """Arguments of ours that may be given by their place and are bools by their annotation or default."""
    positional, _ = one.arguments
    defaults = [*[None] * len(positional), *one.node.args.defaults][len(one.node.args.defaults) :]
    for argument, default in zip(positional, defaults, strict=True):
        words = set(re.findall(r"\w+", ast.unparse(argument.annotation))) if argument.annotation else set()
        is_bool = "bool" in words and words <= {"bool", "None", "Optional"}
        is_bool = is_bool or isinstance(getattr(default, "value", None), bool)
        if is_bool and argument.arg not in one.inherited:
            yield argument.arg


def test_bools_are_given_by_name(definitions):
    found = {}
    for one in definitions:
        if names := list(positional_bools(one)):
            found[one.name] = f"{one}: {', '.join(names)}"
    bad = [line for name, line in found.items() if name not in MAY_TAKE_BOOLS]
    assert not bad, offenders(bad)
    assert found.keys() == MAY_TAKE_BOOLS.keys(), "an exception is no longer needed: take it out of the table"


def test_type_checkers_are_told_of_the_annotations():
    assert (ROOT / "py.typed").is_file()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "py.typed" in setup.get("options.package_data", "multicoco", fallback="")


# --- 6: known in one place ---------------------------------------------------------------------------------------


def constants(path):
    """String literals of a file, without docstrings."""
    tree, docstrings = TREES[path], set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            docstrings.add(body[0].value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield node


def test_knowledge_is_written_once():
    found = []
    for path in (*LIBRARY, *COMMAND_FILES):
        for node in constants(path):
            of_template = path.stem in ("configuration_multicoco", "processing_multicoco")
            if re.search(r"<\|im_(start|end)\|>", node.value) and not of_template:
                found.append(f"{place(path, node)}: a token of the chat template")
        for node in ast.walk(TREES[path]):
            items = getattr(node, "elts", None) or getattr(node, "keys", None) or []
            words = {item.value for item in items if isinstance(item, ast.Constant)}
            if set(multicoco.MODES) <= words and path.stem != "configuration_multicoco":
                found.append(f"{place(path, node)}: the names of the modes")
            is_split = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in (
                "split",
                "rsplit",
                "partition",
                "rpartition",
            )
            reads_mark = is_split and any(re.search(r"ANSWER_MARK|###", ast.unparse(one)) for one in node.args)
            if reads_mark and path.stem != "curriculum":
                found.append(f"{place(path, node)}: how an answer is read")
    assert not found, offenders(found)


# --- the walk of docs/architecture.md ----------------------------------------------------------------------------


def test_the_walk_has_at_most_eight_hops_and_goes_down():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    hops = re.findall(r"^\| \d+ \| `([\w/]+\.py):([\w.]+)` \|", page, flags=re.MULTILINE)
    assert 5 < len(hops) <= 8
    lines = {}
    for name, path in hops:
        body = TREES[ROOT / name].body
        for part in path.split("."):
            (node,) = [item for item in body if getattr(item, "name", None) == part]
            body = node.body
        assert node.lineno > lines.get(name, 0), f"{name}:{path} stands above the hop before it"
        lines[name] = node.lineno
