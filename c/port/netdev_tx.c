/*
 * Frames to the wire: the transmit rings of AF_XDP sockets. A frame is copied into one of ours, or lent where it lies.
 */
#include "frame/csum.h"
#include "netdev.h"

enum { PAGE = 4096 };

static struct netdev_queue *tx_queue(struct netdev *d, u32 queue)
{
	return &d->queue[d->ready[queue % d->ready_n]];
}

u32 netdev_room(struct worker *w, struct port *p, u32 queue, u32 wanted)
{
	struct netdev *d = netdev_of(p);

	if (!d->ready_n)
		return UINT32_MAX;
	struct xsk *x = tx_queue(d, queue)->xsk;

	/* Where another worker may take the room meanwhile, or nothing moves at all, frames are dropped instead. */
	if (x->users == XSK_OF_SEVERAL || !xsk_carries(x))
		return UINT32_MAX;
	xsk_lock(x);
	xsk_reap(x);
	u32 room = min_u32(x->free_n, xsk_tx_room(x));

	if (unlikely((room < XN_BURST || room < wanted) && x->state == XSK_OWING)) {
		xsk_kick(x);
		xsk_reap(x);
		room = min_u32(x->free_n, xsk_tx_room(x));
	}
	xsk_unlock(x);
	if (room >= wanted) {
		x->blocked_since = 0;
		return room;
	}
	if (!x->blocked_since)
		x->blocked_since = cycles();
	/* A driver that has taken nothing for a second is stuck: a guest must not be stuck with it. */
	else if (cycles() - x->blocked_since > w->cycles_per_us * 1000000)
		return UINT32_MAX;
	return 0;
}

/* The sum of a shorter frame, made as it is copied, costs no more than leaving it to the interface. */
enum { LEAVE_CSUM_FROM = 512 };

static bool leaves_csum(const struct xsk *x, const struct view *v)
{
	return x->leaves_csum && v->len >= LEAVE_CSUM_FROM;
}

/*
 * Leaves the checksum of the frame at `to` to the interface; the option of the descriptor that says so. The field is in the
 * snapshot of the headers (vnet_judge), so in the first descriptor.
 */
static u32 leave_csum(u8 *to, const struct view *v, struct xn_queue_stats *stats)
{
	const struct tx_metadata metadata = {
		.flags = XDP_TXMD_FLAGS_CHECKSUM, .csum_start = v->vnet.csum_start, .csum_offset = v->vnet.csum_offset};

	memcpy(to - TX_METADATA, &metadata, sizeof(metadata));
	count(&stats->csum_partial, 1);
	return XDP_TX_METADATA;
}

/* Shorter frames are padded with zeroes: the frame in the arena held somebody else's bytes before. */
static struct xdp_desc write_frame(const struct xsk *x, u64 addr, const struct view *v, struct xn_queue_stats *stats)
{
	struct xdp_desc desc = {.addr = addr, .len = v->len};
	u8 *to = x->arena->base + addr;

	if (likely(!v->needs)) {
		view_copy(to, v);
	} else if (leaves_csum(x, v)) {
		view_copy(to, v);
		desc.options = leave_csum(to, v, stats);
	} else {
		csum_copy_view(to, v);
		count(&stats->csum_computed, 1);
	}
	if (unlikely(v->len < ETH_ZLEN)) {
		memset(to + v->len, 0, ETH_ZLEN - v->len);
		desc.len = ETH_ZLEN;
	}
	return desc;
}

/* A frame that takes several descriptors: all of them, or none. */
static __attribute__((noinline)) bool write_large(struct xsk *x, const struct view *v, struct xn_queue_stats *stats)
{
	u32 n = (v->len + TX_PIECE - 1) / TX_PIECE, left = v->len;
	struct xdp_desc *first = xsk_desc_at(&x->tx, x->tx.cached_producer);
	u8 *frames[WIRE_PIECES];

	if (unlikely(min_u32(x->free_n, xsk_tx_room(x)) < n)) {
		xsk_reap(x);
		if (min_u32(x->free_n, xsk_tx_room(x)) < n)
			return false;
	}
	for (u32 i = 0; i < n; i++) {
		u64 addr = x->free[--x->free_n];
		u32 len = min_u32(left, TX_PIECE);

		left -= len;
		frames[i] = x->arena->base + addr;
		*xsk_desc_at(&x->tx, x->tx.cached_producer++) =
			(struct xdp_desc){.addr = addr, .len = len, .options = left ? XDP_PKT_CONTD : 0};
	}
	if (!v->needs) {
		view_copy_large(frames, v);
	} else if (leaves_csum(x, v)) {
		view_copy_large(frames, v);
		first->options |= leave_csum(*frames, v, stats);
	} else {
		csum_copy_large(frames, v);
		count(&stats->csum_computed, 1);
	}
	return true;
}

_Static_assert((XN_MAX_FRAME + TX_PIECE - 1) / TX_PIECE <= WIRE_PIECES, "any frame is one chain");

/*
 * Whether a frame can be sent from where it lies: in one piece, in no need of padding, and not so short that the copy
 * costs less than the loan. A driver that maps pages one by one takes no frame across the border of two, nor the place of
 * its metadata, which a lent frame has none of.
 */
static bool can_lend(const struct worker *w, const struct xsk *x, const struct view *v, u32 copybreak)
{
	if (v->n != 1 || v->needs || v->len < copybreak || v->len < ETH_ZLEN)
		return false;
	/* A snapshot, whose checksum was made for another port. */
	if (v->pieces->ptr >= w->headers[0] && v->pieces->ptr < (const u8 *)(w->headers + XN_BURST))
		return false;
	const u32 front = x->metadata ? TX_METADATA : 0;

	return !x->zerocopy || ((uintptr_t)v->pieces->ptr - front) % PAGE + front + v->len <= PAGE;
}

/*
 * Whether the frame, which can be lent, is still where it was pinned: pages that moved raise an alarm when they are read.
 * The first one was read for the snapshot; there is one more at most.
 */
static bool is_in_place(const struct mem_alarms *alarms, const struct view *v)
{
	const u8 *first = v->pieces->ptr, *last = first + v->len - 1;

	if ((uintptr_t)first / PAGE != (uintptr_t)last / PAGE)
		(void)g_load8(last);
	/* Acquire: by whomever the page was touched first, his alarm came before it. */
	return __atomic_load_n(&alarms->moved, __ATOMIC_ACQUIRE) == MEM_IN_PLACE;
}

void netdev_deliver(struct worker *w, struct port *p, struct burst *burst, const struct view *views, const u8 *which,
		    u32 n)
{
	struct netdev *d = netdev_of(p);

	if (unlikely(!d->ready_n)) {
		drop_ownerless(&d->queue[0].tx, XN_DROP_NOT_READY, n);
		return;
	}
	struct netdev_queue *nq = tx_queue(d, burst->queue);
	struct xsk *x = nq->xsk;
	struct virtqueue *lender = burst->lender;
	const u32 copybreak = p->bridge->config.copybreak;
	u64 sent = 0, bytes = 0, in_place = 0;

	/* The bytes must be in the socket's UMEM, all of the guest's. */
	if (lender && (x->umem < lender->lending->umem || x->policy < lender->lending->least))
		lender = NULL;
	xsk_lock(x);
	if (unlikely(!xsk_carries(x))) {
		drop(&nq->tx, XN_DROP_NOT_READY, n);
		goto out;
	}
	if (x->free_n < n || x->copies)
		xsk_reap(x);
	for (u32 i = 0; i < n; i++) {
		const struct view *v = &views[which[i]];

		if (unlikely(v->len > x->max_plain)) {
			if (v->len > x->max_frame) {
				drop(&nq->tx, XN_DROP_OVERSIZE, 1);
			} else if (write_large(x, v, &nq->tx)) {
				bytes += v->len;
				sent++;
			} else {
				drop(&nq->tx, XN_DROP_NO_FRAME, 1);
			}
			continue;
		}
		if (unlikely(!x->free_n || !xsk_tx_room(x))) {
			drop(&nq->tx, XN_DROP_NO_FRAME, 1);
			continue;
		}
		struct xdp_desc *desc = xsk_desc_at(&x->tx, x->tx.cached_producer++);

		bytes += v->len;
		sent++;
		/* Flooded to several interfaces, it is lent to the first: a loan has one end. */
		if (lender && !(burst->lent >> which[i] & 1) && can_lend(w, x, v, copybreak) &&
		    likely(is_in_place(lender->alarms, v))) {
			*desc = xsk_lend(x, &lender->loans[(lender->loans_tail + which[i]) & lender->loans_mask],
					 v->pieces->ptr, v->len);
			burst->lent |= 1ull << which[i];
			in_place++;
			continue;
		}
		u64 addr = x->free[--x->free_n];

		*desc = write_frame(x, addr, v, &nq->tx);
	}
	if (!sent)
		goto out;
	xsk_submit(&x->tx);
	count(&nq->tx.packets, sent);
	count(&nq->tx.bytes, bytes);
	count(&nq->tx.in_place, in_place);
	count(&nq->tx.bursts, 1);
	worker_owes_kick(w, x, (u32)sent);
out:
	xsk_unlock(x);
}
