#include "guard.h"

#include <linux/if_arp.h>
#include <netinet/in.h>

#include "packet.h"

enum { ARP_LEN = 28, ARP_OP = 6, ARP_SENDER = 8, ARP_SENDER_IP = 14, ARP_TARGET_IP = 24 };
enum { IPV4_FRAGMENT = 6, IPV4_SRC = 12, IPV6_SRC = 8, ND_TARGET = 8, IPV4_LEN = 4, IPV6_LEN = 16, ICMP6_CSUM = 2 };
enum { MLD_REPORT = 131, MLD_DONE, ND_ROUTER_SOLICITATION, ND_ROUTER_ADVERTISEMENT, ND_SOLICITATION, ND_ADVERTISEMENT };
enum { ND_REDIRECTION = 137, MLD2_REPORT = 143 };
enum { UDP_PORTS = 4, DHCP_SERVER = 67, DHCP_CLIENT = 68, DHCP6_CLIENT = 546, DHCP6_SERVER = 547 };

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

static void claims(struct xn_ip *claimed, u8 version, const u8 *ip)
{
	claimed->version = version;
	memcpy(claimed->ip, ip, version == 4 ? IPV4_LEN : IPV6_LEN);
}

/* Who asks for an address as nobody means to take it: whoever has it, or is about to, gives it up (RFC 5227, 2.1). */
static bool arp_is_own(const struct guard *g, const struct view *v, const u8 *arp, u32 have, struct xn_ip *claimed)
{
	static const u8 ethernet_and_ipv4[6] = {0, ARPHRD_ETHER, ETH_P_IP >> 8, 0, ETH_ALEN, IPV4_LEN};

	if (have < ARP_LEN || v->needs || memcmp(arp, ethernet_and_ipv4, sizeof(ethernet_and_ipv4)) ||
	    memcmp(arp + ARP_SENDER, v->head + ETH_ALEN, ETH_ALEN))
		return false;
	u16 op = load_be16(arp + ARP_OP);
	bool is_probe = op == ARPOP_REQUEST && !memcmp(arp + ARP_SENDER_IP, zeroes, IPV4_LEN);

	claims(claimed, 4, arp + (is_probe ? ARP_TARGET_IP : ARP_SENDER_IP));
	return (op == ARPOP_REQUEST || op == ARPOP_REPLY) && is_given(g, 4, claimed->ip);
}

/* What a station may say that has no address yet (RFC 4862, 5.4.2; RFC 3590); a probe as in ARP. */
static bool icmp6_is_nobodys(u8 type)
{
	return type == MLD_REPORT || type == MLD_DONE || type == MLD2_REPORT || type == ND_ROUTER_SOLICITATION ||
	       type == ND_SOLICITATION;
}

static bool icmp6_is_own(const struct guard *g, const struct view *v, const u8 *p, u32 end, const struct packet *at,
			 bool nobody, struct xn_ip *claimed)
{
	/* Where there is nothing, nobody takes it for anything. */
	if (at->l4 == at->end)
		return !nobody;
	/* A checksum may not be made where the type is, nor the address. */
	if (at->l4 >= end || (v->needs && (v->vnet.csum_start != at->l4 || v->vnet.csum_offset != ICMP6_CSUM)))
		return false;
	u8 type = p[at->l4];

	if (type == ND_ROUTER_ADVERTISEMENT || type == ND_REDIRECTION || (nobody && !icmp6_is_nobodys(type)))
		return false;
	if (type != ND_ADVERTISEMENT && !(nobody && type == ND_SOLICITATION))
		return true;
	if (at->l4 + (u32)(ND_TARGET + IPV6_LEN) > end)
		return false;
	claims(claimed, 6, p + at->l4 + ND_TARGET);
	return is_own_ipv6(g, v, claimed->ip);
}

/* No guest is a server of DHCP, or its relay: clients look at the port that it is for, not at where it comes from. */
static bool udp_is_own(const struct view *v, const u8 *p, u32 end, const struct packet *at, bool nobody)
{
	if (at->l4 == at->end)
		return !nobody;
	/* A checksum may not be made where the ports are. */
	if (at->l4 + (u32)UDP_PORTS > end ||
	    (v->needs && v->vnet.csum_start + v->vnet.csum_offset < at->l4 + (u32)UDP_PORTS))
		return false;
	u16 from = load_be16(p + at->l4), to = load_be16(p + at->l4 + 2);

	if (at->version == 6)
		return !nobody && from != DHCP6_SERVER && to != DHCP6_CLIENT;
	return nobody ? from == DHCP_CLIENT && to == DHCP_SERVER : from != DHCP_SERVER && to != DHCP_CLIENT;
}

/* Of a fragment, whether it has the first bytes of what is behind IP. */
static bool is_first(const u8 *p, const struct packet *at)
{
	return at->version == 4 ? !(load_be16(p + at->l3 + IPV4_FRAGMENT) & 0x1fff)
				: !(load_be16(p + at->l4 - IPV6_FRAGMENT_HDR + 2) & 0xfff8);
}

/* Behind a fragment header the parser does not look; what is no extension is seen there (RFC 7112 wants it so). */
static bool is_hidden(const struct packet *at)
{
	return at->version == 6 && (at->protocol == IPPROTO_HOPOPTS || at->protocol == IPPROTO_ROUTING ||
				    at->protocol == IPPROTO_DSTOPTS || at->protocol == IPPROTO_FRAGMENT);
}

bool guard_allows(const struct guard *g, const struct view *v, const u8 *p, u32 have, struct xn_ip *claimed)
{
	struct packet at;
	bool parsed = packet_parse(p, have, v->len, &at);
	const u8 *l3 = p + at.l3;

	claimed->version = 0;
	if (at.type == ETH_P_ARP)
		return arp_is_own(g, v, l3, have - at.l3, claimed);
	/* IP may be in anything else: SNAP, MPLS, PPPoE, more tags or other ones than we look behind, what is yet to come. */
	if (at.type != ETH_P_IP && at.type != ETH_P_IPV6)
		return false;
	if (at.fault == XN_DROP_L3 || at.fault == XN_DROP_IPV6_EXT)
		return false;
	if (v->needs && (!parsed || v->vnet.csum_start < at.l4))
		return false;
	const u8 *source = l3 + (at.version == 4 ? IPV4_SRC : IPV6_SRC);
	bool nobody = !memcmp(source, zeroes, at.version == 4 ? IPV4_LEN : IPV6_LEN);
	u32 end = min_u32(min_u32(have, at.end), PACKET_HEADERS);

	claims(claimed, at.version, source);
	if (nobody ? at.fragment : at.version == 4 ? !is_given(g, 4, source) : !is_own_ipv6(g, v, source))
		return false;
	/* What the first fragment says, the others cannot say otherwise. */
	if (at.fragment && !is_first(p, &at))
		return true;
	if (at.fragment && is_hidden(&at))
		return false;
	if (at.protocol == IPPROTO_UDP)
		return udp_is_own(v, p, end, &at, nobody);
	if (at.version == 6 && at.protocol == IPPROTO_ICMPV6)
		return icmp6_is_own(g, v, p, end, &at, nobody, claimed);
	return !nobody;
}
