#include "guard.h"

#include <linux/if_arp.h>
#include <netinet/in.h>

#include "packet.h"

enum { ARP_LEN = 28, IPV4_SRC = 12, IPV6_SRC = 8, ND_TARGET = 8, IPV4_LEN = 4, IPV6_LEN = 16, ICMP6_CSUM = 2 };
enum { ND_ROUTER_ADVERTISEMENT = 134, ND_ADVERTISEMENT = 136, ND_REDIRECTION = 137 };

static const u8 zeroes[IPV6_LEN];

static bool is_given(const struct guard *g, u8 version, const u8 *ip)
{
	for (u32 i = 0; i < g->n; i++)
		if (g->ips[i].version == version && !memcmp(g->ips[i].ip, ip, version == 4 ? IPV4_LEN : IPV6_LEN))
			return true;
	return false;
}

/* The link-local address that everybody has who has this MAC (RFC 4291, appendix A), or one that was given. */
static bool is_own_ipv6(const struct guard *g, const struct view *v, const u8 *ip)
{
	const u8 *mac = v->head + ETH_ALEN;
	const u8 own[IPV6_LEN] = {0xfe,	      0x80,   0,      0,    0,	  0,	  0,	  0,
				  mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]};

	return !memcmp(own, ip, IPV6_LEN) || is_given(g, 6, ip);
}

/* Of whoever asks, zero is nobody's: probes for an address, DHCP. */
static bool arp_is_own(const struct guard *g, const struct view *v, const u8 *arp, u32 have)
{
	static const u8 ethernet_and_ipv4[6] = {0, ARPHRD_ETHER, ETH_P_IP >> 8, 0, ETH_ALEN, IPV4_LEN};

	if (have < ARP_LEN || v->needs || memcmp(arp, ethernet_and_ipv4, sizeof(ethernet_and_ipv4)) ||
	    memcmp(arp + 8, v->head + ETH_ALEN, ETH_ALEN))
		return false;
	return !memcmp(arp + 14, zeroes, IPV4_LEN) || is_given(g, 4, arp + 14);
}

static bool icmp6_is_own(const struct guard *g, const struct view *v, const u8 *p, u32 have, const struct packet *at)
{
	u32 end = min_u32(have, at->end);

	/* Where there is nothing, nobody takes it for anything. Of fragments nobody takes these messages (RFC 6980). */
	if (at->l4 == at->end || at->fragment)
		return true;
	if (at->l4 >= end || p[at->l4] == ND_ROUTER_ADVERTISEMENT || p[at->l4] == ND_REDIRECTION)
		return false;
	if (p[at->l4] != ND_ADVERTISEMENT)
		return true;
	/* A checksum may not be made where the address is. */
	if (v->needs && (v->vnet.csum_start != at->l4 || v->vnet.csum_offset != ICMP6_CSUM))
		return false;
	return at->l4 + (u32)(ND_TARGET + IPV6_LEN) <= end && is_own_ipv6(g, v, p + at->l4 + ND_TARGET);
}

bool guard_allows(const struct guard *g, const struct view *v, const u8 *p, u32 have)
{
	struct packet at;
	bool parsed = packet_parse(p, have, v->len, &at);
	const u8 *l3 = p + at.l3;

	/* What is behind more tags than we look behind is not seen; nor what is behind broken extension headers. */
	if (at.fault == XN_DROP_VLAN || at.fault == XN_DROP_IPV6_EXT)
		return false;
	if (at.type == ETH_P_ARP || at.type == ETH_P_RARP)
		return arp_is_own(g, v, l3, have - at.l3);
	if (at.type != ETH_P_IP && at.type != ETH_P_IPV6)
		return true;
	if (at.fault == XN_DROP_L3 || (v->needs && (!parsed || v->vnet.csum_start < at.l4)))
		return false;
	if (at.version == 4)
		return !memcmp(l3 + IPV4_SRC, zeroes, IPV4_LEN) || is_given(g, 4, l3 + IPV4_SRC);
	if (memcmp(l3 + IPV6_SRC, zeroes, IPV6_LEN) && !is_own_ipv6(g, v, l3 + IPV6_SRC))
		return false;
	return at.protocol != IPPROTO_ICMPV6 || icmp6_is_own(g, v, p, have, &at);
}
