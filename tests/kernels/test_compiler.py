import fcntl
import hashlib
import os
import shutil
import stat
from pathlib import Path

import pytest

from training_framework.kernels import NativeKernelsError, library_cache
from training_framework.kernels import compiler as library
from training_framework.kernels.library_cache import cache_folder

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
    library._warn_once.cache_clear()
    yield
    library.load_library.cache_clear()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "kernels.cpp"
    path.write_text(SOURCE)
    return path


def refuse(*_):
    raise AssertionError("it was compiled again")


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@needs_compiler
def test_a_source_is_compiled_once_and_found_again(source, monkeypatch):
    assert library.load_library(source).answer() == 42
    (kept,) = cache_folder().iterdir()
    library.load_library.cache_clear()
    monkeypatch.setattr(library, "_compile", refuse)
    assert library.load_library(source).answer() == 42
    assert list(cache_folder().iterdir()) == [kept]


@needs_compiler
def test_a_changed_source_is_compiled_anew(source):
    library.load_library(source)
    source.write_text(SOURCE.replace("i * 2", "i"))
    library.load_library.cache_clear()
    assert library.load_library(source).answer() == 21
    assert len(list(cache_folder().iterdir())) == 2


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
    assert not list(cache_folder().iterdir())


def test_without_a_compiler_that_is_said(source, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NativeKernelsError, match=r"no C\+\+ compiler is installed"):
        library.load_library(source)


PRIVATELY = "every process compiles its native kernels anew, since "


@needs_compiler
def test_a_cache_that_cannot_be_written_is_said_once_and_kernels_load(
    source, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=PRIVATELY + ".*/file'; .*set XDG_CACHE_HOME"):
        assert library.load_library(source).answer() == 42
    library.load_library.cache_clear()
    assert library.load_library(source).answer() == 42  # a second warning would be an error


@needs_compiler
def test_the_cache_is_the_users_alone(source):
    umask = os.umask(0)
    try:
        library.load_library(source)
    finally:
        os.umask(umask)
    folder = cache_folder()
    for made in (folder, folder.parent, folder.parent.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    (kept,) = folder.iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600


def kept_library(source):
    """Compile the source and forget that: the file that the next load finds."""
    library.load_library(source)
    library.load_library.cache_clear()
    (kept,) = cache_folder().iterdir()
    return kept


def plant(source, answer):
    """A library of the right name that gives another answer, as somebody else would make it."""
    kept = kept_library(source)
    other = source.with_name("other.cpp")
    other.write_text(f'extern "C" int answer() {{ return {answer}; }}\n')
    built = library._compile(other, library._compiler_command(), None)
    kept.unlink()
    prefix = kept.name.rpartition("-")[0]
    planted = kept.with_name(f"{prefix}-{hashlib.sha256(built).hexdigest()}.so")
    planted.write_bytes(built)
    planted.chmod(0o600)
    return planted


@needs_compiler
def test_the_planted_library_of_these_tests_would_load(source):
    plant(source, 666)
    assert library.load_library(source).answer() == 666


@needs_compiler
@pytest.mark.parametrize("mode", [0o770, 0o777, 0o707, 0o1777])
@pytest.mark.parametrize("level", [0, 1])
def test_a_cache_folder_that_others_may_write_to_is_not_loaded_from(source, mode, level):
    plant(source, 666)
    folder = [cache_folder(), cache_folder().parent][level]
    folder.chmod(mode)
    with pytest.warns(UserWarning, match=PRIVATELY + f"others may write to {folder} "):
        assert library.load_library(source).answer() == 42
    assert len(list(cache_folder().iterdir())) == 1


@needs_compiler
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o777])
def test_a_library_that_others_may_write_to_is_not_loaded(source, mode):
    planted = plant(source, 666)
    planted.chmod(mode)
    assert library.load_library(source).answer() == 42
    assert not planted.exists()


@needs_compiler
def test_a_link_in_place_of_a_library_is_not_followed(source):
    planted = plant(source, 666)
    target = planted.rename(source.with_name("elsewhere.so"))
    planted.symlink_to(target)
    assert library.load_library(source).answer() == 42
    assert target.exists() and not planted.is_symlink()


@needs_compiler
def test_a_pipe_in_place_of_a_library_does_not_stop_the_run(source):
    planted = plant(source, 666)
    planted.unlink()
    os.mkfifo(planted, 0o600)
    assert library.load_library(source).answer() == 42


@needs_compiler
def test_somebody_elses_cache_is_not_loaded_from(source, monkeypatch):
    plant(source, 666)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.warns(UserWarning, match=PRIVATELY + f".* belongs to user {me}, not to user"):
        assert library.load_library(source).answer() == 42


@needs_compiler
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_root_does_not_load_what_another_user_made(source):
    planted = plant(source, 666)
    os.chown(planted, 1234, 1234)
    assert library.load_library(source).answer() == 42
    planted = plant_again(source)
    os.chown(cache_folder(), 1234, 1234)
    with pytest.warns(UserWarning, match="belongs to user 1234"):
        assert library.load_library(source).answer() == 42
    assert planted.exists()


def plant_again(source):
    for kept in cache_folder().iterdir():
        kept.unlink()
    library.load_library.cache_clear()
    return plant(source, 666)


@needs_compiler
def test_a_cache_folder_that_is_the_users_own_link_serves(source, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "linked").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "linked"))
    kept = kept_library(source)
    monkeypatch.setattr(library, "_compile", refuse)
    assert library.load_library(source).answer() == 42
    assert kept.resolve().is_relative_to(tmp_path / "disk")


@needs_compiler
def test_without_a_home_kernels_are_built_for_the_process_alone(source, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.warns(UserWarning, match=PRIVATELY + "this user has no home folder"):
        assert library.load_library(source).answer() == 42


def test_a_relative_cache_home_is_ignored(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/.cache/efficient-resnet/native")
    monkeypatch.setenv("HOME", "relative")
    assert cache_folder() is None


def damaged(content, damage):
    middle = len(content) // 2
    return {
        "empty": b"",
        "half": content[:middle],
        "one byte short": content[:-1],
        "longer": content + b"\0",
        "inverted": content[:middle] + bytes(255 - b for b in content[middle:]),
        "zeros at the end": content[:-4096] + bytes(4096),
        "no library": b"no library",
    }[damage]


DAMAGES = (
    "empty", "half", "one byte short", "longer", "inverted", "zeros at the end", "no library",
)  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_compiled_again(source, damage):
    kept = kept_library(source)
    kept.write_bytes(damaged(kept.read_bytes(), damage))
    assert library.load_library(source).answer() == 42
    (healed,) = cache_folder().iterdir()
    library.load_library.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_compile", refuse)
        assert library.load_library(source).answer() == 42
    assert f"-{hashlib.sha256(healed.read_bytes()).hexdigest()}.so" in healed.name


@needs_compiler
def test_a_whole_library_that_does_not_load_is_compiled_again_once(source, monkeypatch):
    kept = kept_library(source)
    text = b"no library, but whole" * 999
    bad = kept.with_name(f"{kept.name.rpartition('-')[0]}-{hashlib.sha256(text).hexdigest()}.so")
    kept.unlink()
    bad.write_bytes(text)
    bad.chmod(0o600)
    assert library.load_library(source).answer() == 42
    assert not bad.exists()
    library.load_library.cache_clear()
    for kept in cache_folder().iterdir():
        kept.unlink()
    built = []
    monkeypatch.setattr(library, "_compile", lambda *_: built.append(1) or text)
    with (
        pytest.warns(UserWarning, match=PRIVATELY),
        pytest.raises(NativeKernelsError, match=r"kernels do not load: .*ELF") as caught,
    ):
        library.load_library(source)
    assert len(built) == 2 and "\n" not in str(caught.value)


@needs_compiler
def test_a_full_disk_leaves_no_part_of_a_library(source, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match=PRIVATELY + ".*No space left on device"):
        assert library.load_library(source).answer() == 42
    assert not list(cache_folder().iterdir())


LOAD = """
import sys
from pathlib import Path
from training_framework.kernels import compiler as library
real = library._compile
def counted(*arguments):
    Path(sys.argv[2]).open("a").write("built ")
    return real(*arguments)
library._compile = counted
assert library.load_library(Path(sys.argv[1])).answer() == 42
"""


@needs_compiler
def test_processes_that_start_together_build_once(source, tmp_path, forks):
    log = tmp_path / "log"
    started = [forks.start("-W", "error", "-c", LOAD, source, log) for _ in range(4)]
    done = [program.wait() for program in started]
    assert [one.returncode for one in done] == [0] * 4, done
    assert log.read_text() == "built "
    assert len(list(cache_folder().iterdir())) == 1


@needs_compiler
def test_a_builder_that_dies_or_hangs_stops_no_other(source, monkeypatch):
    folder = cache_folder()
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o700)
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    monkeypatch.setattr(library_cache, "MAX_WAIT_FOR_ANOTHER_BUILD_SECONDS", 0.2)
    assert library.load_library(source).answer() == 42
    os.close(descriptor)


@needs_compiler
@pytest.mark.parametrize("cxx", ["g++ -O1", "  g++  ", "env 'g++'", ""])
def test_cxx_may_have_flags_and_a_launcher(source, monkeypatch, cxx):
    monkeypatch.setenv("CXX", cxx)
    assert library.find_compiler() == shutil.which("env" if "env" in cxx else "g++")
    assert library.load_library(source).answer() == 42


@needs_compiler
def test_the_flags_of_cxx_take_effect(source, monkeypatch):
    source.write_text('extern "C" int answer() { return ANSWER; }')
    for answer in ("17", "18"):
        monkeypatch.setenv("CXX", f"g++ -DANSWER={answer}")
        library.load_library.cache_clear()
        assert library.load_library(source).answer() == int(answer)


@pytest.mark.parametrize("cxx", ["no-such-compiler -O2", "'g++"])
def test_a_cxx_that_names_no_compiler_counts_as_none(source, monkeypatch, cxx):
    monkeypatch.setenv("CXX", cxx)
    assert library.find_compiler() is None
    with pytest.raises(NativeKernelsError, match=r"no C\+\+ compiler is installed \(CXX is ") as c:
        library.load_library(source)
    assert cxx in str(c.value)


def test_a_compiler_that_fails_is_one_line(source, tmp_path, monkeypatch):
    compiler = tmp_path / "failing"
    compiler.write_text("#!/bin/sh\nprintf 'first\\n\\377 error: broken\\n' >&2\nexit 3\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(NativeKernelsError, match=r"failing failed: .* error: broken$"):
        library.load_library(source)
