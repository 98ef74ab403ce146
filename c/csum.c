#include "csum.h"

#include <arpa/inet.h>
#include <linux/if_ether.h>
#include <netinet/in.h>

enum { VXLAN_PORT = 4789, VXLAN_HDR = 8, UDP_HDR = 8, TCP_HDR = 20, IPV4_HDR = 20, IPV6_HDR = 40, VLAN_HDR = 4 };

static u16 load16(const u8 *p)
{
	u16 v;

	memcpy(&v, p, sizeof(v));
	return v;
}

/* Sum of the bytes as 16-bit words in memory order, unfolded; odd lengths are padded with a zero. */
static u64 sum_bytes(const u8 *p, u32 len)
{
	u64 sum = 0;

	for (; len >= 32; len -= 32, p += 32) {
		u32 w[8];

		memcpy(w, p, sizeof(w));
		sum += (u64)w[0] + w[1] + w[2] + w[3] + ((u64)w[4] + w[5] + w[6] + w[7]);
	}
	for (; len >= 2; len -= 2, p += 2)
		sum += load16(p);
	if (len) {
		const u8 last[2] = {*p, 0};

		sum += load16(last);
	}
	return sum;
}

static u16 fold(u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (u16)sum;
}

static bool complete(u8 *frame, u32 len, u32 depth)
{
	u32 at = ETH_HLEN;
	u16 type;

	if (len < ETH_HLEN + IPV4_HDR)
		return false;
	type = ntohs(load16(frame + 12));
	for (u32 tags = 0; tags < 2 && (type == ETH_P_8021Q || type == ETH_P_8021AD); tags++) {
		at += VLAN_HDR;
		if (at + IPV4_HDR > len)
			return false;
		type = ntohs(load16(frame + at - 2));
	}

	u8 *ip = frame + at;
	u8 proto;
	u32 l4_len;
	u64 pseudo;

	if (type == ETH_P_IP) {
		u32 ihl = (ip[0] & 0xf) * 4u, total = ntohs(load16(ip + 2));

		/* Fragments have no checksum of their own: MF or an offset. */
		if (ip[0] >> 4 != 4 || ihl < IPV4_HDR || total < ihl || total > len - at ||
		    ntohs(load16(ip + 6)) & 0x3fff)
			return false;
		proto = ip[9];
		l4_len = total - ihl;
		pseudo = sum_bytes(ip + 12, 8);
		at += ihl;
	} else if (type == ETH_P_IPV6) {
		u32 payload;

		if (len - at < IPV6_HDR)
			return false;
		payload = ntohs(load16(ip + 4));
		if (ip[0] >> 4 != 6 || payload > len - at - IPV6_HDR)
			return false;
		proto = ip[6];
		l4_len = payload;
		pseudo = sum_bytes(ip + 8, 32);
		at += IPV6_HDR;
	} else {
		return false;
	}

	u8 *l4 = frame + at, *field;

	if (proto == IPPROTO_TCP && l4_len >= TCP_HDR)
		field = l4 + 16;
	else if (proto == IPPROTO_UDP && l4_len >= UDP_HDR)
		field = l4 + 6;
	else
		return false;

	/* The outer checksum of a tunnel was made for a completed inner one, so the inner comes first. */
	bool done = false;

	if (proto == IPPROTO_UDP && !depth && ntohs(load16(l4 + 2)) == VXLAN_PORT && l4_len > UDP_HDR + VXLAN_HDR)
		done = complete(l4 + UDP_HDR + VXLAN_HDR, l4_len - UDP_HDR - VXLAN_HDR, 1);
	u16 found = load16(field);

	/* Zero is "no checksum" in UDP. */
	if ((!found && proto == IPPROTO_UDP) || found != fold(pseudo + htons((u16)l4_len) + htons(proto)))
		return done;
	/* The field still holds the pseudo header's sum: the sum over the segment includes it. */
	u16 sum = (u16)~fold(sum_bytes(l4, l4_len));

	if (!sum && proto == IPPROTO_UDP)
		sum = 0xffff;
	memcpy(field, &sum, sizeof(sum));
	return true;
}

bool csum_complete_partial(u8 *frame, u32 len)
{
	return complete(frame, len, 0);
}
