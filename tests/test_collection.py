"""No test lies where nobody runs it."""

from fnmatch import fnmatch
from pathlib import Path


def test_every_folder_of_tests_is_looked_into(pytestconfig):
    """pytest leaves out folders of some names by itself; one of them is "dist"."""
    left_out = pytestconfig.getini("norecursedirs")
    folders = {path.parent.name for path in Path(__file__).parent.rglob("test_*.py")}
    assert "dist" in folders
    assert [name for name in folders if any(fnmatch(name, pattern) for pattern in left_out)] == []
