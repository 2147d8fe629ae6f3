"""What the pages in docs/ show comes out."""

import re


def test_the_figures_on_numbers_come_out(root, capsys):
    """To within a factor of four: another CPU sums in another order, which is what the page is about."""
    text = (root / "docs/numbers.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    exec(block, {})
    came = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    shown = [float(number) for number in re.findall(r"\)  # (\S+)$", block, re.MULTILINE)]
    assert len(came) == len(shown) == 5
    assert all(1 / 4 < computed / printed < 4 for computed, printed in zip(came, shown, strict=True))
