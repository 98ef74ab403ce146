#include "packet.h"

#include <linux/if_ether.h>
#include <netinet/in.h>

enum { EXTENSIONS = 8 };

static bool fault(struct packet *out, enum xn_drop why)
{
	out->fault = (u8)why;
	return false;
}

static bool parse_ipv4(const u8 *p, u32 have, u32 len, struct packet *out)
{
	const u8 *ip = p + out->l3;

	if (out->l3 + (u32)IPV4_HDR > have)
		return fault(out, XN_DROP_L3);
	u32 header = (ip[0] & 0xf) * 4u, total = load_be16(ip + 2);

	if (ip[0] >> 4 != 4 || header < IPV4_HDR || out->l3 + header > have || total < header || total > len - out->l3)
		return fault(out, XN_DROP_L3);
	out->version = 4;
	out->protocol = ip[9];
	out->extended = header > IPV4_HDR;
	/* More fragments to come, or an offset. */
	out->fragment = load_be16(ip + 6) & 0x3fff;
	out->l4 = (u16)(out->l3 + header);
	out->end = out->l3 + total;
	return true;
}

static bool parse_ipv6(const u8 *p, u32 have, u32 len, struct packet *out)
{
	const u8 *ip = p + out->l3;
	u32 at = out->l3 + IPV6_HDR;

	if (at > have)
		return fault(out, XN_DROP_L3);
	u32 payload = load_be16(ip + 4);

	if (ip[0] >> 4 != 6 || payload > len - at)
		return fault(out, XN_DROP_L3);
	out->version = 6;
	out->protocol = ip[6];
	out->end = at + payload;
	for (u32 n = 0;; n++) {
		u32 size;

		if (out->protocol != IPPROTO_HOPOPTS && out->protocol != IPPROTO_ROUTING &&
		    out->protocol != IPPROTO_DSTOPTS && out->protocol != IPPROTO_FRAGMENT)
			break;
		if (n == EXTENSIONS || at + 8 > have || at + 8 > out->end)
			return fault(out, XN_DROP_IPV6_EXT);
		size = 8;
		if (out->protocol == IPPROTO_FRAGMENT)
			/* Alone in its packet ("atomic"), it is one all the same: what follows is nobody's to cut again. */
			out->fragment = true;
		else
			size += p[at + 1] * 8u;
		if (at + size > have || at + size > out->end)
			return fault(out, XN_DROP_IPV6_EXT);
		out->protocol = p[at];
		out->extended = true;
		at += size;
		if (out->fragment)
			break;
	}
	out->l4 = (u16)at;
	return true;
}

static bool parse_transport(const u8 *p, u32 have, struct packet *out)
{
	u32 end = min_u32(have, out->end), size;

	out->payload = out->l4;
	if (out->fragment)
		return true;
	if (out->protocol == IPPROTO_TCP) {
		if (out->l4 + (u32)TCP_HDR > end)
			return fault(out, XN_DROP_L4);
		size = (p[out->l4 + 12] >> 4) * 4u;
		if (size < TCP_HDR || out->l4 + size > end)
			return fault(out, XN_DROP_L4);
		out->payload = (u16)(out->l4 + size);
	} else if (out->protocol == IPPROTO_UDP) {
		if (out->l4 + (u32)UDP_HDR > end)
			return fault(out, XN_DROP_L4);
		size = load_be16(p + out->l4 + 4);
		if (size < UDP_HDR || size > out->end - out->l4)
			return fault(out, XN_DROP_L4);
		out->payload = (u16)(out->l4 + UDP_HDR);
	}
	return true;
}

bool packet_parse_at(const u8 *p, u32 have, u32 len, u16 type, u32 l3, struct packet *out)
{
	*out = (struct packet){.type = type, .l3 = (u16)l3};
	if (type != ETH_P_IP && type != ETH_P_IPV6)
		return fault(out, XN_DROP_L3);
	return (type == ETH_P_IP ? parse_ipv4(p, have, len, out) : parse_ipv6(p, have, len, out)) &&
	       parse_transport(p, have, out);
}

bool packet_parse(const u8 *p, u32 have, u32 len, struct packet *out)
{
	u32 at = ETH_HLEN;
	u16 type;

	*out = (struct packet){.l3 = ETH_HLEN};
	have = min_u32(min_u32(have, len), PACKET_HEADERS);
	if (have < ETH_HLEN)
		return fault(out, XN_DROP_RUNT);
	type = load_be16(p + 12);
	for (u32 tags = 0; type == ETH_P_8021Q || type == ETH_P_8021AD; tags++) {
		if (tags == PACKET_TAGS || at + VLAN_HDR > have)
			return fault(out, XN_DROP_VLAN);
		type = load_be16(p + at + 2);
		at += VLAN_HDR;
		out->l3 = (u16)at;
	}
	return packet_parse_at(p, have, len, type, at, out);
}

static bool is_tag(u16 type)
{
	return type == ETH_P_8021Q || type == ETH_P_8021AD;
}

u32 packet_flow(const u8 *p, u32 have)
{
	u32 at = 2 * ETH_ALEN, l4 = have, ports = 0;
	u64 words[4] = {0}, flow = 0;
	u8 protocol = 0;

	for (u32 tags = 0; tags < PACKET_TAGS && is_tag(load_be16(p + at)) && at + VLAN_HDR + 2 <= have; tags++)
		at += VLAN_HDR;
	const u16 type = load_be16(p + at);

	at += 2;
	if (type == ETH_P_IP && at + IPV4_HDR <= have) {
		memcpy(words, p + at + 12, 8);
		/* More of them, or an offset: a fragment. */
		protocol = load_be16(p + at + 6) & 0x3fff ? 0 : p[at + 9];
		l4 = at + (p[at] & 0xfu) * 4;
	} else if (type == ETH_P_IPV6 && at + IPV6_HDR <= have) {
		memcpy(words, p + at + 8, 32);
		protocol = p[at + 6];
		l4 = at + IPV6_HDR;
	} else {
		memcpy(words, p, 2 * ETH_ALEN);
	}
	if ((protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP) && l4 + 4 <= have)
		memcpy(&ports, p + l4, sizeof(ports));
	for (u32 i = 0; i < ARRAY_LEN(words); i++) {
		flow = (flow ^ words[i]) * 0x9e3779b97f4a7c15;
		flow ^= flow >> 32;
	}
	flow = (flow ^ ports) * 0x9e3779b97f4a7c15;
	return (u32)(flow >> 32);
}
