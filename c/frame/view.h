/*
 * A view: one frame as the bridge sees it. The bytes lie in memory that its source owns until the burst is delivered.
 *
 * The first bytes are a snapshot. Decisions (addresses, VLAN) rest on it, and it is what is delivered in their place: a
 * guest that rewrites its buffer meanwhile changes nothing that was checked.
 */
#ifndef XN_VIEW_H
#define XN_VIEW_H

#include <endian.h>
#include <linux/if_ether.h>
#include <linux/virtio_net.h>

#include "memory/mem.h"

/* Ethernet header, one VLAN tag and a start of what follows; a multiple of the vector registers' 16 bytes. */
enum { VIEW_HEAD = 32 };

/* A frame of 64 KiB with its Ethernet header and two tags. */
enum { XN_MAX_FRAME = 65535 + 14 + 8 };
/* A frame of the wire has at most so many pieces: those of an skb, MAX_SKB_FRAGS and its head. */
enum { WIRE_PIECES = 18 };
/* In front of a frame to the wire its buffer has room for metadata: what a piece of a frame has is the rest. */
enum { TX_METADATA = 32, TX_PIECE = XN_FRAME_SIZE - TX_METADATA };

/*
 * What a frame needs done before it is one of the wire: a receiver that takes it as it is does that itself. Several frames
 * in one, by what they are cut into, need their checksums too.
 */
enum view_need {
	NEED_CSUM = 1 << 0,
	NEED_TSO4 = 1 << 1,
	NEED_TSO6 = 1 << 2,
	NEED_ECN = 1 << 3, /* the first frame alone has CWR */
	NEED_UFO = 1 << 4, /* IP fragments */
	NEED_USO4 = 1 << 5,
	NEED_USO6 = 1 << 6,
	NEED_CUT = NEED_TSO4 | NEED_TSO6 | NEED_ECN | NEED_UFO | NEED_USO4 | NEED_USO6
};

struct view {
	u8 head[VIEW_HEAD];
	const struct piece *pieces; /* of the whole frame, from its first byte */
	u32 n;
	u32 len;  /* bytes of the frame */
	u16 port; /* where it goes: a port, VIEW_FLOOD or VIEW_DROPPED */
	u8 drop;  /* enum xn_drop, with VIEW_DROPPED */
	u8 needs; /* enum view_need; with any, the first piece is memory of ours and holds all headers */
	struct virtio_net_hdr vnet; /* of the frame, checked, in host order; num_buffers is the receiver's */
};

enum { VIEW_FLOOD = XN_MAX_PORTS, VIEW_DROPPED };

static inline void view_drop(struct view *v, enum xn_drop why)
{
	v->port = VIEW_DROPPED;
	v->drop = (u8)why;
}

/* Six bytes of the snapshot as a number, the first on the wire lowest; one load, as there are more bytes behind. */
static inline u64 mac_at(const u8 *p)
{
	u64 v;

	memcpy(&v, p, sizeof(v));
	return le64toh(v) & 0xffffffffffffull;
}

static inline u64 view_dst(const struct view *v)
{
	return mac_at(v->head);
}

static inline u64 view_src(const struct view *v)
{
	return mac_at(v->head + ETH_ALEN);
}

/* The group bit of an address as view_dst and view_src give it. */
static inline bool mac_is_group(u64 mac)
{
	return mac & 1;
}

/* The VLAN of a tagged frame, 0 if it has no tag. */
static inline u16 view_vlan(const struct view *v)
{
	u16 type = (u16)(v->head[12] << 8 | v->head[13]);

	if (likely(type != ETH_P_8021Q && type != ETH_P_8021AD))
		return 0;
	return (u16)(v->head[14] << 8 | v->head[15]) & 0xfff;
}

/* Takes the snapshot; needs pieces, n and len, with len at least ETH_HLEN. */
static inline void view_snapshot(struct view *v)
{
	if (likely(v->pieces->len >= VIEW_HEAD)) {
		g_copy_from(v->head, v->pieces->ptr, VIEW_HEAD);
		return;
	}
	memset(v->head, 0, sizeof(v->head));
	for (u32 i = 0, done = 0; i < v->n && done < VIEW_HEAD; i++) {
		u32 part = min_u32(v->pieces[i].len, VIEW_HEAD - done);

		g_copy_from(v->head + done, v->pieces[i].ptr, part);
		done += part;
	}
}

/* Cuts off what is behind the first `len` bytes. */
static inline void view_trim(struct view *v, u32 len)
{
	struct piece *pieces = (struct piece *)v->pieces;

	if (likely(len >= v->len))
		return;
	v->len = len;
	for (u32 i = 0; i < v->n; i++) {
		if (len <= pieces[i].len) {
			pieces[i].len = len;
			v->n = i + 1;
			return;
		}
		len -= pieces[i].len;
	}
}

/* Copies the frame into `to`, which has room for v->len bytes. */
static inline void view_copy(u8 *to, const struct view *v)
{
	if (likely(v->len >= VIEW_HEAD)) {
		memcpy(to, v->head, VIEW_HEAD);
		if (likely(v->n == 1)) {
			g_copy(to + VIEW_HEAD, v->pieces->ptr + VIEW_HEAD, v->len - VIEW_HEAD);
			return;
		}
	} else {
		memcpy(to, v->head, v->len);
	}
	u32 skip = min_u32(v->len, VIEW_HEAD), done = skip;

	for (u32 i = 0; i < v->n; i++) {
		u32 part = v->pieces[i].len;

		if (skip >= part) {
			skip -= part;
			continue;
		}
		g_copy_from(to + done, v->pieces[i].ptr + skip, part - skip);
		done += part - skip;
		skip = 0;
	}
}

/* Copies n bytes to where the cursor (piece, offset) stands, and moves it on. */
static inline void scatter(struct piece **at, u32 *offset, const u8 *from, u32 n)
{
	while (n) {
		u32 part = min_u32((*at)->len - *offset, n);

		g_copy_to((*at)->ptr + *offset, from, part);
		from += part;
		n -= part;
		*offset += part;
		if (*offset == (*at)->len) {
			(*at)++;
			*offset = 0;
		}
	}
}

/* The frame, likewise. */
static inline void view_scatter(struct piece **at, u32 *offset, const struct view *v)
{
	u32 skip = min_u32(v->len, VIEW_HEAD);

	scatter(at, offset, v->head, skip);
	for (u32 i = 0; i < v->n; i++) {
		u32 len = v->pieces[i].len;

		if (skip >= len) {
			skip -= len;
			continue;
		}
		scatter(at, offset, v->pieces[i].ptr + skip, len - skip);
		skip = 0;
	}
}

/* Copies it into several of TX_PIECE bytes; it is longer than VIEW_HEAD. */
static inline void view_copy_large(u8 *const *to, const struct view *v)
{
	u32 skip = VIEW_HEAD, done = VIEW_HEAD;

	memcpy(*to, v->head, VIEW_HEAD);
	for (u32 i = 0; i < v->n; i++) {
		const u8 *from = v->pieces[i].ptr;
		u32 left = v->pieces[i].len, n = min_u32(skip, left);

		skip -= n;
		for (from += n, left -= n; left; from += n, left -= n, done += n) {
			n = min_u32(left, TX_PIECE - done % TX_PIECE);
			g_copy_from(to[done / TX_PIECE] + done % TX_PIECE, from, n);
		}
	}
}

#endif
