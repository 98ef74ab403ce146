/* As many frames as one AF_XDP socket sends: rawtx INTERFACE LENGTH. No guest, no copy of ours, nothing received.
 * Runs until it is killed. */
#include <linux/if_xdp.h>
#include <net/if.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>

#ifndef SOL_XDP
#define SOL_XDP 283
#endif
#ifndef XDP_MAX_TX_SKB_BUDGET
#define XDP_MAX_TX_SKB_BUDGET 9 /* Linux 6.17 */
#endif
#define ENTRIES 2048u
#define FRAME 4096u
#define BATCH 256u

static void must(int ok, const char *what)
{
	if (ok)
		return;
	perror(what);
	exit(1);
}

static char *ring(int fd, off_t at, size_t size)
{
	char *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, at);

	must(p != MAP_FAILED, "mmap");
	return p;
}

int main(int argc, char **argv)
{
	must(argc == 3, "usage: rawtx INTERFACE LENGTH");
	const unsigned length = (unsigned)atoi(argv[2]);
	unsigned entries = ENTRIES;
	int fd = socket(AF_XDP, SOCK_RAW, 0);
	char *memory =
		mmap(NULL, ENTRIES * FRAME, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	struct xdp_umem_reg umem = {.addr = (uint64_t)(uintptr_t)memory, .len = ENTRIES * FRAME, .chunk_size = FRAME};
	struct sockaddr_xdp address = {.sxdp_family = AF_XDP, .sxdp_flags = XDP_USE_NEED_WAKEUP};
	struct xdp_mmap_offsets at;
	socklen_t len = sizeof(at);

	must(fd >= 0, "socket");
	must(!setsockopt(fd, SOL_XDP, XDP_UMEM_REG, &umem, sizeof(umem)), "XDP_UMEM_REG");
	must(!setsockopt(fd, SOL_XDP, XDP_UMEM_FILL_RING, &entries, sizeof(entries)), "XDP_UMEM_FILL_RING");
	must(!setsockopt(fd, SOL_XDP, XDP_UMEM_COMPLETION_RING, &entries, sizeof(entries)), "XDP_UMEM_COMPLETION_RING");
	must(!setsockopt(fd, SOL_XDP, XDP_TX_RING, &entries, sizeof(entries)), "XDP_TX_RING");
	setsockopt(fd, SOL_XDP, XDP_MAX_TX_SKB_BUDGET, &entries, sizeof(entries));
	must(!getsockopt(fd, SOL_XDP, XDP_MMAP_OFFSETS, &at, &len), "XDP_MMAP_OFFSETS");
	address.sxdp_ifindex = if_nametoindex(argv[1]);
	must(!bind(fd, (struct sockaddr *)&address, sizeof(address)), "bind");

	char *tx = ring(fd, XDP_PGOFF_TX_RING, at.tx.desc + ENTRIES * sizeof(struct xdp_desc));
	char *done = ring(fd, (off_t)XDP_UMEM_PGOFF_COMPLETION_RING, at.cr.desc + ENTRIES * sizeof(uint64_t));
	struct xdp_desc *descs = (struct xdp_desc *)(tx + at.tx.desc);
	uint32_t *produced = (uint32_t *)(tx + at.tx.producer), *completed = (uint32_t *)(done + at.cr.producer);
	uint32_t *reaped = (uint32_t *)(done + at.cr.consumer), sent = 0;

	for (unsigned i = 0; i < ENTRIES; i++) {
		char *frame = memory + i * FRAME;

		memset(frame, (int)i, length);
		memcpy(frame, "\x52\x54\0\0\0\2\x52\x54\0\0\0\1\x88\xb5", 14);
		descs[i] = (struct xdp_desc){.addr = i * FRAME, .len = length};
	}
	for (;;) {
		uint32_t back = __atomic_load_n(completed, __ATOMIC_ACQUIRE);

		/* A frame is the slot's own: one that is completed may be sent again as it stands. */
		__atomic_store_n(reaped, back, __ATOMIC_RELEASE);
		if (sent - back <= ENTRIES - BATCH) {
			sent += BATCH;
			__atomic_store_n(produced, sent, __ATOMIC_RELEASE);
		}
		sendto(fd, NULL, 0, MSG_DONTWAIT, NULL, 0);
	}
}
