"""bpf/headers.py and bpf/loader.py: header trees of every layout, and the child that compiles."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.rig.descriptors import open_files
from tests.rig.netns import needs_root
from xdpnet.bpf import loader
from xdpnet.bpf.headers import Headers, find_headers
from xdpnet.errors import SetupError

RELEASE = "6.1.0-9-amd64"


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def plant_whole(tree: Path) -> None:
    """As Fedora and Ubuntu have it."""
    touch(tree / "include/generated/autoconf.h")
    touch(tree / "include/linux/kconfig.h")
    touch(tree / "arch/x86/include/asm/page.h")


def plant_debian(root: Path, version: str) -> Path:
    build = root / f"usr/src/linux-headers-{version}-amd64"
    touch(build / "include/generated/autoconf.h")
    touch(build / "arch/x86/include/generated/asm/unistd.h")
    touch(root / f"usr/src/linux-headers-{version}-common/include/linux/kconfig.h")
    return build


def find(root: Path) -> Headers:
    return find_headers(root, RELEASE, "x86_64")


def test_debians_two_packages_become_a_source_tree_and_flags(tmp_path: Path) -> None:
    build = plant_debian(tmp_path, "6.1.0-9")
    headers = find(tmp_path)
    assert headers.source == tmp_path / "usr/src/linux-headers-6.1.0-9-common"
    assert f"-I{build}/include" in headers.cflags
    assert f"-I{build}/arch/x86/include/generated/uapi" in headers.cflags


def test_the_build_link_of_the_running_kernel_is_followed(tmp_path: Path) -> None:
    plant_whole(tmp_path / "usr/src/kernels/6.9.0-1.fc40.x86_64")
    build = plant_debian(tmp_path, "6.1.0-9")
    link = tmp_path / "lib/modules" / RELEASE / "build"
    link.parent.mkdir(parents=True)
    link.symlink_to(build)
    assert find(tmp_path).source == tmp_path / "usr/src/linux-headers-6.1.0-9-common"


def test_a_build_link_to_nowhere_is_passed_over(tmp_path: Path) -> None:
    link = tmp_path / "lib/modules" / RELEASE / "build"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "usr/src/removed")
    plant_whole(tmp_path / "usr/src/kernels/6.9.0-1.fc40.x86_64")
    assert find(tmp_path) == Headers(tmp_path / "usr/src/kernels/6.9.0-1.fc40.x86_64")


def test_the_newest_of_other_versions_is_taken_by_number_not_by_letter(tmp_path: Path) -> None:
    plant_debian(tmp_path, "6.1.0-9")
    plant_debian(tmp_path, "6.1.0-56")
    assert find_headers(tmp_path, "6.18.0", "x86_64").source.name == "linux-headers-6.1.0-56-common"


def test_a_common_package_of_another_version_does_not_complete_a_tree(tmp_path: Path) -> None:
    plant_debian(tmp_path, "6.1.0-5")
    plant_debian(tmp_path, "6.1.0-56")
    (tmp_path / "usr/src/linux-headers-6.1.0-56-common/include/linux/kconfig.h").unlink()
    assert find(tmp_path).source.name == "linux-headers-6.1.0-5-common"


def test_kheaders_are_the_running_kernels_and_go_before_other_versions(tmp_path: Path) -> None:
    plant_debian(tmp_path, "5.10.0-1")
    touch(tmp_path / "sys/kernel/kheaders.tar.xz")
    headers = find(tmp_path)
    assert headers.packed
    assert headers.source == tmp_path / "sys/kernel/kheaders.tar.xz"


def test_a_tree_without_generated_headers_is_not_usable(tmp_path: Path) -> None:
    plant_whole(tmp_path / "usr/src/kernels/6.9.0")
    (tmp_path / "usr/src/kernels/6.9.0/include/generated/autoconf.h").unlink()
    with pytest.raises(SetupError):
        find(tmp_path)


def test_a_tree_of_another_architecture_is_not_usable(tmp_path: Path) -> None:
    plant_whole(tmp_path / "usr/src/kernels/6.9.0")
    with pytest.raises(SetupError):
        find_headers(tmp_path, RELEASE, "aarch64")


def test_no_headers_name_the_package_to_install(tmp_path: Path) -> None:
    with pytest.raises(SetupError) as failure:
        find(tmp_path)
    assert "linux-headers-amd64" in str(failure.value)
    assert "kernel-devel" in str(failure.value)


def test_a_kheaders_archive_is_unpacked(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "kheaders.tar.xz", "w:xz") as tar:
        tar.addfile(tarfile.TarInfo("./include/linux/kconfig.h"), io.BytesIO())
    tree = Headers(tmp_path / "kheaders.tar.xz").unpack(tmp_path / "tree")
    assert tree == Headers(tmp_path / "tree")
    assert (tree.source / "include/linux/kconfig.h").is_file()


def test_the_unrelated_bcc_of_pypi_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "bcc/__init__.py")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bcc", raising=False)
    with pytest.raises(SetupError, match="not the BPF Compiler Collection") as failure:
        loader.check_bcc()
    assert "pip uninstall bcc" in failure.value.remedy


def test_a_missing_bcc_names_the_distributions_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.delitem(sys.modules, "bcc", raising=False)
    with pytest.raises(SetupError, match="missing") as failure:
        loader.check_bcc()
    assert "python3-bpfcc" in failure.value.remedy


@needs_root
def test_the_program_is_loaded_and_everything_of_it_is_closed_again() -> None:
    before = open_files()
    program = loader.load(4, 64)
    fds = program.prog_fd, program.frags_fd, program.xsks_fd, program.macs_fd
    targets = [os.readlink(f"/proc/self/fd/{fd}") for fd in fds]
    program.close()
    program.close()
    assert targets == ["anon_inode:bpf-prog"] * 2 + ["anon_inode:bpf-map"] * 2
    assert open_files() == before


@needs_root
def test_file_descriptors_of_the_program_are_not_inherited_by_other_children() -> None:
    program = loader.load(1, 1)
    try:
        assert not any(os.get_inheritable(fd) for fd in (program.prog_fd, program.macs_fd, program.verdicts_fd))
    finally:
        program.close()


@needs_root
def test_the_compiler_never_enters_this_process() -> None:
    script = (
        "import sys; from xdpnet.bpf import loader; loader.load(1, 1).close(); "
        "assert 'bcc' not in sys.modules; assert 'libbcc' not in open('/proc/self/maps').read()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


@needs_root
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("int steer(struct xdp_md *ctx) { return nonsense; }", "nonsense"),
        ("int steer(struct xdp_md *ctx) { return *(char *)(long)ctx->data; }", "invalid access to packet"),
        ("int other(struct xdp_md *ctx) { return 2; }", "steer"),
    ],
    ids=["the compiler refuses", "the verifier refuses", "there is no function steer"],
)
def test_what_the_tools_said_is_in_the_error(tmp_path: Path, source: str, words: str) -> None:
    before = open_files()
    path = tmp_path / "bad.c"
    maps = "BPF_XSKMAP(xsks, 1); BPF_HASH(macs, __u64, __u32, 1); BPF_PERCPU_ARRAY(verdicts, __u64, 1);"
    path.write_text(f"#include <uapi/linux/bpf.h>\n{maps}\n{source}\n")
    with pytest.raises(SetupError, match=r"load XDP program bad\.c") as failure:
        loader.load(1, 1, path)
    assert words in str(failure.value)
    assert open_files() == before
