"""What `moectl families --backend` says is what the installed transformers is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from installed import installed

from moectl.families import backend
from moectl.families.tiny_moe import model_types, tiny_inputs, tiny_moe

PROGRAM = str(Path(sys.executable).with_name("moectl"))

PLAIN = """
@use_experts_implementation
class NewExperts(nn.Module):
    pass
"""
UNUSUAL = """
@use_experts_implementation(has_gate=False, has_bias=True, is_transposed=True)
class OddExperts(nn.Module):
    def _apply_gate(self, gate_up):
        return gate_up
"""
ELSEWHERE = """
class OldExperts(nn.Module):
    pass
"""


def test_refused_families_are_the_committed_ones() -> None:
    """A family that a new release adds without the decorator is named here until it is in the list."""
    found = {family for family, classes in backend.experts_classes().items() if not classes}
    assert found - ({"aria"} - {*installed("aria")}) == set(backend.NOT_DECORATED)


def test_decorated_classes_are_those_that_transformers_counts() -> None:
    """Against a plain count of the decorator in the source."""
    models = Path(transformers.__file__).parent / "models"
    count = sum(
        line.startswith("@use_experts_implementation")
        for path in models.glob("*/modeling_*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
    )
    assert sum(map(len, backend.experts_classes().values())) == count > 50


@pytest.mark.parametrize(
    "family",
    [each for each in sorted(set(backend.NOT_DECORATED) - {"vitpose_backbone"}) if installed(*model_types(each))],
)
def test_refused_families_run_without_us(family: str) -> None:
    """The builder of tiny models knows them too, and they do not take an implementation."""
    for model_type in model_types(family):
        model = tiny_moe(model_type)
        assert not model._can_set_experts_implementation()
        with torch.no_grad():
            assert model(**tiny_inputs(model))[0].isfinite().all()


def test_new_families_are_listed_from_their_source(tmp_path: Path) -> None:
    for family, text in {
        "new": PLAIN,
        "odd": UNUSUAL,
        "old": ELSEWHERE,
        "dense": "class DenseMLP(nn.Module): ...",
    }.items():
        (tmp_path / family).mkdir()
        (tmp_path / family / f"modeling_{family}.py").write_text(text)
    rows = {row["family"]: row for row in backend.backend_rows(tmp_path)}
    assert {family: row["backend"] for family, row in rows.items()} == {
        "new": "fused",
        "odd": "unfused",
        "old": "refused",
    }
    assert rows["odd"]["layout"] == "no gate, biases, transposed"
    assert rows["odd"]["because"] and rows["old"]["because"]


def test_command(tmp_path: Path) -> None:
    """The same rows as a table and as JSON, with the version of transformers, and without torch."""
    table = subprocess.run([PROGRAM, "families", "--backend"], capture_output=True, text=True, check=True)
    header, *lines = [line.split("\t") for line in table.stdout.splitlines()]
    assert transformers.__version__ in table.stderr
    document = json.loads(
        subprocess.run([PROGRAM, "families", "--backend", "--json"], capture_output=True, check=True).stdout
    )
    assert document["schema"] == "moectl.families.backend/1"
    assert document["transformers"] == transformers.__version__
    assert [dict(zip(header, line, strict=True)) for line in lines] == document["experts"] == backend.backend_rows()
    program = "from moectl.families.backend import backend_rows as f; import sys; f(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
