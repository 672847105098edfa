"""Letting go of mapped pages: of the right part of the right file, and nothing is lost."""

import mmap

import numpy as np
import pytest

from lfm_edge.backends import mapped
from lfm_edge.backends.mapped import MappedPages, loading
from tests.helpers import reads_proc, resident

PAGES = 64
pytestmark = reads_proc


@pytest.fixture
def held(tmp_path):
    """Two files whose every page has been read through a mapping, each with its numbers."""
    found = {}
    for name in ("one", "other"):
        (tmp_path / name).write_bytes(np.arange(PAGES * mmap.PAGESIZE // 8).tobytes())
        found[tmp_path / name] = np.memmap(tmp_path / name, np.int64, mode="r")
        found[tmp_path / name].sum()
    return found


def test_a_file_is_let_go_of_and_its_neighbour_is_not(held):
    one, other = held
    assert resident(one) == resident(other) == PAGES * mmap.PAGESIZE
    pages = MappedPages.of(one)
    assert sum(length for _, length in pages.ranges) == PAGES * mmap.PAGESIZE
    pages.forget()
    assert resident(one) == 0 and resident(other) == PAGES * mmap.PAGESIZE
    assert held[one].sum() == held[other].sum()


def test_paging_out_loses_nothing_that_was_changed(tmp_path):
    (tmp_path / "file").write_bytes(bytes(PAGES * mmap.PAGESIZE))
    own = np.memmap(tmp_path / "file", np.uint8, mode="c")  # a copy of each page that is written
    own[:mmap.PAGESIZE] = 7
    MappedPages.of(tmp_path / "file").page_out()
    assert own[:mmap.PAGESIZE].sum() == 7 * mmap.PAGESIZE and own[mmap.PAGESIZE:].sum() == 0


def test_a_part_of_a_file_is_let_go_of_in_whole_pages(held):
    one, _ = held
    pages = MappedPages.of(one, (10 * mmap.PAGESIZE + 5, 20 * mmap.PAGESIZE))
    pages.forget()
    assert resident(one) == (PAGES - 21) * mmap.PAGESIZE
    assert np.array_equal(held[one], np.arange(PAGES * mmap.PAGESIZE // 8))


def test_all_files_of_a_directory_are_let_go_of(held, tmp_path):
    MappedPages.of(tmp_path).forget()
    assert [resident(path) for path in held] == [0, 0]


def test_what_was_mapped_before_a_load_is_not_the_loads(held):
    one, _ = held
    with loading(one) as others:
        again = np.memmap(one, np.int64, mode="r")
        mine = MappedPages.of(one, but=others)
        part = MappedPages.of(one, (0, mmap.PAGESIZE), others)
    address = again.ctypes.data
    assert mine == MappedPages(((address, PAGES * mmap.PAGESIZE),)) and part == MappedPages(((address, mmap.PAGESIZE),))
    assert len(others.ranges) == 1 and others.ranges != mine.ranges


def test_what_is_not_mapped_is_not_found(held, tmp_path, monkeypatch):
    assert MappedPages.of(tmp_path / "missing") == MappedPages()
    assert MappedPages.of(next(iter(held)), (PAGES * mmap.PAGESIZE, 100)) == MappedPages()
    monkeypatch.setattr(mapped, "_MAPS", tmp_path / "missing")  # as where there is no /proc
    assert MappedPages.of(next(iter(held))) == MappedPages()
    MappedPages().forget()
