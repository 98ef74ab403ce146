/*
 * Frames out of a guest: its transmit rings.
 *
 * A burst goes through stages, each of which prefetches for the next: heads, descriptors, headers; then the bridge takes
 * the views to where they go, and the chains are handed back in the order in which they came.
 */
#include "guest.h"

/* Frames that large ones may become in one turn: as many bytes as a burst of plain frames has, and a few. */
enum { CUT_FRAMES = 4 * XN_BURST };

/* Reads bytes off the front of the pieces, across as many as they are spread over; returns how many are left. */
static u32 gather(u8 *to, u32 bytes, struct piece **pieces, u32 n)
{
	struct piece *p = *pieces;

	for (u32 got = 0; got < bytes;) {
		u32 part = min_u32(p->len, bytes - got);

		g_copy_from(to + got, p->ptr, part);
		got += part;
		p->ptr += part;
		p->len -= part;
		if (!p->len) {
			p++;
			n--;
		}
	}
	*pieces = p;
	return n;
}

/* Whether more of a frame decides over it than the first bytes. */
static inline bool is_looked_into(const struct virtqueue *q, const u8 *hdr)
{
	return vnet_asks(hdr) || guest_of(q->port)->guard.n;
}

/*
 * A frame that something is asked for, or of a guest that may not say everything: all that rests on its headers rests on
 * a snapshot, which takes their place. There is room for one more piece in front.
 */
static void look_into(const struct virtqueue *q, struct view *v, const u8 *raw, u8 *headers)
{
	const struct virtio_net_hdr hdr = vnet_read(raw);
	struct piece *pieces = (struct piece *)v->pieces;
	u32 have = min_u32(v->len, PACKET_HEADERS), left = gather(headers, have, &pieces, v->n);

	*--pieces = (struct piece){headers, have};
	v->pieces = pieces;
	v->n = left + 1;
	view_snapshot(v);
	if (vnet_asks(raw))
		vnet_judge(v, &hdr, guest_of(q->port)->sends, headers, have);
	struct xn_ip claimed;

	if (guest_of(q->port)->guard.n && v->port != VIEW_DROPPED &&
	    unlikely(!guard_allows(&guest_of(q->port)->guard, v, headers, have, &claimed))) {
		offence_note(&q->port->policy, v, &claimed);
		view_drop(v, XN_DROP_POLICY);
	}
}

static __attribute__((noinline)) void open_any_chain(const struct virtqueue *q, struct view *v, u64 total, u8 *headers)
{
	struct piece *pieces = (struct piece *)v->pieces;
	u8 hdr[sizeof(struct virtio_net_hdr_mrg_rxbuf)];

	v->len = 0;
	if (total <= q->hdr_len) {
		view_drop(v, XN_DROP_SHORT);
		return;
	}
	v->n = gather(hdr, q->hdr_len, &pieces, v->n);
	v->pieces = pieces;
	if (total - q->hdr_len > XN_MAX_FRAME) {
		view_drop(v, XN_DROP_OVERSIZE);
		return;
	}
	v->len = (u32)(total - q->hdr_len);
	if (v->len < ETH_HLEN)
		view_drop(v, XN_DROP_RUNT);
	else if (is_looked_into(q, hdr))
		look_into(q, v, hdr, headers);
	else
		view_snapshot(v);
}

/* Makes a frame of a translated chain: takes the virtio_net_hdr off it, once, and judges it. */
static always_inline void open_chain(const struct virtqueue *q, struct view *v, u64 total, u8 *headers)
{
	struct piece *piece = (struct piece *)v->pieces;
	u8 hdr[sizeof(struct virtio_net_hdr)];

	v->needs = 0;
	v->vnet = (struct virtio_net_hdr){0};
	/* One piece, and room in it for header and snapshot: nearly all of them. */
	if (unlikely(v->n != 1 || piece->len < (u32)q->hdr_len + VIEW_HEAD || piece->len > XN_MAX_FRAME)) {
		open_any_chain(q, v, total, headers);
		return;
	}
	g_copy_from(hdr, piece->ptr, sizeof(hdr));
	piece->ptr += q->hdr_len;
	piece->len -= q->hdr_len;
	v->len = piece->len;
	if (unlikely(is_looked_into(q, hdr)))
		look_into(q, v, hdr, headers);
	else
		g_copy_from(v->head, piece->ptr, VIEW_HEAD);
}

/* What came with each view of a burst. */
struct taken {
	struct cursor after; /* where the ring stands when it is done with */
	chain_t chain;
	u64 total; /* bytes, header included */
};

/* Takes up to `most` chains apart into views; returns how many, up to the first that breaks the ring. */
static always_inline u32 fetch(struct worker *w, struct virtqueue *q, struct taken *taken, u32 most, bool packed)
{
	struct cursor at = q->next;
	u32 n = 0, used = 0, frames = 0, steps = 0;
	u64 bytes = 0;

	if (!vring_peek(q, at, packed))
		return 0;
	vring_prefetch(q, most, q->in_order ? 1 : most, packed);
	for (; n < most && vring_peek(q, at, packed); n++) {
		struct view *v = &w->views[n];
		int pieces;

		if (packed)
			packed_prefetch_ahead(q, at.pos);
		/* Every chain may have as many pieces as the core gathers: what does not fit now waits for the next turn. */
		if (unlikely(used + VRING_MAX_PIECES + 1 > WORKER_PIECES || steps >= POLL_STEPS || bytes >= POLL_BYTES))
			break;
		/* In front of them is room for the snapshot of a frame's headers. */
		struct piece *to = &w->pieces[used + 1];

		v->port = VIEW_FLOOD;
		v->pieces = to;
		pieces = vring_pop(q, &at, false, to, VRING_MAX_PIECES, &taken[n].total, &taken[n].chain, &steps,
				   packed);
		taken[n].after = at;
		if (unlikely(pieces == -EIO))
			break;
		if (unlikely(pieces < 0)) {
			v->len = 0;
			view_drop(v, pieces == -EFAULT ? XN_DROP_LEFT_OUT : XN_DROP_PIECES);
			continue;
		}
		v->n = (u32)pieces;
		used += (u32)pieces + 1;
		bytes += taken[n].total;
		if (likely(pieces)) {
			/* Drivers put the header right before the frame, often at the end of another line. */
			prefetch(v->pieces->ptr);
			prefetch(v->pieces->ptr + q->hdr_len);
		}
	}
	w->price += n * PRICE_FRAME + steps * PRICE_STEP + bytes / BYTES_PER_NS;
	for (u32 i = 0; i < n; i++) {
		struct view *v = &w->views[i];

		if (unlikely(v->port == VIEW_DROPPED))
			continue;
		open_chain(q, v, taken[i].total, w->headers[i]);
		/* What one turn can become has a limit; the rest is looked at anew in the next one. */
		if (unlikely(v->needs & NEED_CUT) && (frames += vnet_segments(v)) >= CUT_FRAMES)
			return i + 1;
	}
	return n;
}

/* Queues a burst of which something is lent, or that comes behind what is. */
static void wait_for_loans(struct worker *w, struct virtqueue *q, const struct taken *taken, u64 lent, u32 n)
{
	if (q->loans_head == q->loans_tail) {
		q->loans_since = cycles();
		worker_waits(w, q);
	}
	for (u32 i = 0; i < n; i++) {
		struct loan *loan = &q->loans[(q->loans_tail + i) & q->loans_mask];

		loan->chain = taken[i].chain;
		/* What is lent may be returned already, by another worker. */
		if (!(lent >> i & 1))
			loan->borrower = NULL;
	}
	q->loans_tail += n;
}

static always_inline u32 poll_ring(struct worker *w, struct source *s, bool packed, bool logged)
{
	struct virtqueue *q = container_of(s, struct virtqueue, source);
	struct taken taken[XN_BURST];
	struct burst burst = {.from = q->port, .queue = q->index / 2, .stats = &q->stats, .flood_next = &q->flood_next};
	/* A guest may make the same chain available again and again: no more than its ring has are out at once. */
	u32 most = min_u32(XN_BURST, q->num);

	if (unlikely(__atomic_load_n(&q->alarms->lost, __ATOMIC_RELAXED)))
		vring_break(q, XN_BROKEN_MEMORY);
	if (logged && unlikely(dirty_is_lost(q->log)))
		vring_break(q, XN_BROKEN_MEMORY);
	if (unlikely(__atomic_load_n(&q->alarms->moved, __ATOMIC_RELAXED) == MEM_MOVED)) {
		__atomic_store_n(&q->alarms->moved, MEM_MOVED_TOLD, __ATOMIC_RELAXED);
		events_tell(q->events, XN_EVENT_UMEM);
	}
	if (unlikely(q->loans))
		most = min_u32(most, q->loans_mask + 1 - (q->loans_tail - q->loans_head));
	u32 n = fetch(w, q, taken, most, packed);

	s->dead = q->broken;
	if (!n)
		return 0;
	/* Started but disabled: transmit is processed and thrown away (vhost-user, "Ring states"). */
	if (unlikely(!q->enabled))
		for (u32 i = 0; i < n; i++)
			view_drop(&w->views[i], XN_DROP_DISABLED);
	burst.lender = q->loans && q->lending->least != XN_ZEROCOPY_OFF ? q : NULL;
	n = bridge_forward(w, &burst, w->views, n);
	if (!n)
		return q->flood_next ? 1 : 0;
	if (!s->woken)
		count(&q->stats.kicks_saved, 1);
	s->woken = false;
	q->next = taken[n - 1].after;
	count(&q->stats.chains, n);
	if (unlikely(burst.lent || q->loans_head != q->loans_tail)) {
		wait_for_loans(w, q, taken, burst.lent, n);
		return n;
	}
	struct pushing push = vring_begin(q);

	if (q->in_order)
		vring_push_until(q, &push, taken[n - 1].after, taken[n - 1].chain, packed);
	else
		for (u32 i = 0; i < n; i++)
			vring_push(q, &push, taken[i].chain, 0, packed);
	(void)vring_publish(q, &push, packed, logged);
	worker_owes(w, q);
	return n;
}

static u32 poll_split(struct worker *w, struct source *s)
{
	return poll_ring(w, s, false, false);
}

static u32 poll_packed(struct worker *w, struct source *s)
{
	return poll_ring(w, s, true, false);
}

static u32 poll_split_logged(struct worker *w, struct source *s)
{
	return poll_ring(w, s, false, true);
}

static u32 poll_packed_logged(struct worker *w, struct source *s)
{
	return poll_ring(w, s, true, true);
}

static bool guest_arm(struct source *s)
{
	struct virtqueue *q = container_of(s, struct virtqueue, source);

	if (q->broken || !vring_arm(q, q->next))
		return false;
	vring_disarm(q);
	return true;
}

static void guest_disarm(struct source *s)
{
	struct virtqueue *q = container_of(s, struct virtqueue, source);

	if (!q->broken)
		vring_disarm(q);
}

const struct source_ops split_source = {poll_split, guest_arm, guest_disarm};
const struct source_ops packed_source = {poll_packed, guest_arm, guest_disarm};
const struct source_ops split_logged_source = {poll_split_logged, guest_arm, guest_disarm};
const struct source_ops packed_logged_source = {poll_packed_logged, guest_arm, guest_disarm};
