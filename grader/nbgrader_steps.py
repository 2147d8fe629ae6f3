"""Steps that `nbgrader_config.py` adds to stock nbgrader."""

from pathlib import Path

from nbformat import NotebookNode
from nbformat.v4 import new_output
from nbgrader.api import Gradebook, SourceCell
from nbgrader.plugins import FileNameCollectorPlugin
from nbgrader.preprocessors import ClearSolutions, NbGraderPreprocessor, OverwriteCells

from grader.check import MIME
from grader.intake import HandedIn, take_in


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


class CollectGradable(FileNameCollectorPlugin):
    """For `nbgrader zip_collect`: collect what `take_in` finds gradable, log a sentence about everything else."""

    _submissions: dict[str, HandedIn] | None = None

    def collect(self, submitted_file: str) -> dict[str, str] | None:
        course, path = self.parent.coursedir, Path(submitted_file)
        chapter = course.assignment_id
        folder = next(above for above in path.parents if above.name == self.parent.extracted_directory)
        if self._submissions is None:
            release = Path(course.format_path(course.release_directory, ".", chapter))
            self._submissions = {submission.file: submission for submission in take_in(folder, release / f"{chapter}.ipynb")}
        submission = self._submissions[str(path.relative_to(folder))]
        if submission.note:
            self.log.warning("%s: %s", submission.file, submission.note)
        return {"student_id": submission.student, "file_id": f"{chapter}.ipynb"} if submission.gradable else None


class RebuildMetadata(NbGraderPreprocessor):
    """Give each cell of the chapter nbgrader's metadata as released, and every other cell none; replaces DeduplicateIds.

    A copied cell (of copies the last counts), one of another chapter, an old or damaged description of a cell: each
    would cost the submission in stock nbgrader, and some the batch.
    """

    def preprocess(self, nb: NotebookNode, resources):
        about = resources["nbgrader"]
        with Gradebook(about["db_url"]) as gradebook:
            notebook = gradebook.find_notebook(about["notebook"], about["assignment"])
            points = {cell.name: cell.max_score for cell in notebook.grade_cells}
            answers = {cell.name for cell in notebook.solution_cells}
            cells = notebook.source_cells
            released = {cell.name: _metadata(cell, points.get(cell.name), cell.name in answers) for cell in cells}
        for cell in reversed(nb.cells):
            came = cell.metadata.pop("nbgrader", None)
            known = released.pop(str(came.get("grade_id")), None) if isinstance(came, dict) else None
            if known:
                cell.metadata["nbgrader"] = known
        return nb, resources


class PutBackChecks(OverwriteCells):
    """OverwriteCells that puts a deleted check cell back although the answer above it was deleted too."""

    def add_missing_grade_cells(self, nb: NotebookNode, resources):
        notebook = self.gradebook.find_notebook(self.notebook_id, self.assignment_id)
        points = {cell.name: cell.max_score for cell in notebook.grade_cells}
        below = 0  # the place below the last cell that is there
        for source in notebook.source_cells:
            places = [i for i, cell in enumerate(nb.cells) if cell.metadata.get("nbgrader", {}).get("grade_id") == source.name]
            if places:
                below = places[0] + 1
            elif source.name in points:
                nb.cells.insert(below, self.missing_cell_transform(source, points[source.name]))
                below += 1
        return nb, resources

    def add_missing_task_cells(self, nb: NotebookNode, resources):
        return nb, resources  # the course has none


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


def _metadata(cell: SourceCell, points: float | None, answer: bool) -> NotebookNode:
    return NotebookNode(
        {
            "schema_version": 3,
            "grade_id": cell.name,
            "cell_type": cell.cell_type,
            "solution": answer,
            "grade": points is not None,
            "locked": cell.locked,
            "task": False,
            "checksum": cell.checksum,
        }
        | ({} if points is None else {"points": points})
    )
