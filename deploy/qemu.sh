#!/bin/sh
# A guest of QEMU behind xdpnet: deploy/qemu.sh SOCKET MAC [QEMU OPTIONS...]
# Memory is a sealed memfd that the backend shares; reconnecting lets xdpnet be restarted under the guest.
# In the environment: MEMORY (1G), QUEUES (1), ACCEL (kvm where /dev/kvm may be used, else tcg; xdpnet check tries it).
set -eu
socket=${1:?usage: $0 SOCKET MAC [QEMU OPTIONS...]}
mac=${2:?usage: $0 SOCKET MAC [QEMU OPTIONS...]}
shift 2
memory=${MEMORY:-1G} queues=${QUEUES:-1}
accel=${ACCEL:-$([ -r /dev/kvm ] && [ -w /dev/kvm ] && echo kvm || echo tcg)}
# Where it emulates, QEMU 7.2 crashes when a vhost-user card with message interrupts (MSI-X) starts: no vectors, none of those.
case $accel in
kvm*) cpu=host vectors= ;;
*) cpu=max vectors=,vectors=0 ;;
esac
# In milliseconds since QEMU 9.2; from 11 on nothing else is taken.
case $(qemu-system-x86_64 --version | sed -n 's/.*version \([0-9]*\.[0-9]*\).*/\1/p') in
[0-8].* | 9.[01]) reconnect=reconnect=1 ;;
*) reconnect=reconnect-ms=1000 ;;
esac
exec qemu-system-x86_64 -M q35,accel="$accel" -cpu "$cpu" -m "$memory" -smp "$queues" \
	-object memory-backend-memfd,id=memory,size="$memory",share=on -numa node,memdev=memory \
	-chardev socket,id=net,path="$socket","$reconnect" \
	-netdev vhost-user,id=net,chardev=net,queues="$queues" \
	-device virtio-net-pci,netdev=net,mac="$mac",mq=on,rx_queue_size=1024,tx_queue_size=1024"$vectors" \
	"$@"
