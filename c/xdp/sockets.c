#define _GNU_SOURCE
#include "sockets.h"

#include <sys/socket.h>
#include <unistd.h>

#include "xsk.h"

static int registered(int fd, const void *umem, socklen_t len)
{
	return setsockopt(fd, SOL_XDP, XDP_UMEM_REG, umem, len) < 0 ? -errno : 0;
}

/* An open socket of this kind that has this UMEM registered already; NULL: we are the first. */
static const struct xsk *sharer(const struct arena *a, u64 umem, bool sg)
{
	for (u32 i = 0; i < a->sets; i++)
		if (a->owner[i] && a->owner[i]->umem == umem && a->owner[i]->sg == sg)
			return a->owner[i];
	return NULL;
}

static int register_umem(struct arena *a, struct umem *u)
{
	const u32 flags = u->number ? XDP_UMEM_UNALIGNED_CHUNK_FLAG : 0;
	/* struct xdp_umem_reg, with what it has had since Linux 6.8. */
	struct {
		u64 addr, len;
		u32 chunk_size, headroom, flags, tx_metadata_len;
	} umem = {.addr = (u64)(uintptr_t)a->base,
		  .len = arena_umem_length(a, u->number),
		  .chunk_size = XN_FRAME_SIZE,
		  .flags = flags | XDP_UMEM_TX_METADATA_LEN,
		  .tx_metadata_len = TX_METADATA};
	int r = u->number ? arena_fill_holes(a) : 0;

	if (!r) {
		r = registered(u->fd, &umem, sizeof(umem));
		u->metadata = !r;
		if (r == -EINVAL) {
			umem.flags = flags;
			umem.tx_metadata_len = 0;
			r = registered(u->fd, &umem, sizeof(umem));
		}
	}
	if (u->number)
		arena_empty_holes(a);
	if (u->number && r && arena_find_moved(a))
		r = -EFAULT;
	return r;
}

/* The one that is kept, if it has this UMEM. */
static bool take_ready(struct arena *a, struct umem *u)
{
	const struct umem ready = a->ready;

	if (ready.fd < 0)
		return false;
	a->ready.fd = -1;
	if (ready.number == u->number) {
		*u = ready;
		return true;
	}
	/* Of guests that are gone, or not wanted: it is not to be pinned for nothing. */
	close(ready.fd);
	return false;
}

static int open_socket(struct arena *a, struct umem *u)
{
	if (u->shared < 0 && take_ready(a, u))
		return 0;
	u->fd = socket(AF_XDP, SOCK_RAW | SOCK_CLOEXEC, 0);
	if (u->fd < 0)
		return -errno;
	int r = u->shared < 0 ? register_umem(a, u) : 0;

	if (r) {
		close(u->fd);
		u->fd = -1;
	}
	return r;
}

int socket_open(struct umem *u, struct arena *a, u32 max_frame, enum xn_zerocopy policy, u32 flags)
{
	*u = (struct umem){.fd = -1, .number = arena_umem(a, policy != XN_ZEROCOPY_OFF), .shared = -1};
	const struct xsk *first = sharer(a, u->number, xsk_wants_sg(max_frame, flags));

	if (first) {
		u->shared = first->fd;
		u->metadata = first->metadata;
	}
	return open_socket(a, u);
}

int socket_prepare(struct arena *a, u32 max_frame, enum xn_zerocopy policy, u32 flags)
{
	struct umem u = {.fd = -1, .number = arena_umem(a, policy != XN_ZEROCOPY_OFF), .shared = -1};

	if (sharer(a, u.number, xsk_wants_sg(max_frame, flags)) || (a->ready.fd >= 0 && a->ready.number == u.number))
		return 0;
	int r = open_socket(a, &u);

	a->ready = u;
	return r;
}

void socket_give_back(struct umem *u, struct arena *a, int error)
{
	if (u->fd < 0)
		return;
	/* It is tried again in a moment, and what took long is kept. */
	if (error == -EBUSY && u->shared < 0 && a->ready.fd < 0) {
		a->ready = *u;
		a->ready.rings = true;
	} else {
		close(u->fd);
	}
	u->fd = -1;
}
