#!/bin/bash
# From a bare Debian machine to a working xdpnet: packages, virtual environment, C core; then demo, tests or benchmark.
#
#   deploy/bootstrap.sh                        install; afterwards .venv/bin/xdpnet is there
#   deploy/bootstrap.sh demo                   install, then boot a guest and pass traffic
#   deploy/bootstrap.sh build                  for developers: the same with their packages, and the C core anew if it changed
#   deploy/bootstrap.sh lint                   then ruff, mypy and clang-format
#   deploy/bootstrap.sh unit [PYTEST ARGS]     then the tests that need no interface and no guest
#   deploy/bootstrap.sh test [-- PYTEST ARGS]  install, then lint and every test; with arguments: that pytest run alone
#   deploy/bootstrap.sh fuzz [MINUTES [TARGET...]]  install, then fuzz the core and the daemon, an hour unless told
#   deploy/bootstrap.sh bench [ROW...]         install, then the benchmark
#
# Running it again repairs what is missing and is quick when nothing is.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."

readonly ROOT=$PWD VENV=$PWD/.venv
LOG=/dev/null
readonly RUNTIME=(ca-certificates gcc iproute2 libc6-dev linux-headers-amd64 linux-libc-dev
	python3 python3-bpfcc python3-dev python3-venv)
readonly GUEST=(busybox-static ethtool iperf3 procps qemu-system-x86)
readonly TEST=(bpftool dpdk-dev strace user-mode-linux)
readonly BENCH=(sockperf)
readonly FUZZ=(clang llvm)
readonly CORE_JOBS=4 GUEST_JOBS=2 # tests at once, of the core and of all else: they wait more than they work
readonly NEWER=trixie # and its backports: see newer_guest

say() {
	if [ -t 2 ]; then printf '\033[1m==>\033[0m %s\n' "$*" >&2; else printf '==> %s\n' "$*" >&2; fi
}

fail() { # reason, remedy
	printf 'bootstrap: %s\nremedy: %s\n' "$1" "$2" >&2
	[ ! -s "$LOG" ] || printf 'log: %s\n' "$LOG" >&2
	exit 1
}

# What the last command said is kept where it failed.
tidy() { # exit status
	[ "$1" != 0 ] && [ -s "$LOG" ] || rm -f "$LOG"
}

# What the last command complained of.
errors() { grep -m 3 -E '(error|Error|ERROR):' "$LOG" || tail -n 5 "$LOG"; }

require_debian() {
	local ID="" ID_LIKE=""
	# shellcheck source=/dev/null
	[ -r /etc/os-release ] && . /etc/os-release
	[[ " $ID $ID_LIKE " == *" debian "* ]] ||
		fail "this is ${PRETTY_NAME:-an unknown system}, not Debian" "use Debian 12 or later, or install by hand what RUNTIME names in $0"
	[ "$(dpkg --print-architecture)" = amd64 ] ||
		fail "this machine is $(dpkg --print-architecture)" "use an amd64 machine"
	[ "$EUID" = 0 ] || fail "user $(id -un) may not install packages nor open AF_XDP sockets" "sudo $0 ${*:-}"
}

installed() { [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$1" 2>/dev/null)" = "ii " ]; }

refresh() {
	say "refreshing Debian's package lists"
	apt-get -q update >"$LOG" 2>&1 </dev/null ||
		fail "apt-get update failed: $(tail -n 3 "$LOG")" "check the network and /etc/apt/sources.list"
	refresh() { :; }
}

have_lists() { compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null; }

packages() {
	local missing=() package
	for package in "$@"; do installed "$package" || missing+=("$package"); done
	[ ${#missing[@]} = 0 ] && return
	have_lists || refresh
	say "installing ${#missing[@]} Debian packages: ${missing[*]}"
	local install=(apt-get -q -y --no-install-recommends -o Dpkg::Use-Pty=0 install "${missing[@]}")
	export DEBIAN_FRONTEND=noninteractive
	"${install[@]}" >"$LOG" 2>&1 </dev/null && return
	refresh # the lists may be older than the archive
	"${install[@]}" >"$LOG" 2>&1 </dev/null ||
		fail "apt-get could not install ${missing[*]}: $(tail -n 3 "$LOG")" "check the network and the free space, then run this again"
}

# Take packages' files without installing them: no kernel joins the boot menu and no service starts.
take() { # directory, [options of apt-get,] packages
	local into="$1.part" package
	rm -rf "$into" "$1"
	mkdir -p "$into/partial"
	(cd "$into" && apt-get -q -o APT::Sandbox::User=root "${@:2}") >"$LOG" 2>&1 </dev/null || return
	for package in "$into"/*.deb; do
		dpkg-deb -x "$package" "$into" >"$LOG" 2>&1 || return
	done
	rm -rf "$into"/*.deb "$into"/partial "$into"/lock
	touch "$into/.complete"
	mv "$into" "$1"
}

unpack() { # package, directory
	[ -e "$2/.complete" ] && return
	have_lists || refresh
	say "unpacking Debian's $1 into ${2#"$ROOT"/}"
	take "$2" download "$1" && return
	refresh
	take "$2" download "$1" ||
		fail "apt-get could not download $1: $(tail -n 3 "$LOG")" "check the network, then run this again"
}

# A newer QEMU with its libraries and a newer guest kernel, for what Debian 12's do not negotiate: from the archive that apt
# uses anyway, over lists of our own, so that apt here stays as it is. Where they are out of reach, their tests are skipped.
newer_guest() {
	local into=$ROOT/build/newer-guest
	[ -e "$into/.complete" ] && return
	have_lists || refresh
	say "unpacking QEMU and a kernel of Debian's $NEWER into ${into#"$ROOT"/}"
	take_newer "$into" "$ROOT/build/newer-lists" ||
		say "they are not to be had, so their tests are skipped: $(tail -n 3 "$LOG")"
	rm -rf "$ROOT/build/newer-lists" "$into.part"
}

take_newer() { # directory, directory for lists
	local archive kernel VERSION_CODENAME=""
	# shellcheck source=/dev/null
	. /etc/os-release
	archive=$(apt-get indextargets --format '$(REPO_URI)' "Created-By: Packages" "Codename: $VERSION_CODENAME" \
		"Component: main" 2>"$LOG" | head -n 1)
	[ -n "$archive" ] || {
		echo "apt knows no archive of $VERSION_CODENAME" >"$LOG"
		return 1
	}
	mkdir -p "$2/lists/partial" "$2/archives/partial"
	printf "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $archive %s main\n" \
		"$NEWER" "$NEWER-backports" >"$2/sources.list"
	local own=(-o "Dir::Etc::sourcelist=$2/sources.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State=$2"
		-o Dir::State::status=/dev/null -o "Dir::Cache=$2" -o APT::Sandbox::User=root)
	apt-get -q "${own[@]}" --error-on=any update >"$LOG" 2>&1 </dev/null || return
	kernel=$(apt-cache "${own[@]}" depends linux-image-cloud-amd64 2>"$LOG" |
		awk '$1 == "Depends:" && /linux-image/ { print $2; exit }')
	[ -n "$kernel" ] || return
	take "$1" "${own[@]}" -y --no-install-recommends -o "Dir::Cache::archives=$1.part" -t "$NEWER-backports" \
		--download-only install qemu-system-x86 "$kernel/$NEWER"
}

guest_packages() {
	packages "${GUEST[@]}"
	compgen -G '/boot/vmlinuz-*-cloud-amd64' >/dev/null && return
	have_lists || refresh
	local kernel
	kernel=$(apt-cache depends linux-image-cloud-amd64 | awk '$1 == "Depends:" && /linux-image/ { print $2; exit }')
	[ -n "$kernel" ] || fail "no package linux-image-cloud-amd64 is known here" "add Debian's main archive to /etc/apt/sources.list"
	unpack "$kernel" "$ROOT/build/guest-kernel"
}

test_packages() {
	guest_packages
	packages "${TEST[@]}"
	command -v promtool >/dev/null || unpack prometheus "$ROOT/build/prometheus"
	export PATH="$PATH:$ROOT/build/prometheus/usr/bin"
}

fuzz_packages() {
	packages "${FUZZ[@]}"
	local version
	version=$(clang -dumpversion)
	packages "libclang-rt-${version%%.*}-dev"
}

digest() { cat "$@" | sha256sum | cut -d ' ' -f 1; }

# Two stamps: .packages for what pyproject.toml asks for, .core for the C sources.
environment() { # extras: "" or "[dev]"
	local wanted core
	wanted="$1 $(digest pyproject.toml c/hatch_build.py)"
	core=$(find c -name '*.[ch]' -o -path c/build.py | LC_ALL=C sort | xargs cat | digest)
	if ! "$VENV/bin/python" -c 'import sys; sys.exit(sys.prefix != sys.argv[1])' "$VENV" 2>/dev/null; then
		say "making the virtual environment .venv"
		rm -rf "$VENV"
		/usr/bin/python3 -m venv --system-site-packages "$VENV"
	fi
	# The development packages include the others.
	local stamped
	stamped=$(cat "$VENV/.packages" 2>/dev/null || true)
	if [ "$stamped" != "$wanted" ] && [ "$stamped" != "[dev]$wanted" ] || [ ! -x "$VENV/bin/xdpnet" ]; then
		say "installing Python packages and building the C core"
		"$VENV/bin/pip" -q --disable-pip-version-check install -e ".$1" >"$LOG" 2>&1 </dev/null ||
			fail "pip failed: $(errors)" "see the message; without a network, give pip a mirror by PIP_INDEX_URL"
		echo "$wanted" >"$VENV/.packages"
	elif [ "$(cat "$VENV/.core" 2>/dev/null)" != "$core" ] || [ ! -e xdpnet/_core.abi3.so ]; then
		say "building the C core"
		build_core
	fi
	echo "$core" >"$VENV/.core"
	"$VENV/bin/python" -c 'import bcc, xdpnet.core' 2>"$LOG" ||
		fail "the installation does not load: $(tail -n 1 "$LOG")" "rm -r .venv and run this again"
}

build_core() { # [arguments of c/build.py]
	local needs=()
	mapfile -t needs < <("$VENV/bin/python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")')
	"$VENV/bin/pip" -q --disable-pip-version-check install "${needs[@]}" >"$LOG" 2>&1 </dev/null ||
		fail "pip failed: $(errors)" "see the message; without a network, give pip a mirror by PIP_INDEX_URL"
	"$VENV/bin/python" c/build.py "$@" >"$LOG" 2>&1 ||
		fail "the C core does not compile: $(errors)" "see the message"
}

lint() {
	say "ruff, mypy, clang-format"
	"$VENV/bin/ruff" check .
	"$VENV/bin/ruff" format --check .
	"$VENV/bin/mypy"
	find c tests/*/*.c -name '*.[ch]' -exec "$VENV/bin/clang-format" --dry-run -Werror {} +
}

sanitized_tests() {
	say "the C core with AddressSanitizer and UndefinedBehaviorSanitizer"
	build_core --sanitize build/asan
	local preload
	preload=$(gcc -print-file-name=libasan.so)
	# SIGBUS is the core's own business; the interpreter's leaks are not ours.
	ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0:allow_user_segv_handler=1 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD=$preload "$VENV/bin/python" -m pytest -q -m core -n "$CORE_JOBS" --dist worksteal \
		--core=build/asan/xdpnet/_core.abi3.so </dev/null
}

every_test() { # arguments of pytest
	"$VENV/bin/python" -m pytest -rs --expected-skips=tests/expected-skips.txt --nothing-left "$@" </dev/null
}

fuzz() { # minutes, [targets]
	say "fuzzing for $1 minutes in all"
	"$VENV/bin/python" -m tests.fuzz run --minutes "$@" </dev/null
}

main() {
	local verb=${1:-install}
	[ $# = 0 ] || shift
	case $verb in
	install | demo | build | lint | unit | test | fuzz | bench) ;;
	-h | --help) sed -n '2,/^set/ { /^#/s/^# \{0,1\}//p }' "$ROOT/deploy/bootstrap.sh" && exit ;;
	*) fail "no such command: $verb" "one of: install, demo, build, lint, unit, test, fuzz, bench" ;;
	esac
	require_debian "$verb" "$@"
	LOG=$(mktemp -t "xdpnet-bootstrap-$$-XXXXXX")
	trap 'tidy $?' EXIT

	packages "${RUNTIME[@]}"
	case $verb in
	install)
		environment ""
		say "ready: .venv/bin/xdpnet"
		;;
	demo)
		guest_packages
		environment ""
		rm -f "$LOG"
		exec "$VENV/bin/xdpnet" demo "$@" # in our place, so that a signal reaches it
		;;
	build)
		environment "[dev]"
		say "ready: .venv, and the core in xdpnet/"
		;;
	lint)
		environment "[dev]"
		lint
		;;
	unit)
		environment "[dev]"
		"$VENV/bin/python" -m pytest -q -m "not net and not guest and not dpdk" -n "$CORE_JOBS" --dist worksteal "$@"
		;;
	test)
		test_packages
		fuzz_packages
		newer_guest
		environment "[dev]"
		if [ "${1:-}" = -- ]; then
			shift
			"$VENV/bin/python" -m pytest "$@"
			return
		fi
		lint
		sanitized_tests
		fuzz 2
		say "every test"
		every_test -m core -n "$CORE_JOBS" --dist worksteal
		every_test -m "not core" -n "$GUEST_JOBS" --dist loadfile
		;;
	fuzz)
		fuzz_packages
		environment "[dev]"
		[ $# = 0 ] && set -- 60
		fuzz "$@"
		;;
	bench)
		test_packages
		packages "${BENCH[@]}"
		environment "[dev]"
		"$VENV/bin/python" -m tests.bench "$@"
		;;
	esac
}

main "$@"
