#include "partial.h"

#include <netinet/in.h>

#include "csum.h"
#include "packet.h"
#include "tunnel.h"

/* Where the checksum of a packet's transport is; 0: it has none that is of this kind. */
static u32 field_of(const u8 *frame, u32 have, const struct packet *at)
{
	if (at->fragment)
		return 0;
	switch (at->protocol) {
	case IPPROTO_TCP:
		return at->l4 + TCP_CSUM;
	case IPPROTO_UDP:
		return at->l4 + UDP_CSUM;
	case IPPROTO_GRE:
		return at->l4 + GRE_CSUM + 2u <= min_u32(have, at->end) && frame[at->l4] & GRE_HAS_CSUM
			       ? at->l4 + GRE_CSUM
			       : 0;
	default:
		return 0;
	}
}

/* What that sum begins with; GRE's is of the packet alone. */
static u64 pseudo_of(const u8 *frame, const struct packet *at)
{
	if (at->protocol == IPPROTO_GRE)
		return 0;
	return csum_pseudo(frame + at->l3, at->version, at->protocol, at->end - at->l4);
}

static u16 load_sum(const u8 *p)
{
	u16 sum;

	memcpy(&sum, p, sizeof(sum));
	return sum;
}

/* The offset of the field, if it holds no more than the pseudo header's sum; 0: it does not. */
static u32 partial_field(const u8 *frame, u32 have, const struct packet *at)
{
	u32 field = field_of(frame, have, at);

	if (!field)
		return 0;
	u16 found = load_sum(frame + field);

	if (!found && at->protocol == IPPROTO_UDP)
		return 0;
	return found == csum_fold(pseudo_of(frame, at)) ? field : 0;
}

/*
 * Whether the sum of a packet around a partial one goes with that being completed yet (the kernel's lco_csum: what the
 * inner sum is over, completed, sums up to what its field holds now, inverted). Then to complete it is right, even if it
 * only looks partial. A sum that is partial itself is that of a frame to be cut, or of a program's data: it goes by the port.
 */
static bool goes_with(const u8 *frame, u32 have, const struct packet *outer, const struct packet *inner, u32 field)
{
	u32 around = field_of(frame, have, outer), length = inner->l4 - outer->l4;

	if (!around || (outer->protocol == IPPROTO_UDP && !load_sum(frame + around)))
		return true;
	if (partial_field(frame, have, outer))
		return tunnel_has_port(frame, outer);
	u64 sum = pseudo_of(frame, outer) + csum_bytes(frame + outer->l4, length);

	return csum_fold(csum_add(sum, (u16)~load_sum(frame + field), length)) == 0xffff;
}

/*
 * Of a packet in tunnels: the offset of the field of the one sum that is still partial when those that are in it were
 * completed; *outer is its packet then. 0: there is none.
 */
static __attribute__((noinline)) u32 find_within(const struct view *v, u32 have, struct packet *outer)
{
	const u8 *frame = v->pieces->ptr;
	struct packet layers[TUNNEL_DEPTH];
	u32 n = 0, field = 0;
	bool fits = false;

	layers[0] = *outer;
	while (n + 1 < TUNNEL_DEPTH && tunnel_within(frame, have, &layers[n], &layers[n + 1]))
		n++;
	for (; n && !fits; n -= !fits) {
		field = partial_field(frame, have, &layers[n]);
		fits = field;
		for (u32 i = 0; i < n && fits; i++)
			fits = goes_with(frame, have, &layers[i], &layers[n], field);
	}
	if (!n)
		return partial_field(frame, have, outer);
	/* A frame can ask for one sum only, and an outer one is over the inner. */
	for (u32 i = n; i--;) {
		u32 around = partial_field(frame, have, &layers[i]);

		if (!around)
			continue;
		csum_complete_part(v, layers[n].l4, field, layers[n].end);
		field = around;
		n = i;
	}
	/* What pads a packet in the one around it is in no sum. */
	if (layers[n].end != outer->end) {
		csum_complete_part(v, layers[n].l4, field, layers[n].end);
		return 0;
	}
	*outer = layers[n];
	return field;
}

/* Castagnoli's polynomial, reflected. */
static u32 crc_table[256];

static __attribute__((constructor)) void make_crc_table(void)
{
	for (u32 i = 0; i < ARRAY_LEN(crc_table); i++) {
		u32 crc = i;

		for (u32 bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78 : 0);
		crc_table[i] = crc;
	}
}

static u32 crc32c(u32 crc, const u8 *p, u32 n)
{
	for (u32 i = 0; i < n; i++)
		crc = crc >> 8 ^ crc_table[(u8)crc ^ p[i]];
	return crc;
}

/* SCTP's is a CRC-32C, and the kernel leaves all of it out: RFC 9260, appendix A. A right one may be zero, too. */
static __attribute__((noinline)) void complete_crc(const struct view *v, u32 have, const struct packet *sctp)
{
	const u32 start = sctp->l4, field = start + SCTP_CSUM;
	u32 crc = UINT32_MAX, at = 0;

	if (field + 4 > min_u32(have, sctp->end) || load_be32(v->pieces->ptr + field))
		return;
	for (u32 i = 0; i < v->n && at < sctp->end; i++) {
		u32 n = min_u32(v->pieces[i].len, sctp->end - at), before = at < start ? min_u32(start - at, n) : 0;

		crc = crc32c(crc, v->pieces[i].ptr + before, n - before);
		at += n;
	}
	crc = htole32(~crc);
	memcpy(v->pieces->ptr + field, &crc, sizeof(crc));
}

void partial_find(struct view *v)
{
	const u8 *frame = v->pieces->ptr;
	const u32 have = min_u32(v->pieces->len, v->len);
	struct packet at;

	if (!packet_parse(frame, have, v->len, &at) && !tunnel_enter(frame, have, v->len, &at))
		return;
	/* What is behind the IP packet is padding. */
	const u32 end = at.end;
	u32 field = partial_field(frame, have, &at);

	if (tunnel_may_be(&at) && (!field || tunnel_has_port(frame, &at)))
		field = find_within(v, have, &at);
	else if (at.protocol == IPPROTO_SCTP && !at.fragment)
		complete_crc(v, have, &at);
	if (!field)
		return;
	view_trim(v, end);
	v->vnet.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
	v->vnet.csum_start = at.l4;
	v->vnet.csum_offset = (u16)(field - at.l4);
	v->needs |= NEED_CSUM;
}
