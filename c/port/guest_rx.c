/*
 * Frames into a guest: its receive rings.
 *
 * A burst is placed first (chains taken and translated, destinations prefetched), then copied, then published once. What
 * differs little from frame to frame is not written again.
 */
#include "frame/packet.h"
#include "guest.h"

enum {
	/* Steps that each frame may take beside one for so many bytes: drivers have chains of twenty, or a buffer a page. */
	FRAME_STEPS = 32,
	BYTES_A_STEP = 256
};

/* Where one frame will go: pieces and chains in the worker's scratch. */
struct place {
	const struct view *view;
	struct piece *pieces;
	u32 chain; /* first of chains_n */
	u32 chains_n;
};

/*
 * Whether a buffer starts with the header of a plain frame: all zero but for one buffer. Most do, from their last use, and
 * what is not written again stays shared with the guest, which has just read it.
 */
static always_inline bool has_plain_header(const u8 *to, u32 len)
{
	u64 first;
	u32 rest;

	memcpy(&first, to, sizeof(first));
	if (likely(len == sizeof(struct virtio_net_hdr_mrg_rxbuf))) {
		memcpy(&rest, to + sizeof(first), sizeof(rest));
		return !first && le32toh(rest) == 1u << 16;
	}
	return !first && !to[8] && !to[9];
}

/* The header of a frame in one buffer. */
static always_inline void put_header(u8 *to, u32 len, const struct view *v)
{
	if (likely(!(v->vnet.flags | v->vnet.gso_type)) && likely(has_plain_header(to, len)))
		return;
	const struct virtio_net_hdr_mrg_rxbuf header = vnet_header(v, 1);

	g_copy_to(to, &header, len);
}

/* Header and frame into any chains. */
static __attribute__((noinline)) void fill_any_place(const struct virtqueue *q, const struct place *p)
{
	const struct view *v = p->view;
	const struct virtio_net_hdr_mrg_rxbuf hdr = vnet_header(v, (u16)p->chains_n);
	struct piece *at = p->pieces;
	u32 offset = 0;

	scatter(&at, &offset, (const u8 *)&hdr, q->hdr_len);
	view_scatter(&at, &offset, v);
}

/* Marks header and frame, wherever they were put. */
static __attribute__((noinline)) void log_place(const struct virtqueue *q, const struct place *p)
{
	u32 left = q->hdr_len + p->view->len;

	for (const struct piece *at = p->pieces; q->logs_frames && left; at++) {
		u32 part = min_u32(at->len, left);

		dirty_mark_at(q->log, q->mem, at->ptr, part);
		left -= part;
	}
}

/* Copies what has been placed and pushes its chains. */
static always_inline void commit(struct worker *w, struct virtqueue *q, struct pushing *push,
				 const struct place *places, u32 n, bool packed, bool logged)
{
	const u32 hdr_len = q->hdr_len;
	u64 bytes = 0;
	u32 chains = 0;

	for (u32 i = 0; i < n; i++) {
		const struct place *p = &places[i];
		const struct view *v = p->view;
		u32 left = hdr_len + v->len;
		u8 *to = p->pieces->ptr;

		bytes += v->len;
		chains += p->chains_n;
		/* One piece to one piece: nearly all of them. */
		if (likely(p->pieces->len >= left && v->n == 1 && v->len >= VIEW_HEAD)) {
			put_header(to, hdr_len, v);
			g_copy_to(to + hdr_len, v->head, VIEW_HEAD);
			g_copy(to + hdr_len + VIEW_HEAD, v->pieces->ptr + VIEW_HEAD, v->len - VIEW_HEAD);
			if (logged)
				log_place(q, p);
			vring_push(q, push, w->chains[p->chain].chain, left, packed);
			continue;
		}
		fill_any_place(q, p);
		if (logged)
			log_place(q, p);
		for (u32 c = 0; c + 1 < p->chains_n; c++) {
			u32 written = w->chains[p->chain + c].capacity;

			vring_push(q, push, w->chains[p->chain + c].chain, written, packed);
			left -= written;
		}
		vring_push(q, push, w->chains[p->chain + p->chains_n - 1].chain, left, packed);
	}
	count(&q->stats.packets, n);
	count(&q->stats.bytes, bytes);
	count(&q->stats.chains, chains);
}

/* Scratch in use by the frames placed so far. */
struct scratch {
	u32 pieces;
	u32 chains;
};

/*
 * Whether the next chain, of whatever length, finds its place. Behind this limit there is room for a burst of chains of one
 * piece, which place() takes without asking: so what is used may be more than the limit.
 */
static bool has_room(const struct scratch *s)
{
	return s->pieces + VRING_MAX_PIECES <= WORKER_PIECES && s->chains < WORKER_CHAINS;
}

enum placing { PLACED, PLACE_LATER, PLACE_NEVER, PLACE_WAIT };

/* Chains that this frame was to have go back with nothing in them, in order; nothing is placed before it. */
static void hand_back(const struct worker *w, struct virtqueue *q, struct pushing *push, const struct place *p,
		      struct cursor after, bool packed)
{
	for (u32 i = 0; i < p->chains_n; i++)
		vring_push(q, push, w->chains[p->chain + i].chain, 0, packed);
	q->next = after;
	count(&q->stats.chains, p->chains_n);
}

/*
 * Takes chains for one frame. PLACE_LATER: commit what is placed and come again. PLACE_NEVER: the frame is dropped for
 * *why; its chains stay in the ring, unless one of them is unfit for any frame like it. PLACE_WAIT: there are too few of
 * them, until the guest puts more where q->wanted stands. Of chains in memory that is left out it hands back as many as it
 * takes to find others.
 */
static enum placing try_chains(struct worker *w, struct virtqueue *q, struct pushing *push, const struct view *v,
			       struct scratch *s, struct place *p, enum xn_drop *why, u32 *steps, bool packed)
{
	u64 need = (u64)q->hdr_len + v->len, have = 0;
	const struct scratch start = *s;
	struct cursor at = q->next;
	enum xn_drop unfit = XN_DROP_TOO_SMALL;

	*p = (struct place){.view = v, .pieces = &w->to_pieces[s->pieces], .chain = s->chains};
	do {
		chain_t chain;
		u64 capacity;

		if (unlikely(!has_room(s) || *steps > POLL_STEPS)) {
			*s = start;
			*why = unfit;
			return start.chains ? PLACE_LATER : PLACE_NEVER;
		}
		if (unlikely(!vring_peek(q, at, packed))) {
			*s = start;
			*why = q->broken ? XN_DROP_BROKEN : XN_DROP_NO_BUFFER;
			/* More than all of the ring's would not be enough, however long it waited. */
			if (unlikely(q->broken || vring_distance(q, q->next, at) >= q->num))
				return PLACE_NEVER;
			q->wanted = at;
			return PLACE_WAIT;
		}
		int n = vring_pop(q, &at, true, &w->to_pieces[s->pieces], VRING_MAX_PIECES, &capacity, &chain, steps,
				  packed);

		*steps += 1;
		if (unlikely(n == -EIO)) {
			*s = start;
			*why = XN_DROP_BROKEN;
			return PLACE_NEVER;
		}
		w->chains[s->chains].chain = chain;
		w->chains[s->chains].capacity = (u32)(capacity > UINT32_MAX ? UINT32_MAX : capacity);
		s->chains++;
		p->chains_n++;
		/* A chain of more pieces than we gather, or of no bytes, can never take a frame. */
		if (unlikely(n <= 0 || !capacity || (!q->mergeable && capacity < need))) {
			*s = start;
			*why = n == -EMSGSIZE ? XN_DROP_PIECES : XN_DROP_TOO_SMALL;
			if (start.chains)
				return PLACE_LATER;
			/* Or no frame would ever pass. */
			hand_back(w, q, push, p, at, packed);
			if (n != -EFAULT)
				return PLACE_NEVER;
			count(&q->stats.left_out, 1);
			unfit = XN_DROP_LEFT_OUT;
			p->chains_n = 0;
			have = 0;
			continue;
		}
		s->pieces += (u32)n;
		have += capacity;
	} while (unlikely(have < need));
	q->next = at;
	return PLACED;
}

/*
 * As try_chains, for as long as the ring's chains are worth their walk. A sender, who pays for his frame, must not pay for
 * what a guest has made of its buffers: beyond what a frame may take, as often as one comes, frames are dropped.
 */
static __attribute__((noinline)) enum placing place_any(struct worker *w, struct virtqueue *q, struct pushing *push,
							const struct view *v, struct scratch *s, struct place *p,
							enum xn_drop *why, bool packed)
{
	u32 steps = 0, free = v->len / BYTES_A_STEP;

	if (unlikely(q->steps_left <= 0)) {
		*why = XN_DROP_COSTLY;
		return PLACE_NEVER;
	}
	enum placing r = try_chains(w, q, push, v, s, p, why, &steps, packed);

	q->steps_left -= (s32)(steps > free ? steps - free : 0);
	return r;
}

/* A frame that fits into one chain of one piece, which nearly all do. */
static always_inline bool place(struct worker *w, struct virtqueue *q, struct cursor at, const struct view *v,
				const struct scratch *s, struct place *p, bool packed)
{
	struct piece *piece = &w->to_pieces[s->pieces];
	u64 capacity;

	if (unlikely(!vring_peek(q, at, packed) ||
		     !pop_single(q, at, true, piece, &capacity, &w->chains[s->chains].chain, packed) ||
		     capacity < q->hdr_len + v->len))
		return false;
	/* The header is only read, most of the time: that line is better not taken away from the guest. */
	prefetch(piece->ptr);
	prefetch_write(piece->ptr + q->hdr_len);
	*p = (struct place){v, piece, s->chains, 1};
	return true;
}

/* Puts frames into the ring, or drops them, up to the first that has to wait; returns how many. */
static always_inline u32 deliver_to_ring(struct worker *w, struct virtqueue *q, const struct view *views,
					 const u8 *which, u32 n, bool packed, bool logged)
{
	struct place places[XN_BURST];
	struct scratch scratch = {0};
	struct pushing push = vring_begin(q);
	struct cursor at = q->next;
	u32 placed = 0, i = 0;

	q->steps_left = q->steps_left + (s32)(n * FRAME_STEPS) < POLL_STEPS ? q->steps_left + (s32)(n * FRAME_STEPS)
									    : POLL_STEPS;
	while (i < n) {
		const struct view *v = &views[which[i]];

		if (likely(place(w, q, at, v, &scratch, &places[placed], packed))) {
			cursor_advance(q, &at, 1, packed);
			scratch.pieces++;
			scratch.chains++;
			placed++;
			i++;
			continue;
		}
		/* Copies, so that the loop has its own in registers. */
		struct scratch used = scratch;
		struct pushing back = push;
		enum xn_drop why;

		q->next = at;
		enum placing r = place_any(w, q, &back, v, &used, &places[placed], &why, packed);

		at = q->next;
		scratch = used;
		push = back;
		if (r == PLACE_LATER) {
			commit(w, q, &push, places, placed, packed, logged);
			placed = 0;
			scratch = (struct scratch){0};
			continue;
		}
		if (r == PLACE_WAIT)
			break;
		if (r == PLACED)
			placed++;
		else
			drop(&q->stats, why, 1);
		i++;
	}
	q->next = at;
	commit(w, q, &push, places, placed, packed, logged);
	count(&q->stats.bursts, 1);
	if (vring_publish(q, &push, packed, logged))
		worker_owes(w, q);
	/* For the next burst: buffers are posted long before they are used, and nobody touches these lines until then. */
	vring_prefetch(q, n, n, packed);
	return i;
}

static __attribute__((noinline)) u32 deliver_logged(struct worker *w, struct virtqueue *q, const struct view *views,
						    const u8 *which, u32 n)
{
	if (unlikely(dirty_is_lost(q->log)))
		vring_break(q, XN_BROKEN_MEMORY);
	return q->is_packed ? deliver_to_ring(w, q, views, which, n, true, true)
			    : deliver_to_ring(w, q, views, which, n, false, true);
}

static u32 deliver(struct worker *w, struct virtqueue *q, const struct view *views, const u8 *which, u32 n)
{
	if (unlikely(q->log))
		return deliver_logged(w, q, views, which, n);
	return q->is_packed ? deliver_to_ring(w, q, views, which, n, true, false)
			    : deliver_to_ring(w, q, views, which, n, false, false);
}

/* ---- frames that wait for buffers ---- */

/* Drops those that have waited for too long. */
static void drop_overdue(struct worker *w, struct virtqueue *q)
{
	u32 n = backlog_overdue(&q->backlog, w->turn, w->cycles_per_us * BACKLOG_US);

	if (!n)
		return;
	drop(&q->stats, XN_DROP_NO_BUFFER, n);
	backlog_drop(&q->backlog, n);
	/* The next one may do with what there is. */
	q->wanted = q->next;
}

/* Puts those that have waited longest, at most `most`, into the ring; returns how many it is done with. */
static u32 serve_waiting(struct worker *w, struct virtqueue *q, u32 most)
{
	struct view views[XN_BURST];
	struct piece pieces[2 * XN_BURST];
	u8 which[XN_BURST];

	drop_overdue(w, q);
	if (!q->backlog.n || (!vring_peek(q, q->wanted, q->is_packed) && !q->broken))
		return 0;
	u32 n = backlog_peek(&q->backlog, most, views, pieces);

	for (u32 i = 0; i < n; i++)
		which[i] = (u8)i;
	u32 done = deliver(w, q, views, which, n);

	if (done == n)
		q->wanted = q->next;
	backlog_drop(&q->backlog, done);
	return done;
}

/* Has frames wait behind those that do, and its worker look after them. */
static __attribute__((noinline)) void add_waiting(struct worker *w, struct virtqueue *q, const struct view *views,
						  const u8 *which, u32 n)
{
	const u32 before = q->backlog.n;
	u32 kept = 0;

	for (u32 i = 0; i < n; i++)
		kept += backlog_add(&q->backlog, &views[which[i]], w->turn);
	count(&q->stats.waited, kept);
	drop(&q->stats, XN_DROP_NO_BUFFER, n - kept);
	if (kept && !vring_starved(q)) {
		__atomic_store_n(&q->starved_after, q->stats.packets, __ATOMIC_RELAXED);
		__atomic_store_n(&q->starved, w->turn | 1, __ATOMIC_RELAXED);
	}
	if (kept && !before)
		worker_ask(w, &q->source);
}

/*
 * Behind frames that wait. For each that it brings, whoever sends puts one of those into the ring; what it costs to catch up
 * with a guest that has posted buffers is the guest's own (poll_waiting).
 */
static __attribute__((noinline)) u32 deliver_behind(struct worker *w, struct virtqueue *q, const struct view *views,
						    const u8 *which, u32 n)
{
	(void)serve_waiting(w, q, n);
	return q->backlog.n ? 0 : deliver(w, q, views, which, n);
}

static u32 poll_waiting(struct worker *w, struct source *s)
{
	struct virtqueue *q = container_of(s, struct virtqueue, source);
	struct backlog *b = &q->backlog;
	u32 n = 0;

	vring_lock(q);
	if (b->n) {
		if (unlikely(__atomic_load_n(&q->alarms->lost, __ATOMIC_RELAXED)))
			vring_break(q, XN_BROKEN_MEMORY);
		n = serve_waiting(w, q, XN_BURST);
	} else if (b->bytes && w->turn - b->last > w->cycles_per_us * BACKLOG_US) {
		backlog_release(b);
	}
	/* That nothing more comes for a guest that takes nothing makes it no better: only buffers do. */
	if (q->starved && !b->n && (!vring_starved(q) || q->broken || vring_peek(q, q->wanted, q->is_packed)))
		__atomic_store_n(&q->starved, 0, __ATOMIC_RELAXED);
	s->dead = !b->bytes && !q->starved;
	vring_unlock(q);
	return n;
}

static bool arm_waiting(struct source *s)
{
	struct virtqueue *q = container_of(s, struct virtqueue, source);

	vring_lock(q);
	/* Of a ring that broke meanwhile, they are to be dropped. */
	bool more = (q->backlog.n || q->starved) && (q->broken || vring_arm(q, q->wanted));

	if (more && !q->broken)
		vring_disarm(q);
	vring_unlock(q);
	return more;
}

static void disarm_waiting(struct source *s)
{
	struct virtqueue *q = container_of(s, struct virtqueue, source);

	if (!q->broken)
		vring_disarm(q);
}

const struct source_ops receive_source = {poll_waiting, arm_waiting, disarm_waiting};

void guest_drop_waiting(struct virtqueue *q)
{
	drop(&q->stats, XN_DROP_NOT_READY, q->backlog.n);
	backlog_release(&q->backlog);
	q->starved = 0;
}

/* ---- which ring ---- */

static u32 flow_of(const struct view *v)
{
	u8 head[PACKET_FLOW];
	u32 have = min_u32(v->len, PACKET_FLOW);

	for (u32 i = 0, at = 0; i < v->n && at < have; i++) {
		u32 part = min_u32(v->pieces[i].len, have - at);

		g_copy_from(head + at, v->pieces[i].ptr, part);
		at += part;
	}
	memcpy(head, v->head, min_u32(have, VIEW_HEAD));
	return packet_flow(head, have);
}

/* The i-th ring that this worker's frames are spread over. */
static struct virtqueue *choice(const struct worker *w, const struct guest *g, u32 i)
{
	return &g->rings[2 * g->ready[w->id % g->choice_step + i * g->choice_step]];
}

static void deliver_to(struct worker *w, struct virtqueue *q, const struct view *views, const u8 *which, u32 n)
{
	worker_delivers_to(w, q->source.place);
	vring_lock(q);
	if (unlikely(__atomic_load_n(&q->alarms->lost, __ATOMIC_RELAXED)))
		vring_break(q, XN_BROKEN_MEMORY);
	u32 done = likely(!q->backlog.n) ? deliver(w, q, views, which, n) : deliver_behind(w, q, views, which, n);

	if (unlikely(done < n))
		add_waiting(w, q, views, which + done, n - done);
	vring_unlock(q);
	worker_delivers_to(w, XN_AT_REST);
}

/* Each ring gets its part of the burst at once, in order. */
static __attribute__((noinline)) void deliver_by_flow(struct worker *w, const struct guest *g, const struct view *views,
						      const u8 *which, u32 n)
{
	u8 chosen[XN_BURST], part[XN_BURST];
	u32 left = 0;

	for (u32 i = 0; i < n; i++) {
		chosen[i] = (u8)((u64)flow_of(&views[which[i]]) * g->choices >> 32);
		left |= 1u << chosen[i];
	}
	for (; left; left &= left - 1) {
		u32 c = (u32)__builtin_ctz(left), m = 0;

		for (u32 i = 0; i < n; i++)
			if (chosen[i] == c)
				part[m++] = which[i];
		deliver_to(w, choice(w, g, c), views, part, m);
	}
}

void guest_deliver(struct worker *w, struct port *p, struct burst *burst, const struct view *views, const u8 *which,
		   u32 n)
{
	const struct guest *g = guest_of(p);

	(void)burst;
	if (likely(g->choices == 1))
		deliver_to(w, choice(w, g, 0), views, which, n);
	else if (g->choices)
		deliver_by_flow(w, g, views, which, n);
	else
		drop_ownerless(&g->rings[0].stats, XN_DROP_NOT_READY, n);
}
