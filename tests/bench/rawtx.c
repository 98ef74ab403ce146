/*
 * The limit of one AF_XDP socket, with no guest and no copy of ours. Runs until it is killed.
 *
 *   rawtx INTERFACE LENGTH       sends the same frames for ever
 *   rawtx INTERFACE LENGTH back  sends some, and each again as it comes back from a reflector at the far end
 */
#include <linux/bpf.h>
#include <linux/if_link.h>
#include <linux/if_xdp.h>
#include <net/if.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SOL_XDP
#define SOL_XDP 283
#endif
#ifndef XDP_MAX_TX_SKB_BUDGET
#define XDP_MAX_TX_SKB_BUDGET 9 /* Linux 6.17 */
#endif
#define ENTRIES 2048u /* of each ring; the umem has as many frames for transmit and as many for receive */
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

static int bpf(int command, union bpf_attr *attr)
{
	int r = (int)syscall(SYS_bpf, command, attr, sizeof(*attr));

	must(r >= 0, "bpf");
	return r;
}

/* An XDP program that gives every frame to the socket of its queue; attached for as long as this process lives. */
static void steer(int socket_fd, unsigned ifindex)
{
	union bpf_attr map = {.map_type = BPF_MAP_TYPE_XSKMAP, .key_size = 4, .value_size = 4, .max_entries = 1};
	const int map_fd = bpf(BPF_MAP_CREATE, &map);
	const struct bpf_insn program[] = {
		{.code = BPF_LDX | BPF_MEM | BPF_W,
		 .dst_reg = 2,
		 .src_reg = 1,
		 .off = offsetof(struct xdp_md, rx_queue_index)},
		{.code = BPF_LD | BPF_IMM | BPF_DW, .dst_reg = 1, .src_reg = BPF_PSEUDO_MAP_FD, .imm = map_fd},
		{0},
		{.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 3, .imm = XDP_PASS},
		{.code = BPF_JMP | BPF_CALL, .imm = BPF_FUNC_redirect_map},
		{.code = BPF_JMP | BPF_EXIT},
	};
	union bpf_attr load = {.prog_type = BPF_PROG_TYPE_XDP,
			       .expected_attach_type = BPF_XDP,
			       .insns = (uint64_t)(uintptr_t)program,
			       .insn_cnt = sizeof(program) / sizeof(*program),
			       .license = (uint64_t)(uintptr_t) "GPL"};
	unsigned key = 0;
	union bpf_attr update = {
		.map_fd = (unsigned)map_fd, .key = (uint64_t)(uintptr_t)&key, .value = (uint64_t)(uintptr_t)&socket_fd};
	union bpf_attr link = {0};

	link.link_create.prog_fd = (unsigned)bpf(BPF_PROG_LOAD, &load);
	link.link_create.target_ifindex = ifindex;
	link.link_create.attach_type = BPF_XDP;
	link.link_create.flags = XDP_FLAGS_DRV_MODE;
	bpf(BPF_MAP_UPDATE_ELEM, &update);
	bpf(BPF_LINK_CREATE, &link);
}

int main(int argc, char **argv)
{
	must(argc == 3 || argc == 4, "usage: rawtx INTERFACE LENGTH [back]");
	const unsigned length = (unsigned)atoi(argv[2]);
	const int back = argc == 4;
	unsigned entries = ENTRIES;
	const size_t size = 2 * ENTRIES * FRAME;
	int fd = socket(AF_XDP, SOCK_RAW, 0);
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	struct xdp_umem_reg umem = {.addr = (uint64_t)(uintptr_t)memory, .len = size, .chunk_size = FRAME};
	struct sockaddr_xdp address = {.sxdp_family = AF_XDP, .sxdp_flags = XDP_USE_NEED_WAKEUP};
	struct xdp_mmap_offsets at;
	socklen_t len = sizeof(at);

	must(fd >= 0, "socket");
	must(!setsockopt(fd, SOL_XDP, XDP_UMEM_REG, &umem, sizeof(umem)), "XDP_UMEM_REG");
	must(!setsockopt(fd, SOL_XDP, XDP_UMEM_FILL_RING, &entries, sizeof(entries)), "XDP_UMEM_FILL_RING");
	must(!setsockopt(fd, SOL_XDP, XDP_UMEM_COMPLETION_RING, &entries, sizeof(entries)), "XDP_UMEM_COMPLETION_RING");
	must(!setsockopt(fd, SOL_XDP, XDP_TX_RING, &entries, sizeof(entries)), "XDP_TX_RING");
	must(!setsockopt(fd, SOL_XDP, XDP_RX_RING, &entries, sizeof(entries)), "XDP_RX_RING");
	setsockopt(fd, SOL_XDP, XDP_MAX_TX_SKB_BUDGET, &entries, sizeof(entries));
	must(!getsockopt(fd, SOL_XDP, XDP_MMAP_OFFSETS, &at, &len), "XDP_MMAP_OFFSETS");
	address.sxdp_ifindex = if_nametoindex(argv[1]);
	must(!bind(fd, (struct sockaddr *)&address, sizeof(address)), "bind");

	char *tx = ring(fd, XDP_PGOFF_TX_RING, at.tx.desc + ENTRIES * sizeof(struct xdp_desc));
	char *rx = ring(fd, XDP_PGOFF_RX_RING, at.rx.desc + ENTRIES * sizeof(struct xdp_desc));
	char *fill = ring(fd, (off_t)XDP_UMEM_PGOFF_FILL_RING, at.fr.desc + ENTRIES * sizeof(uint64_t));
	char *done = ring(fd, (off_t)XDP_UMEM_PGOFF_COMPLETION_RING, at.cr.desc + ENTRIES * sizeof(uint64_t));
	struct xdp_desc *descs = (struct xdp_desc *)(tx + at.tx.desc), *got = (struct xdp_desc *)(rx + at.rx.desc);
	uint64_t *filled = (uint64_t *)(fill + at.fr.desc), *finished = (uint64_t *)(done + at.cr.desc);
	uint32_t *produced = (uint32_t *)(tx + at.tx.producer), *completed = (uint32_t *)(done + at.cr.producer);
	uint32_t *reaped = (uint32_t *)(done + at.cr.consumer), *received = (uint32_t *)(rx + at.rx.producer);
	uint32_t *taken = (uint32_t *)(rx + at.rx.consumer), *refilled = (uint32_t *)(fill + at.fr.producer);
	uint32_t sent = 0, seen = 0, freed = 0;

	for (unsigned i = 0; i < ENTRIES; i++) {
		char *frame = memory + i * FRAME;

		memset(frame, (int)i, length);
		memcpy(frame, "\x52\x54\0\0\0\2\x52\x54\0\0\0\1\x88\xb5", 14);
		descs[i] = (struct xdp_desc){.addr = i * FRAME, .len = length};
		filled[i] = (ENTRIES + i) * (uint64_t)FRAME;
	}
	if (!back)
		for (;;) {
			freed = __atomic_load_n(completed, __ATOMIC_ACQUIRE);
			/* A frame is the slot's own: one that is completed may be sent again as it stands. */
			__atomic_store_n(reaped, freed, __ATOMIC_RELEASE);
			if (sent - freed <= ENTRIES - BATCH) {
				sent += BATCH;
				__atomic_store_n(produced, sent, __ATOMIC_RELEASE);
			}
			sendto(fd, NULL, 0, MSG_DONTWAIT, NULL, 0);
		}
	steer(fd, address.sxdp_ifindex);
	__atomic_store_n(refilled, ENTRIES, __ATOMIC_RELEASE);
	sent = BATCH;
	__atomic_store_n(produced, sent, __ATOMIC_RELEASE);
	for (uint32_t fills = ENTRIES;;) {
		uint32_t end = __atomic_load_n(received, __ATOMIC_ACQUIRE),
			 ends = __atomic_load_n(completed, __ATOMIC_ACQUIRE);

		/* What has come is sent from where it lies; what was sent takes its place in the fill ring. */
		for (; seen != end; seen++)
			descs[sent++ % ENTRIES] =
				(struct xdp_desc){.addr = got[seen % ENTRIES].addr, .len = got[seen % ENTRIES].len};
		for (; freed != ends; freed++)
			filled[fills++ % ENTRIES] = finished[freed % ENTRIES] / FRAME * FRAME;
		__atomic_store_n(taken, seen, __ATOMIC_RELEASE);
		__atomic_store_n(reaped, freed, __ATOMIC_RELEASE);
		__atomic_store_n(refilled, fills, __ATOMIC_RELEASE);
		__atomic_store_n(produced, sent, __ATOMIC_RELEASE);
		sendto(fd, NULL, 0, MSG_DONTWAIT, NULL, 0);
	}
}
