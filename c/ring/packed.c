/* The packed layout: chains of consecutive descriptors, virtio 1.3, 2.8. */
#define _GNU_SOURCE
#include <unistd.h>

#include "vring.h"

enum {
	/* How often, and after how long, a ring is looked at again that its driver was seen writing to. */
	FIND_TRIES = 10,
	FIND_PAUSE_US = 50
};

/* The chain in an indirect table: all of its entries; of their flags only WRITE means anything (2.8.7). */
static int walk_indirect(struct virtqueue *q, const struct vring_packed_desc *at, bool writable, struct piece *out,
			 u32 room, u64 *total, u32 *steps)
{
	struct indirect in;
	u32 n = 0;

	if (unlikely(vring_open_indirect(q, at->addr, at->len, &in)))
		return -EIO;
	for (u32 i = 0; i < in.entries; i++) {
		struct vring_packed_desc d;
		int r;

		if (unlikely(i >= VRING_MAX_DESCS))
			return -EMSGSIZE;
		r = vring_read_indirect(q, &in, i, &d, steps);
		if (unlikely(r))
			return r;
		if (unlikely(d.flags & VRING_DESC_F_INDIRECT))
			return vring_fail(q, XN_BROKEN_INDIRECT);
		/* Not asked of a table to transmit: DPDK's driver leaves WRITE in its entries (virtio_init_vring). */
		if (unlikely(writable && !(d.flags & VRING_DESC_F_WRITE)))
			return vring_fail(q, XN_BROKEN_DIRECTION);
		r = vring_add_pieces(q, d.addr, d.len, out + n, room - n, steps);
		if (unlikely(r < 0))
			return r;
		n += (u32)r;
		*total += d.len;
	}
	return (int)n;
}

int packed_walk(struct virtqueue *q, struct cursor at, bool writable, struct piece *out, u32 room, u64 *total,
		chain_t *chain, u32 *steps)
{
	int unfit = 0;
	u32 n = 0;

	*total = 0;
	for (u32 descs = 1;; descs++) {
		struct vring_packed_desc d;
		int r = 0;

		g_load_desc(&d, &q->packed.desc[at.pos]);
		*steps += 1;
		/* A list is made available as a whole: its first element's flags come last (2.8.21). */
		if (unlikely(!packed_is_available(d.flags, at.wrap)))
			return vring_fail(q, XN_BROKEN_CHAIN);
		if (unlikely(d.flags & VRING_DESC_F_INDIRECT)) {
			/* Unlike in the split layout, a chain holds direct descriptors or one indirect (2.8.8). */
			if (unlikely(!q->indirect || d.flags & VRING_DESC_F_NEXT || descs > 1))
				return vring_fail(q, XN_BROKEN_INDIRECT);
			r = walk_indirect(q, &d, writable, out, room, total, steps);
		} else {
			if (unlikely(!(d.flags & VRING_DESC_F_WRITE) == writable))
				return vring_fail(q, XN_BROKEN_DIRECTION);
			/* The way to the end of the chain is walked in any case: that is where the next one starts. */
			if (unlikely(descs > VRING_MAX_DESCS))
				unfit = -EMSGSIZE;
			if (likely(!unfit))
				r = vring_add_pieces(q, d.addr, d.len, out + n, room - n, steps);
			*total += d.len;
		}
		if (unlikely(r == -EIO))
			return r;
		if (unlikely(r < 0))
			unfit = r;
		else
			n += (u32)r;
		if (!(d.flags & VRING_DESC_F_NEXT)) {
			/* The id is in the last descriptor of the chain (2.8.6). */
			if (unlikely(d.id >= q->num))
				return vring_fail(q, XN_BROKEN_ID);
			*chain = chain_of(d.id, (u16)descs);
			return unfit ? unfit : (int)n;
		}
		if (unlikely(descs >= q->num))
			return vring_fail(q, XN_BROKEN_LOOP);
		cursor_advance(q, &at, 1, true);
	}
}

/* ---- where a device stands in a ring that it has left ---- */

/* A lap that ends where the driver stands; places in it count from its beginning, there is one more than descriptors. */
struct lap {
	const struct virtqueue *q;
	struct cursor end;
};

static struct cursor cursor_in(const struct lap *l, u32 place)
{
	struct cursor c = {l->end.pos, l->end.wrap ^ 1};

	cursor_advance(l->q, &c, (u16)place, true);
	return c;
}

/* Beyond the size of the ring: not in the lap. */
static u32 place_in(const struct lap *l, struct cursor c)
{
	return c.pos < l->q->num ? vring_distance(l->q, cursor_in(l, 0), c) : UINT32_MAX;
}

static u16 flags_in(const struct lap *l, u32 place)
{
	return g_load16(&l->q->packed.desc[cursor_in(l, place).pos].flags);
}

static u16 id_in(const struct lap *l, u32 place)
{
	return g_load16(&l->q->packed.desc[cursor_in(l, place).pos].id);
}

static bool is_used_in(const struct lap *l, u32 place)
{
	const u16 both = packed_used_flags(1);

	return (flags_in(l, place) & both) == packed_used_flags(cursor_in(l, place).wrap);
}

/* The driver's and the device's flags both have the lap in AVAIL: the driver stands where it changes. */
static struct cursor find_driver(const struct virtqueue *q)
{
	const u16 avail = 1u << VRING_PACKED_DESC_F_AVAIL;
	u16 first = g_load16(&q->packed.desc[0].flags) & avail, pos = 1;

	/* All of one lap; or at the first descriptor, which comes last, of a chain there. What is one is not read twice. */
	if (q->num == 1 || (g_load16(&q->packed.desc[q->num - 1].flags) & avail) == first)
		return (struct cursor){0, !first};
	while (pos < q->num - 1u && (g_load16(&q->packed.desc[pos].flags) & avail) == first)
		pos++;
	return (struct cursor){pos, !!first};
}

/*
 * Whether the chains that the element before `last` is about may end before `place`. It took the flags of the first
 * descriptor with it, so that a chain of one looks like one that goes on; but the last descriptor has the element's id. No
 * element (last is 0): the driver has come past it, and all that could be left is the rest of its chain.
 */
static bool may_end(const struct lap *l, u32 last, u32 place)
{
	if (flags_in(l, place - 1) & VRING_DESC_F_NEXT)
		return false;
	return last ? id_in(l, place - 1) == id_in(l, last - 1) : place < l->q->num;
}

/* The first such place, but for `last` itself; 0: there is none. */
static u32 find_other_end(const struct lap *l, u32 last)
{
	for (u32 place = last + 1; place <= l->q->num; place++) {
		if (may_end(l, last, place))
			return place;
		/* In order, an element may be about several chains (2.8.9). */
		if (!l->q->in_order && !(flags_in(l, place - 1) & VRING_DESC_F_NEXT))
			return 0;
	}
	return 0;
}

static bool is_end(const struct lap *l, u32 last, u32 other, u32 place)
{
	if (place == last || (other && place == other))
		return true;
	return l->q->in_order && place > last && place <= l->q->num && may_end(l, last, place);
}

/* The place behind the last element that shows; -EAGAIN: a descriptor is neither available nor used, it is being written. */
static int find_last_used(const struct lap *l)
{
	u32 last = 0;

	for (u32 place = 0; place < l->q->num; place++) {
		if (is_used_in(l, place))
			last = place + 1;
		else if (!packed_is_available(flags_in(l, place), cursor_in(l, place).wrap))
			return -EAGAIN;
	}
	return (int)last;
}

/* The element's length and id are there: the first of a batch is shown last. */
static void show_element(const struct lap *l, u32 place)
{
	struct cursor at = cursor_in(l, place);
	struct vring_packed_desc d;

	g_load_desc(&d, &l->q->packed.desc[at.pos]);
	g_store16_release(&l->q->packed.desc[at.pos].flags,
			  packed_used_flags(at.wrap) | (d.len ? VRING_DESC_F_WRITE : 0));
}

bool packed_find(const struct virtqueue *q, struct cursor base, struct cursor *found)
{
	struct lap l = {q, find_driver(q)};
	int r = find_last_used(&l);

	for (u32 i = 0; r < 0 && i < FIND_TRIES; i++) {
		usleep(FIND_PAUSE_US);
		l.end = find_driver(q);
		r = find_last_used(&l);
	}
	if (r < 0)
		return false;
	u32 last = (u32)r, other = find_other_end(&l, last), place = place_in(&l, base);
	u32 mark = place_in(&l, cursor_of(g_load16(&q->packed.device->off_wrap)));
	bool marked = mark <= q->num;

	/* From the mark on they are all of one descriptor. Where it is older than the lap, so are those before. */
	if (!marked)
		mark = 0;
	while (mark < q->num && is_used_in(&l, mark))
		mark++;
	if (mark < last) {
		/* Shown from its second element on: of chains that were all out at once, whose ids differ. */
		show_element(&l, mark);
		place = other ? other : last;
	} else if (is_end(&l, last, other, mark) && (marked || !last || !is_end(&l, last, other, place))) {
		place = mark;
	} else if (!is_end(&l, last, other, place)) {
		if (last && other)
			return false;
		place = last;
	}
	*found = cursor_in(&l, place);
	return true;
}
