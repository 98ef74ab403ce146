/* The split layout: chains through a descriptor table, virtio 1.3, 2.7. */
#include "vring.h"

/* The chain in an indirect table. The WRITE flag of the descriptor that refers to it is ignored (2.7.5.3.2). */
static int walk_indirect(struct virtqueue *q, const struct vring_desc *at, bool writable, struct piece *out, u32 room,
			 u64 *total, u32 *descs, u32 *steps)
{
	struct indirect in;
	u32 n = 0, i = 0;

	if (unlikely(vring_open_indirect(q, at->addr, at->len, &in)))
		return -EIO;
	for (u32 taken = 0;; taken++) {
		struct vring_desc d;
		int r;

		if (unlikely(taken >= in.entries))
			return vring_fail(q, XN_BROKEN_LOOP);
		if (unlikely(++*descs > VRING_MAX_DESCS))
			return -EMSGSIZE;
		r = vring_read_indirect(q, &in, i, &d, steps);
		if (unlikely(r))
			return r;
		if (unlikely(d.flags & VRING_DESC_F_INDIRECT))
			return vring_fail(q, XN_BROKEN_INDIRECT);
		if (unlikely(!(d.flags & VRING_DESC_F_WRITE) == writable))
			return vring_fail(q, XN_BROKEN_DIRECTION);
		r = vring_add_pieces(q, d.addr, d.len, out + n, room - n, steps);
		if (unlikely(r < 0))
			return r;
		n += (u32)r;
		*total += d.len;
		if (!(d.flags & VRING_DESC_F_NEXT))
			return (int)n;
		i = d.next;
		if (unlikely(i >= in.entries))
			return vring_fail(q, XN_BROKEN_NEXT);
	}
}

int split_walk(struct virtqueue *q, struct cursor at, bool writable, struct piece *out, u32 room, u64 *total,
	       chain_t *chain, u32 *steps)
{
	u16 i = split_head(q, at.pos);
	u32 n = 0, descs = 0;

	*total = 0;
	*chain = chain_of(i, 1);
	if (unlikely(i >= q->num))
		return vring_fail(q, XN_BROKEN_HEAD);
	for (u32 taken = 0;; taken++) {
		if (unlikely(taken >= q->num))
			return vring_fail(q, XN_BROKEN_LOOP);
		if (unlikely(++descs > VRING_MAX_DESCS))
			return -EMSGSIZE;
		struct vring_desc d;
		int r;

		g_load_desc(&d, &q->split.desc[i]);
		*steps += 1;
		if (d.flags & VRING_DESC_F_INDIRECT) {
			if (unlikely(!q->indirect || d.flags & VRING_DESC_F_NEXT))
				return vring_fail(q, XN_BROKEN_INDIRECT);
			r = walk_indirect(q, &d, writable, out + n, room - n, total, &descs, steps);
		} else {
			if (unlikely(!(d.flags & VRING_DESC_F_WRITE) == writable))
				return vring_fail(q, XN_BROKEN_DIRECTION);
			r = vring_add_pieces(q, d.addr, d.len, out + n, room - n, steps);
			*total += d.len;
		}
		if (unlikely(r < 0))
			return r;
		n += (u32)r;
		if (!(d.flags & VRING_DESC_F_NEXT))
			return (int)n;
		i = d.next;
		if (unlikely(i >= q->num))
			return vring_fail(q, XN_BROKEN_NEXT);
	}
}
