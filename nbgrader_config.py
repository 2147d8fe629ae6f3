"""Stock nbgrader, told where this repository keeps things; its commands and its formgrader work here as they are."""

c = get_config()  # noqa: F821 - nbgrader provides it

c.CourseDirectory.course_id = "warmstart"
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "course"
# The authors' scripts lie beside the notebooks and hold the answers.
c.CourseDirectory.ignore = [".ipynb_checkpoints", "*.pyc", "__pycache__", "feedback", "*.py"]

# `nbgrader zip_collect`: what an LMS gave, in downloaded/<chapter>/archive/, named <student>_<chapter>.ipynb.
c.ExtractorPlugin.zip_ext = []  # one damaged archive would stop it: unpack what an LMS packed before
c.ZipCollectApp.collector_plugin = "grader.nbgrader_steps.CollectGradable"

c.GenerateAssignment.preprocessors = [
    "nbgrader.preprocessors.IncludeHeaderFooter",
    "nbgrader.preprocessors.InstantiateTests",
    "nbgrader.preprocessors.LockCells",
    "grader.nbgrader_steps.NameTheExercise",  # in place of ClearSolutions
    "nbgrader.preprocessors.ClearOutput",
    "nbgrader.preprocessors.CheckCellMetadata",
    "nbgrader.preprocessors.ComputeChecksums",
    "nbgrader.preprocessors.SaveCells",
    "nbgrader.preprocessors.ClearHiddenTests",
    "nbgrader.preprocessors.ClearMarkScheme",
    "nbgrader.preprocessors.ComputeChecksums",
    "nbgrader.preprocessors.CheckCellMetadata",
]

c.Autograde.sanitize_preprocessors = [
    "nbgrader.preprocessors.ClearOutput",
    "grader.nbgrader_steps.RebuildMetadata",  # in place of DeduplicateIds
    "nbgrader.preprocessors.OverwriteKernelspec",
    "grader.nbgrader_steps.PutBackChecks",  # in place of OverwriteCells
    "grader.nbgrader_steps.DropDemo",
    "nbgrader.preprocessors.CheckCellMetadata",
]
c.Autograde.autograde_preprocessors = [
    "nbgrader.preprocessors.Execute",
    "nbgrader.preprocessors.IgnorePattern",
    "nbconvert.preprocessors.ClearMetadataPreprocessor",
    "grader.nbgrader_steps.ScoreVerdicts",
    "nbgrader.preprocessors.LimitOutput",
    "nbgrader.preprocessors.SaveAutoGrades",
    "nbgrader.preprocessors.AssignLatePenalties",
    "nbgrader.preprocessors.CheckCellMetadata",
]
c.Execute.timeout = 120  # seconds per cell; the checks stop a subject well before
c.OverwriteCells.add_missing_cells = True  # a deleted check cell is put back and scored, not left for manual grading
