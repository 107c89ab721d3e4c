import shutil
import stat
from pathlib import Path

import pytest

from training_framework.kernels import NativeKernelsError
from training_framework.kernels import compiler as library

SOURCE = """
extern "C" int answer() {
    int sum = 0;
    #pragma omp parallel for reduction(+ : sum)
    for (int i = 0; i < 7; ++i) sum += i * 2;
    return sum;
}
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.load_library.cache_clear()
    yield
    library.load_library.cache_clear()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "kernels.cpp"
    path.write_text(SOURCE)
    return path


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@needs_compiler
def test_a_source_is_compiled_once_and_found_again(source, monkeypatch):
    assert library.load_library(source).answer() == 42
    (kept,) = library.cache_folder().iterdir()
    library.load_library.cache_clear()
    monkeypatch.setattr(library, "_compile", None)  # it would be called
    assert library.load_library(source).answer() == 42
    assert list(library.cache_folder().iterdir()) == [kept]


@needs_compiler
def test_a_changed_source_is_compiled_anew(source):
    library.load_library(source)
    source.write_text(SOURCE.replace("i * 2", "i"))
    library.load_library.cache_clear()
    assert library.load_library(source).answer() == 21
    assert len(list(library.cache_folder().iterdir())) == 2


def loaded_runtimes():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if "libgomp" in line or "libiomp5" in line}


@needs_compiler
def test_the_openmp_runtime_is_pytorchs_and_no_other_is_loaded(source):
    import sklearn.cluster  # noqa: F401  # it brings a runtime of its own

    before = loaded_runtimes()
    library.load_library(source).answer()
    assert loaded_runtimes() == before
    chosen = library._loaded_openmp()
    assert chosen is None or "torch" in Path(chosen).parent.as_posix()


@needs_compiler
def test_a_source_that_does_not_compile_is_one_line(source):
    source.write_text("this is no C++\n")
    with pytest.raises(
        NativeKernelsError, match=r"g\+\+ failed: .*kernels.cpp:1:1: error"
    ) as caught:
        library.load_library(source)
    assert "\n" not in str(caught.value)
    assert not list(library.cache_folder().iterdir())


def test_without_a_compiler_that_is_said(source, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NativeKernelsError, match=r"no C\+\+ compiler is installed"):
        library.load_library(source)


@needs_compiler
def test_a_cache_that_cannot_be_written_is_one_line(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(NativeKernelsError, match="file/efficient-resnet/native") as caught:
        library.load_library(source)
    assert "\n" not in str(caught.value)


@needs_compiler
def test_the_cache_is_the_users_alone(source):
    library.load_library(source)
    assert stat.S_IMODE(library.cache_folder().stat().st_mode) == 0o700


@needs_compiler
def test_a_damaged_library_is_compiled_again(source):
    compiler = library.find_compiler()
    digest = library._digest(source, compiler, library._loaded_openmp())
    library.cache_folder().mkdir(parents=True)
    kept = library.cache_folder() / f"kernels-{digest}.so"
    kept.write_bytes(b"no library")
    assert library.load_library(source).answer() == 42
    assert list(library.cache_folder().iterdir()) == [kept]
