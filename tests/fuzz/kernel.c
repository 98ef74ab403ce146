#define _GNU_SOURCE
#include "kernel.h"

#include <errno.h>
#include <linux/aio_abi.h>
#include <linux/if_packet.h>
#include <linux/if_xdp.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "clock.h"
#include "xdp/xsk.h"

enum { SOCKETS = 8, MAPPED = 1024, PAGE = 4096, GUARD = 1 << 21, HEADROOM = 256, GROUP_FRAMES = 8, DESC_AT = 192 };
enum { FILL, COMPLETION, RX, TX, RINGS };
enum { NOBODYS = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE };

/* The kernel's view of one ring. */
struct side {
	u8 *memory;
	u32 entries;
	u32 at; /* next entry to produce, or to consume */
};

static struct xsk_socket {
	bool open;
	int fd;
	u8 *umem;
	u64 umem_len;
	bool unaligned;
	bool sg;
	bool zerocopy;
	struct side rings[RINGS];
	u64 *held; /* sent, and not yet given back */
	u32 held_n;
	u32 pieces; /* of the frame that is being sent */
} sockets[SOCKETS];

/* Files that are mapped. */
static struct mapped {
	u8 *base;
	size_t length;
} mapped[MAPPED];
static u32 mapped_n;

/*
 * Address space that the core reserved, to map something there. What it gives back of it at either end is kept until all
 * of it is given back, so that nobody may touch what is around; behind it as many pages as an index of 16 bits reaches.
 */
static struct reservation {
	u8 *whole;
	size_t room;
	u8 *base; /* what the core still has of it */
	size_t length;
} reservations[MAPPED];
static u32 reservations_n;

static struct group_frame {
	u8 bytes[72 * 1024];
	struct virtio_net_hdr told;
	u32 len;
	u32 tag;
} group[GROUP_FRAMES];
static u32 group_n;

struct kernel kernel;

int __real_socket(int domain, int type, int protocol);
int __real_setsockopt(int fd, int level, int option, const void *value, socklen_t len);
int __real_getsockopt(int fd, int level, int option, void *value, socklen_t *len);
int __real_bind(int fd, const struct sockaddr *address, socklen_t len);
void *__real_mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset);
int __real_munmap(void *addr, size_t length);
void *__real_mremap(void *old, size_t length, size_t more, int flags, void *place);
ssize_t __real_sendto(int fd, const void *bytes, size_t n, int flags, const struct sockaddr *to, socklen_t len);
ssize_t __real_recvfrom(int fd, void *bytes, size_t n, int flags, struct sockaddr *from, socklen_t *len);

int __wrap_socket(int domain, int type, int protocol);
int __wrap_setsockopt(int fd, int level, int option, const void *value, socklen_t len);
int __wrap_getsockopt(int fd, int level, int option, void *value, socklen_t *len);
int __wrap_bind(int fd, const struct sockaddr *address, socklen_t len);
void *__wrap_mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset);
int __wrap_munmap(void *addr, size_t length);
void *__wrap_mremap(void *old, size_t length, size_t more, int flags, void *place);
int __wrap_close(int fd);
int __real_close(int fd);
ssize_t __wrap_sendto(int fd, const void *bytes, size_t n, int flags, const struct sockaddr *to, socklen_t len);
ssize_t __wrap_recvfrom(int fd, void *bytes, size_t n, int flags, struct sockaddr *from, socklen_t *len);
int __wrap_recvmmsg(int fd, struct mmsghdr *messages, unsigned int n, int flags, struct timespec *timeout);
int __wrap_usleep(useconds_t us);
ssize_t __wrap_getrandom(void *to, size_t n, unsigned int flags);
long __wrap_syscall(long number, long a, long b, long c);
long __real_syscall(long number, long a, long b, long c);

/* ---- sleep and chance ---- */

/* The core sleeps only for the kernel to be done with what was lent. */
int __wrap_usleep(useconds_t us)
{
	(void)clock_advance(100ull * us);
	for (u32 i = 0; i < SOCKETS; i++)
		if (sockets[i].open && !kernel.holds)
			kernel_complete(sockets[i].fd, UINT32_MAX);
	return 0;
}

ssize_t __wrap_getrandom(void *to, size_t n, unsigned int flags)
{
	(void)flags;
	memset(to, 0x5a, n);
	return (ssize_t)n;
}

/* A context takes tens of milliseconds to go away: it is kept for the next bridge. */
long __wrap_syscall(long number, long a, long b, long c)
{
	static aio_context_t kept[XN_MAX_WORKERS];
	static u32 kept_n;

	if (number == SYS_io_setup && kept_n) {
		*(aio_context_t *)b = kept[--kept_n];
		return 0;
	}
	if (number == SYS_io_destroy && kept_n < XN_MAX_WORKERS) {
		kept[kept_n++] = (aio_context_t)a;
		return 0;
	}
	return __real_syscall(number, a, b, c);
}

void kernel_reset(void)
{
	group_n = 0;
	kernel = (struct kernel){.metadata = true, .budget = UINT32_MAX};
}

/* ---- mappings ---- */

bool kernel_is_guest(const void *p)
{
	for (u32 i = 0; i < mapped_n; i++)
		if ((const u8 *)p >= mapped[i].base && (const u8 *)p < mapped[i].base + mapped[i].length)
			return true;
	return false;
}

void kernel_guard(const u8 *from, u64 n, bool poison)
{
	if (poison)
		ASAN_POISON_MEMORY_REGION(from, n);
	else
		ASAN_UNPOISON_MEMORY_REGION(from, n);
}

static void remember(u8 *base, size_t length)
{
	if (mapped_n < MAPPED)
		mapped[mapped_n++] = (struct mapped){base, length};
}

/* Other things will be there, or nothing. */
static void forget(const u8 *addr, size_t length)
{
	for (u32 i = 0; i < mapped_n; i++) {
		const struct mapped m = mapped[i];

		if (m.base < addr || m.base >= addr + length)
			continue;
		mapped[i--] = mapped[--mapped_n];
		kernel_guard(m.base, (m.length + PAGE - 1) / PAGE * PAGE, false);
	}
}

static void *reserve(size_t length, int flags)
{
	const size_t room = PAGE + length + GUARD;
	u8 *whole = __real_mmap(NULL, room, PROT_NONE, flags, -1, 0);

	if (whole == MAP_FAILED)
		return whole;
	reservations[reservations_n++] = (struct reservation){whole, room, whole + PAGE, length};
	return whole + PAGE;
}

/* False: it is none. What is mapped there goes. */
static bool release(const u8 *addr, size_t length)
{
	for (u32 i = 0; i < reservations_n; i++) {
		struct reservation *r = &reservations[i];

		if (addr < r->base || addr + length > r->base + r->length)
			continue;
		if (length == r->length) {
			__real_munmap(r->whole, r->room);
			*r = reservations[--reservations_n];
			return true;
		}
		if (addr == r->base)
			r->base += length;
		else if (addr + length != r->base + r->length)
			return false;
		r->length -= length;
		return __real_mmap((void *)addr, length, PROT_NONE, NOBODYS | MAP_FIXED, -1, 0) == addr;
	}
	return false;
}

static struct xsk_socket *socket_of(int fd)
{
	for (u32 i = 0; i < SOCKETS; i++)
		if (sockets[i].open && sockets[i].fd == fd)
			return &sockets[i];
	return NULL;
}

static int ring_at(off_t offset)
{
	switch ((u64)offset) {
	case XDP_UMEM_PGOFF_FILL_RING:
		return FILL;
	case XDP_UMEM_PGOFF_COMPLETION_RING:
		return COMPLETION;
	case XDP_PGOFF_RX_RING:
		return RX;
	default:
		return TX;
	}
}

void *__wrap_mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset)
{
	struct xsk_socket *s = fd >= 0 ? socket_of(fd) : NULL;

	if (s) {
		struct side *side = &s->rings[ring_at(offset)];

		side->memory = calloc(1, length);
		/* XDP_RING_NEED_WAKEUP: every kick is a call, and every call the target's to answer. */
		*(u32 *)(side->memory + 128) = XDP_RING_NEED_WAKEUP;
		return side->memory;
	}
	if (flags & MAP_FIXED)
		forget(addr, length);
	else if (prot == PROT_NONE && reservations_n < MAPPED)
		return reserve(length, flags);
	u8 *base = __real_mmap(addr, length, prot, flags, fd, offset);

	if (base != MAP_FAILED && fd >= 0)
		remember(base, length);
	return base;
}

int __wrap_munmap(void *addr, size_t length)
{
	for (u32 i = 0; i < SOCKETS; i++)
		for (u32 k = 0; k < RINGS; k++)
			if (sockets[i].open && sockets[i].rings[k].memory == addr) {
				sockets[i].rings[k].memory = NULL;
				free(addr);
				return 0;
			}
	forget(addr, length);
	return release(addr, length) ? 0 : __real_munmap(addr, length);
}

void *__wrap_mremap(void *old, size_t length, size_t more, int flags, void *place)
{
	u8 *base = __real_mremap(old, length, more, flags, place);

	if (base == MAP_FAILED)
		return base;
	forget(old, length);
	forget(base, more);
	remember(base, more);
	if (!(flags & MREMAP_DONTUNMAP))
		(void)release(old, length);
	return base;
}

/* ---- sockets ---- */

int __wrap_socket(int domain, int type, int protocol)
{
	if (domain != AF_XDP)
		return __real_socket(domain, type, protocol);
	for (u32 i = 0; i < SOCKETS; i++) {
		struct xsk_socket *s = &sockets[i];

		if (s->open)
			continue;
		*s = (struct xsk_socket){.open = true, .fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)};
		return s->fd;
	}
	errno = EMFILE;
	return -1;
}

int __wrap_close(int fd)
{
	struct xsk_socket *s = socket_of(fd);

	if (s) {
		for (u32 k = 0; k < RINGS; k++)
			MUST(!s->rings[k].memory);
		free(s->held);
		s->open = false;
	}
	return __real_close(fd);
}

int __wrap_setsockopt(int fd, int level, int option, const void *value, socklen_t len)
{
	static const u8 of[] = {[XDP_RX_RING] = RX,
				[XDP_TX_RING] = TX,
				[XDP_UMEM_FILL_RING] = FILL,
				[XDP_UMEM_COMPLETION_RING] = COMPLETION};
	struct xsk_socket *s = socket_of(fd);
	struct {
		u64 addr, len;
		u32 chunk_size, headroom, flags, metadata;
	} umem = {0};

	if (!s)
		return __real_setsockopt(fd, level, option, value, len);
	if (option == XDP_UMEM_REG) {
		memcpy(&umem, value, min_u32(len, sizeof(umem)));
		if (umem.metadata && !kernel.metadata) {
			errno = EINVAL;
			return -1;
		}
		s->umem = (u8 *)(uintptr_t)umem.addr;
		s->umem_len = umem.len;
		s->unaligned = umem.flags & XDP_UMEM_UNALIGNED_CHUNK_FLAG;
	} else if (option == XDP_RX_RING || option == XDP_TX_RING || option == XDP_UMEM_FILL_RING ||
		   option == XDP_UMEM_COMPLETION_RING) {
		memcpy(&s->rings[of[option]].entries, value, sizeof(u32));
	}
	return 0;
}

int __wrap_getsockopt(int fd, int level, int option, void *value, socklen_t *len)
{
	const struct xdp_ring_offset ring = {.producer = 0, .consumer = 64, .flags = 128, .desc = DESC_AT};
	struct xsk_socket *s = socket_of(fd);

	if (!s)
		return __real_getsockopt(fd, level, option, value, len);
	memset(value, 0, *len);
	if (option == XDP_MMAP_OFFSETS)
		*(struct xdp_mmap_offsets *)value = (struct xdp_mmap_offsets){ring, ring, ring, ring};
	else if (option == XDP_OPTIONS)
		((struct xdp_options *)value)->flags = s->zerocopy ? XDP_OPTIONS_ZEROCOPY : 0;
	return 0;
}

int __wrap_bind(int fd, const struct sockaddr *address, socklen_t len)
{
	const struct sockaddr_xdp *sxdp = (const struct sockaddr_xdp *)address;
	struct xsk_socket *s = socket_of(fd);

	if (!s)
		return __real_bind(fd, address, len);
	if (sxdp->sxdp_flags & XDP_SHARED_UMEM) {
		const struct xsk_socket *first = socket_of((int)sxdp->sxdp_shared_umem_fd);

		MUST(first && first->umem);
		s->umem = first->umem;
		s->umem_len = first->umem_len;
		s->unaligned = first->unaligned;
		s->sg = first->sg;
		s->zerocopy = first->zerocopy;
	} else {
		if (sxdp->sxdp_flags & XDP_ZEROCOPY && !kernel.zerocopy) {
			errno = EOPNOTSUPP;
			return -1;
		}
		s->zerocopy = sxdp->sxdp_flags & XDP_ZEROCOPY;
		s->sg = sxdp->sxdp_flags & XDP_USE_SG;
	}
	s->held = calloc(2 * s->rings[TX].entries, sizeof(*s->held));
	return 0;
}

/* ---- rings ---- */

static u32 *producer(const struct side *r)
{
	return (u32 *)r->memory;
}

static u32 *consumer(const struct side *r)
{
	return (u32 *)(r->memory + 64);
}

static u64 *addr_at(const struct side *r, u32 i)
{
	return (u64 *)(r->memory + DESC_AT) + (i & (r->entries - 1));
}

static struct xdp_desc *desc_at(const struct side *r, u32 i)
{
	return (struct xdp_desc *)(r->memory + DESC_AT) + (i & (r->entries - 1));
}

static void give_back(struct xsk_socket *s, u64 addr)
{
	struct side *r = &s->rings[COMPLETION];

	MUST(r->at - *consumer(r) < r->entries);
	*addr_at(r, r->at++) = addr;
	*producer(r) = r->at;
}

/* As the kernel sees a descriptor to send: whatever it would refuse is a fault of ours, and reading it must be possible. */
static void send_one(struct xsk_socket *s, const struct xdp_desc *d)
{
	static u8 wire[XN_MAX_FRAME];
	u64 place = s->unaligned ? xsk_place(d->addr) : d->addr;

	MUST(d->len && d->len <= sizeof(wire));
	MUST(place < s->umem_len && d->len <= s->umem_len - place);
	MUST(!(d->options & ~(XDP_PKT_CONTD | XDP_TX_METADATA)));
	if (!(s->unaligned && d->addr >> XSK_OFFSET_SHIFT))
		MUST(place % XN_FRAME_SIZE + d->len <= XN_FRAME_SIZE);
	memcpy(wire, s->umem + place, d->len);
	if (d->options & XDP_TX_METADATA) {
		struct tx_metadata metadata;

		memcpy(&metadata, s->umem + place - TX_METADATA, sizeof(metadata));
		MUST(metadata.csum_start + metadata.csum_offset + 2u <= d->len);
	}
	s->pieces++;
	MUST(s->pieces <= WIRE_PIECES && (s->sg || !(d->options & XDP_PKT_CONTD)));
	if (!(d->options & XDP_PKT_CONTD))
		s->pieces = 0;
	for (u32 i = 0; i < s->held_n; i++)
		MUST(s->held[i] != d->addr);
	kernel.sent++;
}

static void send_all(struct xsk_socket *s)
{
	struct side *r = &s->rings[TX];
	u32 end = *producer(r);

	MUST(end - r->at <= r->entries);
	for (u32 n = 0; r->at != end && n < kernel.budget; n++) {
		const struct xdp_desc d = *desc_at(r, r->at);

		send_one(s, &d);
		*consumer(r) = ++r->at;
		if (!kernel.holds) {
			give_back(s, d.addr);
			continue;
		}
		MUST(s->held_n < 2 * r->entries);
		s->held[s->held_n++] = d.addr;
	}
}

ssize_t __wrap_sendto(int fd, const void *bytes, size_t n, int flags, const struct sockaddr *to, socklen_t len)
{
	struct xsk_socket *s = socket_of(fd);

	if (!s)
		return __real_sendto(fd, bytes, n, flags, to, len);
	if (kernel.error) {
		errno = kernel.error;
		return -1;
	}
	send_all(s);
	return 0;
}

ssize_t __wrap_recvfrom(int fd, void *bytes, size_t n, int flags, struct sockaddr *from, socklen_t *len)
{
	return socket_of(fd) ? 0 : __real_recvfrom(fd, bytes, n, flags, from, len);
}

void kernel_complete(int fd, u32 most)
{
	struct xsk_socket *s = socket_of(fd);
	u32 n;

	if (!s)
		return;
	if (!kernel.error)
		send_all(s);
	n = min_u32(most, s->held_n);
	for (u32 i = 0; i < n; i++)
		give_back(s, s->held[i]);
	s->held_n -= n;
	memmove(s->held, s->held + n, s->held_n * sizeof(*s->held));
}

u32 kernel_outstanding(int fd)
{
	const struct xsk_socket *s = socket_of(fd);

	if (!s)
		return 0;
	const struct side *tx = &s->rings[TX], *done = &s->rings[COMPLETION];

	return *producer(tx) - tx->at + s->held_n + done->at - *consumer(done);
}

/* ---- receive ---- */

enum { WRONG_ADDR = 1, WRONG_LEN, WRONG_OPTIONS, ENDLESS, MANY_PIECES };

void kernel_receive(int fd, const u8 *frame, u32 len, u8 wrong, u64 value)
{
	struct xsk_socket *s = socket_of(fd);

	if (!s)
		return;
	struct side *fill = &s->rings[FILL], *rx = &s->rings[RX];
	u32 most = XN_FRAME_SIZE - HEADROOM, piece = wrong == MANY_PIECES ? 64 : most;

	if (len > most && !s->sg)
		len = most;
	for (u32 done = 0; done < len;) {
		u32 n = min_u32(piece, len - done);

		if (fill->at == *producer(fill) || rx->at - *consumer(rx) == rx->entries)
			return;
		u64 addr = *addr_at(fill, fill->at++);

		*consumer(fill) = fill->at;
		MUST(addr % XN_FRAME_SIZE == 0 && addr < s->umem_len);
		memcpy(s->umem + addr + HEADROOM, frame + done, n);
		done += n;
		struct xdp_desc d = {.addr = s->unaligned ? addr | (u64)HEADROOM << XSK_OFFSET_SHIFT : addr + HEADROOM,
				     .len = n,
				     .options = s->sg && (done < len || wrong == ENDLESS) ? XDP_PKT_CONTD : 0};

		if (wrong == WRONG_ADDR)
			d.addr = value;
		else if (wrong == WRONG_LEN)
			d.len = (u32)value;
		else if (wrong == WRONG_OPTIONS)
			d.options = (u32)value;
		*desc_at(rx, rx->at++) = d;
		*producer(rx) = rx->at;
	}
}

void kernel_receive_group(const struct virtio_net_hdr *told, const u8 *frame, u32 len, u32 tag)
{
	struct group_frame *f = &group[group_n];

	if (group_n == GROUP_FRAMES)
		return;
	group_n++;
	f->len = min_u32(len, sizeof(f->bytes));
	f->tag = tag;
	f->told = *told;
	memcpy(f->bytes, frame, f->len);
}

int __wrap_recvmmsg(int fd, struct mmsghdr *messages, unsigned int n, int flags, struct timespec *timeout)
{
	u32 given = min_u32(n, group_n);

	(void)fd, (void)flags, (void)timeout;
	for (u32 i = 0; i < given; i++) {
		struct msghdr *m = &messages[i].msg_hdr;
		struct cmsghdr *c = CMSG_FIRSTHDR(m);
		struct tpacket_auxdata aux = {
			.tp_status = group[i].tag ? TP_STATUS_VLAN_VALID | TP_STATUS_VLAN_TPID_VALID : 0,
			.tp_vlan_tci = (u16)group[i].tag,
			.tp_vlan_tpid = (u16)(group[i].tag >> 16)};

		memcpy(m->msg_iov[0].iov_base, &group[i].told, sizeof(group[i].told));
		memcpy(m->msg_iov[1].iov_base, group[i].bytes, min_u32(group[i].len, (u32)m->msg_iov[1].iov_len));
		messages[i].msg_len = (u32)sizeof(group[i].told) + group[i].len;
		c->cmsg_level = SOL_PACKET;
		c->cmsg_type = PACKET_AUXDATA;
		c->cmsg_len = CMSG_LEN(sizeof(aux));
		memcpy(CMSG_DATA(c), &aux, sizeof(aux));
		m->msg_controllen = CMSG_SPACE(sizeof(aux));
	}
	group_n = 0;
	if (given)
		return (int)given;
	errno = EAGAIN;
	return -1;
}
