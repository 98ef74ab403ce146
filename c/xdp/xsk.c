#define _GNU_SOURCE
#include "xsk.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef XDP_MAX_TX_SKB_BUDGET
#define XDP_MAX_TX_SKB_BUDGET 9 /* Linux 6.17 */
#endif

static int ring_map(struct xsk_ring *r, int fd, const struct xdp_ring_offset *offset, u32 entries, size_t entry,
		    off_t at)
{
	r->map_len = offset->desc + entries * entry;
	r->map = mmap(NULL, r->map_len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, at);
	if (r->map == MAP_FAILED) {
		r->map = NULL;
		return -errno;
	}
	u8 *base = r->map;

	r->producer = (u32 *)(base + offset->producer);
	r->consumer = (u32 *)(base + offset->consumer);
	r->flags = (u32 *)(base + offset->flags);
	r->entries = base + offset->desc;
	r->mask = entries - 1;
	return 0;
}

static void ring_unmap(struct xsk_ring *r)
{
	if (r->map)
		munmap(r->map, r->map_len);
	r->map = NULL;
}

static int set_option(int fd, int option, const void *value, socklen_t len)
{
	return setsockopt(fd, SOL_XDP, option, value, len) < 0 ? -errno : 0;
}

static int make_rings(struct xsk *x, u32 entries, bool sized)
{
	const struct {
		struct xsk_ring *ring;
		int option;
		off_t at;
		size_t entry;
		size_t offset;
	} rings[] = {
		{&x->fill, XDP_UMEM_FILL_RING, (off_t)XDP_UMEM_PGOFF_FILL_RING, sizeof(u64),
		 offsetof(struct xdp_mmap_offsets, fr)},
		{&x->completion, XDP_UMEM_COMPLETION_RING, (off_t)XDP_UMEM_PGOFF_COMPLETION_RING, sizeof(u64),
		 offsetof(struct xdp_mmap_offsets, cr)},
		{&x->rx, XDP_RX_RING, XDP_PGOFF_RX_RING, sizeof(struct xdp_desc),
		 offsetof(struct xdp_mmap_offsets, rx)},
		{&x->tx, XDP_TX_RING, XDP_PGOFF_TX_RING, sizeof(struct xdp_desc),
		 offsetof(struct xdp_mmap_offsets, tx)},
	};
	struct xdp_mmap_offsets offsets;
	socklen_t len = sizeof(offsets);
	int r = 0;

	for (u32 i = 0; i < ARRAY_LEN(rings) && !r && !sized; i++)
		r = set_option(x->fd, rings[i].option, &entries, sizeof(entries));
	if (!r && getsockopt(x->fd, SOL_XDP, XDP_MMAP_OFFSETS, &offsets, &len) < 0)
		r = -errno;
	for (u32 i = 0; i < ARRAY_LEN(rings) && !r; i++)
		r = ring_map(rings[i].ring, x->fd, (struct xdp_ring_offset *)((u8 *)&offsets + rings[i].offset),
			     entries, rings[i].entry, rings[i].at);
	return r;
}

static int bind_socket(const struct xsk *x, int shared, u32 ifindex, u32 queue, bool copy)
{
	struct sockaddr_xdp sxdp = {.sxdp_family = AF_XDP, .sxdp_ifindex = ifindex, .sxdp_queue_id = queue};
	/* A shared UMEM brings its mode along: the flag must stand alone then. Zero copy first, else the kernel copies. */
	const u16 common = XDP_USE_NEED_WAKEUP | (x->sg ? XDP_USE_SG : 0);
	const u16 flags[] = {XDP_ZEROCOPY | common, XDP_COPY | common};
	int r = -EINVAL;

	if (shared >= 0) {
		sxdp.sxdp_flags = XDP_SHARED_UMEM;
		sxdp.sxdp_shared_umem_fd = (u32)shared;
		return bind(x->fd, (struct sockaddr *)&sxdp, sizeof(sxdp)) < 0 ? -errno : 0;
	}
	for (u32 i = copy; i < ARRAY_LEN(flags); i++) {
		sxdp.sxdp_flags = flags[i];
		r = bind(x->fd, (struct sockaddr *)&sxdp, sizeof(sxdp)) < 0 ? -errno : 0;
		if (!r || r == -EBUSY || r == -ENODEV)
			break;
	}
	return r;
}

int xsk_open(struct xsk **out, struct arena *a, const struct umem *u, u32 ifindex, u32 queue, u32 max_frame,
	     enum xn_zerocopy policy, u32 flags)
{
	struct xsk *x = aligned_alloc(XN_CACHELINE, (sizeof(*x) + XN_CACHELINE - 1) / XN_CACHELINE * XN_CACHELINE);
	u32 half = a->frames / 2;
	struct xdp_options options = {0};
	socklen_t len = sizeof(options);
	int r;

	if (!x)
		return -ENOMEM;
	memset(x, 0, sizeof(*x));
	x->fd = u->fd;
	x->arena = a;
	x->sg = xsk_wants_sg(max_frame, flags);
	x->metadata = u->metadata;
	x->max_frame = min_u32(max_frame, XN_MAX_FRAME);
	x->max_plain = min_u32(max_frame, TX_PIECE);
	x->policy = policy;
	x->umem = u->number;
	x->umem_len = arena_umem_length(a, u->number);
	for (x->set = 0; x->set < a->sets && a->owner[x->set]; x->set++)
		;
	r = -ENOSPC;
	if (x->set == a->sets)
		goto fail;
	x->first = x->set * a->set_size;
	r = -ENOMEM;
	x->free = calloc(half, sizeof(*x->free));
	x->lent = x->umem ? calloc(half, sizeof(*x->lent)) : NULL;
	if (!x->free || (x->umem && !x->lent))
		goto fail;
	r = make_rings(x, half, u->rings);
	if (!r)
		r = bind_socket(x, u->shared, ifindex, queue, flags & XN_COPY);
	if (r)
		goto fail;
	/* Old kernels take 32 frames a call and no option; then it takes more calls. */
	(void)set_option(x->fd, XDP_MAX_TX_SKB_BUDGET, &half, sizeof(half));
	if (!getsockopt(x->fd, SOL_XDP, XDP_OPTIONS, &options, &len))
		x->zerocopy = options.flags & XDP_OPTIONS_ZEROCOPY;
	x->copies = flags & XN_COPIES_AT_ONCE && x->umem && !x->zerocopy;
	/* With zero copy that is another question, of the driver: it may make another checksum than it is asked for. */
	x->tells = flags & XN_TELLS;
	x->leaves_csum = flags & XN_MAKES_CSUM && x->metadata && !x->zerocopy;
	for (u32 i = 0; i < half; i++)
		xsk_refill(x, x->first + (u64)i * XN_FRAME_SIZE);
	xsk_submit(&x->fill);
	for (u32 i = 0; i < half; i++)
		x->free[x->free_n++] = x->first + (u64)(a->frames - 1 - i) * XN_FRAME_SIZE + TX_METADATA;
	a->owner[x->set] = x;
	*out = x;
	return 0;
fail:
	x->fd = -1;
	xsk_close(x);
	return r;
}

static void end_loan(struct xsk *x, u32 token)
{
	/* Release: whatever the kernel read is read before the chain goes back to the guest. */
	__atomic_store_n(&x->lent[token]->borrower, NULL, __ATOMIC_RELEASE);
	x->lent[token] = NULL;
	__atomic_store_n(&x->lent_n, x->lent_n - 1, __ATOMIC_RELAXED);
}

static u64 token_frame(const struct xsk *x, u64 token)
{
	return x->first + (x->arena->frames / 2 + token) * XN_FRAME_SIZE + TX_METADATA;
}

u64 xsk_return(struct xsk *x, u64 addr)
{
	u64 token = (addr >> XSK_OFFSET_SHIFT) - 1;

	if (!x->lent || token >= x->arena->frames / 2)
		return UINT64_MAX;
	/* A recalled frame has an end to its loan behind it, if the kernel had begun with it after all. */
	if (x->lent[token])
		end_loan(x, (u32)token);
	return token_frame(x, token);
}

void xsk_end_taken(struct xsk *x)
{
	/* Acquire: with it go the kernel's reads of what the descriptors stand for. */
	u32 end = __atomic_load_n(x->tx.consumer, __ATOMIC_ACQUIRE);

	for (; x->taken != end; x->taken++) {
		u64 token = (xsk_desc_at(&x->tx, x->taken)->addr >> XSK_OFFSET_SHIFT) - 1;

		if (token < x->arena->frames / 2 && x->lent[token])
			end_loan(x, (u32)token);
	}
}

void xsk_recall(struct xsk *x)
{
	if (!x->lent_n || x->zerocopy)
		return;
	for (u32 i = __atomic_load_n(x->tx.consumer, __ATOMIC_ACQUIRE); i != x->tx.cached_producer; i++) {
		struct xdp_desc *d = xsk_desc_at(&x->tx, i);
		u64 token = (d->addr >> XSK_OFFSET_SHIFT) - 1;

		if (token >= x->arena->frames / 2 || !x->lent[token])
			continue;
		g_copy_from(x->arena->base + token_frame(x, token), x->arena->base + xsk_place(d->addr), d->len);
		__atomic_store_n(&d->addr, token_frame(x, token), __ATOMIC_RELAXED);
		end_loan(x, (u32)token);
	}
}

void xsk_close(struct xsk *x)
{
	if (!x)
		return;
	/* The kernel keeps the queue bound for as long as a ring is mapped. */
	ring_unmap(&x->fill);
	ring_unmap(&x->completion);
	ring_unmap(&x->rx);
	ring_unmap(&x->tx);
	if (x->fd >= 0)
		close(x->fd);
	if (x->set < x->arena->sets && x->arena->owner[x->set] == x)
		x->arena->owner[x->set] = NULL;
	for (u32 i = 0; x->lent_n; i++)
		if (x->lent[i])
			end_loan(x, i);
	free(x->lent);
	free(x->free);
	free(x);
}

int xsk_statistics(struct xsk *x, struct xn_xsk_stats *sum)
{
	struct xdp_statistics s = {0};
	socklen_t len = sizeof(s);

	if (getsockopt(x->fd, SOL_XDP, XDP_STATISTICS, &s, &len) < 0)
		return -errno;
	/*
	 * In copy mode a frame that finds the fill ring empty is in both (__xsk_rcv() and xp_alloc() of net/xdp); a driver
	 * that fills its own ring looks there without a frame. Read one after the other, the second may be ahead.
	 */
	u64 empty = x->zerocopy ? 0 : s.rx_fill_ring_empty_descs;
	u64 others = s.rx_dropped > empty ? s.rx_dropped - empty : 0;

	x->rx_dropped = others > x->rx_dropped ? others : x->rx_dropped;
	sum->rx_dropped += x->rx_dropped;
	sum->rx_invalid_descs += s.rx_invalid_descs;
	sum->tx_invalid_descs += s.tx_invalid_descs;
	sum->rx_ring_full += s.rx_ring_full;
	sum->rx_fill_ring_empty_descs += s.rx_fill_ring_empty_descs;
	sum->tx_ring_empty_descs += s.tx_ring_empty_descs;
	return 0;
}

/* What a kick finds. */
static enum xsk_state kick(struct xsk *x)
{
	if (x->state == XSK_GONE)
		return XSK_GONE;
	if (!(__atomic_load_n(x->tx.flags, __ATOMIC_RELAXED) & XDP_RING_NEED_WAKEUP))
		return XSK_IDLE;
	count(&x->sent->kicks, 1);
	int error = sendto(x->fd, NULL, 0, MSG_DONTWAIT, NULL, 0) < 0 ? errno : 0;

	if (error == ENXIO)
		return XSK_GONE;
	/* It comes back without telling: ask again until it does. */
	if (error == ENETDOWN)
		return XSK_DOWN;
	/* In copy mode the call itself sends; what is left was refused (a full queue below, a budget) and needs another. */
	return x->zerocopy || __atomic_load_n(x->tx.consumer, __ATOMIC_ACQUIRE) == x->tx.cached_producer ? XSK_IDLE
													 : XSK_OWING;
}

void xsk_kick(struct xsk *x)
{
	x->state = kick(x);
}

void xsk_send(struct xsk *x)
{
	const enum xsk_state was = x->state;

	xsk_lock(x);
	xsk_kick(x);
	/* What waits for an interface to come up again must not keep a guest's buffers. */
	if (unlikely(!xsk_carries(x)))
		xsk_recall(x);
	xsk_unlock(x);
	if (x->state != was && (x->state >= XSK_DOWN || was >= XSK_DOWN))
		events_tell(x->events, XN_EVENT_SOCKET);
}

void xsk_collect(struct xsk *x)
{
	xsk_lock(x);
	xsk_reap(x);
	xsk_unlock(x);
}

void xsk_is_overdue(struct xsk *x)
{
	xsk_lock(x);
	xsk_recall(x);
	bool keeps = x->lent_n;

	/* It may be stuck already, for what it has delivered. */
	x->stuck |= keeps;
	xsk_unlock(x);
	if (keeps)
		events_tell(x->events, XN_EVENT_UMEM);
}
