"""examples/first_hour.ipynb runs from top to bottom: its cells one after the other, and in a Jupyter kernel."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the notebook's model is a transformers one")
pytest.importorskip("matplotlib", reason="the notebook draws")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "first_hour.ipynb"


def test_its_cells_run_in_order(monkeypatch, tmp_path, capsys):
    import matplotlib

    matplotlib.use("agg", force=True)
    from matplotlib import pyplot

    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        assert not cell["outputs"] and cell["execution_count"] is None, "save it without outputs"
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
    assert len(pyplot.get_fignums()) == 2
    pyplot.close("all")
    assert all(layer.is_ours for layer in namespace["relibra"].layers(namespace["model"]))
    assert namespace["error"] <= 1e-5 and namespace["plan"].num_ranks == 4
    static, ours = (namespace["results"][name].cost.seconds for name in ("static", "relibra"))
    assert f"relibra      max/mean {namespace['results']['relibra'].imbalance_mean:.3f}" in capsys.readouterr().out
    assert ours < static and list(tmp_path.iterdir()) == []


def test_it_runs_in_a_jupyter_kernel(monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: make test-extras runs this")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: make test-extras runs this")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert sum("<table" in output.get("data", {}).get("text/html", "") for output in outputs) == 2
    assert not any(output.output_type == "error" for output in outputs)
