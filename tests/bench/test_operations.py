"""Layers of a graph by type: added up by hand, and of a real tower."""

from click.testing import CliRunner

from invariclip.bench.operations import Kind, kinds_of, operations, table


def test_medians_are_added_up_by_type_and_primitive():
    runs = [
        [("a", "MatMul", "int8", 1.0), ("b", "MatMul", "int8", 5.0), ("c", "Add", "float32", 0.5)],
        [("a", "MatMul", "int8", 3.0), ("b", "MatMul", "int8", 5.0), ("c", "Add", "float32", 0.5)],
        [("a", "MatMul", "int8", 2.0), ("b", "MatMul", "int8", 50.0), ("c", "Add", "float32", 0.5)],
    ]
    kinds = kinds_of(runs)
    assert kinds == [Kind("MatMul", "int8", 2, 7.0), Kind("Add", "float32", 1, 0.5)]
    assert table(kinds).splitlines()[2] == "| MatMul | int8 | 2 | 7.00 | 93.3% |"


def test_a_tower_is_mostly_products(tiny_artifact):
    done = CliRunner().invoke(operations, [str(tiny_artifact), "--threads", "1"], catch_exceptions=False)
    assert done.exit_code == 0
    rows = [line.split(" | ") for line in done.output.splitlines()[2:]]
    assert any("FullyConnected" in row[0] for row in rows)
    assert abs(sum(float(row[-1].rstrip("% |")) for row in rows) - 100) < 1
