"""The standard library as text: the rule of what is held out, on any Python."""

from __future__ import annotations

import pytest

from fastsae.lm.text import is_held_out, is_test, stdlib_documents


@pytest.mark.parametrize(
    "name",
    [
        "json/decoder.py",
        "csv.py",
        "email/mime/text.py",
        "zipfile.py",
        "zipfile/_path/glob.py",
        "sqlite3/test/dbapi.py",
        "test/test_json/test_dump.py",
        "test/test_httplib.py",
        "test/test_http_cookies.py",
        "test/test_zipfile64.py",
        "test/test_email/torture_test.py",
    ],
)
def test_held_out(name):
    assert is_held_out(name)


@pytest.mark.parametrize(
    "name",
    [
        "abc.py",
        "importlib/metadata/_text.py",
        "xml/dom/minidom.py",
        "test/test_io.py",
        "test/support/__init__.py",
        "unittest/test/test_case.py",
        "pydoc_data/topics/json",
        "urllib/request.py",
    ],
)
def test_not_held_out(name):
    assert not is_held_out(name)


def test_is_test():
    assert is_test("test/test_io.py")
    assert is_test("lib2to3/tests/test_all.py")
    assert not is_test("unittest/case.py")
    assert not is_test("doctest.py")


def test_splits_are_disjoint_sorted_and_real():
    train = list(stdlib_documents("train", include_tests=False))
    held_out = list(stdlib_documents("heldout", include_tests=False))
    names = [name for name, _ in train]
    assert not set(names) & {name for name, _ in held_out}
    assert not any(map(is_held_out, names))
    assert all(is_held_out(name) for name, _ in held_out)
    assert not any(is_test(name) for name, _ in train + held_out)
    files = [name for name in names if name.endswith(".py")]
    assert len(files) == len(set(files)) > 300
    assert "json/decoder.py" in dict(held_out)
    assert "argparse.py" in names
    assert "site-packages" not in "".join(names)
    assert sum(len(text) for _, text in train) > 4_000_000
    assert train == list(stdlib_documents("train", include_tests=False))


def test_help_topics_are_prose():
    topics = {n: t for n, t in stdlib_documents("train") if n.startswith("pydoc_data/topics/")}
    if not topics:
        pytest.skip("this Python has no pydoc_data.topics")
    assert len(topics) > 50
    assert "\\n" not in topics["pydoc_data/topics/assert"]


def test_no_source_text_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="without its library's source text"):
        list(stdlib_documents("train", root=tmp_path))


def test_an_unreadable_file_and_a_table_are_left_out(tmp_path):
    (tmp_path / "good.py").write_text("def good(argument):\n    return argument\n")
    (tmp_path / "coded.py").write_bytes(b"# coding: utf-8\nname = '\xff\xfe words words words'")
    (tmp_path / "table.py").write_text("T = [" + "0x10, 0x20, 0x30, " * 40 + "]\n")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "tool.py").write_text("def tool(argument):\n    return argument\n")
    assert [n for n, _ in stdlib_documents("train", root=tmp_path)] == ["good.py"]
    assert [n for n, _ in stdlib_documents("heldout", root=tmp_path)] == ["json/tool.py"]


def test_split_is_checked():
    with pytest.raises(ValueError, match="split must be"):
        list(stdlib_documents("test"))  # type: ignore[arg-type]
