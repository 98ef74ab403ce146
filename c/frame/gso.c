#include "gso.h"

#include <netinet/in.h>

#include "csum.h"

enum {
	TCP_SEQ = 4,
	TCP_FIN = 0x01,
	TCP_PSH = 0x08,
	IP_MF = 0x2000,
	/* Pieces that one segment may take: those of a chain, cut at both ends, and its header. */
	SEGMENT_PIECES = 1024 + 2
};

static u32 new_ident(void)
{
	static u32 last;

	/* Only different from those shortly before, of whatever worker. */
	return __atomic_add_fetch(&last, 0x9e3779b1, __ATOMIC_RELAXED);
}

static u8 *field_of(const struct view *v, const struct virtio_net_hdr *hdr)
{
	return v->pieces->ptr + hdr->csum_start + hdr->csum_offset;
}

void gso_start(struct gso *g, struct view *whole)
{
	*g = (struct gso){.whole = whole};
	(void)packet_parse(whole->pieces->ptr, whole->pieces->len, whole->len, &g->at);
	if (whole->needs & NEED_UFO) {
		g->ident = new_ident();
		/* The checksum of a datagram is of the whole of it. */
		g->vnet = whole->vnet;
		memcpy(&g->partial, field_of(whole, &g->vnet), sizeof(g->partial));
		csum_complete(whole);
	}
	/* Where the payload begins. */
	for (u32 left = vnet_headers(whole); left;) {
		u32 part = min_u32(left, whole->pieces[g->piece].len);

		left -= part;
		g->offset = part;
		if (part == whole->pieces[g->piece].len) {
			g->piece++;
			g->offset = 0;
		}
	}
}

/* The next n bytes of payload, as pieces; how many pieces. */
static u32 take_payload(struct gso *g, struct piece *out, u32 n)
{
	u32 pieces = 0;

	while (n) {
		const struct piece *from = &g->whole->pieces[g->piece];
		u32 part = min_u32(from->len - g->offset, n);

		if (part)
			out[pieces++] = (struct piece){from->ptr + g->offset, part};
		n -= part;
		g->offset += part;
		if (g->offset == from->len) {
			g->piece++;
			g->offset = 0;
		}
	}
	return pieces;
}

static void set_ipv4(u8 *ip, u32 header, u32 total, u16 ident, u16 fragment)
{
	u16 sum;

	store_be16(ip + 2, total);
	store_be16(ip + 4, ident);
	store_be16(ip + 6, fragment);
	memset(ip + 10, 0, 2);
	sum = (u16)~csum_fold(csum_bytes(ip, header));
	memcpy(ip + 10, &sum, sizeof(sum));
}

/* IP and TCP or UDP of segment `number`, `n` bytes of payload from `done` on; `last`: there are no more. */
static void set_segment(const struct gso *g, u8 *header, u32 n, bool last)
{
	const struct packet *at = &g->at;
	u8 *ip = header + at->l3, *l4 = header + at->l4;
	u32 l4_len = at->payload - at->l4 + n, was = at->end - at->l4;
	u16 field;

	if (at->version == 4)
		/* Each its own identification, as the kernel has it (inet_gso_segment). */
		set_ipv4(ip, at->l4 - at->l3, at->l4 - at->l3 + l4_len, (u16)(load_be16(ip + 4) + g->number),
			 load_be16(ip + 6));
	else
		store_be16(ip + 4, at->l4 - at->l3 - IPV6_HDR + l4_len);
	if (at->protocol == IPPROTO_TCP) {
		store_be32(l4 + TCP_SEQ, load_be32(l4 + TCP_SEQ) + g->done);
		if (!last)
			l4[TCP_FLAGS] &= (u8) ~(TCP_FIN | TCP_PSH);
		if (g->number)
			l4[TCP_FLAGS] &= (u8)~TCP_CWR;
	} else {
		store_be16(l4 + 4, l4_len);
	}
	/* The pseudo header's sum, with this length in place of the whole one's (tcp_gso_segment). */
	u8 *sum = l4 + (at->protocol == IPPROTO_TCP ? TCP_CSUM : UDP_CSUM);

	memcpy(&field, sum, sizeof(field));
	field = csum_fold((u64)field + (u16)~htons((u16)was) + htons((u16)l4_len));
	memcpy(sum, &field, sizeof(field));
}

/* IP of a fragment; returns the length of its headers. */
static u32 set_fragment(const struct gso *g, u8 *header, u32 n, bool last)
{
	const struct packet *at = &g->at;
	u8 *ip = header + at->l3;
	u32 offset = g->done / 8;

	if (at->version == 4) {
		set_ipv4(ip, at->l4 - at->l3, at->l4 - at->l3 + n, load_be16(ip + 4),
			 (u16)(offset | (last ? 0 : IP_MF)));
		return at->l4;
	}
	/* A header of its own, before the UDP header: there are no extension headers that must stay behind it. */
	u8 *fragment = header + at->l4;

	store_be16(ip + 4, at->l4 - at->l3 - IPV6_HDR + IPV6_FRAGMENT_HDR + n);
	ip[6] = IPPROTO_FRAGMENT;
	fragment[0] = IPPROTO_UDP;
	fragment[1] = 0;
	store_be16(fragment + 2, offset << 3 | (last ? 0 : 1));
	store_be32(fragment + 4, g->ident);
	return at->l4 + IPV6_FRAGMENT_HDR;
}

u32 gso_next(struct gso *g, struct gso_room *room)
{
	struct view *whole = g->whole;
	const u32 headers = vnet_headers(whole), payload = whole->len - headers, size = whole->vnet.gso_size;
	u32 made = 0, used = 0;

	for (; made < XN_BURST && used + SEGMENT_PIECES <= ARRAY_LEN(room->pieces); made++) {
		struct view *v = &room->views[made];
		u8 *header = room->headers[made];
		u32 n = min_u32(size, payload - g->done), length = headers;
		bool last = g->done + n == payload;

		if (!n)
			break;
		memcpy(header, whole->pieces->ptr, headers);
		*v = (struct view){.pieces = &room->pieces[used], .port = whole->port};
		if (whole->needs & NEED_UFO) {
			length = set_fragment(g, header, n, last);
		} else {
			set_segment(g, header, n, last);
			v->needs = NEED_CSUM;
			v->vnet = (struct virtio_net_hdr){.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM,
							  .csum_start = whole->vnet.csum_start,
							  .csum_offset = whole->vnet.csum_offset};
		}
		room->pieces[used] = (struct piece){header, length};
		v->n = 1 + take_payload(g, &room->pieces[used + 1], n);
		v->len = length + n;
		used += v->n;
		view_snapshot(v);
		g->done += n;
		g->number++;
	}
	/* Another port may take the datagram as it came. */
	if (!made && whole->needs & NEED_UFO) {
		memcpy(field_of(whole, &g->vnet), &g->partial, sizeof(g->partial));
		whole->vnet = g->vnet;
		whole->needs |= NEED_CSUM;
	}
	return made;
}
