"""Steps that `nbgrader_config.py` adds to stock nbgrader."""

from nbformat import NotebookNode
from nbformat.v4 import new_output
from nbgrader.preprocessors import ClearSolutions, NbGraderPreprocessor

from grader.check import MIME


class NameTheExercise(ClearSolutions):
    """Clear solutions as nbgrader does, with a stub that names the exercise; end the pairing with a script.

    A learner's notebook that were still paired would write a script beside itself at every save.
    """

    def preprocess(self, nb, resources):
        nb.metadata.pop("jupytext", None)
        return super().preprocess(nb, resources)

    def preprocess_cell(self, cell, resources, cell_index):
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if grade_id.startswith("answer-"):
            number = grade_id.removeprefix("answer-").replace("_", ".")
            self.code_stub = {"python": f'raise NotImplementedError("Exercise {number}")'}
        return super().preprocess_cell(cell, resources, cell_index)


class DropDemo(NbGraderPreprocessor):
    """Drop cells that only demonstrate, and everything a submission's metadata could tell the executor.

    A cell that nbgrader knows is never dropped, whatever tags a submission gives it.
    """

    def preprocess(self, nb: NotebookNode, resources):
        nb.cells = [cell for cell in nb.cells if "nbgrader" in cell.metadata or "demo" not in cell.metadata.get("tags", ())]
        for cell in nb.cells:
            cell.metadata.pop("tags", None)
        return nb, resources


class ScoreVerdicts(NbGraderPreprocessor):
    """Let nothing but the verdict of `check` score a check cell; without a verdict it scores 0.

    Stock nbgrader gives full marks to a check cell without an output, and none to one with anything on stderr.
    """

    def preprocess_cell(self, cell, resources, cell_index):
        meta = cell.metadata.get("nbgrader", {})
        if cell.cell_type != "code" or not meta.get("grade") or not meta["grade_id"].startswith("check-"):
            return cell, resources
        verdicts = [output.data[MIME] for output in cell.outputs if MIME in output.get("data", ())]
        failed = any(output.output_type == "error" for output in cell.outputs)
        points = verdicts[-1].get("points") if verdicts and not failed else 0
        if not isinstance(points, int) or not 0 <= points <= meta["points"]:
            points = 0
        kept = [o for o in cell.outputs if o.output_type == "error" or o.get("name") == "stdout"]
        cell.outputs = [*kept, new_output("execute_result", {"text/plain": str(float(points))}, execution_count=None)]
        cell.metadata["warmstart"] = verdicts[-1] if verdicts else {}
        return cell, resources
