"""From script to release: what is generated is fresh, deterministic and without a solution; and all of it runs."""

import json
import re
import shutil
import symtable
import tempfile
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from grader import golden
from grader.authoring import MISTAKES, common_mistakes, make_course, notebook
from grader.checks import TOPICS, exercises
from helpers.backbones import glyphnet
from helpers.data import digits, docstrings
from helpers.transfer import TASKS, recorded

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "solutions").glob("*/*.py"))
NAMES = [script.stem for script in SCRIPTS]


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.get("outputs", ()) if output.output_type == "stream")


@cache
def solved(name):
    """The solution notebook after a run; run once for all tests."""
    with tempfile.TemporaryDirectory() as folder:
        return run(ROOT / "solutions" / name / f"{name}.ipynb", folder)


def means(name, title):
    """{name: mean} of the figure of dots with that title, from its text alternative."""
    alts = [o.data["text/plain"] for c in solved(name).cells for o in c.get("outputs", ()) if "image/png" in o.get("data", {})]
    found = [re.search(rf"\. {re.escape(title)}: (.+?)(?:\. |\.$)(?=[a-z]|$)", alt) for alt in alts]
    (line,) = [match[1] for match in found if match]
    return {row[1]: float(row[2]) for row in re.finditer(r"(?:^|, )(.+?) (\d\.\d{3})(?=,|$)", line)}


def run(path, tmp_path, **options):
    nb = nbformat.read(path, 4)
    NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}, **options).execute()
    return nb


@pytest.mark.slow
def test_committed_files_equal_freshly_generated_ones(tmp_path):
    shutil.copytree(ROOT / "solutions", tmp_path / "solutions")
    shutil.copy(ROOT / "nbgrader_config.py", tmp_path)
    for generated in (tmp_path / "solutions").glob("*/*.ipynb"):
        generated.unlink()
    make_course(tmp_path, tables=tmp_path / "golden")
    fresh = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.suffix in (".ipynb", ".json")}
    assert len(fresh) == 2 * len(SCRIPTS) + len(TOPICS)
    for path, content in fresh.items():
        committed = golden.FOLDER / path.name if path.suffix == ".json" else ROOT / path
        assert committed.read_bytes() == content, f"{path} is stale: run `make course`"
    here = {p.relative_to(ROOT) for folder in ("solutions", "course") for p in (ROOT / folder).rglob("*.ipynb")}
    assert {p for p in here if ".ipynb_checkpoints" not in p.parts} == {p for p in fresh if p.suffix == ".ipynb"}


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_a_notebook_is_made_the_same_twice(script):
    assert nbformat.writes(notebook(script)) == nbformat.writes(notebook(script))


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_every_exercise_is_in_the_chapter_with_its_points(script):
    nb = notebook(script)
    topic = script.stem.partition("_")[2]
    metas = {c.metadata.nbgrader.grade_id: c.metadata.nbgrader for c in nb.cells if "nbgrader" in c.metadata}
    for number, exercise in exercises(topic).items():
        key = number.replace(".", "_")
        assert metas[f"check-{key}"].points == exercise.points and metas[f"check-{key}"].locked
        assert metas[f"answer-{key}"].solution and not metas[f"answer-{key}"].locked
    assert sum(meta.grade for meta in metas.values()) == len(exercises(topic))
    for number, exercise in exercises(topic).items():
        head = rf"\*\*Exercise {re.escape(number)}\*\* \(\d+ min, [●○]{{3}}\)"
        (statement,) = [c.source for c in nb.cells if c.cell_type == "markdown" and re.search(head, c.source)]
        if any(experiment.seconds > 10 for experiment in exercise.experiments):
            assert re.search(r"The check (trains|exports) .* seconds?\b", " ".join(statement.split())), (
                "what takes long, says so"
            )


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_common_mistakes_are_those_the_checks_know(script):
    topic = script.stem.partition("_")[2]
    section = next(c.source for c in notebook(script).cells if c.source.startswith(MISTAKES))
    assert section == common_mistakes(topic)
    assert all(m.hint in section for e in exercises(topic).values() for m in e.misconceptions)


@pytest.mark.parametrize("name", NAMES)
def test_what_learners_get_holds_no_solution_and_no_output(name):
    folder = ROOT / "course" / name
    assert {p.name for p in folder.iterdir() if p.name != ".ipynb_checkpoints"} == {f"{name}.ipynb"}
    text = (folder / f"{name}.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"(BEGIN|END) (SOLUTION|HIDDEN)", text)
    nb = nbformat.reads(text, 4)
    assert not any(cell.get("outputs") for cell in nb.cells)
    script = (ROOT / "solutions" / name / f"{name}.py").read_text(encoding="utf-8")
    answers = [c for c in nb.cells if c.metadata.get("nbgrader", {}).get("solution")]
    cells = [cell for cell in script.split("\n# %%") if "### BEGIN SOLUTION" in cell]
    solutions = ["".join(re.findall(r"### BEGIN SOLUTION(.*?)### END SOLUTION", cell, re.DOTALL)) for cell in cells]
    assert len(answers) == len(solutions) > 0
    for cell, solution in zip(answers, solutions, strict=True):
        number = cell.metadata.nbgrader.grade_id.removeprefix("answer-").replace("_", ".")
        assert f'raise NotImplementedError("Exercise {number}")' in cell.source
        for line in solution.splitlines():
            assert len(line.split()) < 2 or line not in cell.source


@pytest.mark.parametrize("name", NAMES)
def test_locked_cells_use_nothing_that_a_demo_cell_defines(name):
    """Demo cells are not run when grading, so no other cell may need them."""
    nb = nbformat.read(ROOT / "solutions" / name / f"{name}.ipynb", 4)
    here, demo = set(), set()
    for cell in nb.cells:
        if cell.cell_type != "code":
            continue
        bound, used = global_names(symtable.symtable(cell.source, "cell", "exec"))
        if "demo" in cell.metadata.get("tags", ()):
            demo |= bound
        else:
            assert not used & (demo - here - bound)
            here |= bound


def global_names(table: symtable.SymbolTable) -> tuple[set[str], set[str]]:
    """What code binds at its top level, imports included, and what it looks up there, from inside functions too."""
    top = table.get_type() == "module"
    symbols = table.get_symbols()
    bound = {s.get_name() for s in symbols if top and (s.is_assigned() or s.is_imported() or s.is_namespace())}
    used = {s.get_name() for s in symbols if s.is_referenced() and (top or s.is_global())}
    for child in table.get_children():
        used |= global_names(child)[1]
    return bound, used


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_solution_notebook_runs_and_every_check_passes(name):
    nb = solved(name)
    checks = [c for c in nb.cells if c.metadata.get("nbgrader", {}).get("grade")]
    assert checks
    for cell in checks:
        assert set(re.findall(r" {2}(passed|not attempted|not yet|error)$", text_of(cell), re.MULTILINE)) == {"passed"}
    assert not any(o.get("name") == "stderr" for c in nb.cells for o in c.get("outputs", ())), "nothing on stderr"


def test_every_link_into_the_glossary_leads_to_a_term():
    terms = re.findall(r"^### (.+)$", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", term.lower()).replace(" ", "-") for term in terms}
    assert len(anchors) == len(terms) and terms == sorted(terms, key=str.lower)
    for script in SCRIPTS:
        links = re.findall(r"\.\./\.\./docs/glossary\.md#([a-z-]+)", script.read_text(encoding="utf-8"))
        assert set(links) <= anchors
        assert len(links) >= 8 or script.stem == "00_start"


def test_numbers_in_the_prose_of_chapter_02_are_those_of_its_data_and_networks():
    prose = "\n".join(
        c.source for c in notebook(ROOT / "solutions/02_features/02_features.py").cells if c.cell_type == "markdown"
    )
    facts = {
        "800 test digits": len(digits("test").labels) == 800,
        "1,024 raw": digits("test").inputs[0].numel() == 1024,
        "128 features": glyphnet().width == 128,
        "360 test texts": len(docstrings("test").labels) == 360,
        "six topics": len(docstrings("test").classes) == 6,
        "hundreds of thousands of weights": 200_000 < sum(p.numel() for p in glyphnet().parameters()) < 900_000,
        "0.3 million parameters": round(sum(p.numel() for p in glyphnet().parameters()) / 1e6, 1) == 0.3,
        "60 steps of 16 texts": TASKS["docstrings"][-2:] == (60, 16),
        "300 steps, five draws": TASKS["digits"].steps == 300 and len(recorded("digits")[1]["probe"]) == 5,
    }
    for text, holds in facts.items():
        assert " ".join(text.split()) in " ".join(prose.split()) and holds, text


@pytest.mark.slow
def test_what_chapter_04_says_of_its_figures_holds():
    five = {
        title: means("04_finetune", title)
        for title in ("handwritten (trained on)", "printed (another domain)", "letters (forgetting)")
    }
    handwritten, printed, letters = five.values()
    assert max(handwritten.values()) - min(handwritten.values()) < 0.02
    assert min(printed, key=printed.get) == min(letters, key=letters.get) == "everything"
    assert printed["LP-FT"] - printed["everything"] > 0.05 and letters["head only"] > 0.97
    cures = means("04_finetune", "accuracy on test images")
    assert min(cures["early stopping"], cures["augmentation, stopped"], cures["frozen, penalty 1"]) > cures["none"] + 0.08
    assert cures["none"] + 0.03 < cures["augmentation"] < cures["early stopping"]
    assert abs(cures["weight decay 0.3"] - cures["none"]) < 0.03 and cures["frozen, penalty 0.001"] < cures["none"]
    assert cures["lower learning rate"] < cures["none"]
    text = "\n".join(text_of(cell) for cell in solved("04_finetune").cells)
    spent = {way: re.search(rf"^{way} .* (\d\.\d\d) +\d+\.\d$", text, re.MULTILINE) for way in ("everything", "LP-FT")}
    assert float(spent["everything"][1]) > 1.2 * float(spent["LP-FT"][1]), "features moved"
    start = [float(norm) for norm in re.findall(r"gradient into the backbone (\d+\.\d+)", text)]
    assert start[0] > 5 * start[1]
    low, suggested, high = means("04_finetune", "test images").values()
    assert suggested > high > low
    assert list(means("04_finetune", "letters (after training)").values())[2] < 0.3


@pytest.mark.slow
def test_what_chapter_05_says_of_its_figures_holds():
    text = "\n".join(text_of(cell) for cell in solved("05_batchnorm").cells)
    assert "ResNet-18: moved 0 of 62 parameters, 60 of 60 buffers" in text and "glyphnet: moved 0 of 38 parameters" in text
    assert re.search(r"eval\(\), once  36 .*\nyour freeze    0\nafter undo\(\)  36", text)
    assert all(float(score) < 0.6 for score in re.search(r"one pass in train mode, nothing else: (.+)", text)[1].split(", "))
    moved = means("05_batchnorm", "accuracy on white paper")
    assert moved["before"] - moved["after 50 grey batches"] > 0.1
    training, afterwards = (means("05_batchnorm", t) for t in ("while training, batches of 32", "afterwards, in eval mode"))
    keras, since = "statistics (Keras before TF 2)", "all (Keras since)"
    assert training[keras] == training["nothing frozen"] > 0.9 and afterwards[keras] < 0.5 < 0.9 < afterwards["nothing frozen"]
    assert training[since] == pytest.approx(afterwards[since], abs=0.001) and afterwards[since] < afterwards["nothing frozen"]
    small = means("05_batchnorm", "accuracy afterwards, in eval mode")
    assert small["batches of 2, train mode"] < small["batches of 2, frozen"]
    stored, recomputed = means("05_batchnorm", "stored statistics"), means("05_batchnorm", "recomputed")
    assert stored["grey paper"] < 0.5 and recomputed["grey paper"] > 0.9
    assert recomputed["noise 0.2"] - stored["noise 0.2"] > 0.1 and max(stored["inverted"], recomputed["inverted"]) < 0.2
    assert recomputed["as they are"] < stored["as they are"]
    samples = means("05_batchnorm", "accuracy on all grey test digits")
    assert samples["10 images"] > 0.8 and samples["100 images"] > samples["800 images"] - 0.02
    assert next(value for name, value in samples.items() if "all ones" in name) < samples["30 images"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["02_features", "04_finetune"])
def test_the_hub_variant_is_one_variable_and_stops_at_its_first_download_with_what_to_do(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WARMSTART_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    nb = nbformat.read(ROOT / "solutions" / name / f"{name}.ipynb", 4)
    cell = next(c for c in nb.cells if 'choose("embedded")' in c.source)
    cell.source = cell.source.replace('"embedded"', '"hub"')
    changed = tmp_path / "hub.ipynb"
    changed.write_text(nbformat.writes(nb), encoding="utf-8")
    with pytest.raises(CellExecutionError) as error:
        run(changed, tmp_path)
    assert error.value.ename == "DownloadFailed"
    wanted = {
        "02_features": r"resnet18-f37072fd\.pth from https://\S+: WARMSTART_OFFLINE is set, and the cache does not hold it",
        "04_finetune": r"the Oxford-IIIT Pets from \S+: WARMSTART_OFFLINE is set, and they are not there",
    }[name]
    assert re.fullmatch(
        rf'could not get {wanted}\. Put .+ \S+, or go on without it: the profile "embedded" needs no network\.',
        error.value.evalue,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_untouched_student_notebook_runs_to_the_end_on_the_reference(name, tmp_path):
    nb = run(ROOT / "course" / name / f"{name}.ipynb", tmp_path)
    for cell in nb.cells:
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if grade_id.startswith("check-"):
            assert text_of(cell).rstrip().endswith("not attempted")
        if cell.cell_type == "code" and (called := re.search(r'= continue_with\("(\d+\.\d+)"\)', cell.source)):
            assert f"{called[1]}  is not attempted: continuing with the reference" in text_of(cell)


def test_a_chapter_without_a_check_below_an_answer_is_refused(tmp_path):
    script = tmp_path / "00_start.py"
    script.write_text("# %%\ndef f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^00_start.py: the last answer cell has no check below it.$"):
        notebook(script)
    script.write_text('# %%\ncheck("0.1", f)\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"^00_start.py: exercise 0.1 needs one answer cell and one check below it.$"):
        notebook(script)


@pytest.mark.parametrize("topic", TOPICS.values())
def test_truth_tables_are_readable_json(topic):
    tables = json.loads((golden.FOLDER / f"{topic}.json").read_text(encoding="utf-8"))
    assert tables.keys() == exercises(topic).keys()
    assert golden.dump(tables) == (golden.FOLDER / f"{topic}.json").read_text(encoding="utf-8")
