import pytest

from dmtjepa.evaluation.figure_data import pick_queries


@pytest.mark.parametrize("grid_size", [(6, 6), (14, 14), (9, 14), (16, 16)])
def test_windows_of_queries_lie_on_the_grid_and_apart(grid_size):
    queries = pick_queries(grid_size)
    rows, columns = queries // grid_size[1], queries % grid_size[1]
    assert rows.min() >= 1
    assert columns.min() >= 1
    assert rows.max() <= grid_size[0] - 2
    assert columns.max() <= grid_size[1] - 2
    for i in range(len(queries)):
        for j in range(i):
            assert max(abs(rows[i] - rows[j]), abs(columns[i] - columns[j])) >= 2
