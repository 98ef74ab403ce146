#!/bin/sh
# A guest of QEMU behind xdpnet: deploy/qemu.sh SOCKET MAC [QEMU OPTIONS...]
# Memory is a sealed memfd that the backend shares; reconnecting lets xdpnet be restarted under the guest.
set -eu
socket=${1:?usage: $0 SOCKET MAC [QEMU OPTIONS...]}
mac=${2:?usage: $0 SOCKET MAC [QEMU OPTIONS...]}
shift 2
memory=${MEMORY:-1G} queues=${QUEUES:-1}
# In milliseconds since QEMU 9.2; from 11 on nothing else is taken.
case $(qemu-system-x86_64 --version | sed -n 's/.*version \([0-9]*\.[0-9]*\).*/\1/p') in
[0-8].* | 9.[01]) reconnect=reconnect=1 ;;
*) reconnect=reconnect-ms=1000 ;;
esac
exec qemu-system-x86_64 -M q35,accel=kvm -cpu host -m "$memory" -smp "$queues" \
	-object memory-backend-memfd,id=memory,size="$memory",share=on -numa node,memdev=memory \
	-chardev socket,id=net,path="$socket","$reconnect" \
	-netdev vhost-user,id=net,chardev=net,queues="$queues" \
	-device virtio-net-pci,netdev=net,mac="$mac",mq=on,rx_queue_size=1024,tx_queue_size=1024 \
	"$@"
