"""The notebook of examples/: its code compiles, what it imports is there, it is small, and it runs to its end."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest
from running import EXAMPLES

NOTEBOOK = EXAMPLES / "tour.ipynb"


CODE = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_its_code_compiles_and_what_it_imports_is_there():
    found = set()
    for cell in CODE:
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.Import):
                found |= {(alias.name, "") for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mvmae":
                found.add(("mvmae", node.attr))
    for module, name in found:
        assert not name or hasattr(importlib.import_module(module), name), f"{module} has no {name}"
    assert {("mvmae", "MultiViewMAE"), ("mvmae", "embed"), ("mvmae.visualize", "rollout")} <= found


def test_it_is_small_and_its_outputs_are_those_of_one_run_without_errors():
    assert NOTEBOOK.stat().st_size < 1_000_000
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    printed = "".join(json.dumps({**output, "data": None}) for output in outputs)
    assert not re.search(r"/tmp|/home|/root|Warning", printed)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of the notebook's own libraries
def test_it_runs_and_finds_what_it_says(tmp_path):
    reason = "the notebook's kernel is no dependency: pip install nbclient ipykernel"
    nbformat, client, _ = (pytest.importorskip(name, reason=reason) for name in ("nbformat", "nbclient", "ipykernel"))
    book = nbformat.read(NOTEBOOK, as_version=4)
    client.NotebookClient(book, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", ()))
    knn = {name: float(value) for name, value in re.findall(r"(\w+): k-NN ([\d.]+) %", printed)}
    assert knn["pretrained"] > knn["untrained"] + 5
    assert float(re.search(r"held-out tiles: ([\d.]+) %", printed)[1]) > 60
    assert list(Path(tmp_path).iterdir()) == []
