"""Run notebooks and keep them with their outputs: `make notebooks`, or `python notebooks/run.py FILE.ipynb`.

Their folder `work` is kept: what it holds already is looked up, not trained again.
"""

import hashlib
import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import ray
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbformat import NotebookNode

from coda_ray.cluster import start_ray

FOLDER = Path(__file__).resolve().parent
# What a notebook keeps of the machine that ran it: nothing.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
NODE_LINE = re.compile(r"^.*(?:\(raylet\)|core_worker\.cc).*(?:\n|\Z)", re.MULTILINE)
TIMEOUT_S = 1800


def executed(path: Path, folder: Path, **environment: str) -> NotebookNode:
    """Execute a notebook with this interpreter, whatever kernels are installed elsewhere.

    Parameters
    ----------
    path
        The notebook; it stays as it is.
    folder
        Where it runs; `work` in it holds its data, and `../configs` the configurations.
    environment
        Variables of its process besides this one's own.

    Returns
    -------
    NotebookNode
        With fresh outputs.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        When a cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    kernels = KernelSpecManager(kernel_dirs=[str(Path(sys.prefix, "share", "jupyter", "kernels"))])
    with TemporaryDirectory(prefix="kernel_") as sockets:
        # Sockets in a folder of one's own, not ports that everybody on this machine can reach.
        manager = AsyncKernelManager(
            kernel_name="python3", kernel_spec_manager=kernels, transport="ipc", ip=str(Path(sockets, "kernel"))
        )
        client = NotebookClient(
            notebook,
            km=manager,
            resources={"metadata": {"path": str(folder)}},
            startup_timeout=TIMEOUT_S,
            timeout=TIMEOUT_S,
            record_timing=False,
            store_widget_state=False,
            coalesce_streams=True,
        )
        # A client that was given its manager leaves the kernel running, unless it is asked.
        client.execute(cleanup_kc=True, env={**os.environ, **environment})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(_without_node, cell.outputs) if output.get("text") != ""]
    notebook.metadata = NotebookNode(METADATA, code=code_hash(notebook))
    return notebook


def _without_node(output: NotebookNode) -> NotebookNode:
    """Drop what Ray's own processes print, such as how many of them were started on this machine."""
    if output.output_type == "stream":
        output.text = NODE_LINE.sub("", output.text)
    return output


def code_hash(notebook: NotebookNode) -> str:
    """Name the code of a notebook, so that outputs of other code are noticed."""
    code = "\f".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def main() -> None:
    """Run every notebook, or those that are named, in their folder on one Ray, and store the outputs."""
    start_ray()
    for path in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        print(path.name, flush=True)
        nbformat.write(executed(path, FOLDER, RAY_ADDRESS=ray.get_runtime_context().gcs_address), path)


if __name__ == "__main__":
    main()
