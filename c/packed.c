/* The packed layout: chains of consecutive descriptors, virtio 1.3, 2.8. */
#include "vring.h"

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

		if (unlikely(i >= VRING_MAX_DESCS))
			return -EMSGSIZE;
		if (unlikely(vring_read_indirect(q, &in, i, &d, steps)))
			return -EIO;
		if (unlikely(d.flags & VRING_DESC_F_INDIRECT))
			return vring_fail(q, XN_BROKEN_INDIRECT);
		/* Not asked of a table to transmit: DPDK's driver leaves WRITE in its entries (virtio_init_vring). */
		if (unlikely(writable && !(d.flags & VRING_DESC_F_WRITE)))
			return vring_fail(q, XN_BROKEN_DIRECTION);
		int r = vring_add_pieces(q, d.addr, d.len, out + n, room - n, steps);

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
	bool too_many = false;
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
			too_many |= descs > VRING_MAX_DESCS;
			if (likely(!too_many))
				r = vring_add_pieces(q, d.addr, d.len, out + n, room - n, steps);
			*total += d.len;
		}
		if (unlikely(r == -EIO))
			return r;
		if (unlikely(r == -EMSGSIZE))
			too_many = true;
		else
			n += (u32)r;
		if (!(d.flags & VRING_DESC_F_NEXT)) {
			/* The id is in the last descriptor of the chain (2.8.6). */
			if (unlikely(d.id >= q->num))
				return vring_fail(q, XN_BROKEN_ID);
			*chain = chain_of(d.id, (u16)descs);
			return too_many ? -EMSGSIZE : (int)n;
		}
		if (unlikely(descs >= q->num))
			return vring_fail(q, XN_BROKEN_LOOP);
		cursor_advance(q, &at, 1, true);
	}
}
