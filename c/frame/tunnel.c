#include "tunnel.h"

#include <linux/if_ether.h>
#include <netinet/in.h>

#include "csum.h"

#ifndef ETH_P_NSH
#define ETH_P_NSH 0x894f
#endif

enum {
	/* Tags, labels and the like before one IP packet, those together of what it could also be: what may be either doubles
	 * at each turn. */
	LABELS = 12,
	/* Whatever a header of up to so many bytes carries: an IP packet, so that these are there. */
	LEAST = IPV4_HDR,
	VXLAN_HDR = 8,
	GENEVE_HDR = 8,
	GTP_HDR = 8,
	GUE_HDR = 4,
	L2TP_UDP_HDR = 4,
	L2TP_SESSION = 4,
	L2TP_MOST = 12, /* a cookie of none, 4 or 8 bytes, and none or 4 of a sublayer: the session knows */
	PPPOE_HDR = 6,
	SHORT_FRAME = ETH_ZLEN + VLAN_HDR,
	MPLS_PORT = 6635,
	PROTO_L2TP = 115,
	PROTO_ETHERNET = 143
};

enum vxlan { VXLAN_VNI = 0x08, VXLAN_GPE = 0x04, VXLAN_REMOTE_CSUM = 0x20 /* in the second byte */ };
/* Flags of the first byte; the rest of it, and the second, are of older and other versions. */
enum gre { GRE_KEY = 0x20, GRE_SEQUENCE = 0x10, GRE_OTHERS = 0x4f };

/* Of the next protocol in VXLAN-GPE and NSH, which have the same numbers. */
static u16 type_of_next(u8 next)
{
	static const u16 types[] = {0, ETH_P_IP, ETH_P_IPV6, ETH_P_TEB, ETH_P_NSH, ETH_P_MPLS_UC};

	return next < ARRAY_LEN(types) ? types[next] : 0;
}

static u16 type_of_version(u8 first)
{
	return first >> 4 == 4 ? ETH_P_IP : first >> 4 == 6 ? ETH_P_IPV6 : 0;
}

static u16 type_of_ppp(u16 protocol)
{
	return protocol == 0x21 ? ETH_P_IP : protocol == 0x57 ? ETH_P_IPV6 : protocol == 0x281 ? ETH_P_MPLS_UC : 0;
}

static bool walk(const u8 *p, u32 have, u32 end, u16 type, u32 at, u32 *labels, struct packet *out)
{
	while ((*labels)++ < LABELS) {
		u32 rest = end - at;

		if (at > end || at + LEAST > min_u32(have, end))
			return false;
		switch (type) {
		case ETH_P_IP:
		case ETH_P_IPV6:
			return packet_parse_at(p, have, end, type, at, out);
		case ETH_P_TEB:
			type = load_be16(p + at + 12);
			at += ETH_HLEN;
			break;
		case ETH_P_8021Q:
		case ETH_P_8021AD:
		case ETH_P_QINQ1:
		case ETH_P_QINQ2:
		case ETH_P_QINQ3:
			type = load_be16(p + at + 2);
			at += VLAN_HDR;
			break;
		case ETH_P_MPLS_UC:
		case ETH_P_MPLS_MC:
			at += 4;
			/* The last of the stack: by the first bits of what follows, for nothing says it. */
			if (!(p[at - 2] & 1))
				break;
			type = type_of_version(p[at]);
			/* A pseudowire, with or without its control word. */
			if (!type && !(p[at] >> 4) && walk(p, have, end, ETH_P_TEB, at + 4, labels, out))
				return true;
			if (!type)
				type = ETH_P_TEB;
			break;
		case ETH_P_PPP_SES:
			if (load_be16(p + at) != 0x1100 || load_be16(p + at + 4) > rest - PPPOE_HDR)
				return false;
			end = at + PPPOE_HDR + load_be16(p + at + 4);
			type = type_of_ppp(load_be16(p + at + PPPOE_HDR));
			at += PPPOE_HDR + 2;
			break;
		case ETH_P_HSR:
			type = load_be16(p + at + 4);
			at += 6;
			break;
		case ETH_P_NSH:
			type = type_of_next(p[at + 3]);
			at += (p[at + 1] & 0x3f) * 4u;
			break;
		default:
			return false;
		}
	}
	return false;
}

/* The IP packet behind an Ethernet header (ETH_P_TEB), tags, labels and the like; `at` is where the first of them is. */
static bool find_packet(const u8 *p, u32 have, u32 end, u16 type, u32 at, struct packet *out)
{
	u32 labels = 0;

	return walk(p, have, end, type, at, &labels, out);
}

bool tunnel_enter(const u8 *p, u32 have, u32 len, struct packet *out)
{
	return find_packet(p, min_u32(min_u32(have, len), TUNNEL_HEADERS), len, ETH_P_TEB, 0, out);
}

/* Whether there is a packet that fits into the outer one; a short Ethernet frame may have been padded. */
static bool carries(const u8 *p, u32 have, const struct packet *outer, u16 type, u32 at, struct packet *inner)
{
	if (!find_packet(p, have, outer->end, type, at, inner))
		return false;
	if (inner->version == 4 && csum_fold(csum_bytes(p + inner->l3, inner->l4 - inner->l3)) != 0xffff)
		return false;
	return inner->end == outer->end || (type == ETH_P_TEB && outer->end - at <= SHORT_FRAME);
}

/* RFC 2784 and 2890, and with ERSPAN's headers. */
static bool in_gre(const u8 *p, u32 have, const struct packet *outer, u32 at, struct packet *inner)
{
	if (at + LEAST > have || p[at] & GRE_OTHERS || p[at + 1])
		return false;
	u8 flags = p[at];
	u16 type = load_be16(p + at + 2);

	at += 4 + !!(flags & GRE_HAS_CSUM) * 4 + !!(flags & GRE_KEY) * 4 + !!(flags & GRE_SEQUENCE) * 4;
	if (type == ETH_P_ERSPAN) {
		type = ETH_P_TEB;
		at += flags & GRE_SEQUENCE ? 8 : 0;
	} else if (type == ETH_P_ERSPAN2) {
		if (at + LEAST > have)
			return false;
		type = ETH_P_TEB;
		at += p[at + 11] & 1 ? 20 : 12;
	}
	return carries(p, have, outer, type, at, inner);
}

static bool in_l2tp(const u8 *p, u32 have, const struct packet *outer, u32 at, struct packet *inner)
{
	for (u32 n = 0; n <= L2TP_MOST; n += 4)
		if (carries(p, have, outer, ETH_P_TEB, at + L2TP_SESSION + n, inner))
			return true;
	return false;
}

static bool in_gtp(const u8 *p, u32 have, const struct packet *outer, u32 at, struct packet *inner)
{
	const u8 *h = p + at;
	u32 next;

	/* Version 1 of GTP, a user's packet. */
	if (h[0] >> 3 != 6 || h[1] != 255 || load_be16(h + 2) != outer->end - at - GTP_HDR)
		return false;
	at += GTP_HDR;
	if (h[0] & 7)
		at += 4;
	if (h[0] & 4)
		/* Each extension header ends with the kind of the next. */
		while (at < have && p[at - 1]) {
			next = at + p[at] * 4u;
			if (next == at || next > have)
				return false;
			at = next;
		}
	return at < have && carries(p, have, outer, type_of_version(p[at]), at, inner);
}

static bool in_protocol(const u8 *p, u32 have, const struct packet *outer, u8 protocol, u32 at, struct packet *inner)
{
	switch (protocol) {
	case IPPROTO_IPIP:
		return carries(p, have, outer, ETH_P_IP, at, inner);
	case IPPROTO_IPV6:
		return carries(p, have, outer, ETH_P_IPV6, at, inner);
	case PROTO_ETHERNET:
		return carries(p, have, outer, ETH_P_TEB, at, inner);
	case IPPROTO_MPLS:
		return carries(p, have, outer, ETH_P_MPLS_UC, at, inner);
	case IPPROTO_GRE:
		return in_gre(p, have, outer, at, inner);
	case PROTO_L2TP:
		return in_l2tp(p, have, outer, at, inner);
	default:
		return false;
	}
}

/* Each that it can be, by its first bytes. */
static bool in_udp(const u8 *p, u32 have, const struct packet *outer, struct packet *inner)
{
	const u32 at = outer->payload;
	const u8 *h = p + at;

	if (at + LEAST > min_u32(have, outer->end))
		return false;
	/* With a remote checksum, what is in it is not complete on purpose. */
	if (h[0] & VXLAN_VNI && !(h[1] & VXLAN_REMOTE_CSUM) && !h[7] &&
	    carries(p, have, outer, h[0] & VXLAN_GPE ? type_of_next(h[3]) : ETH_P_TEB, at + VXLAN_HDR, inner))
		return true;
	if (!(h[0] >> 6) && !h[7] &&
	    carries(p, have, outer, load_be16(h + 2), at + GENEVE_HDR + (h[0] & 0x3f) * 4u, inner))
		return true;
	if (in_gtp(p, have, outer, at, inner))
		return true;
	/* GUE of version 0, without flags, which may stand for a remote checksum. */
	if (!(h[0] >> 5) && !load_be16(h + 2) &&
	    in_protocol(p, have, outer, h[1], at + GUE_HDR + (h[0] & 0x1f) * 4u, inner))
		return true;
	if (load_be16(h) == 3 && in_l2tp(p, have, outer, at + L2TP_UDP_HDR, inner))
		return true;
	/* Labels could be anything. */
	if (load_be16(p + outer->l4 + 2) == MPLS_PORT)
		return carries(p, have, outer, ETH_P_MPLS_UC, at, inner);
	return carries(p, have, outer, type_of_version(h[0]), at, inner) || in_gre(p, have, outer, at, inner);
}

bool tunnel_within(const u8 *p, u32 have, const struct packet *outer, struct packet *inner)
{
	have = min_u32(min_u32(have, outer->end), TUNNEL_HEADERS);
	/* Linux completes a checksum before it makes fragments. */
	if (outer->fragment)
		return false;
	return outer->protocol == IPPROTO_UDP ? in_udp(p, have, outer, inner)
					      : in_protocol(p, have, outer, outer->protocol, outer->l4, inner);
}

bool tunnel_may_be(const struct packet *at)
{
	switch (at->protocol) {
	case IPPROTO_UDP:
	case IPPROTO_IPIP:
	case IPPROTO_IPV6:
	case IPPROTO_MPLS:
	case IPPROTO_GRE:
	case PROTO_ETHERNET:
	case PROTO_L2TP:
		return !at->fragment;
	default:
		return false;
	}
}

bool tunnel_has_port(const u8 *p, const struct packet *at)
{
	if (at->protocol != IPPROTO_UDP)
		return true;
	switch (load_be16(p + at->l4 + 2)) {
	case 4789: /* VXLAN, and as Linux has it, and GPE */
	case 8472:
	case 4790:
	case 6081: /* GENEVE */
	case 2152: /* GTP-U */
	case 1701: /* L2TP */
	case 4754: /* GRE */
	case 6080: /* GUE */
	case MPLS_PORT:
		return true;
	default:
		return false;
	}
}
