#include "gro.h"

#include <netinet/in.h>

#include "csum.h"
#include "packet.h"
#include "vnet.h"

#ifndef VIRTIO_NET_HDR_GSO_UDP_L4 /* Linux 6.2 */
#define VIRTIO_NET_HDR_GSO_UDP_L4 5
#endif

enum {
	TCP_SEQ = 4,
	TCP_ACK = 8,
	TCP_WINDOW = 14,
	TCP_URGENT = 18,
	FLAG_PSH = 0x08,
	FLAG_ACK = 0x10,
	FLAG_ECE = 0x40,
	IP_DF = 0x40, /* in the upper byte */
	MOST = 65535  /* bytes of an IP packet */
};

/* Frames of one flow that are joined, as far as the burst was looked at. */
struct flow {
	struct packet at;
	const u8 *header; /* of the first frame */
	u8 first;	  /* indices into `which` */
	u8 last;
	u8 frames;
	bool open;	 /* more may follow */
	bool checked;	 /* the first frame's checksum is right, or partial */
	bool same_ident; /* IPv4: of all frames, else they count up; known from the second on */
	u16 ident;	 /* of the last */
	u32 size;	 /* bytes of payload, of each frame but the last */
	u32 payload;
	u32 seq; /* of the next byte */
};

/* Between the same two addresses, by the same protocol. */
static bool is_same_way(const struct flow *f, const u8 *p, const struct packet *at)
{
	u32 addresses = at->version == 4 ? 12 : 8, size = at->version == 4 ? 8 : 32;

	return f->at.l3 == at->l3 && f->at.version == at->version && f->at.protocol == at->protocol &&
	       !memcmp(f->header + at->l3 + addresses, p + at->l3 + addresses, size) && !memcmp(f->header, p, at->l3);
}

/* Behind whatever options or extension headers: what may not be joined still keeps its place among the others. */
static bool is_same_flow(const struct flow *f, const u8 *p, const struct packet *at)
{
	return is_same_way(f, p, at) && !memcmp(f->header + f->at.l4, p + at->l4, 4);
}

/* Whether the fields of IP that a cut gives to every segment are the same, and its identification is the next. */
static bool ip_follows(const struct flow *f, const u8 *p)
{
	const u8 *a = f->header + f->at.l3, *b = p + f->at.l3;

	if (f->at.version == 6)
		return !memcmp(a, b, 4) && a[7] == b[7];
	if (a[0] != b[0] || a[1] != b[1] || a[8] != b[8] || a[6] != b[6] || a[7] != b[7])
		return false;
	u16 step = (u16)(load_be16(b + 4) - f->ident);

	/* All the same is for those that may not be fragmented only (RFC 6864). */
	if (f->frames > 1)
		return step == !f->same_ident;
	return step == 1 || (!step && a[6] & IP_DF);
}

static bool tcp_follows(const struct flow *f, const u8 *p, const struct packet *at)
{
	const u8 *a = f->header + at->l4, *b = p + at->l4;
	u32 header = at->payload - at->l4;

	return f->at.payload == at->payload && load_be32(b + TCP_SEQ) == f->seq &&
	       !memcmp(a + TCP_ACK, b + TCP_ACK, 4) && a[12] == b[12] && !((a[TCP_FLAGS] ^ b[TCP_FLAGS]) & ~FLAG_PSH) &&
	       !memcmp(a + TCP_WINDOW, b + TCP_WINDOW, 2) &&
	       !memcmp(a + TCP_URGENT, b + TCP_URGENT, header - TCP_URGENT);
}

/* Right, or partial: then whoever gets it has to complete it. */
static bool checksum_is_good(struct view *v, const struct packet *at, struct gro_done *done)
{
	const u8 *p = v->pieces->ptr;

	if (v->needs)
		return v->needs == NEED_CSUM && v->vnet.csum_start == at->l4;
	if (v->vnet.flags & VIRTIO_NET_HDR_F_DATA_VALID)
		return true;
	/* Zero in UDP: there is none. */
	if (at->protocol == IPPROTO_UDP && !load_be16(p + at->l4 + UDP_CSUM))
		return false;
	if (!csum_is_right(v, at->l4, at->end, csum_pseudo(p + at->l3, at->version, at->protocol, at->end - at->l4)))
		return false;
	v->vnet.flags = VIRTIO_NET_HDR_F_DATA_VALID;
	done->verified++;
	return true;
}

static u8 kind_of(const struct packet *at)
{
	if (at->protocol == IPPROTO_TCP)
		return at->version == 4 ? NEED_TSO4 : NEED_TSO6;
	return at->version == 4 ? NEED_USO4 : NEED_USO6;
}

/* Data of TCP with no flag that means something once, or UDP; whole, unpadded, and of a kind that the receiver takes. */
static bool can_join(const struct view *v, const u8 *p, const struct packet *at, u8 takes)
{
	if (at->extended || v->n > WIRE_PIECES || at->end != v->len || at->payload == at->end || !(takes & kind_of(at)))
		return false;
	/* A wrong sum would be made a right one. */
	if (at->version == 4 && csum_fold(csum_bytes(p + at->l3, IPV4_HDR)) != 0xffff)
		return false;
	if (at->protocol == IPPROTO_UDP)
		return load_be16(p + at->l4 + 4) == at->end - at->l4;
	return (p[at->l4 + TCP_FLAGS] & ~(FLAG_PSH | FLAG_ECE)) == FLAG_ACK && !(p[at->l4 + 12] & 0xf);
}

/* Makes the first frame's headers those of all. */
static void write_header(const struct flow *f, struct view *v)
{
	const struct packet *at = &f->at;
	u8 *p = v->pieces->ptr, *ip = p + at->l3, *l4 = p + at->l4;
	u32 l4_len = at->payload - at->l4 + f->payload;
	bool tcp = at->protocol == IPPROTO_TCP;
	u16 sum;

	if (at->version == 4) {
		store_be16(ip + 2, at->l4 - at->l3 + l4_len);
		memset(ip + 10, 0, 2);
		sum = (u16)~csum_fold(csum_bytes(ip, at->l4 - at->l3));
		memcpy(ip + 10, &sum, sizeof(sum));
	} else {
		store_be16(ip + 4, l4_len);
	}
	if (!tcp)
		store_be16(l4 + 4, l4_len);
	sum = csum_fold(csum_pseudo(ip, at->version, at->protocol, l4_len));
	memcpy(l4 + (tcp ? TCP_CSUM : UDP_CSUM), &sum, sizeof(sum));
	v->len = at->payload + f->payload;
	v->needs = NEED_CSUM | kind_of(at);
	v->vnet = (struct virtio_net_hdr){.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM,
					  .gso_type = !tcp		 ? VIRTIO_NET_HDR_GSO_UDP_L4
						      : at->version == 4 ? VIRTIO_NET_HDR_GSO_TCPV4
									 : VIRTIO_NET_HDR_GSO_TCPV6,
					  .hdr_len = at->payload,
					  .gso_size = (u16)f->size,
					  .csum_start = at->l4,
					  .csum_offset = tcp ? TCP_CSUM : UDP_CSUM};
	view_snapshot(v);
}

/* The payload of a frame, as pieces. */
static u32 add_payload(struct piece *out, const struct view *v, u32 header)
{
	u32 n = 0;

	for (u32 i = 0; i < v->n; i++) {
		struct piece piece = v->pieces[i];
		u32 skip = min_u32(header, piece.len);

		header -= skip;
		if (piece.len > skip)
			out[n++] = (struct piece){piece.ptr + skip, piece.len - skip};
	}
	return n;
}

/* Tries to make a frame the next of a flow; closes the flow if it cannot be. */
static bool join(struct flow *f, struct view *views, const u8 *which, u32 i, const struct packet *at,
		 struct gro_done *done)
{
	struct view *v = &views[which[i]];
	const u8 *p = v->pieces->ptr;
	u32 n = at->end - at->payload;
	bool tcp = at->protocol == IPPROTO_TCP;

	f->open = f->open && n <= f->size && at->payload - at->l3 + f->payload + n <= MOST && ip_follows(f, p) &&
		  (!tcp || tcp_follows(f, p, at));
	if (f->open && !f->checked)
		f->open = f->checked = checksum_is_good(&views[which[f->first]], &f->at, done);
	f->open = f->open && checksum_is_good(v, at, done);
	if (!f->open)
		return false;
	if (at->version == 4) {
		u16 ident = load_be16(p + at->l3 + 4);

		f->same_ident = ident == f->ident;
		f->ident = ident;
	}
	f->frames++;
	f->payload += n;
	f->seq += n;
	f->last = (u8)i;
	/* A shorter one can only be the last of a cut, and so can one that is pushed. */
	if (n < f->size)
		f->open = false;
	if (tcp && p[at->l4 + TCP_FLAGS] & FLAG_PSH) {
		views[which[f->first]].pieces->ptr[at->l4 + TCP_FLAGS] |= FLAG_PSH;
		f->open = false;
	}
	return true;
}

/* Ends a flow: what was joined becomes one frame. */
static void finish(const struct flow *f, struct view *views, const u8 *which, const u8 *next, struct piece *pieces,
		   u32 *used)
{
	struct view *first = &views[which[f->first]];
	struct piece *start = pieces + *used;
	u32 n = first->n;

	if (f->frames < 2)
		return;
	memcpy(start, first->pieces, n * sizeof(*start));
	for (u32 i = next[f->first], left = f->frames - 1u; left; left--, i = next[i])
		n += add_payload(start + n, &views[which[i]], f->at.payload);
	first->pieces = start;
	first->n = n;
	*used += n;
	write_header(f, first);
}

static struct flow start(const u8 *p, const struct packet *at, u32 i, bool fit)
{
	bool tcp = at->protocol == IPPROTO_TCP;
	u32 n = at->end - at->payload;

	return (struct flow){.at = *at,
			     .header = p,
			     .first = (u8)i,
			     .last = (u8)i,
			     .frames = 1,
			     /* Nobody would cut it again into segments that small (vnet_judge). */
			     .open = fit && n >= GSO_MIN_SIZE && !(tcp && p[at->l4 + TCP_FLAGS] & FLAG_PSH),
			     .ident = at->version == 4 ? load_be16(p + at->l3 + 4) : 0,
			     .size = n,
			     .payload = n,
			     .seq = tcp ? load_be32(p + at->l4 + TCP_SEQ) + n : 0};
}

u32 gro_join(struct gro_room *room, struct view *views, u8 *which, u32 n, u8 takes, struct gro_done *done)
{
	struct flow flows[GRO_FLOWS];
	u8 next[XN_BURST];
	u64 gone = 0;
	u32 flows_n = 0, used = 0, left = 0;

	if (n < 2 || !(takes & NEED_CUT))
		return n;
	for (u32 i = 0; i < n; i++) {
		const struct view *v = &views[which[i]];
		const u8 *p = v->pieces->ptr;
		struct flow *f = flows;
		struct packet at;

		if (!packet_parse(p, v->pieces->len, v->len, &at) ||
		    (at.protocol != IPPROTO_TCP && at.protocol != IPPROTO_UDP))
			continue;
		/* Nothing says to which of them it belongs. */
		if (at.fragment) {
			for (; f < flows + flows_n; f++)
				f->open = f->open && !is_same_way(f, p, &at);
			continue;
		}
		while (f < flows + flows_n && !is_same_flow(f, p, &at))
			f++;
		bool fit = can_join(v, p, &at, takes);

		if (f < flows + flows_n) {
			u8 last = f->last;

			if (fit && join(f, views, which, i, &at, done)) {
				next[last] = (u8)i;
				gone |= 1ull << i;
				continue;
			}
			/* It may not be overtaken by what comes later. */
			finish(f, views, which, next, room->pieces, &used);
		} else if (flows_n < GRO_FLOWS) {
			flows_n++;
		} else {
			continue;
		}
		*f = start(p, &at, i, fit);
	}
	for (u32 i = 0; i < flows_n; i++)
		finish(&flows[i], views, which, next, room->pieces, &used);
	for (u32 i = 0; i < n; i++)
		if (!(gone >> i & 1))
			which[left++] = which[i];
	done->joined += n - left;
	return left;
}
