#!/bin/bash
# Has a fresh Debian 12 with real systemd, libvirt and Prometheus do what README and deploy/ say; without KVM. By hand:
#
#   tests/deploy/run.sh [OPTIONS OF systemd-nspawn...] 2>&1 | tee output
#
# Takes some ten minutes, 4 GiB in TMPDIR and the network; needs root, mmdebstrap and systemd-container. The options are what
# an installation needs here: --setenv=PIP_INDEX_URL=..., --bind-ro=... of a certificate. The last commit is installed.
# KEEP=1 leaves the machine there, so that KEEP=DIRECTORY has the steps tried again without making another.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/../.."

say() { printf '==> %s\n' "$*"; }

leader() { pgrep -P "$BOOTED" | head -n 1 || true; }

inside() { "${NSPAWN[@]}" --setenv=DEBIAN_FRONTEND=noninteractive --pipe "$@" </dev/null; }

finish() {
	# Its first process, and with that all that it runs; systemd-nspawn alone would leave them to themselves.
	[ -z "${BOOTED:-}" ] || kill -KILL $(leader) "$BOOTED" 2>/dev/null || true
	if [ -n "${KEEP:-}" ]; then
		say "kept: $DIRECTORY"
	else
		rm -rf --one-file-system "$DIRECTORY"
	fi
}

for program in mmdebstrap systemd-nspawn nsenter git; do
	command -v "$program" >/dev/null || {
		echo "$program: not found; apt install mmdebstrap systemd-container git" >&2
		exit 1
	}
done
if [ -d "${KEEP:-}" ]; then
	DIRECTORY=$KEEP
else
	DIRECTORY=$(mktemp -d -t xdpnet-deploy.XXXXXX)
fi
readonly DIRECTORY MACHINE=$DIRECTORY/machine
readonly NSPAWN=(systemd-nspawn --quiet --register=no --keep-unit --directory="$MACHINE" "$@")
trap finish EXIT

if [ ! -d "$MACHINE" ]; then
	say "a fresh Debian 12"
	mmdebstrap --quiet --variant=apt --include=systemd-sysv,dbus,iproute2,iputils-ping,ca-certificates bookworm "$MACHINE"
	say "its other programs: libvirt, QEMU, Prometheus, and a kernel and a shell for the guest"
	inside sh -c 'apt-get -q update && apt-get -q -y --no-install-recommends -o Dpkg::Use-Pty=0 install \
		busybox-static libvirt-clients libvirt-daemon-system linux-image-cloud-amd64 prometheus qemu-system-x86' \
		>"$DIRECTORY/apt.log" 2>&1
fi
say "README: deploy/bootstrap.sh in /opt/xdpnet, $(git log -1 --format='commit %h')"
mkdir -p "$MACHINE/opt/xdpnet"
git archive HEAD | tar -x -C "$MACHINE/opt/xdpnet"
inside /opt/xdpnet/deploy/bootstrap.sh

say "booting it"
"${NSPAWN[@]}" --private-network --capability=all --system-call-filter=bpf --console=pipe --boot \
	>"$DIRECTORY/console.log" 2>&1 </dev/null &
BOOTED=$!
until [ -n "$(leader)" ] && [ -S "/proc/$(leader)/root/run/systemd/private" ]; do
	kill -0 "$BOOTED" || {
		cat "$DIRECTORY/console.log"
		exit 1
	}
	sleep 0.5
done
nsenter --target "$(leader)" --all -- systemctl is-system-running --wait || nsenter --target "$(leader)" --all -- systemctl --failed --no-pager
nsenter --target "$(leader)" --all -- env -C /opt/xdpnet .venv/bin/python -m tests.deploy.steps
